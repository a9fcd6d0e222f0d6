// The probability of each token of a text, and what the model expected in its place.

import { post, stopped } from "./api.js";
import { alert, area, el, fail, field, number, percent, roving, show } from "./dom.js";
import { runButton } from "./settings.js";

const ALTERNATIVES = 10;
const MODES = {
  causal: "Each token is predicted from the tokens before it.",
  masked: "Each token is hidden in turn and predicted from all others.",
  halves: "Each token is predicted from the prompt and the tokens before it.",
};

export function tokensView(model) {
  const prompt = area({ rows: 2 });
  const text = area({ rows: 4, placeholder: "A text whose tokens are scored" });
  const problem = alert();
  const out = el("section", { "aria-label": "Tokens" });
  const runner = runButton("Score", run);

  async function run(signal) {
    fail(problem, null);
    try {
      const body = { model: model.name, text: text.value, prompt: prompt.value, top: ALTERNATIVES };
      draw(await post("/score", body, signal));
    } catch (error) {
      if (!stopped(error)) fail(problem, error);
    }
  }

  function draw(found) {
    const detail = el("div", { class: "detail", "aria-live": "polite" });
    const items = found.tokens.map((token) => {
      const item = el("button", { type: "button", class: "token" }, visible(token.text));
      const share = token.logprob === null ? 1 : Math.exp(token.logprob);
      item.style.setProperty("--surprise", surprise(token.logprob));
      item.setAttribute("aria-label", `${token.text}: ${percent(share)}`);
      return item;
    });
    const strip = el("div", { class: "tokens", role: "group", "aria-label": "Tokens of the text; arrow keys move" }, items.flatMap((item, i) => (found.tokens[i].text.includes("\n") ? [item, el("span", { class: "line" })] : [item])));
    const scored = found.tokens.filter((token) => token.logprob !== null);
    const mean = found.logprob / Math.max(1, scored.length);
    const facts = `${scored.length} tokens, log-probability ${number(found.logprob)} nats, perplexity ${number(Math.exp(-mean))}. ${MODES[found.mode] ?? ""}`;
    show(out, el("h2", {}, "Tokens"), el("p", { class: "note" }, facts), strip, legend(), detail);
    if (items.length) roving(strip, items, (i) => show(detail, describe(found.tokens[i], found.tokens, i)))(worst(found.tokens), false);
  }

  function describe(token, tokens, i) {
    const before = tokens.slice(Math.max(0, i - 8), i).map((one) => one.text).join("");
    const title = el("h3", {}, "“", visible(token.text), "”");
    if (token.logprob === null) return [title, el("p", { class: "note" }, "The first token has no probability, since nothing is before it.")];
    const rows = token.top.map((one) => {
      const share = Math.exp(one.logprob);
      const bar = el("span", { class: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--share", share);
      return el("tr", { class: one.text === token.text ? "own" : null }, el("td", {}, bar, el("span", { class: "piece" }, visible(one.text))), el("td", { class: "n" }, percent(share)));
    });
    const head = el("tr", {}, el("th", {}, "Expected here"), el("th", { class: "n" }, "Probability"));
    return [
      title,
      el("p", {}, `Probability ${percent(Math.exp(token.logprob))}, ${number(-token.logprob / Math.LN2)} bits`, before ? el("span", { class: "note" }, ` after “…${before}”`) : null),
      el("table", { class: "bars" }, el("thead", {}, head), el("tbody", {}, rows)),
    ];
  }

  const submit = (event) => {
    event.preventDefault();
    runner.start();
  };
  const first = field("Prompt", prompt, "Comes before the text and is not scored.");
  const form = el("form", { onsubmit: submit }, el("details", { class: "settings" }, el("summary", {}, "Prompt"), first), field("Text", text), el("div", { class: "row" }, runner.button));
  return { node: el("div", {}, form, problem, out), stop: runner.stop };
}

/** Return how unexpected a token was, from 0 to 1: 12 bits and more are 1. */
function surprise(logprob) {
  return logprob === null ? 0 : Math.min(1, -logprob / Math.LN2 / 12);
}

function worst(tokens) {
  let at = 0;
  tokens.forEach((token, i) => {
    if ((token.logprob ?? 0) < (tokens[at].logprob ?? 0)) at = i;
  });
  return at;
}

/** Return a token with a sign for line breaks and for a token of spaces alone. */
export function visible(text) {
  const shown = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return shown.trim() ? shown : shown.replaceAll(" ", "␣") || "∅";
}

function legend() {
  const steps = [0, 2, 4, 8, 12].map((bits) => {
    const box = el("span", { class: "token" }, `${bits}${bits === 12 ? "+" : ""}`);
    box.style.setProperty("--surprise", bits / 12);
    return box;
  });
  return el("p", { class: "note legend" }, "bits of surprise: ", steps);
}
