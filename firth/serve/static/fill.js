// Fill the gaps of a text: candidates for each gap, and the text with the chosen ones.

import { post, stopped } from "./api.js";
import { alert, area, el, fail, field, percent, roving, show } from "./dom.js";
import { runButton } from "./settings.js";

const MASK = "<mask>";

export function fillView(model) {
  const text = area({ rows: 3, placeholder: `The ${MASK} sat on the mat.` });
  const top = el("input", { type: "number", min: 1, max: 50, value: 8, inputmode: "numeric" });
  const problem = alert();
  const out = el("section", { "aria-label": "Filled text" });
  const runner = runButton("Fill", run);
  const insert = el("button", { type: "button", onclick: insertMask }, `Insert ${MASK}`);

  function insertMask() {
    text.setRangeText(MASK, text.selectionStart, text.selectionEnd, "end");
    text.focus();
    text.fit();
  }

  async function run(signal) {
    fail(problem, null);
    if (!top.reportValidity()) return;
    try {
      const found = await post("/fill", { model: model.name, text: text.value, top: Number(top.value) }, signal);
      if (found.text !== null && found.text !== undefined) show(out, el("h2", {}, "The text, written anew"), el("p", { class: "text" }, found.text));
      else draw(found.gaps);
    } catch (error) {
      if (!stopped(error)) fail(problem, error);
    }
  }

  /** Draw the candidates of each gap, of which one is chosen. */
  function draw(gaps) {
    // Where tokens begin with their space, the space before the gap is a part of the candidates.
    const spaced = gaps.map((gap) => gap.some((candidate) => candidate.text.startsWith(" ")));
    const pieces = text.value.split(MASK).map((piece, i) => (spaced[i] ? piece.replace(/ $/, "") : piece));
    const marks = gaps.map((gap) => el("mark", {}, gap[0]?.text ?? ""));
    const whole = el("p", { class: "text", "aria-live": "polite" });
    pieces.forEach((piece, i) => whole.append(piece, ...(i < marks.length && i < pieces.length - 1 ? [marks[i]] : [])));
    const lists = gaps.map((gap, i) => {
      const items = gap.map((candidate) => {
        const bar = el("span", { class: "bar", "aria-hidden": "true" });
        bar.style.setProperty("--share", candidate.probability);
        return el("button", { type: "button", class: "candidate" }, bar, el("span", { class: "piece" }, candidate.text || "(nothing)"), el("span", { class: "n" }, percent(candidate.probability)));
      });
      const list = el("div", { class: "candidates", role: "group", "aria-label": `Candidates for gap ${i + 1}` }, items.length ? items : "The model wrote nothing for this gap.");
      if (items.length) roving(list, items, (at) => show(marks[i], gap[at].text))(0, false);
      return el("div", { class: "gap" }, el("h3", {}, gaps.length > 1 ? `Gap ${i + 1}` : "Candidates"), list);
    });
    show(out, el("h2", {}, "Filled text"), whole, el("div", { class: "gaps" }, lists));
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const form = el("form", { onsubmit: submit }, field("Text", text, `Write ${MASK} where something is missing.`), field("Candidates", top), el("div", { class: "row" }, runner.button, insert));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}
