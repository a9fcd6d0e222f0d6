// The sampling settings, which several views share.

import { area, el, field } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.05, value: 0.8 }, "0 takes the most likely token."],
  ["top_p", "Top-p", { min: 0.01, max: 1, step: 0.01, value: 1 }, "Most likely tokens up to this probability."],
  ["top_k", "Top-k", { min: 0, step: 1, value: 0 }, "0: all tokens."],
  ["min_p", "Min-p", { min: 0, max: 1, step: 0.01, value: 0 }, "Drop tokens below this share of the best one."],
  ["max_tokens", "Most new tokens", { min: 1, step: 1, value: 256 }, ""],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }, "The same seed gives the same text."],
];

/** Return the controls of sampling, folded, and a function that returns them as fields of a request. */
export function samplingSettings() {
  const inputs = {};
  const fields = NUMBERS.map(([name, label, limits, note]) => {
    inputs[name] = el("input", { type: "number", inputmode: "decimal", name, ...limits });
    return field(label, inputs[name], note);
  });
  const stops = area({ rows: 1, name: "stop", placeholder: "one a line" });
  fields.push(field("Stop at", stops, "Texts that end the answer, one a line."));
  const node = el("details", { class: "settings" }, el("summary", {}, "Sampling"), el("div", { class: "grid" }, fields));
  const read = () => {
    const found = {};
    for (const [name, input] of Object.entries(inputs)) {
      if (input.value === "") continue;
      if (!input.checkValidity()) {
        node.open = true;
        input.reportValidity();
        return null;
      }
      found[name] = Number(input.value);
    }
    const stop = stops.value.split("\n").filter((line) => line !== "");
    if (stop.length) found.stop = stop;
    return found;
  };
  return { node, read };
}

/** Return a button that starts a task and stops it. A task takes the signal by which it is stopped. */
export function runButton(label, run) {
  let controller = null;
  const button = el("button", { type: "submit", class: "primary" }, label);
  const stop = () => controller?.abort();
  const start = async (task = run) => {
    if (controller) {
      stop();
      return;
    }
    controller = new AbortController();
    button.textContent = "Stop";
    button.setAttribute("data-running", "");
    try {
      await task(controller.signal);
    } finally {
      controller = null;
      button.textContent = label;
      button.removeAttribute("data-running");
    }
  };
  return { button, start, stop, running: () => controller !== null };
}
