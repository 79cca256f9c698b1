// One answer: what is asked, what comes, and what that took. Knows nothing of the page.

import { stream } from "./api.js";
import { Wave } from "./wave.js";

const ENDS = {
  stop: "by itself",
  length: "at the limit of tokens",
  abort: "by the server, which shuts down",
};

export class Run {
  constructor(speculation) {
    this.speculation = speculation;
    this.text = "";
    this.pieces = []; // of chunks: their text, how many tokens it has, and how many stood before
    this.wave = new Wave();
    this.numTokens = 0;
    this.usage = null;
    this.end = "";
    this.isComplete = false;
    this.times = { asked: null, first: null, last: null }; // milliseconds
  }

  // Fills the run while it comes, and calls `news` for each chunk. Raises what ends it early.
  async fetch(body, key, signal, news) {
    this.times.asked = performance.now();
    const asked = {
      ...body,
      speculation: this.speculation,
      stream: true,
      return_token_ids: true,
      stream_options: { include_usage: true, include_wave: true },
    };
    try {
      for await (const frame of stream(asked, key, signal)) {
        this.#take(frame);
        news(this);
      }
      this.isComplete = true;
    } catch (error) {
      this.end = error.name === "AbortError" ? "by you" : "by an error";
      throw error;
    }
  }

  #take(frame) {
    this.usage = frame.usage ?? this.usage;
    const choice = frame.choices[0];
    if (!choice) return;
    if (choice.wave) this.wave.add(choice.wave);
    const tokens = choice.token_ids?.length ?? 0;
    const text = choice.text ?? choice.delta?.content ?? "";
    const thought = choice.delta?.reasoning_content ?? "";
    if (tokens) {
      this.times.last = performance.now();
      this.times.first ??= this.times.last;
    }
    if (text || thought) this.pieces.push({ text: text || thought, isThought: !text, start: this.numTokens, tokens });
    this.text += text;
    this.numTokens += tokens;
    if (choice.finish_reason) this.end = why(choice);
  }

  get figures() {
    const details = this.usage?.completion_tokens_details;
    const tokens = this.usage?.completion_tokens ?? this.numTokens;
    const passes = details?.decode_passes ?? this.wave.decodePasses;
    const { asked, first, last } = this.times;
    const accepted = details?.accepted_prediction_tokens;
    const drafts = details && accepted + details.rejected_prediction_tokens;
    return {
      tokens,
      rate: tokens > 1 && last > first ? (1000 * (tokens - 1)) / (last - first) : null,
      passes: tokens > 1 && passes > 0 ? passes / (tokens - 1) : null,
      first: first === null ? null : first - asked,
      drafts: drafts ? { accepted, drafts } : null,
      end: this.end,
    };
  }
}

function why(choice) {
  if (choice.stop_reason !== undefined && choice.stop_reason !== null) return `at the stop ${JSON.stringify(choice.stop_reason)}`;
  return ENDS[choice.finish_reason] ?? choice.finish_reason;
}

// What two runs of the same body show: how many times as fast the first one was, and whether it said the same.
export function compared(on, off) {
  if (!on?.figures.rate || !off?.figures.rate) return null;
  const isWhole = on.isComplete && off.isComplete;
  return { speedup: on.figures.rate / off.figures.rate, isSame: isWhole ? on.text === off.text : null };
}
