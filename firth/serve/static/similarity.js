// Similarity of texts: the cosine of the embeddings of each two of them.

import { post, stopped } from "./api.js";
import { alert, area, el, fail, field, show } from "./dom.js";
import { runButton } from "./settings.js";

const MOST_TEXTS = 40;

export function similarityView(model) {
  const text = area({ rows: 6, placeholder: "One text a line" });
  const problem = alert();
  const out = el("section", { "aria-label": "Similarity" });
  const runner = runButton("Compare", run);

  async function run(signal) {
    fail(problem, null);
    const texts = text.value.split("\n").filter((line) => line.trim());
    if (texts.length < 2) return fail(problem, new Error("Write two texts or more, one a line."));
    if (texts.length > MOST_TEXTS) return fail(problem, new Error(`${texts.length} texts: at most ${MOST_TEXTS} are compared.`));
    try {
      const found = await post("/v1/embeddings", { model: model.name, input: texts }, signal);
      draw(texts, found.data.sort((a, b) => a.index - b.index).map((one) => one.embedding));
    } catch (error) {
      if (!stopped(error)) fail(problem, error);
    }
    return null;
  }

  function draw(texts, vectors) {
    const unit = vectors.map((vector) => {
      const size = Math.hypot(...vector) || 1;
      return vector.map((x) => x / size);
    });
    const cosine = unit.map((a) => unit.map((b) => a.reduce((sum, x, i) => sum + x * b[i], 0)));
    const others = cosine.flatMap((row, i) => row.filter((_, j) => j !== i));
    const [low, high] = [Math.min(...others), Math.max(...others)];
    const head = el("tr", {}, el("th", { scope: "col" }, "Text"), texts.map((_, i) => el("th", { scope: "col", class: "n" }, String(i + 1))));
    const rows = texts.map((name, i) => {
      const cells = cosine[i].map((value, j) => {
        const cell = el("td", { class: i === j ? "n same" : "n shade", title: `${i + 1} and ${j + 1}: ${value.toFixed(3)}` }, value.toFixed(2));
        if (i !== j) cell.style.setProperty("--share", high > low ? (value - low) / (high - low) : 0.5);
        return cell;
      });
      return el("tr", {}, el("th", { scope: "row" }, `${i + 1}. ${name}`), cells);
    });
    const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of similarities" }, el("table", { class: "similarity" }, el("thead", {}, head), el("tbody", {}, rows)));
    const pairs = cosine.flatMap((row, i) => row.map((value, j) => [value, i, j]).filter(([, , j]) => j > i)).sort((a, b) => b[0] - a[0]);
    const nearest = pairs.slice(0, 5).map(([value, i, j]) => el("li", {}, `${value.toFixed(2)}: “${texts[i]}” and “${texts[j]}”`));
    show(out, el("h2", {}, "Cosine similarity"), table, el("h3", {}, "Most similar"), el("ol", {}, nearest));
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const form = el("form", { onsubmit: submit }, field("Texts", text, "One text a line. A vector is the mean of the last hidden states."), el("div", { class: "row" }, runner.button));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}
