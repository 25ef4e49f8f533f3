// The attack: the smallest adversarial as it appears, its difference, what every model says, and the way there.
import { Answers, bars, element, make, NORMS, paint, paintDifference, percent, says } from "./paint.js";
import { decodeImage, encodeImage, Latest, lines, post } from "./wire.js";

export class Attack {
  constructor(state) {
    this.state = state;
    this.subject = null; // {pixels, encoded} of the image to be attacked
    this.control = null; // of the attack at work
    this.from = this.to = null;
    this.between = new Latest((share, signal) => this.look(share, signal));
    element("start").addEventListener("click", () => (this.control ? this.stop() : this.run()));
    element("slider").addEventListener("input", () => this.morph());
    element("victim").addEventListener("change", () => (state.victimChosen = true));
  }

  ready(subject) {
    this.subject = subject;
    if (this.control) return;
    element("start").disabled = subject === null;
    if (this.to === null) this.status(subject === null ? "Choose an image first." : "Ready.");
  }

  stop() {
    this.control.abort();
  }

  async run() {
    const subject = this.subject;
    const norm = document.querySelector("[name=norm]:checked").value;
    const target = element("target").value;
    const model = element("victim").value;
    this.control = new AbortController();
    this.begin(subject, model, norm);
    let closest = null;
    try {
      const asked = { model, image: subject.encoded, norm, target: target === "" ? null : Number(target) };
      for await (const event of lines("/api/attack", asked, this.control.signal)) {
        if (event.event === "error") throw new Error(event.error);
        if (event.event === "searching") {
          if (event.seconds > 0) this.state.ready.add(model);
          if (event.image) closest = { image: event.image, distance: event.distance };
          this.progress(event, closest, norm);
        } else this.end(event, model, norm);
      }
    } catch (error) {
      if (error.name === "AbortError" && closest !== null) this.end({ ...closest, aborted: true }, model, norm);
      else if (error.name === "AbortError") this.status("Stopped: nothing was found yet.", "failed");
      else this.status(error.message, "failed");
    } finally {
      this.control = null;
      element("attack").setAttribute("aria-busy", "false");
      element("progress").hidden = true;
      element("start").textContent = "Attack";
      element("start").disabled = this.subject === null;
    }
  }

  begin(subject, model, norm) {
    this.from = subject.pixels;
    this.to = null;
    element("attack").setAttribute("aria-busy", "true");
    element("progress").hidden = false;
    element("start").textContent = "Stop";
    element("result").hidden = element("after").hidden = element("morph").hidden = true;
    this.status(this.state.ready.has(model) ? `Searching in ${NORMS[norm]} …` : `Loading ${model} …`, "busy");
  }

  progress(event, closest, norm) {
    if (event.seconds === 0) return;
    const found = closest ? `smallest so far ${this.size(closest.distance, norm)}` : "nothing yet";
    const asked = `${event.queries.toLocaleString("en")} ${event.queries === 1 ? "question" : "questions"}`;
    this.status(`Searching for ${event.seconds.toFixed(0)} s, ${asked} asked: ${found} …`, "busy");
    if (event.image) this.picture(decodeImage(event.image), event.distance, norm);
  }

  size(distance, norm) {
    return norm === "l0" ? `${distance} ${distance === 1 ? "pixel" : "pixels"}` : `${NORMS[norm]} ${distance.toPrecision(3)}`;
  }

  picture(to, distance, norm) {
    element("result").hidden = false;
    paint(element("clean"), this.from);
    paint(element("adversarial"), to);
    const strongest = paintDifference(element("difference"), this.from, to);
    element("distance").textContent = this.size(distance, norm);
    element("strongest").textContent = `largest change of a pixel ${strongest.toFixed(2)}`;
    element("clean-says").textContent = element("adversarial-says").textContent = "";
    element("difference").setAttribute("aria-label", `The difference, ${this.size(distance, norm)}`);
  }

  async end(event, model, norm) {
    if (event.image === null) {
      element("result").hidden = true;
      this.status(event.stopped ? `Time is up after ${event.seconds.toFixed(0)} s: no adversarial was found.` : "The attacks found no adversarial.", "failed");
      return;
    }
    this.to = decodeImage(event.image);
    this.model = model;
    this.picture(this.to, event.distance, norm);
    const size = this.size(event.distance, norm);
    const why = event.aborted ? "Stopped: smallest so far" : event.stopped ? `Stopped at the limit of ${this.state.seconds} s: smallest so far` : "Found:";
    const cost = event.aborted ? "" : `, after ${event.queries.toLocaleString("en")} questions in ${event.seconds.toFixed(1)} s`;
    this.status(`${why} ${size}${cost}.`, event.stopped ? "late" : "done");
    element("after").hidden = element("morph").hidden = false;
    element("slider").value = 100;
    this.morph();
    const said = await this.say(element("clean-says"), this.from, model);
    await this.say(element("adversarial-says"), this.to, model);
    await this.everyone(event.image, said);
  }

  async say(place, pixels, model) {
    const { answer } = await post("/api/look", { model, image: encodeImage(pixels) }).catch(() => ({}));
    if (answer) place.textContent = `${says(answer)}, ${percent(answer.probabilities[answer.label])}`;
    return answer?.names[answer.label];
  }

  // `expected`: what the attacked model said of the image itself.
  async everyone(image, expected) {
    const answers = new Answers(element("attack-answers"), { blank: false, expected });
    this.asking?.abort();
    this.asking = new AbortController();
    try {
      for await (const event of lines("/api/answers", { image }, this.asking.signal)) answers.set(event);
    } catch (error) {
      if (error.name !== "AbortError") element("attack-answers").append(make("p", { class: "status failed", text: error.message }));
    }
  }

  morph() {
    const share = Number(element("slider").value) / 100;
    element("share").textContent = `${Math.round(100 * share)} %`;
    paint(element("between"), this.mixed(share));
    this.between.ask(share);
  }

  // Beyond 1 the image goes on in the same direction, within black and white.
  mixed(share) {
    if (share === 1) return this.to;
    return this.from.map((value, i) => Math.min(Math.max(value + share * (this.to[i] - value), 0), 1));
  }

  async look(share, signal) {
    try {
      const { answer } = await post("/api/look", { model: this.model, image: encodeImage(this.mixed(share)) }, signal);
      bars(element("between-posterior"), answer.names, answer.probabilities, answer.label, answer.refused);
      element("between-says").textContent = `${this.model} says ${says(answer)}, ${percent(answer.probabilities[answer.label])}.`;
    } catch (error) {
      if (error.name !== "AbortError") element("between-says").textContent = error.message;
    }
  }

  status(text, kind = "") {
    element("attack-status").textContent = text;
    element("attack-status").className = `status ${kind}`;
  }
}
