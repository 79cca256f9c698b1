// The server as the page sees it. All addresses are relative: the page works under any root path.

export class ServerError extends Error {}
export class UnreachableError extends Error {}

const headers = (key) => ({
  "content-type": "application/json",
  ...(key && { authorization: `Bearer ${key}` }),
});

async function request(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new UnreachableError("The server can't be reached: it has stopped, or the network is down.");
  }
}

async function complaint(response) {
  const body = await response.json().catch(() => null);
  return new ServerError(body?.error?.message ?? `The server answered ${response.status}.`);
}

// The names that are served, with what is known of the model.
export async function models(key) {
  const response = await request("v1/models", { headers: headers(key) });
  if (!response.ok) throw await complaint(response);
  return (await response.json()).data;
}

// Why the server would not answer a request now; null if it would.
export async function trouble() {
  const response = await request("ready", { headers: {} });
  return response.ok ? null : (await complaint(response)).message;
}

// The frames of a streamed answer, as they come. Ends with an error if the stream ends before its end.
export async function* stream(body, key, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!response.ok) throw await complaint(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const frame = JSON.parse(data);
    if (frame.error) throw new ServerError(frame.error.message);
    yield frame;
  }
  throw new UnreachableError("The server went away before the answer was complete; what came is kept.");
}

// The data of each event; comments, which keep a connection alive, are lines of their own.
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice("data: ".length);
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new UnreachableError("The connection to the server broke off; what came is kept.");
  }
}
