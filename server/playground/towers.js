// Draws a wave: a list of columns that scrolls, follows its end, and can be read by keyboard.

import { grade, visible, words } from "./wave.js";

const MOST_FLASHES = 16; // that are drawn at a time
const MOST_COLUMNS = 300; // that are drawn; older ones are still in the text
let numLists = 0;
const FLASH = 450; // milliseconds that a flushed column stays

export class Towers {
  // `tell` is given the words of the column that is looked at, or null.
  constructor(title, tell) {
    this.wave = null;
    this.tell = tell;
    this.drawn = new Map(); // position -> { element, look }
    this.follows = true;
    this.selected = null;
    this.element = document.createElement("figure");
    this.caption = this.element.appendChild(document.createElement("figcaption"));
    this.list = this.element.appendChild(document.createElement("div"));
    this.element.className = "wave";
    this.title = title;
    this.prefix = `wave${++numLists}`;
    this.list.className = "columns";
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", `Tokens ${title}; arrow keys read them one by one`);
    this.list.tabIndex = 0;
    this.#listen();
    this.draw();
  }

  // Shows the wave as it stands; `lost` are columns that the last pass flushed.
  draw(wave = this.wave, lost = []) {
    if (wave !== this.wave) this.#clear();
    this.wave = wave;
    this.caption.textContent = this.#summary();
    if (!wave) return;
    this.#axis(wave.numLoops);
    const positions = [...wave.columns.keys()].sort((a, b) => a - b).slice(-MOST_COLUMNS);
    const wanted = new Set(positions);
    for (const position of [...this.drawn.keys()]) if (!wanted.has(position)) this.#remove(position);
    for (const position of positions) this.#put(wave.columns.get(position));
    for (const column of lost.slice(0, MOST_FLASHES)) this.#flash(column);
    if (this.follows) this.list.scrollLeft = this.list.scrollWidth;
  }

  #summary() {
    if (!this.wave?.shown) return this.title;
    const { tokens, passes } = this.wave.summary;
    const ratio = tokens > 1 && !this.wave.missing ? `, ${(passes / (tokens - 1)).toFixed(2)} passes per token` : "";
    const missing = this.wave.missing ? `; ${this.wave.missing} passes came too fast to be shown` : "";
    return `${this.title}: ${tokens} ${tokens === 1 ? "token" : "tokens"}${ratio}${missing}`;
  }

  #clear() {
    this.drawn.clear();
    this.list.replaceChildren();
    this.follows = true;
    this.#select(null);
  }

  // How many loops a cell stands for, at the left; of many loops only the last number is written.
  #axis(numLoops) {
    if (this.list.querySelectorAll(".axis i").length === numLoops) return;
    this.list.querySelector(".axis")?.remove();
    this.list.style.setProperty("--loops", numLoops);
    const axis = document.createElement("div");
    axis.className = "axis";
    axis.setAttribute("aria-hidden", "true");
    const numbers = axis.appendChild(document.createElement("div"));
    numbers.className = "tower";
    for (let depth = 1; depth <= numLoops; depth++) {
      numbers.appendChild(document.createElement("i")).textContent = numLoops <= 8 || depth === numLoops ? depth : "";
    }
    axis.append(label(""));
    this.list.prepend(axis);
  }

  #put(column) {
    const found = this.drawn.get(column.position);
    const look = JSON.stringify([column.depth, column.text, column.final, this.wave.numLoops]);
    if (found?.look === look) return;
    const element = found?.element ?? this.#insert(column.position);
    this.drawn.set(column.position, { element, look });
    element.className = `column ${column.final ? `final g${grade(column)}` : "open"}`;
    element.setAttribute("aria-label", words(column, this.wave.numLoops));
    element.replaceChildren(tower(column, this.wave.numLoops), label(column.text));
    if (column.position === this.selected) this.#select(column.position);
  }

  #insert(position) {
    const element = document.createElement("div");
    element.setAttribute("role", "option");
    element.id = `${this.prefix}-${position}`;
    element.dataset.position = position;
    const next = [...this.drawn.keys()].filter((other) => other > position).sort((a, b) => a - b)[0];
    this.list.insertBefore(element, next === undefined ? this.list.querySelector(".lost") : this.drawn.get(next).element);
    return element;
  }

  #remove(position) {
    this.drawn.get(position).element.remove();
    this.drawn.delete(position);
  }

  #flash(column) {
    const element = document.createElement("div");
    element.className = "column lost";
    element.setAttribute("aria-hidden", "true");
    element.append(tower(column, this.wave.numLoops), label(column.text));
    this.list.append(element);
    setTimeout(() => element.remove(), FLASH);
  }

  #listen() {
    const list = this.list;
    list.addEventListener("scroll", () => {
      this.follows = list.scrollLeft + list.clientWidth >= list.scrollWidth - 40;
    });
    list.addEventListener("pointerover", (event) => this.#look(event.target));
    list.addEventListener("pointerleave", () => this.#select(this.selected));
    list.addEventListener("click", (event) => {
      const column = event.target.closest("[data-position]");
      if (column) this.#select(Number(column.dataset.position));
    });
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  #look(target) {
    const column = this.wave?.columns.get(Number(target.closest("[data-position]")?.dataset.position));
    if (column) this.tell(words(column, this.wave.numLoops));
  }

  #key(event) {
    const positions = [...this.drawn.keys()].sort((a, b) => a - b);
    const now = positions.indexOf(this.selected);
    const last = positions.length - 1;
    const targets = { ArrowLeft: now < 0 ? last : Math.max(0, now - 1), ArrowRight: Math.min(last, now + 1), Home: 0, End: last };
    if (!(event.key in targets) || last < 0) return;
    event.preventDefault();
    this.#select(positions[targets[event.key]]);
    const element = this.drawn.get(this.selected).element;
    this.list.scrollLeft = element.offsetLeft - this.list.clientWidth / 2;
  }

  #select(position) {
    for (const old of this.list.querySelectorAll("[aria-selected]")) old.removeAttribute("aria-selected");
    this.selected = position;
    const element = this.drawn.get(position)?.element;
    element?.setAttribute("aria-selected", "true");
    if (element) this.list.setAttribute("aria-activedescendant", element.id);
    else this.list.removeAttribute("aria-activedescendant");
    const column = this.wave?.columns.get(position);
    this.tell(column ? words(column, this.wave.numLoops) : null);
  }
}

function tower(column, numLoops) {
  const tower = document.createElement("div");
  tower.className = "tower";
  for (let depth = 1; depth <= numLoops; depth++) {
    const cell = tower.appendChild(document.createElement("i"));
    cell.className = `cell ${kind(column, depth)}`;
  }
  return tower;
}

function kind(column, depth) {
  if (depth > column.depth) return "empty";
  if (!column.final) return depth === column.depth ? "flight head" : "flight";
  const guess = column.guesses.find((one) => one.depth === depth);
  if (!guess) return "unread";
  return guess.agrees ? "agreed" : "differed";
}

function label(text) {
  const label = document.createElement("span");
  label.className = "token";
  label.textContent = text.trim() || !text ? text.replaceAll("\n", "⏎") || " " : visible(text);
  return label;
}
