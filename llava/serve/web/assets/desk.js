// Of the whole page: drawers, keys, and files that the browser or the server doesn't take.
(() => {
  const find = (selector) => document.querySelector(selector);
  const isTyping = (target) => target.closest("input:not([type=range]), textarea, select, [contenteditable=true]");

  function openDrawer(name) {
    const before = document.body.dataset.drawer;
    document.body.dataset.drawer = name === before ? "" : name;
    for (const each of ["settings", "about", "files"]) {
      find(`#open-${each}`)?.setAttribute("aria-expanded", document.body.dataset.drawer === each);
    }
    if (document.body.dataset.drawer) { find(`#drawer-${name} :is(input, button)`)?.focus(); }
    else { find(`#open-${before}`)?.focus(); }
  }

  document.addEventListener("click", (event) => {
    const opener = event.target.closest("#open-settings, #open-about, #open-files");
    if (opener) { openDrawer(opener.id.slice(5)); return; }
    const isOutside = !event.target.closest(".drawer, .options, .wrap-inner");
    if (document.body.dataset.drawer && (isOutside || event.target.closest(".close"))) {
      openDrawer(document.body.dataset.drawer);
    }
  });

  function moveSlice(step) {
    const slider = find("#scan-place input[type=range]");
    if (!slider) { return false; }
    slider.value = Number(slider.value) + step;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    return true;
  }
  window.llavaMoveSlice = moveSlice;

  const KEYS = {
    ArrowLeft: "previous", ArrowRight: "next", "+": "larger", "=": "larger", "-": "smaller", "0": "fit", m: "compare",
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      if (document.body.dataset.drawer) { openDrawer(document.body.dataset.drawer); return; }
      find("#stop:not([disabled])")?.click();
      return;
    }
    const turns = event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight");
    if (event.ctrlKey || event.metaKey || (event.altKey && !turns)) { return; }
    if (!turns && (isTyping(event.target) || event.target.closest("[role=listbox], [role=log], input[type=range]"))) { return; }
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      if (moveSlice(event.key === "ArrowUp" ? -1 : 1)) { event.preventDefault(); }
      return;
    }
    const button = KEYS[event.key] && find(`#viewer [data-do=${KEYS[event.key]}]`);
    if (button) { event.preventDefault(); button.click(); }
  });

  // On a narrow page images and answers scroll together: a new answer comes into view, and stays there while it grows
  // unless the reader scrolls.
  let answers = 0;
  let follows = false;
  for (const moved of ["wheel", "touchmove"]) {
    document.addEventListener(moved, () => { follows = false; }, {passive: true});
  }
  new MutationObserver((changes) => {
    if (!changes.some(({target}) => (target.closest ? target : target.parentElement)?.closest("#chat0"))) { return; }
    const all = document.querySelectorAll("#chat0 [data-testid=bot]");
    if (all.length !== answers) { follows = all.length > answers; answers = all.length; }
    if (follows) { all[answers - 1].scrollIntoView({block: "nearest"}); }
  }).observe(document.documentElement, {childList: true, subtree: true, characterData: true});

  const refuse = (words) => { delete document.body.dataset.uploading; tell(words); };
  const tell = (words) => window.dispatchEvent(new CustomEvent("llava-refused", {detail: words.slice(0, 300)}));
  function checkSizes(files) {
    if (files?.length) { document.body.dataset.uploading = ""; }
    for (const file of files ?? []) {
      if (file.size > MOST_BYTES) { refuse(`${file.name}: larger than ${MOST_BYTES >> 20} MiB.`); }
    }
  }
  document.addEventListener("change", (event) => {
    if (event.target.matches("#box input[type=file]")) { checkSizes(event.target.files); }
  }, true);
  document.addEventListener("drop", (event) => checkSizes(event.dataTransfer?.files), true);
  document.addEventListener("paste", (event) => checkSizes(event.clipboardData?.files), true);
  const plainFetch = window.fetch;
  window.fetch = async (...request) => {
    const answer = await plainFetch(...request);
    const url = String(request[0]?.url ?? request[0]);
    if (url.includes("/gradio_api/upload?") || url.endsWith("/gradio_api/upload")) {
      if (!answer.ok) { answer.clone().text().then((text) => refuse(text || `The upload failed (${answer.status}).`)); }
    }
    return answer;
  };
})();
