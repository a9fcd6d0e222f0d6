// Collect preferences: a prompt and answers, which a person ranks by click or key.

import { get, post } from "./api.js";
import { alert, area, el, fail, field, number, percent, show } from "./dom.js";

const NAME = "firth-annotator";
const WAIT_MS = 2000;

const main = document.querySelector("main");
const who = document.querySelector("#who");
const problem = alert();
const status = el("p", { class: "hidden", role: "status" });
const stage = el("div", {});
const results = el("details", { class: "results" }, el("summary", {}, "Progress, agreement and scores"));
const numbers = el("div", {});
let annotator = localStorage.getItem(NAME) ?? "";
let task = null; // {item, token, prompt, answers}
let done = null; // the id of the last event of the annotator, which can be undone
let ranks = []; // the rank of each answer, or null
let tied = false; // whether the next answer shares the rank of the last one
let last = 0; // the last rank that was given
let start = 0;
let busy = false;
let timer = null;

results.append(numbers);
results.addEventListener("toggle", () => results.open && drawResults());
show(main, problem, status, stage, results);

/** Send a request whose answer is the next prompt. */
async function send(action, body = {}) {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  try {
    const found = await post(`/annotation/${action}`, { annotator, ...body });
    const notice = found.notice ?? (found.error ? `No further answers are written: ${found.error}` : null);
    fail(problem, notice ? new Error(notice) : null);
    open(found);
    if (results.open) drawResults();
  } catch (error) {
    await refused(error);
  } finally {
    busy = false;
  }
}

/** Show an error; where the prompt is not what the server has now, show the next one too. */
async function refused(error) {
  try {
    if (error.status === 409) open(await post("/annotation/next", { annotator }));
    fail(problem, error);
  } catch (second) {
    fail(problem, second);
  }
}

function skip() {
  send("skip", { item: task.item, token: task.token });
}

function undo() {
  if (done === null) status.textContent = "There is nothing to undo.";
  else send("undo", { event: done });
}

function open(found) {
  task = found.item ? found : null;
  done = found.event;
  ranks = task ? task.answers.map(() => null) : [];
  tied = false;
  last = 0;
  start = performance.now();
  if (task) {
    drawTask();
    status.textContent = `Next prompt, ${task.judged} judged so far.`;
    window.scrollTo(0, 0);
    return;
  }
  const text = found.sampling ? "The models are still writing. The next prompt appears here." : "There is no further prompt for you. Thank you.";
  const back = el("button", { type: "button", onclick: undo }, "Undo the last");
  show(stage, el("h1", { tabindex: -1 }, found.sampling ? "Please wait" : "Done"), el("p", {}, text), el("div", { class: "row" }, back));
  status.textContent = text;
  if (found.sampling) timer = setTimeout(() => send("next"), WAIT_MS);
}

function drawName() {
  const input = el("input", { type: "text", maxlength: 60, autocomplete: "nickname", required: true, value: annotator });
  const submit = (event) => {
    event.preventDefault();
    if (!input.value.trim()) return;
    annotator = input.value.trim();
    localStorage.setItem(NAME, annotator);
    drawWho();
    send("next");
  };
  show(who);
  show(stage, el("h1", {}, "Which answer is better?"), el("p", {}, "You see prompts with answers and put them into an order, the best first. Several people can take part, each under a name of their own."), el("form", { onsubmit: submit }, field("Your name", input), el("button", { class: "primary" }, "Begin")));
  input.focus();
}

function drawWho() {
  const change = el("button", { type: "button", onclick: () => {
    task = null;
    drawName();
  } }, "Change");
  show(who, el("span", {}, annotator), el("span", { class: "small" }, change));
}

function drawTask() {
  const cards = task.answers.map((text, i) => card(text, i));
  const comment = area({ rows: 1 });
  comment.dataset.comment = "";
  const save = el("button", { type: "button", class: "primary", onclick: judge }, "Save ", el("kbd", {}, "Enter"));
  const tie = el("button", { type: "button", "aria-pressed": "false", onclick: toggleTie }, "Tie with the last ", el("kbd", {}, "T"));
  const equal = el("button", { type: "button", onclick: () => {
    allEqual();
    save.focus();
  } }, "All equal ", el("kbd", {}, "0"));
  const pass = el("button", { type: "button", onclick: skip }, "Skip ", el("kbd", {}, "S"));
  const back = el("button", { type: "button", onclick: undo }, "Undo ", el("kbd", {}, "U"));
  show(
    stage,
    el("section", { class: "prompt" }, el("h1", {}, "Prompt"), el("p", { class: "text" }, task.prompt)),
    el("p", { class: "note" }, "Choose the answers in order, the best first. ", el("span", { class: "by-key" }, "The keys 1, 2, ... do the same.")),
    el("div", { class: "answers" }, cards.map((one) => one.node)),
    el("div", { class: "comment" }, field("Comment", comment)),
    el("div", { class: "decide keys" }, el("div", { class: "row" }, save, tie, equal, pass, back)),
  );
  stage.update = () => {
    cards.forEach((one, i) => one.update(ranks[i]));
    save.disabled = ranks.includes(null);
    tie.disabled = last === 0 || !ranks.includes(null);
    tie.setAttribute("aria-pressed", String(tied));
  };
  stage.update();
}

function card(text, i) {
  const rank = el("span", { class: "rank", "aria-hidden": "true" }, "");
  const spoken = el("span", { class: "hidden" });
  const pick = el("button", { type: "button", class: "pick", onclick: () => choose(i) }, rank, spoken, el("span", { class: "text" }, text || "(empty)"));
  const form = el("form", { hidden: true });
  const correct = el("button", { type: "button", onclick: () => editor(form, text, i) }, "Correct");
  const node = el("section", { class: "answer", "aria-label": `Answer ${i + 1}` }, pick, el("div", { class: "row small keys" }, el("kbd", {}, String(i + 1)), correct), form);
  const update = (value) => {
    rank.textContent = value ?? "–";
    spoken.textContent = value ? `Rank ${value}. ` : "No rank yet. ";
    node.classList.toggle("ranked", value !== null);
    pick.setAttribute("aria-pressed", String(value !== null));
  };
  return { node, update };
}

/** Open the form in which an answer is corrected. */
function editor(form, text, i) {
  const edited = area({ rows: 3, value: text });
  const save = async (event) => {
    event.preventDefault();
    try {
      const found = await post("/annotation/correct", { annotator, item: task.item, token: task.token, place: i, text: edited.value });
      done = found.event;
      fail(problem, null);
      show(form, el("p", { class: "note", role: "status" }, "The correction is saved. Undo removes it."));
    } catch (error) {
      await refused(error);
    }
  };
  const cancel = () => {
    form.hidden = true;
  };
  form.onsubmit = save;
  form.hidden = false;
  show(form, field("How it should read", edited), el("div", { class: "row small" }, el("button", { class: "primary" }, "Save the correction"), el("button", { type: "button", onclick: cancel }, "Cancel")));
  edited.fit();
  edited.focus();
}

/** Give an answer the next rank, or take its rank away. */
function choose(i) {
  if (ranks[i] !== null) {
    const gone = ranks[i];
    ranks[i] = null;
    if (!ranks.includes(gone)) ranks = ranks.map((rank) => (rank !== null && rank > gone ? rank - 1 : rank));
    last = Math.max(0, ...ranks.map((rank) => rank ?? 0));
    tied = false;
  } else {
    if (!tied || last === 0) last += 1;
    ranks[i] = last;
    tied = false;
    const open = ranks.filter((rank) => rank === null).length;
    if (open === 1 && ranks.length > 1 && !tied) status.textContent = "One answer is left.";
  }
  stage.update();
}

function toggleTie() {
  if (last === 0 || !ranks.includes(null)) return;
  tied = !tied;
  stage.update();
}

function allEqual() {
  ranks = ranks.map(() => 1);
  last = 1;
  tied = false;
  stage.update();
}

function judge() {
  if (!task || ranks.includes(null)) return;
  const comment = stage.querySelector("[data-comment]").value;
  send("judge", { item: task.item, token: task.token, ranks, comment, seconds: (performance.now() - start) / 1000 });
}

document.addEventListener("keydown", (event) => {
  if (!task || event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, summary")) return;
  const key = event.key.toLowerCase();
  const place = Number(key) - 1;
  if (place >= 0 && place < ranks.length) choose(place);
  else if (key === "0") allEqual();
  else if (key === "t" || key === "=") toggleTie();
  else if (key === "s") skip();
  else if (key === "u") undo();
  else if (key === "enter" && !ranks.includes(null) && !event.target.closest("button:not(.pick)")) judge();
  else return;
  event.preventDefault();
});

async function drawResults() {
  try {
    const found = await get("/annotation/statistics");
    show(numbers, describe(found));
  } catch (error) {
    fail(problem, error);
  }
}

function describe(found) {
  const people = Object.entries(found.annotators).map(([name, count]) => `${name} ${count}`).join(", ");
  const facts = [
    ["Prompts", `${found.prompts}, ${found.sampled} of them with different answers`],
    ["Judgments", `${found.done} of ${found.wanted} that are wanted so far`],
    ["By", people || "nobody yet"],
    ["Skipped", found.skipped],
    ["Corrections", found.corrections],
  ];
  const nodes = [el("table", {}, el("tbody", {}, facts.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, String(value))))))];
  const { agreement, runs } = found;
  nodes.push(el("h3", {}, "Agreement"));
  if (agreement.decisions) {
    const fleiss = agreement.fleiss === null ? "" : `, Fleiss’ kappa ${agreement.fleiss.toFixed(2)}`;
    nodes.push(el("p", {}, `${percent(agreement.share)} of ${agreement.decisions} decisions between two answers are the same${fleiss}.`));
    const rows = agreement.cohen.map((row) => el("tr", {}, el("td", {}, row.first === row.second ? `${row.first}, twice` : `${row.first} and ${row.second}`), el("td", { class: "n" }, String(row.decisions)), el("td", { class: "n" }, row.kappa === null ? "" : row.kappa.toFixed(2))));
    nodes.push(el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Annotators"), el("th", { class: "n" }, "Decisions"), el("th", { class: "n" }, "Cohen’s kappa"))), el("tbody", {}, rows)));
  } else {
    nodes.push(el("p", { class: "note" }, "No prompt was judged twice yet."));
  }
  nodes.push(el("h3", {}, "Scores of the runs"));
  if (!runs.length) return [...nodes, el("p", { class: "note" }, "Scores need judged answers of two runs or more.")];
  const low = Math.min(...runs.map((run) => run.low ?? run.score));
  const range = Math.max(...runs.map((run) => run.high ?? run.score)) - low || 1;
  const rows = runs.map((run) => {
    const picture = el("span", { class: "interval", "aria-hidden": "true" }, el("span", { class: "line" }), el("span", { class: "dot" }));
    for (const [name, value] of [["--low", run.low ?? run.score], ["--high", run.high ?? run.score], ["--at", run.score]]) picture.style.setProperty(name, (value - low) / range);
    return el("tr", {}, el("th", { scope: "row" }, run.name), el("td", { class: "n" }, String(run.votes)), el("td", { class: "n" }, percent(run.win_rate)), el("td", { class: "n" }, number(Math.round(run.score)) + (run.low === null ? "" : ` (${Math.round(run.low)} to ${Math.round(run.high)})`)), el("td", {}, picture));
  });
  const head = el("tr", {}, el("th", {}, "Run"), ["Votes", "Won", "Bradley-Terry"].map((name) => el("th", { class: "n" }, name)), el("th", {}, el("span", { class: "hidden" }, "Interval")));
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores of the runs" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
  return [...nodes, table, el("p", { class: "note" }, "In Elo’s points around 1,000; 95% intervals, of samples of prompts.")];
}

if (annotator) {
  drawWho();
  send("next");
} else {
  drawName();
}
