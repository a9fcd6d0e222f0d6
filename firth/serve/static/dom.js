// Elements of a page. Text is always set as text, so markup in what a model writes is shown and never run.

/** Return an element. Attributes whose names begin with "on" are listeners; true, false and null set or leave out an attribute. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  set(node, attributes);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Return an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, attributes);
  node.append(...children.flat());
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

/** Replace the children of a node. */
export function show(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

let labels = 0;

/** Return a labeled control: the label above it, and a note below it. */
export function field(label, control, note = "") {
  control.id ||= `control-${(labels += 1)}`;
  const hint = note ? el("p", { class: "note", id: `${control.id}-note` }, note) : null;
  if (hint) control.setAttribute("aria-describedby", hint.id);
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, hint);
}

/** Return a textarea that grows with its text. */
export function area(attributes = {}) {
  const node = el("textarea", { rows: 3, ...attributes });
  const fit = () => {
    node.style.height = "auto";
    node.style.height = `${Math.min(node.scrollHeight + 2, window.innerHeight * 0.6)}px`;
  };
  node.addEventListener("input", fit);
  requestAnimationFrame(fit);
  node.fit = fit;
  return node;
}

/** Return a list of options. */
export function select(options, attributes = {}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  return el("select", attributes, pairs.map(([value, text]) => el("option", { value }, text)));
}

/** Return a share of 1 in percent, with digits where it is small. */
export function percent(share) {
  if (share > 0 && share < 0.0001) return "<0.01%";
  return `${(100 * share).toFixed(share < 0.01 ? 2 : share < 0.1 ? 1 : 0)}%`;
}

/** Return a number with about four significant digits, thousands separated. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(1)}G`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (size >= 1000 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return size >= 0.001 || value === 0 ? Number(value.toPrecision(4)).toString() : value.toExponential(2);
}

/** Return seconds as "1 h 05 min". */
export function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Return a node for a sentence that appears where something failed; it is read aloud. */
export function alert() {
  return el("p", { class: "error", role: "alert", hidden: true });
}

/** Show an error in a node of `alert`, or hide the node. */
export function fail(node, error) {
  node.hidden = !error;
  node.textContent = error ? error.message ?? String(error) : "";
}

/** Return a set of choices of which one can be reached with Tab, and the others with the arrow keys. */
export function roving(container, items, choose) {
  const pick = (index, focus) => {
    items.forEach((item, i) => {
      item.tabIndex = i === index ? 0 : -1;
      item.setAttribute("aria-pressed", String(i === index));
    });
    if (focus) items[index].focus();
    choose(index);
  };
  items.forEach((item, i) => {
    item.tabIndex = i ? -1 : 0;
    item.setAttribute("aria-pressed", "false");
    item.addEventListener("click", () => pick(i, false));
  });
  container.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : at + step;
    if (at < 0 || Number.isNaN(next) || next < 0 || next >= items.length) return;
    event.preventDefault();
    pick(next, true);
  });
  return pick;
}
