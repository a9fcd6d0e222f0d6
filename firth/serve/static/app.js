// The page of a server: one view at a time, chosen by the part of the address after "#".

import { attentionView } from "./attention.js";
import { get } from "./api.js";
import { boardView } from "./board.js";
import { chatView } from "./chat.js";
import { compareView } from "./compare.js";
import { completeView } from "./complete.js";
import { el, fail, alert, number, select, show } from "./dom.js";
import { fillView } from "./fill.js";
import { predictView } from "./predict.js";
import { similarityView } from "./similarity.js";
import { tokensView } from "./tokens.js";

const VIEWS = {
  chat: ["Chat", chatView],
  complete: ["Write", completeView],
  fill: ["Fill in", fillView],
  tokens: ["Tokens", tokensView],
  predict: ["Predict", predictView],
  attention: ["Attention", attentionView],
  similarity: ["Similarity", similarityView],
};

const main = document.querySelector("main");
const nav = document.querySelector("nav");
const head = document.querySelector("#model");
const problem = alert();
let site = null;
let model = null;
let open = null; // the view that is shown, with its stop function
const kept = new Map(); // view and model -> its state, so that changing the view loses nothing

function available() {
  const names = model ? Object.keys(VIEWS).filter((name) => !model.views[name]) : [];
  return [...names, ...(site.compare ? ["compare"] : []), ...(site.runs ? ["runs"] : [])];
}

function titleOf(name) {
  return VIEWS[name]?.[0] ?? { compare: "Side by side", runs: "Runs" }[name];
}

function drawNav(current) {
  const links = available().map((name) => el("a", { href: `#${name}`, "aria-current": name === current ? "page" : null }, titleOf(name)));
  const missing = model ? Object.keys(VIEWS).filter((name) => model.views[name]) : [];
  const reasons = missing.map((name) => el("li", {}, el("b", {}, titleOf(name)), " ", model.views[name]));
  show(nav, el("div", { class: "links" }, links), missing.length ? el("details", { class: "missing" }, el("summary", {}, "Not with this model"), el("ul", {}, reasons)) : null);
}

function make(name) {
  if (name === "runs") return boardView();
  if (name === "compare") return compareView(site.models);
  return VIEWS[name][1](model);
}

function go() {
  const wanted = location.hash.slice(1);
  const names = available();
  const name = names.includes(wanted) ? wanted : names[0];
  open?.stop?.();
  drawNav(name);
  const reason = model && wanted in VIEWS && model.views[wanted];
  const note = reason ? el("p", { class: "note" }, `${titleOf(wanted)}: ${reason}`) : null;
  if (!name) return show(main, problem, note, el("p", {}, "There is nothing to show."));
  const key = name in VIEWS ? `${name} ${model.name}` : name;
  if (!kept.has(key)) kept.set(key, make(name));
  open = kept.get(key);
  document.title = `${titleOf(name)}: firth`;
  show(main, problem, note, el("h1", { tabindex: -1 }, titleOf(name)), open.node);
  open.begin?.();
  return null;
}

function drawModel() {
  if (!model) return;
  const facts = `${model.description}, ${number(model.parameters)} parameters, context ${number(model.context)}`;
  const names = site.models.map((one) => one.name);
  const chosen = names.length > 1 ? select(names, { "aria-label": "Model" }) : el("b", {}, model.name);
  chosen.value = model.name;
  chosen.addEventListener("change", () => {
    model = site.models.find((one) => one.name === chosen.value);
    drawModel();
    go();
  });
  show(head, chosen, el("span", { class: "note" }, facts));
}

try {
  site = await get("/views");
  model = site.models[0] ?? null;
  drawModel();
  window.addEventListener("hashchange", () => {
    go();
    main.querySelector("h1")?.focus();
  });
  go();
} catch (error) {
  show(main, problem);
  fail(problem, error);
}
