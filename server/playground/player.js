// Which pass of the waves is shown: the latest while an answer comes, later any, step by step.

const STEP = 300; // milliseconds between two passes of a slow replay

export class Player {
  // `field` finds an element by its id, `views` gives the waves that are shown.
  constructor(field, views) {
    this.field = field;
    this.views = views;
    this.timer = null;
    field("pass").addEventListener("input", () => (this.#pause(), this.#show(Number(field("pass").value))));
    field("back").addEventListener("click", () => (this.#pause(), this.#show(this.now - 1)));
    field("forth").addEventListener("click", () => (this.#pause(), this.#show(this.now + 1)));
    field("play").addEventListener("click", () => (this.timer ? this.#pause() : this.#play()));
  }

  get last() {
    return Math.max(0, ...this.views().map((view) => view.wave?.passes.length ?? 0));
  }

  get now() {
    return Number(this.field("pass").value);
  }

  // A new answer: nothing to replay yet.
  begin() {
    this.#pause();
    this.field("player").hidden = true;
    for (const view of this.views()) view.draw(null);
  }

  // The latest state of a wave that is still coming.
  live(view, wave) {
    view.draw(wave, wave.show(wave.passes.length));
  }

  // The answer is complete.
  end() {
    this.field("player").hidden = this.last === 0;
    this.field("pass").max = this.last;
    this.#number(this.last);
  }

  #play() {
    if (this.now >= this.last) this.#show(0);
    this.field("play").textContent = "Pause";
    this.timer = setInterval(() => {
      this.#show(this.now + 1);
      if (this.now >= this.last) this.#pause();
    }, STEP);
  }

  #pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.field("play").textContent = "Replay slowly";
  }

  #show(pass) {
    const isStep = pass === this.now + 1;
    this.#number(pass);
    for (const view of this.views().filter(({ wave }) => wave)) {
      const lost = view.wave.show(pass);
      view.draw(view.wave, isStep ? lost : []);
    }
  }

  #number(pass) {
    this.field("pass").value = pass;
    this.field("pass_number").textContent = `pass ${this.now} of ${this.last}`;
  }
}
