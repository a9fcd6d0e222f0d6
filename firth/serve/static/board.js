// The board of runs: their states, and curves that grow while they train.

import { get } from "./api.js";
import { chart, smooth } from "./chart.js";
import { alert, duration, el, fail, field, number, select, show } from "./dom.js";

const SECONDS = 2;
const FIRST_SHOWN = 4;
const STATES = { training: "training", finished: "finished", stopped: "stopped", preparing: "preparing" };
const X = { step: "step", seconds: "second of training", tokens: "token" };
const POSITION = new Set(["split", "step", "seconds", "tokens"]);
const SMOOTHED = 40; // training steps from which on a curve is smoothed

export function boardView() {
  const data = new Map(); // name -> {rows, next, version}
  const chosen = new Map(); // name -> color
  const problem = alert();
  const list = el("tbody", {});
  const empty = el("p", { class: "note", hidden: true }, "There is no run yet. It appears here when it begins.");
  const metric = el("select", {});
  const x = select(Object.entries(X).map(([name]) => [name, name]));
  const log = el("input", { type: "checkbox" });
  const picture = chart("Curves of the chosen runs");
  const legend = el("p", { class: "legend" });
  let summaries = [];
  let touched = false;
  let timer = null;
  let waiting = false;

  metric.addEventListener("change", () => {
    touched = true;
    draw();
  });
  for (const control of [x, log]) control.addEventListener("change", draw);

  async function update() {
    if (waiting) return;
    waiting = true;
    try {
      summaries = (await get("/runs")).runs;
      if (!chosen.size) summaries.slice(0, FIRST_SHOWN).forEach((run) => choose(run.name));
      for (const name of [...chosen.keys()]) {
        if (summaries.some((run) => run.name === name)) await read(name);
        else chosen.delete(name);
      }
      fail(problem, null);
      drawList();
      drawMetrics();
      draw();
    } catch (error) {
      fail(problem, error);
    } finally {
      waiting = false;
    }
  }

  /** Read the rows of a run that were written since the last time. */
  async function read(name) {
    const known = data.get(name) ?? { rows: [], next: 0, version: 0 };
    const found = await get(`/runs/${encodeURIComponent(name)}/metrics?from=${known.next}&version=${known.version}`);
    const rows = found.restarted ? found.rows : [...known.rows, ...found.rows];
    data.set(name, { rows, next: found.next, version: found.version });
  }

  function choose(name) {
    const used = new Set(chosen.values());
    let color = 0;
    while (used.has(color)) color += 1;
    chosen.set(name, color);
  }

  function drawList() {
    empty.hidden = summaries.length > 0;
    const rows = summaries.map((run) => {
      const box = el("input", { type: "checkbox", "aria-label": `Show the curves of ${run.name}`, "data-run": run.name, checked: chosen.has(run.name) });
      box.addEventListener("change", () => {
        if (box.checked) choose(run.name);
        else chosen.delete(run.name);
        update();
      });
      const name = el("label", { class: "name" }, box, el("span", { class: chosen.has(run.name) ? `key c${chosen.get(run.name) % 6}` : "key" }), el("span", {}, breakable(run.name)));
      return el("tr", {}, el("th", { scope: "row" }, name, el("span", { class: "note" }, [...new Set([run.recipe, run.objective])].filter(Boolean).join(", "))), el("td", { class: `state ${run.state}` }, STATES[run.state] ?? run.state, progress(run)), el("td", { class: "n" }, number(run.last.train?.loss)), el("td", { class: "n" }, number(run.last.valid?.loss)), el("td", { class: "n" }, rest(run)));
    });
    const focused = document.activeElement?.dataset?.run;
    show(list, rows);
    if (focused) list.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
  }

  function drawMetrics() {
    const found = [...chosen.keys()].map((name) => metricsOf(data.get(name)?.rows ?? []));
    const names = new Set(found.flatMap((one) => [...one]));
    const rewards = found.length > 0 && found.every((one) => one.has("reward"));
    const sorted = [...names].sort((a, b) => (b === "loss") - (a === "loss") || a.localeCompare(b));
    if ([...metric.options].map((one) => one.value).join() === sorted.join()) return;
    const before = metric.value;
    show(metric, sorted.map((name) => el("option", { value: name }, name)));
    metric.value = touched && names.has(before) ? before : rewards ? "reward" : sorted[0] ?? "";
  }

  function draw() {
    const series = [];
    for (const [name, color] of chosen) {
      for (const split of ["train", "rollouts", "valid"]) {
        const rows = (data.get(name)?.rows ?? []).filter((row) => row.split === split && typeof row[metric.value] === "number");
        const points = rows.map((row) => [row[x.value], row[metric.value]]);
        if (!points.length) continue;
        const long = split !== "valid" && points.length >= SMOOTHED;
        if (long) series.push({ name, color, points, raw: true });
        series.push({ name: `${name} ${split}`, color, points: long ? smooth(points) : points, dots: split === "valid" || points.length === 1 });
      }
    }
    picture.draw(series, { x: X[x.value], y: metric.value, log: log.checked });
    show(legend, [...chosen].map(([name, color]) => el("span", {}, el("span", { class: `key c${color % 6}` }), name)), series.some((one) => one.dots) ? el("span", { class: "note" }, "Dots: held-out examples.") : null);
  }

  const settings = el("div", { class: "row controls" }, field("Metric", metric), field("Horizontal axis", x), el("label", { class: "check" }, log, "Logarithmic"));
  const head = el("tr", {}, el("th", { scope: "col" }, "Run"), ["State", "Loss", "Held-out", "Time left"].map((name, i) => el("th", { scope: "col", class: i ? "n" : null }, name)));
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Runs" }, el("table", { class: "runs" }, el("thead", {}, head), list));
  const node = el("div", {}, problem, settings, picture.node, legend, table, empty);
  const begin = () => {
    update();
    timer = setInterval(() => !document.hidden && update(), SECONDS * 1000);
  };
  return { node, begin, stop: () => clearInterval(timer) };
}

/** Return a path that may be broken after each "/". */
function breakable(path) {
  return path.split("/").flatMap((part, i) => (i ? ["/", el("wbr"), part] : [part]));
}

/** Return the names of the metrics in some rows. */
function metricsOf(rows) {
  const names = new Set();
  for (const row of rows) {
    for (const [key, value] of Object.entries(row)) if (!POSITION.has(key) && typeof value === "number") names.add(key);
  }
  return names;
}

/** Return the share of a run that is done, from the budget that ends first. */
function share(run) {
  const seconds = run.last.train?.seconds ?? 0;
  const shares = [];
  if (run.budget.max_steps) shares.push(run.step / run.budget.max_steps);
  if (run.budget.max_seconds) shares.push(seconds / run.budget.max_seconds);
  if (run.budget.max_flops) shares.push((run.last.train?.flops ?? 0) / run.budget.max_flops);
  return shares.length ? Math.min(1, Math.max(...shares)) : null;
}

function progress(run) {
  const done = share(run);
  const text = el("span", { class: "note" }, `step ${number(run.step)}${run.budget.max_steps ? ` of ${number(run.budget.max_steps)}` : ""}`);
  if (done === null || run.state === "finished") return text;
  const bar = el("progress", { max: 1, "aria-label": `Progress of ${run.name}` });
  bar.value = done;
  return [bar, text];
}

function rest(run) {
  const done = share(run);
  const seconds = run.last.train?.seconds;
  if (run.state === "finished") return "";
  if (run.state !== "training") return run.step ? `idle ${duration(run.idle_seconds)}` : "";
  return done && seconds ? duration((seconds * (1 - done)) / done) : "";
}
