// Predictions of a task head: classes, numbers, choices, tags, answers, rewards.

import { post, stopped } from "./api.js";
import { alert, area, el, fail, field, number, percent, show } from "./dom.js";
import { runButton } from "./settings.js";

export function predictView(model) {
  const { route, inputs } = model.predict;
  const problem = alert();
  const out = el("section", { "aria-label": "Prediction", "aria-live": "polite" });
  const runner = runButton("Predict", run);
  const controls = inputs.map((input) => area({ rows: input.kind === "long" ? 5 : 2, name: input.field }));

  async function run(signal) {
    fail(problem, null);
    try {
      const record = {};
      inputs.forEach((input, i) => {
        const value = controls[i].value;
        record[input.field] = input.kind === "lines" ? lines(value) : input.kind === "words" ? value.split(/\s+/).filter(Boolean) : value;
      });
      const found = await post(`/${route}`, { model: model.name, records: [record] }, signal);
      show(out, el("h2", {}, "Prediction"), describe(found.rows[0], record));
    } catch (error) {
      if (!stopped(error)) fail(problem, error);
    }
  }

  function describe(row, record) {
    if ("reward" in row) return el("p", { class: "figure" }, number(row.reward));
    if (row.tags) return tagged(row);
    if ("answer" in row) return answered(row, record);
    if ("choice" in row) {
      const options = Object.values(record).find(Array.isArray) ?? [];
      return bars(row.probabilities.map((share, i) => [options[i] ?? `option ${i + 1}`, share]));
    }
    if (row.probabilities) return bars(Object.entries(row.probabilities));
    const value = row.value ?? row.score ?? row.label;
    return value === undefined ? el("p", { class: "note" }, "The text is empty.") : el("p", { class: "figure" }, typeof value === "number" ? number(value) : value);
  }

  function answered(row, record) {
    const passage = record.context ?? Object.values(record).at(-1);
    const note = el("p", { class: "note" }, `Probability ${percent(row.probability)}`);
    if (!row.answer) return [el("p", {}, "The model finds no answer in the passage."), note];
    if (!Number.isInteger(row.start)) return [el("p", { class: "figure" }, row.answer), note];
    const end = row.start + [...row.answer].length;
    const characters = [...passage];
    const text = el("p", { class: "text" }, characters.slice(0, row.start).join(""), el("mark", {}, row.answer), characters.slice(end).join(""));
    return [el("p", { class: "figure" }, row.answer), note, text];
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const form = el("form", { onsubmit: submit }, inputs.map((input, i) => field(input.label, controls[i], input.note ?? "")), el("div", { class: "row" }, runner.button));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}

function lines(text) {
  return text.split("\n").filter((line) => line.trim());
}

function bars(pairs) {
  const rows = [...pairs].sort((a, b) => b[1] - a[1]).map(([name, share]) => {
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", share);
    return el("tr", {}, el("td", {}, bar, el("span", { class: "piece" }, name)), el("td", { class: "n" }, percent(share)));
  });
  return el("table", { class: "bars" }, el("thead", {}, el("tr", {}, el("th", {}, "Class"), el("th", { class: "n" }, "Probability"))), el("tbody", {}, rows));
}

function tagged(row) {
  const words = row.tokens.map((word, i) => {
    const outside = row.tags[i] === "O";
    const title = `${percent(row.probabilities[i])}`;
    return el("span", { class: outside ? "word" : "word tagged" }, el("span", {}, word), el("span", { class: "tag" }, outside ? "" : row.tags[i], el("span", { class: "hidden" }, ` ${title}`)));
  });
  const named = row.tokens.map((word, i) => [word, row.tags[i], row.probabilities[i]]).filter(([, tag]) => tag !== "O");
  const table = named.length
    ? el("table", {}, el("thead", {}, el("tr", {}, ["Word", "Tag", "Probability"].map((name) => el("th", {}, name)))), el("tbody", {}, named.map(([word, tag, share]) => el("tr", {}, el("td", {}, word), el("td", {}, tag), el("td", { class: "n" }, percent(share))))))
    : el("p", { class: "note" }, "No word has a tag.");
  return [el("p", { class: "words" }, words), table];
}
