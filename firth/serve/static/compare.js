// Two models side by side on one text.

import { write } from "./api.js";
import { alert, area, el, fail, field, select, show } from "./dom.js";
import { runButton, samplingSettings } from "./settings.js";

export function compareView(models) {
  const able = models.filter((model) => !model.views.chat || !model.views.complete);
  const text = area({ rows: 4, placeholder: "A message or the beginning of a text" });
  const sampling = samplingSettings();
  const runner = runButton("Write with both", run);
  const sides = [0, 1].map((i) => side(able, i));

  function side(choices, i) {
    const chosen = select(choices.map((model) => model.name));
    chosen.selectedIndex = Math.min(i, choices.length - 1);
    const output = el("p", { class: "text", "aria-live": "polite" });
    const note = el("p", { class: "note" });
    const problem = alert();
    const name = i ? "Second model" : "First model";
    const node = el("section", { class: "side", "aria-label": name }, field(name, chosen), output, note, problem);
    return { chosen, output, note, problem, node };
  }

  async function run(signal) {
    const body = sampling.read();
    if (!body) return;
    await Promise.all(sides.map((one) => writeOne(one, body, signal)));
  }

  async function writeOne({ chosen, output, note, problem }, body, signal) {
    const model = able.find((one) => one.name === chosen.value);
    const chat = !model.views.chat;
    const input = chat ? { messages: [{ role: "user", content: text.value }] } : { prompt: text.value };
    fail(problem, null);
    show(output);
    output.setAttribute("aria-busy", "true");
    note.textContent = chat ? "as a chat" : model.answers ? "as an answer" : "as a continuation";
    const start = performance.now();
    try {
      const receive = (piece) => output.append(piece);
      const finish = await write({ chat, body: { model: model.name, ...input, ...body }, signal, receive });
      const ends = { length: ", cut at the limit of new tokens", stopped: ", stopped" }[finish] ?? "";
      note.textContent += `, ${((performance.now() - start) / 1000).toFixed(1)} s${ends}`;
    } catch (error) {
      fail(problem, error);
    } finally {
      output.removeAttribute("aria-busy");
    }
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const form = el("form", { onsubmit: submit }, field("Text", text), sampling.node, el("div", { class: "row" }, runner.button));
  return { node: el("div", {}, form, el("div", { class: "sides" }, sides.map((one) => one.node))), stop: runner.stop };
}
