// Chat with a model: system prompt, sampling settings, edit, regenerate with the earlier answers kept, stop.

import { write } from "./api.js";
import { alert, area, el, fail, field, show } from "./dom.js";
import { runButton, samplingSettings } from "./settings.js";

const ENDS = { length: "The answer ends here because it reached the limit of new tokens.", stopped: "Stopped." };

export function chatView(model) {
  const messages = []; // {role, texts: [...], at, finish}: the answers that were generated, and which one is shown
  const log = el("div", { class: "log", role: "log", "aria-label": "Conversation" });
  const system = area({ rows: 2, placeholder: "You are ..." });
  const sampling = samplingSettings();
  const problem = alert();
  const input = area({ rows: 2, placeholder: "Write a message", "aria-label": "Message", enterkeyhint: "send" });
  const runner = runButton("Send", send);
  const clear = el("button", { type: "button", onclick: reset }, "New conversation");
  const form = el("form", { class: "composer", onsubmit: submit }, input, el("div", { class: "row" }, runner.button, clear));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });

  function submit(event) {
    event.preventDefault();
    if (!runner.running() && !input.value.trim()) return input.focus();
    return runner.start();
  }

  async function send(signal) {
    messages.push({ role: "user", texts: [input.value], at: 0 });
    input.value = "";
    input.fit();
    await answer(signal);
  }

  /** Generate an answer to the messages; `to` has the answers so far that it is an alternative to. */
  async function answer(signal, to = { role: "assistant", texts: [], at: 0 }) {
    const body = sampling.read();
    if (!body) return;
    fail(problem, null);
    const sent = messages.map(({ role, texts, at }) => ({ role, content: texts[at] }));
    if (system.value.trim()) sent.unshift({ role: "system", content: system.value });
    to.texts.push("");
    to.at = to.texts.length - 1;
    to.busy = true;
    to.finish = "";
    messages.push(to);
    const text = render();
    try {
      const receive = (piece) => {
        to.texts[to.at] += piece;
        text.textContent = to.texts[to.at];
        keepInView(text);
      };
      to.finish = await write({ chat: true, body: { model: model.name, messages: sent, ...body }, signal, receive });
    } catch (error) {
      to.texts.pop();
      to.at = to.texts.length - 1;
      if (to.at < 0) messages.pop();
      fail(problem, error);
    } finally {
      to.busy = false;
      render();
    }
  }

  function regenerate(index) {
    if (runner.running()) return;
    const [old] = messages.splice(index);
    runner.start((signal) => answer(signal, old));
  }

  function edit(index, node) {
    const text = area({ "aria-label": "Edit the message" });
    text.value = messages[index].texts[messages[index].at];
    const save = (event) => {
      event.preventDefault();
      if (runner.running() || !text.value.trim()) return;
      messages.splice(index, messages.length, { role: "user", texts: [text.value], at: 0 });
      runner.start((signal) => answer(signal));
    };
    const cancel = el("button", { type: "button", onclick: render }, "Cancel");
    show(node, el("form", { onsubmit: save }, text, el("div", { class: "row" }, el("button", { class: "primary" }, "Send again"), cancel)));
    text.fit();
    text.focus();
  }

  function turn(message, offset) {
    message.at += offset;
    render();
  }

  /** Draw the messages; return the node of the last text. */
  function render() {
    let last = null;
    const nodes = messages.map((message, index) => {
      const mine = message.role === "user";
      last = el("p", { class: "text", "aria-live": mine ? null : "polite", "aria-busy": message.busy ? "true" : null }, message.texts[message.at]);
      const body = el("div", { class: "body" }, last);
      const actions = el("div", { class: "row small" });
      if (mine) actions.append(el("button", { type: "button", onclick: () => edit(index, body) }, "Edit"));
      else if (!message.busy) actions.append(...answerActions(message, index));
      if (message.finish in ENDS) body.append(el("p", { class: "note" }, ENDS[message.finish]));
      body.append(actions);
      return el("article", { class: `message ${message.role}`, "aria-label": mine ? "You" : model.name }, el("h3", {}, mine ? "You" : model.name), body);
    });
    show(log, nodes.length ? nodes : el("p", { class: "note" }, "Write a message below. Shift and Enter begin a new line."));
    clear.hidden = !messages.length;
    return last;
  }

  function answerActions(message, index) {
    const nodes = [];
    if (message.texts.length > 1) {
      const count = `${message.at + 1} of ${message.texts.length}`;
      nodes.push(
        el("button", { type: "button", "aria-label": "Earlier answer", disabled: message.at === 0, onclick: () => turn(message, -1) }, "‹"),
        el("span", { class: "note" }, count),
        el("button", { type: "button", "aria-label": "Later answer", disabled: message.at === message.texts.length - 1, onclick: () => turn(message, 1) }, "›"),
      );
    }
    nodes.push(el("button", { type: "button", onclick: () => regenerate(index) }, "Regenerate"));
    return nodes;
  }

  function reset() {
    runner.stop();
    messages.length = 0;
    fail(problem, null);
    render();
    input.focus();
  }

  render();
  const settings = el("details", { class: "settings" }, el("summary", {}, "System prompt"), field("System prompt", system, "Comes before the conversation."));
  return { node: el("div", { class: "chat" }, settings, sampling.node, log, problem, form), stop: runner.stop };
}

function keepInView(node) {
  const rest = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  if (rest < 160) node.scrollIntoView({ block: "end" });
}
