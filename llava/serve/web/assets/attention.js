// Of the component #viewer: for the token of the last answer that is pointed at, its attention over the large image.
const maps = {found: {}, chosen: null};
const RAMP = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const PICKED = "tok";

function colour(strength) {
  const place = strength * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((value, channel) => value + (RAMP[low + 1][channel] - value) * (place - low));
}

function lastAnswer(side) {
  return [...document.querySelectorAll(`#chat${side} [data-testid=bot]`)].pop();
}

// The texts of an answer in the order that they are read in, without those that stand directly in its Markdown's root.
function textsOf(answer) {
  const walker = document.createTreeWalker(answer, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    if (walker.currentNode.parentElement.closest("p, li, td, th, h1, h2, h3, h4, h5, h6, pre")) { texts.push(walker.currentNode); }
  }
  return texts;
}

// Each token's text is looked for after the one before it; marks of Markdown and HTML are in no text: passed over.
function wrap(side) {
  const answer = lastAnswer(side);
  const {tokens, shares} = maps.found[side];
  if (!answer || answer.querySelector(`.${PICKED}`)) { return; }
  let node, rest = textsOf(answer), at = 0;
  node = rest.shift();
  const most = Math.max(...shares) || 1;
  tokens.forEach((token, number) => {
    const said = token.replace(/<[^>]*>|[*_`#]/g, "").trim();
    if (!said) { return; }
    let ahead = node, from = at, queue = [...rest];
    while (ahead) {
      const found = ahead.data.indexOf(said, from);
      if (found >= 0 && (ahead !== node || found - at < 24)) {
        const part = ahead.splitText(found);
        const after = part.splitText(said.length);
        const mark = document.createElement("span");
        mark.className = PICKED;
        Object.assign(mark.dataset, {side, number});
        mark.tabIndex = 0;
        mark.setAttribute("role", "button");
        mark.style.setProperty("--share", shares[number] / most);
        part.replaceWith(mark);
        mark.append(part);
        [node, at, rest] = [after, 0, queue];
        return;
      }
      ahead = queue.shift();
      from = 0;
    }
  });
}

function draw(view, number) {
  const weights = Uint8Array.from(atob(view.weights), (letter) => letter.charCodeAt(0));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = view.side;
  const image = new ImageData(view.side, view.side);
  weights.subarray(number * view.side ** 2, (number + 1) * view.side ** 2).forEach((weight, place) => {
    const [red, green, blue] = colour(weight / 255);
    image.data.set([red, green, blue, weight * 0.8], place * 4);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function show(mark) {
  const {side, number} = mark.dataset;
  const {tokens, shares, brightest, views} = maps.found[side];
  const layer = element.querySelector(".maps");
  const pressed = element.querySelector("[data-image][aria-pressed=true]")?.dataset.image;
  const own = views.filter((view) => view.place === Number(pressed));
  layer.replaceChildren(...(own.length ? own : views).map((view) => {
    const figure = document.createElement("figure");
    const image = new Image();
    [image.src, image.alt, image.draggable] = [view.url, `Image ${view.number + 1} as the model saw it`, false];
    figure.append(image, draw(view, Number(number)));
    return figure;
  }));
  element.dataset.map = number;
  element.querySelector(".stage").classList.add("mapped");
  let line = element.querySelector(".looked");
  const percent = (value, digits) => `${(value * 100).toFixed(digits)}%`;
  line.textContent = views.length
    ? `Token ${Number(number) + 1} of ${tokens.length}, “${tokens[number].trim()}”: ${percent(shares[number], 1)} of its ` +
      `attention went to images; the brightest patch got ${percent(brightest[number], 2)}. Attention shows what was ` +
      "read, not why something was said."
    : "The model was given no image here.";
  for (const each of document.querySelectorAll(`.${PICKED}`)) { each.toggleAttribute("data-chosen", each === maps.chosen); }
}

function hide() {
  if (maps.chosen?.isConnected) { show(maps.chosen); return; }
  maps.chosen = null;
  element.querySelector(".maps")?.replaceChildren();
  element.querySelector(".stage")?.classList.remove("mapped");
  delete element.dataset.map;
  element.querySelector(".looked").textContent = Object.keys(maps.found).length
    ? "Point at a word of the last answer, or choose one: its attention shows here." : "";
}

const markOf = (event) => event.target instanceof Element && event.target.closest(`.${PICKED}`);
for (const [begin, end] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(begin, (event) => { if (markOf(event)) { show(markOf(event)); } });
  document.addEventListener(end, (event) => { if (markOf(event)) { hide(); } });
}
function choose(mark) {
  maps.chosen = maps.chosen === mark ? null : mark;
  for (const each of document.querySelectorAll(`.${PICKED}`)) { each.toggleAttribute("data-chosen", each === maps.chosen); }
}
document.addEventListener("click", (event) => { if (markOf(event)) { choose(markOf(event)); } });
document.addEventListener("keydown", (event) => {
  const mark = markOf(event);
  if (!mark) { return; }
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(mark); }
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by) {
    event.preventDefault();
    event.stopImmediatePropagation();
    const all = [...document.querySelectorAll(`.${PICKED}[data-side="${mark.dataset.side}"]`)];
    all[all.indexOf(mark) + by]?.focus();
  }
}, true);

watch("attention", () => {
  maps.found = props.attention ? JSON.parse(props.attention) : {};
  maps.chosen = null;
  for (const mark of document.querySelectorAll(`.${PICKED}`)) { mark.replaceWith(...mark.childNodes); }
  for (const side of Object.keys(maps.found)) { wrap(side); }
  hide();
});
// Another image, or the same one anew: the layer went with the HTML.
watch("value", hide);
