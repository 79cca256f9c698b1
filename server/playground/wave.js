// The wave of one answer as a state that passes change. Draws nothing.
//
// A column stands for a token: `depth` is how many loops its row has done, `text` what is guessed or final.
// The row that predicts the token at a position is that of the position before it.

export class Wave {
  constructor() {
    this.numLoops = 0;
    this.passes = []; // all that came
    this.finals = new Map(); // by position, the final tokens of all these
    this.texts = new Map(); // of token ids
    this.missing = 0; // passes that were left out
    this.missingAfterFirst = 0; // those of them that came after the first token
    this.reset();
  }

  reset() {
    this.columns = new Map(); // by position, ascending
    this.shown = 0; // passes that the columns have taken in
  }

  // Takes in what a chunk brings.
  add(record) {
    this.numLoops = record.num_loops;
    this.missing += record.omitted;
    if (this.finals.size) this.missingAfterFirst += record.omitted;
    for (const [id, text] of Object.entries(record.texts)) this.texts.set(Number(id), text);
    for (const pass of record.passes) {
      this.passes.push(pass);
      pass.committed.forEach((token, index) => this.finals.set(pass.position + index, this.#final(token)));
    }
  }

  // The position of the answer's first token, once any pass has come.
  get start() {
    return this.passes[0]?.position ?? null;
  }

  // Passes after the first token, as the server counts them; null if some were left out before it, since
  // nobody can tell how many of those read the prompt.
  get decodePasses() {
    if (this.missing > this.missingAfterFirst) return null;
    return this.#decoding(this.passes.length) + this.missingAfterFirst;
  }

  // Figures of what is shown.
  get summary() {
    const tokens = [...this.columns.values()].filter((column) => column.final).length;
    return { tokens, passes: this.#decoding(this.shown) };
  }

  #decoding(count) {
    return this.passes.slice(0, count).filter((pass) => pass.position > this.start).length;
  }

  // Shows the state after so many passes; returns the columns that were flushed on the way.
  show(count) {
    if (count < this.shown) this.reset();
    const lost = [];
    while (this.shown < Math.min(count, this.passes.length)) lost.push(...this.#step(this.passes[this.shown++]));
    return lost;
  }

  #step(pass) {
    for (const [start, rows, depth] of pass.runs) {
      for (let position = Math.max(start + 1, pass.position); position <= start + rows; position++) {
        this.#column(position).depth = depth;
      }
    }
    const lost = pass.flushed ? this.#drop(pass.flushed.position + 1) : [];
    pass.committed.forEach((_, index) => this.#commit(pass.position + index));
    const end = pass.position + pass.committed.length;
    pass.drafts.forEach((id, index) => (this.#column(end + index).text = this.#text(id)));
    this.#drop(end + pass.drafts.length + 1); // behind the last guess one row can be in flight
    return lost;
  }

  #column(position) {
    if (!this.columns.has(position)) {
      this.columns.set(position, { position, depth: 0, text: "", final: false, guesses: [], agreed: 0 });
    }
    return this.columns.get(position);
  }

  #commit(position) {
    Object.assign(this.#column(position), { depth: this.numLoops, ...this.finals.get(position) });
  }

  #final(token) {
    return {
      text: this.#text(token.token_id),
      final: true,
      agreed: token.agreed,
      guesses: token.guesses.map(([depth, id]) => ({ depth, text: this.#text(id), agrees: id === token.token_id })),
    };
  }

  #drop(position) {
    const lost = [...this.columns.values()].filter((column) => column.position >= position);
    for (const column of lost) this.columns.delete(column.position);
    return lost;
  }

  #text(id) {
    return this.texts.get(id) ?? "";
  }
}

// How strongly a token was agreed on: 1 (the last loop alone) to 4 (all that were asked), 0 if nobody else was.
export function grade(column) {
  const asked = column.guesses.length;
  return asked < 2 ? 0 : 1 + Math.floor((3 * (column.agreed - 1)) / (asked - 1));
}

// A token as it can be read alone: blanks and line ends shown.
export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "·") || "∅";
}

// A column in words.
export function words(column, numLoops) {
  const name = column.text ? `“${visible(column.text)}”` : "A token that nobody has guessed yet";
  if (!column.final) return `${name}: ${column.depth} of ${numLoops} loops done, not decided.`;
  if (column.guesses.length < 2) return `${name}: said by the last loop; no other loop was asked.`;
  const said = column.guesses.map(({ depth, text, agrees }) => `loop ${depth} ${agrees ? "the same" : `“${visible(text)}”`}`);
  return `${name}: ${column.agreed} of ${column.guesses.length} loops that were asked agree (${said.join(", ")}).`;
}
