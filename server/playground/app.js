// The page: one form, a conversation, and the waves of the latest answer.

import { ServerError, UnreachableError, models, trouble } from "./api.js";
import { Answer } from "./answer.js";
import { Player } from "./player.js";
import { Run, compared } from "./run.js";
import { Towers } from "./towers.js";

const field = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "num_loops"];
const EXAMPLES = { chat: "Why is the sky blue?", completion: "Once upon a time there was a" };
const CHECK_AGAIN = 3000; // milliseconds between two looks at a server that isn't ready

const conversation = []; // of { user, assistant }
const latest = { on: null, off: null, asked: "" }; // the runs of the latest body
let running = null; // the AbortController of the answer in flight
let cards = []; // of the models that are served
let watching = 0; // the timer of the next look at a server that isn't ready

// ---- what is asked -----------------------------------------------------------------------------

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function settings() {
  const numbers = NUMBERS.filter((name) => field(name).value !== "").map((name) => [name, Number(field(name).value)]);
  const policy = field("draft_policy").value;
  return { model: field("model").value, ...Object.fromEntries(numbers), ...(policy && { draft_policy: policy }) };
}

function requestBody(text) {
  if (chosen("mode") === "completion") return { ...settings(), prompt: text };
  const system = field("system").value.trim();
  const before = conversation.flatMap(({ user, assistant }) => [
    { role: "user", content: user },
    { role: "assistant", content: assistant },
  ]);
  const opening = system ? [{ role: "system", content: system }] : [];
  return { ...settings(), messages: [...opening, ...before, { role: "user", content: text }] };
}

// ---- what is shown -----------------------------------------------------------------------------

function tell(words) {
  field("detail").textContent = words ?? "Point at a token, or reach a wave by Tab and read it with the arrow keys: what each loop said stands here.";
}

const towers = { on: new Towers("With speculation", tell), off: new Towers("Without speculation", tell) };
const player = new Player(field, () => Object.values(towers).filter((one) => one.element.isConnected));

function say(text) {
  field("status").textContent = text;
}

function complain(text) {
  field("message").textContent = text;
}

function showWaves(kinds) {
  field("waves").replaceChildren(...kinds.map((kind) => towers[kind].element));
}

const CELLS = {
  rate: ({ rate }) => rate?.toFixed(1),
  passes: ({ passes }) => passes?.toFixed(2),
  first: ({ first }) => first && `${first.toFixed(0)} ms`,
  tokens: ({ tokens }) => tokens,
  drafts: ({ drafts }) => drafts && `${drafts.accepted} of ${drafts.drafts}`,
  end: ({ end }) => end,
};

function showNumbers() {
  for (const [row, cell] of Object.entries(CELLS)) {
    const [on, off] = document.querySelectorAll(`[data-row="${row}"] td`);
    on.textContent = (latest.on && cell(latest.on.figures)) ?? "–";
    off.textContent = (latest.off && cell(latest.off.figures)) ?? "–";
  }
  const found = compared(latest.on, latest.off);
  if (!found) return;
  const factor = document.createElement("b");
  factor.textContent = `${found.speedup.toFixed(2)}×`;
  const same = { true: ", and the text is the same", false: ", but the texts differ", null: "" }[found.isSame];
  const note = document.createElement("small");
  note.textContent = "Tokens per second with speculation over those without, for one prompt and one seed; one after the other, so that neither slows the other.";
  field("gain").replaceChildren(factor, ` as fast with speculation${same}.`, note);
}

function forgetGain() {
  field("gain").replaceChildren("Choose ", Object.assign(document.createElement("b"), { textContent: "Side by side" }), " to answer once with and once without speculation.");
}

function addTurn(text) {
  const turn = document.createElement("article");
  turn.className = `turn ${chosen("mode")}`;
  const user = turn.appendChild(document.createElement("div"));
  user.className = "user";
  user.textContent = text;
  const answers = turn.appendChild(document.createElement("div"));
  answers.className = "answers";
  if (chosen("mode") === "completion") field("log").replaceChildren();
  field("log").append(turn);
  return { turn, answers };
}

function scrollLog() {
  field("log").scrollTop = field("log").scrollHeight;
}

// ---- one message -------------------------------------------------------------------------------

// Draws once in a frame, however many chunks come.
function drawing(answer, kind) {
  let isDue = false;
  const draw = () => {
    isDue = false;
    latest[kind] = answer.run;
    answer.draw();
    player.live(towers[kind], answer.run.wave);
    showNumbers();
    scrollLog();
  };
  const request = () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(draw);
  };
  return { request, draw };
}

async function answer(kind, body, element, title) {
  const run = new Run(kind === "on");
  const view = new Answer(run, title, tell);
  element.append(view.element);
  const { request, draw } = drawing(view, kind);
  say(`Answering ${kind === "on" ? "with" : "without"} speculation…`);
  try {
    await run.fetch(body, field("key").value.trim(), running.signal, request);
  } finally {
    draw();
  }
}

function begin(text) {
  const wanted = chosen("speculation");
  const kinds = wanted === "both" ? ["on", "off"] : [wanted];
  const body = requestBody(text);
  if (kinds.length > 1) body.seed ??= Math.floor(Math.random() * 2 ** 31);
  const asked = JSON.stringify(body);
  if (asked !== latest.asked) Object.assign(latest, { on: null, off: null, asked });
  for (const kind of kinds) latest[kind] = null;
  running = new AbortController();
  busy(true);
  complain("");
  tell(null);
  forgetGain();
  showNumbers();
  showWaves(kinds);
  player.begin();
  return { body, kinds };
}

function finish() {
  running = null;
  busy(false);
  player.end();
}

// A button that is disabled while it has the focus would lose it to nowhere.
function busy(isBusy) {
  const [from, to] = isBusy ? ["send", "stop"] : ["stop", "prompt"];
  const isFocused = document.activeElement === field(from);
  field("stop").disabled = !isBusy;
  for (const id of ["send", "clear", "mode", "speculation"]) field(id).disabled = isBusy;
  if (isFocused) field(to).focus();
}

async function send(event) {
  event.preventDefault();
  const text = field("prompt").value;
  if (running || !text.trim()) return;
  const { body, kinds } = begin(text);
  const { turn, answers } = addTurn(text);
  field("prompt").value = chosen("mode") === "chat" ? "" : text;
  try {
    if (!body.model) await loadModels();
    body.model ||= field("model").value;
    const titles = kinds.length > 1 ? { on: "With speculation", off: "Without" } : {};
    for (const kind of kinds) await answer(kind, body, answers, titles[kind]);
    say("Done.");
  } catch (error) {
    failed(error);
  } finally {
    finish();
    remember(text, turn, latest[kinds[0]]);
  }
}

function failed(error) {
  if (error.name === "AbortError") return say("Stopped; the figures are those of what came.");
  say("");
  complain(error.message);
  if (error instanceof UnreachableError) watchHealth();
  else if (!(error instanceof ServerError)) throw error;
}

// What came belongs to the conversation; where nothing did, the message goes back to be sent again.
function remember(text, turn, run) {
  if (run?.text) conversation.push({ user: text, assistant: run.text });
  if (run?.pieces.length) return;
  turn.remove();
  field("prompt").value ||= text;
}

function clear() {
  conversation.length = 0;
  Object.assign(latest, { on: null, off: null, asked: "" });
  field("log").replaceChildren();
  for (const one of Object.values(towers)) one.draw(null);
  player.begin();
  complain("");
  say("");
  tell(null);
  forgetGain();
  showNumbers();
}

// ---- the server --------------------------------------------------------------------------------

async function loadModels() {
  cards = await models(field("key").value.trim());
  field("model").replaceChildren(...cards.map((card) => new Option(card.id)));
  showModel();
}

// What the chosen model can do, as far as the server knows: one that isn't loaded has told nothing of its loops.
function showModel() {
  const card = cards.find((one) => one.id === field("model").value) ?? cards[0];
  const chat = document.querySelector('input[value="chat"]');
  chat.disabled = !card.supports_chat;
  if (chat.disabled) document.querySelector('input[value="completion"]').checked = true;
  const loops = card.num_loops;
  field("loops").textContent = loops ?? "several";
  field("num_loops").max = card.max_loops ?? loops ?? "";
  chooseMode();
}

function showHealth(state, words) {
  field("health").dataset.state = state;
  field("health").textContent = words;
}

// Looks until the server is ready, and says what keeps it.
async function watchHealth() {
  clearTimeout(watching);
  try {
    const reason = await trouble();
    if (reason === null) {
      await loadModels();
      showHealth("ready", "ready");
      return;
    }
    showHealth("loading", reason);
  } catch (error) {
    if (error instanceof ServerError) {
      complain(error.message);
      showHealth("loading", "not available");
      return; // by a key that is missing: no use asking again
    }
    showHealth("away", "the server can't be reached");
  }
  watching = setTimeout(watchHealth, CHECK_AGAIN);
}

// ---- the form ----------------------------------------------------------------------------------

function chooseMode() {
  const mode = chosen("mode");
  field("prompt_label").textContent = mode === "chat" ? "Your message" : "Text to go on with";
  field("keys").textContent = mode === "chat" ? "Enter sends, Shift+Enter begins a line, Escape stops" : "Ctrl+Enter sends, Escape stops";
  field("clear").textContent = mode === "chat" ? "New conversation" : "Clear";
  const prompt = field("prompt");
  if (!prompt.value || Object.values(EXAMPLES).includes(prompt.value)) prompt.value = conversation.length ? "" : EXAMPLES[mode];
}

function key(event) {
  const isSending = event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (chosen("mode") === "chat" && !event.shiftKey));
  if (!isSending) return;
  event.preventDefault();
  field("form").requestSubmit();
}

field("form").addEventListener("submit", send);
field("stop").addEventListener("click", () => running?.abort());
field("clear").addEventListener("click", () => (clear(), field("prompt").focus()));
field("prompt").addEventListener("keydown", key);
field("mode").addEventListener("change", () => (clear(), chooseMode()));
field("model").addEventListener("change", showModel);
field("key").addEventListener("change", () => (complain(""), watchHealth()));
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
showWaves(["on"]);
tell(null);
showNumbers();
watchHealth();
