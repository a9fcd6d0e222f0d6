// Attention weights of a text by layer and head: an overview, one matrix, and the weights of one token in the text itself.

import { post, stopped } from "./api.js";
import { alert, area, el, fail, field, percent, roving, select, show } from "./dom.js";
import { runButton } from "./settings.js";

const KINDS = {
  self: "Self-attention",
  encoder: "Encoder: text over text",
  decoder: "Decoder: answer over answer",
  cross: "Cross: answer over text",
};
const MEAN = -1;

export function attentionView(model) {
  const text = area({ rows: 3, placeholder: "A sentence" });
  const answer = area({ rows: 2, placeholder: "Empty: the model writes it" });
  const problem = alert();
  const out = el("section", { "aria-label": "Attention" });
  const runner = runButton("Show attention", run);

  async function run(signal) {
    fail(problem, null);
    try {
      const body = { model: model.name, text: text.value, encoding_format: "base64" };
      if (model.answers && answer.value) body.answer = answer.value;
      const found = await post("/attention", body, signal);
      draw(found.maps.map((one) => ({ ...one, weights: decode(one.weights) })));
    } catch (error) {
      if (!stopped(error)) fail(problem, error);
    }
  }

  function draw(maps) {
    const kind = select(maps.map((map, i) => [i, KINDS[map.kind]]));
    kind.value = maps.length - 1; // cross-attention, where there is any
    const body = el("div", {});
    const open = () => show(body, mapView(maps[kind.value]));
    kind.addEventListener("change", open);
    open();
    show(out, maps.length > 1 ? field("Kind", kind) : null, body);
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const second = model.answers ? field("Answer", answer, "What the decoder reads.") : null;
  const form = el("form", { onsubmit: submit }, field("Text", text), second, el("div", { class: "row" }, runner.button));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}

/** Return float32 numbers from their bytes in base64. */
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** Return the view of one kind of attention: choose a layer and a head, then a token. */
function mapView(map) {
  const [layers, heads, rows, columns] = map.shape;
  const layer = select([...Array(layers).keys()].map((i) => [i, `Layer ${i + 1}`]));
  const head = select([[MEAN, "Mean of all heads"], ...[...Array(heads).keys()].map((i) => [i, `Head ${i + 1}`])]);
  layer.value = layers - 1;
  const matrix = el("canvas", { role: "img" });
  const holder = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Matrix of weights" });
  const tokens = el("div", { class: "tokens", role: "group", "aria-label": "Choose the token that attends; arrow keys move" });
  const keys = el("p", { class: "tokens keys" });
  const strongest = el("p", { class: "note", "aria-live": "polite" });
  const strongestCell = el("p", { class: "note" });
  const thumbs = el("div", { class: "thumbs" });
  thumbs.style.setProperty("--columns", heads);
  let chosen = rows - 1;

  /** Return the weight of a key for a query in the chosen layer and head. */
  function weight(query, key, l = Number(layer.value), h = Number(head.value)) {
    if (h !== MEAN) return map.weights[((l * heads + h) * rows + query) * columns + key];
    let sum = 0;
    for (let i = 0; i < heads; i += 1) sum += map.weights[((l * heads + i) * rows + query) * columns + key];
    return sum / heads;
  }

  /** Return the largest weight of a layer and head, which is drawn in the full color. */
  function largest(l, h) {
    let most = 0;
    for (let query = 0; query < rows; query += 1) for (let key = 0; key < columns; key += 1) most = Math.max(most, weight(query, key, l, h));
    return most || 1;
  }

  const items = map.queries.map((piece) => el("button", { type: "button", class: "token plain" }, piece));
  show(tokens, items);
  const pick = roving(tokens, items, (i) => {
    chosen = i;
    drawToken();
    drawMatrix();
  });

  function drawToken() {
    const weights = map.keys.map((_, key) => weight(chosen, key));
    const most = Math.max(...weights);
    show(keys, map.keys.map((piece, key) => {
      const node = el("span", { class: "token key-token", title: percent(weights[key]) }, piece);
      node.style.setProperty("--share", most ? weights[key] / most : 0);
      return node;
    }));
    const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, 4);
    strongest.textContent = `“${map.queries[chosen]}” attends to ${order.map((i) => `“${map.keys[i]}” ${percent(weights[i])}`).join(", ")}.`;
  }

  function drawMatrix() {
    const cell = Math.max(14, Math.min(30, Math.floor(620 / columns)));
    const label = 84;
    const width = label + columns * cell;
    const height = label + rows * cell;
    const scale = window.devicePixelRatio || 1;
    matrix.width = width * scale;
    matrix.height = height * scale;
    matrix.style.width = `${width}px`;
    matrix.style.height = `${height}px`;
    const most = largest();
    strongestCell.textContent = `A row attends to the columns. The strongest cell is ${percent(most)}.`;
    const style = getComputedStyle(document.documentElement);
    const pen = matrix.getContext("2d");
    pen.scale(scale, scale);
    pen.font = `12px ${style.getPropertyValue("--sans")}`;
    pen.textBaseline = "middle";
    for (let query = 0; query < rows; query += 1) {
      const y = label + query * cell;
      pen.fillStyle = style.getPropertyValue(query === chosen ? "--c1" : "--ink");
      pen.textAlign = "right";
      pen.fillText(cut(map.queries[query]), label - 6, y + cell / 2, label - 8);
      pen.fillStyle = style.getPropertyValue("--c0");
      for (let key = 0; key < columns; key += 1) {
        pen.globalAlpha = weight(query, key) / most;
        pen.fillRect(label + key * cell, y, cell - 1, cell - 1);
      }
      pen.globalAlpha = 1;
    }
    pen.fillStyle = style.getPropertyValue("--ink");
    pen.textAlign = "left";
    for (let key = 0; key < columns; key += 1) {
      pen.save();
      pen.translate(label + key * cell + cell / 2, label - 6);
      pen.rotate(-Math.PI / 2);
      pen.fillText(cut(map.keys[key]), 0, 0, label - 8);
      pen.restore();
    }
    pen.strokeStyle = style.getPropertyValue("--c1");
    pen.strokeRect(label - 0.5, label + chosen * cell - 0.5, columns * cell, cell);
    matrix.setAttribute("aria-label", `Weights of ${rows} tokens over ${columns}; the text above gives those of the chosen token`);
    matrix.onclick = (event) => {
      const at = Math.floor((event.offsetY - label) / cell);
      if (at >= 0 && at < rows) pick(at, false);
    };
  }

  /** Draw a small matrix of each layer and head; a click opens it. */
  function drawThumbs() {
    const style = getComputedStyle(document.documentElement);
    show(thumbs, [...Array(layers * heads).keys()].map((at) => {
      const [l, h] = [Math.floor(at / heads), at % heads];
      const small = el("canvas", { width: columns, height: rows });
      const pen = small.getContext("2d");
      const most = largest(l, h);
      pen.fillStyle = style.getPropertyValue("--c0");
      for (let query = 0; query < rows; query += 1) {
        for (let key = 0; key < columns; key += 1) {
          pen.globalAlpha = weight(query, key, l, h) / most;
          pen.fillRect(key, query, 1, 1);
        }
      }
      const open = () => {
        layer.value = l;
        head.value = h;
        redraw();
      };
      return el("button", { type: "button", class: "thumb", "aria-label": `Layer ${l + 1}, head ${h + 1}`, title: `Layer ${l + 1}, head ${h + 1}`, onclick: open }, small);
    }));
  }

  function redraw() {
    drawMatrix();
    drawToken();
  }

  for (const control of [layer, head]) control.addEventListener("change", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    drawThumbs();
    redraw();
  });
  holder.append(matrix);
  drawThumbs();
  pick(chosen, false);
  return [
    el("div", { class: "row controls" }, field("Layer", layer), field("Head", head)),
    el("h3", {}, "One token"),
    tokens,
    keys,
    strongest,
    el("h3", {}, "All tokens"),
    strongestCell,
    holder,
    el("h3", {}, "All layers and heads"),
    el("p", { class: "note" }, "A row is a layer, a column a head."),
    thumbs,
  ];
}

function cut(piece) {
  return piece.length > 12 ? `${piece.slice(0, 11)}…` : piece;
}
