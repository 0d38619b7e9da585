// Of the component #viewer: zoom, shift, slices, what is clicked, and attention drawn over the image.
const state = {zoom: 1, x: 0, y: 0, wheel: 0};
const stage = () => element.querySelector(".stage");

function place() {
  element.style.setProperty("--zoom", state.zoom);
  element.style.setProperty("--x", `${state.x}px`);
  element.style.setProperty("--y", `${state.y}px`);
  element.dataset.zoom = state.zoom.toFixed(2);
}

// The point under the pointer stays where it is; without one, the middle. Images beside each other move alike.
function zoomTo(zoom, event) {
  const box = (event?.target.closest("figure") ?? element.querySelector("figure") ?? stage()).getBoundingClientRect();
  const x = (event ? event.clientX - box.left : box.width / 2) - box.width / 2;
  const y = (event ? event.clientY - box.top : box.height / 2) - box.height / 2;
  const next = Math.min(16, Math.max(1, zoom));
  state.x = next === 1 ? 0 : x - ((x - state.x) * next) / state.zoom;
  state.y = next === 1 ? 0 : y - ((y - state.y) * next) / state.zoom;
  state.zoom = next;
  place();
}

const actions = {
  smaller: () => zoomTo(state.zoom / 1.4),
  larger: () => zoomTo(state.zoom * 1.4),
  fit: () => zoomTo(1),
  previous: () => step(-1),
  next: () => step(1),
  compare: () => trigger("select", {index: 0, value: "compare"}),
};

function step(by) {
  const buttons = [...element.querySelectorAll("[data-image]")];
  const now = buttons.findIndex((button) => button.getAttribute("aria-pressed") === "true");
  buttons[now + by]?.click();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) { return; }
  if (button.dataset.do) { actions[button.dataset.do](); }
  if (button.dataset.image) { trigger("select", {index: Number(button.dataset.image), value: "show"}); }
  if (button.dataset.remove) { trigger("select", {index: Number(button.dataset.remove), value: "remove"}); }
});
element.addEventListener("dblclick", (event) => {
  // A captured pointer's events name the capturer.
  if (document.elementFromPoint(event.clientX, event.clientY)?.closest(".sheet, .maps")) { zoomTo(1); }
});
element.addEventListener("wheel", (event) => {
  if (!event.target.closest(".stage") || !element.querySelector("img.large")) { return; }
  event.preventDefault();
  if (event.ctrlKey || !document.querySelector("#scan-place")) {
    zoomTo(state.zoom * Math.exp(-event.deltaY / 400), event);
    return;
  }
  state.wheel += event.deltaY;
  const slices = Math.trunc(state.wheel / 40);
  if (slices) { state.wheel -= slices * 40; window.llavaMoveSlice(slices); }
}, {passive: false});

// One finger or the mouse moves, two fingers zoom.
const pointers = new Map();
element.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !event.target.closest(".sheet, .maps")) { return; }
  pointers.set(event.pointerId, event);
  if (state.zoom > 1 || pointers.size > 1) { element.setPointerCapture(event.pointerId); }
});
element.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) { return; }
  if (pointers.size === 2) {
    const [other] = [...pointers.values()].filter((each) => each.pointerId !== event.pointerId);
    const apart = (each) => Math.hypot(each.clientX - other.clientX, each.clientY - other.clientY) || 1;
    zoomTo((state.zoom * apart(event)) / apart(before), event);
  } else if (state.zoom > 1) {
    state.x += event.clientX - before.clientX;
    state.y += event.clientY - before.clientY;
    place();
  }
  pointers.set(event.pointerId, event);
});
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, (event) => pointers.delete(event.pointerId));
}
place();

// The slice that the slider stands at is asked for by its address; of those passed while one comes only the last. Words,
// and what goes with the question, follow once the slider rests, or before anything else is done.
const REST = 150; // ms
const passed = {wanted: null, told: null, resting: 0};

function showSlice() {
  const image = element.querySelector(".stage:not([data-slices='']) img.large");
  if (!image?.complete || passed.wanted === null) { return; }
  const url = stage().dataset.slices + passed.wanted;
  if (image.getAttribute("src") !== url) { image.src = url; }
  element.toggleAttribute("data-moving", url !== passed.told);
}

function settle() {
  if (!passed.resting) { return; }
  clearTimeout(passed.resting);
  passed.resting = 0;
  document.querySelector("#scan-place input[type=range]")?.dispatchEvent(new Event("pointerup", {bubbles: true}));
}

document.addEventListener("input", ({target}) => {
  if (!target.matches("#scan-place input") || !target.value || !target.validity.valid) { return; }
  passed.wanted = Number(target.value);
  clearTimeout(passed.resting);
  passed.resting = setTimeout(settle, REST);
  showSlice();
});
for (const end of ["load", "error"]) { element.addEventListener(end, showSlice, true); }
document.addEventListener("pointerdown", settle, true);
document.addEventListener("keydown", (event) => { if (!event.key?.startsWith("Arrow")) { settle(); } }, true);

watch("value", () => {
  passed.told = element.querySelector("img.large")?.getAttribute("src");
  if (!passed.resting) { passed.wanted = null; }
  element.removeAttribute("data-moving");
  showSlice();
});
