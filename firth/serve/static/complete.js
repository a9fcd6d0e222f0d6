// A text that a decoder continues, or that an encoder-decoder answers.

import { write } from "./api.js";
import { alert, area, el, fail, field, show } from "./dom.js";
import { runButton, samplingSettings } from "./settings.js";

export function completeView(model) {
  const text = area({ rows: 5, placeholder: model.answers ? "A text to answer" : "The beginning of a text" });
  const sampling = samplingSettings();
  const problem = alert();
  const prompt = el("span", {});
  const written = el("span", { class: "written", "aria-live": "polite" });
  const note = el("p", { class: "note" });
  const out = el("section", { class: "output", "aria-label": "What the model wrote", hidden: true }, el("p", { class: "text" }, prompt, written), note);
  const runner = runButton(model.answers ? "Answer" : "Continue", run);
  const take = el("button", { type: "button", hidden: true, onclick: keep }, "Keep and go on");

  async function run(signal) {
    const body = sampling.read();
    if (!body) return;
    fail(problem, null);
    take.hidden = true;
    out.hidden = false;
    show(written);
    note.textContent = "";
    prompt.textContent = model.answers ? "" : text.value;
    written.setAttribute("aria-busy", "true");
    try {
      const receive = (piece) => written.append(piece);
      const finish = await write({ chat: false, body: { model: model.name, prompt: text.value, ...body }, signal, receive });
      note.textContent = { stop: "The model ended the text.", length: "The limit of new tokens is reached.", stopped: "Stopped." }[finish] ?? "";
      take.hidden = model.answers || !written.textContent;
    } catch (error) {
      fail(problem, error);
    } finally {
      written.removeAttribute("aria-busy");
    }
  }

  function keep() {
    text.value += written.textContent;
    text.fit();
    return runner.start();
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const form = el("form", { onsubmit: submit }, field("Text", text), sampling.node, el("div", { class: "row" }, runner.button, take));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}
