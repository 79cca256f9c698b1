// Draws one answer: its text, each token tinted by how many loops agreed with it, and a line of figures.

import { grade, words } from "./wave.js";

export class Answer {
  // `tell` is given the words of the token that is pointed at, or null.
  constructor(run, title, tell) {
    this.run = run;
    this.numDrawn = 0; // pieces
    this.element = document.createElement("div");
    this.element.className = "answer";
    if (title) this.element.appendChild(document.createElement("h3")).textContent = title;
    this.text = this.element.appendChild(document.createElement("div"));
    this.text.className = "text";
    this.line = this.element.appendChild(document.createElement("p"));
    this.line.className = "line hint";
    this.text.addEventListener("pointerover", (event) => tell(this.#words(event.target)));
    this.text.addEventListener("pointerleave", () => tell(null));
  }

  draw() {
    const { pieces, end } = this.run;
    for (const piece of pieces.slice(this.numDrawn)) this.#append(piece);
    this.numDrawn = pieces.length;
    this.element.setAttribute("aria-busy", String(!end));
    this.line.textContent = figuresInWords(this.run);
  }

  #append(piece) {
    const spans = this.#spans(piece);
    if (!piece.isThought) return this.text.append(...spans);
    const thought = this.text.appendChild(document.createElement("span"));
    thought.className = "thought";
    thought.append(...spans);
  }

  // A span for each token, where the text of the piece is that of its tokens; else one for all of them.
  #spans({ text, start, tokens }) {
    const { wave } = this.run;
    const finals = Array.from({ length: tokens }, (_, index) => wave.finals.get(wave.start + start + index));
    if (!finals.length || finals.includes(undefined)) return [document.createTextNode(text)];
    if (finals.map((one) => one.text).join("") === text) {
      return finals.map((one, index) => token(one.text, one, wave.start + start + index));
    }
    const least = finals.reduce((a, b) => (grade(a) < grade(b) ? a : b));
    return [token(text, least, wave.start + start + finals.indexOf(least))];
  }

  #words(target) {
    const { wave } = this.run;
    const final = wave.finals.get(Number(target.closest("[data-position]")?.dataset.position));
    return final ? words(final, wave.numLoops) : null;
  }
}

function token(text, final, position) {
  const span = document.createElement("span");
  span.className = `g${grade(final)}`;
  span.dataset.position = position;
  span.textContent = text;
  return span;
}

// The figures of a run in a line.
function figuresInWords({ figures }) {
  const { tokens, rate, passes, end } = figures;
  return [
    `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    rate === null ? "" : `${rate.toFixed(0)} tokens/s`,
    passes === null ? "" : `${passes.toFixed(2)} passes per token`,
    end && `ended ${end}`,
  ]
    .filter(Boolean)
    .join(" · ");
}
