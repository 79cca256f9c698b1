// One form, one streamed request at a time. All addresses are relative: the page works under any root path.
"use strict";

const field = (id) => document.getElementById(id);
const EXAMPLES = { completions: "def fibonacci(n):\n    ", chat: "Write one sentence about the sea." };
let running = null; // AbortController of the request in flight
let numRuns = 0;
let lastRun = null; // { settings, text } of the run before

function headers() {
  const key = field("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  const cards = (await response.json()).data;
  field("model").replaceChildren(...cards.map((card) => new Option(card.id)));
  const chats = cards.every((card) => card.supports_chat);
  field("chat").disabled = !chats;
  field("api").value = chats ? "chat" : "completions";
  showExample();
}

// Unless the user wrote a prompt.
function showExample() {
  const isExample = Object.values(EXAMPLES).includes(field("prompt").value);
  if (isExample) field("prompt").value = EXAMPLES[field("api").value];
}

function requestBody() {
  const chat = field("api").value === "chat";
  const prompt = field("prompt").value;
  return {
    model: field("model").value,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number(field("max_tokens").value),
    temperature: Number(field("temperature").value),
    top_p: Number(field("top_p").value),
    seed: Number(field("seed").value),
    speculation: field("speculation").checked,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The parsed frames of an event stream.
async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const frame = JSON.parse(part.slice("data: ".length));
      if (frame.error) throw new Error(frame.error.message);
      yield frame;
    }
  }
}

async function generate(body, show) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const started = performance.now();
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal };
  const response = await fetch(path, options);
  if (!response.ok) throw await failure(response);
  const result = { text: "", usage: null, first: null, last: null };
  for await (const frame of frames(response)) {
    const choice = frame.choices[0];
    const text = choice?.text ?? choice?.delta?.content ?? "";
    result.usage = frame.usage ?? result.usage;
    if (text) {
      result.last = performance.now() - started;
      result.first ??= result.last;
      result.text += text;
      show(text);
    }
  }
  return result;
}

function addRow(body, result) {
  const { speculation, ...settings } = body;
  const same = lastRun?.settings === JSON.stringify(settings) ? lastRun.text === result.text : null;
  lastRun = { settings: JSON.stringify(settings), text: result.text };
  const tokens = result.usage?.completion_tokens ?? 0;
  const details = result.usage?.completion_tokens_details ?? {};
  const drafts = details.accepted_prediction_tokens + details.rejected_prediction_tokens;
  const decoding = (result.last - result.first) / 1000;
  const cells = [
    ++numRuns,
    speculation ? "on" : "off",
    tokens,
    tokens > 1 && decoding > 0 ? ((tokens - 1) / decoding).toFixed(0) : "-",
    result.first === null ? "-" : `${result.first.toFixed(0)} ms`,
    tokens > 1 ? (details.decode_passes / (tokens - 1)).toFixed(2) : "-",
    drafts ? `${details.accepted_prediction_tokens} of ${drafts}` : "-",
    same === null ? "-" : same ? "yes" : "no",
  ];
  const row = field("runs").insertRow(0);
  for (const cell of cells) row.insertCell().textContent = cell;
}

function say(text, isError = false) {
  field("status").textContent = text;
  field("status").className = isError ? "error" : "";
}

async function run(event) {
  event.preventDefault();
  running = new AbortController();
  field("run").disabled = true;
  field("stop").disabled = false;
  say("…");
  const output = field("output");
  output.replaceChildren();
  try {
    if (!field("model").value) await loadModels();
    const body = requestBody();
    if (body.prompt) {
      const prompt = output.appendChild(document.createElement("span"));
      prompt.className = "prompt";
      prompt.textContent = body.prompt;
    }
    addRow(body, await generate(body, (text) => output.append(text)));
    say("done");
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    field("run").disabled = false;
    field("stop").disabled = true;
  }
}

field("form").addEventListener("submit", run);
field("api").addEventListener("change", showExample);
field("stop").addEventListener("click", () => running?.abort());
field("key").addEventListener("change", () => loadModels().then(() => say(""), (error) => say(error.message, true)));
loadModels().catch((error) => say(error.message, true));
