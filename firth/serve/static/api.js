// Requests to the server of the page. Nothing else is ever called.

export class RequestError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: the status has to do
  }
  throw new RequestError(message, response.status);
}

async function request(path, options) {
  try {
    return await checked(await fetch(path, options));
  } catch (error) {
    if (error instanceof TypeError) throw new RequestError("the server does not answer: is it still running?");
    throw error;
  }
}

/** Return the JSON of a GET request. */
export async function get(path, signal) {
  return (await request(path, { signal })).json();
}

function post_options(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

/** Return the JSON of a POST request. */
export async function post(path, body, signal) {
  return (await request(path, post_options(body, signal))).json();
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (stopped(error)) throw error;
    throw new RequestError("the answer broke off: the connection was lost");
  }
}

/** Yield the events of a stream (server-sent events, as OpenAI's) until "[DONE]"; a stream that ends without it is an error. */
export async function* stream(path, body, signal) {
  const response = await request(path, post_options({ ...body, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await read(reader);
    if (done) throw new RequestError("the answer broke off: the server closed the connection");
    buffer += value.replaceAll("\r\n", "\n");
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const found = JSON.parse(data);
      if (found.error) throw new RequestError(found.error.message);
      yield found;
    }
  }
}

/** Return whether an error is that of a request that was stopped by its user. */
export function stopped(error) {
  return error.name === "AbortError";
}

/** Stream the text of a chat or a completion; `receive` gets each new piece. Returns why it ended: "stop", "length" or "stopped". */
export async function write({ chat, body, signal, receive }) {
  let finish = "stop";
  try {
    for await (const event of stream(chat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
      const choice = event.choices?.[0];
      if (!choice) continue;
      const piece = chat ? choice.delta?.content : choice.text;
      if (piece) receive(piece);
      finish = choice.finish_reason ?? finish;
    }
  } catch (error) {
    if (!stopped(error)) throw error;
    finish = "stopped";
  }
  return finish;
}
