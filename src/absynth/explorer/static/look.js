// The live panel: label, posterior, reconstructions with their energies, certified radius.
import { atMost, bars, element, erase, make, NORMS, paint, percent, says } from "./paint.js";
import { decodeBytes, decodeImage, encodeImage, Latest, post } from "./wire.js";

const DIGITS = [..."0123456789"];

export class Look {
  // `state`: the page's; `seen(image, answer)` is told every answer.
  constructor(state, seen) {
    this.state = state;
    this.seen = seen;
    this.panel = element("look");
    this.latest = new Latest((request, signal) => this.work(request, signal));
    this.clear();
  }

  // `subject`: {image} or {ink}, as the server wants them; null: there is nothing to see.
  show(subject, { drop = false } = {}) {
    this.subject = subject;
    if (subject === null) {
      this.latest.cancel();
      this.clear();
    } else this.latest.ask({ model: this.state.model, ...subject }, { drop });
  }

  again() {
    if (this.subject) this.show(this.subject, { drop: true });
  }

  async work(request, signal) {
    const loading = !this.state.ready.has(request.model);
    const slow = setTimeout(() => {
      this.panel.setAttribute("aria-busy", "true");
      this.status(loading ? `Loading ${request.model}: the first time takes a few seconds …` : "Looking …", "busy");
    }, loading ? 0 : 300);
    try {
      const look = await post("/api/look", request, signal);
      this.state.ready.add(request.model);
      clearTimeout(slow);
      if (this.subject !== null && request.model === this.state.model) this.fill(look);
      this.status("");
    } catch (error) {
      if (error.name === "AbortError") throw error; // a newer request is on its way
      this.fail(error.message);
    } finally {
      clearTimeout(slow);
      this.panel.setAttribute("aria-busy", "false");
    }
  }

  fill(look) {
    const { answer, explanation } = look;
    const image = decodeImage(look.image);
    const best = answer.probabilities[answer.label];
    paint(element("seen"), image);
    element("label").textContent = says(answer);
    element("label").className = answer.refused ? "label refused" : "label";
    element("sure").textContent = answer.refused
      ? `Nothing explains this image; the likeliest, ${answer.names[answer.label]}, gets ${percent(best)}.`
      : `${percent(best)} sure${answer.can_refuse ? "" : "; this model cannot say “no digit”"}.`;
    bars(element("posterior"), answer.names, answer.probabilities, answer.label, answer.refused);
    this.explain(answer, explanation);
    this.certify(look.certified, answer);
    this.panel.classList.remove("empty");
    this.seen({ pixels: image, encoded: encodeImage(image) }, answer);
  }

  explain(answer, explanation) {
    element("explained").hidden = explanation === null;
    if (explanation === null) return;
    const box = element("explanations");
    this.cells(answer.names);
    explanation.reconstructions.forEach((text, k) => {
      const cell = box.children[k];
      paint(cell.children[0], decodeBytes(text), 255);
      cell.children[1].children[1].textContent = (1000 * explanation.energies[k]).toFixed(1);
      cell.className = k === answer.label ? (answer.refused ? "best refused" : "best") : "";
    });
  }

  cells(names) {
    const box = element("explanations");
    if (box.children.length === names.length && box.dataset.names === names.join()) return;
    box.dataset.names = names.join();
    box.replaceChildren(
      ...names.map((name) =>
        make("figure", {},
          make("canvas", { width: 28, height: 28, role: "img", "aria-label": `What class ${name} makes of the image` }),
          make("figcaption", {}, make("b", { text: name }), make("span"))),
      ),
    );
  }

  certify(radii, answer) {
    const box = element("certified");
    box.replaceChildren();
    if (radii !== null) {
      const chips = ["l2", "linf", "l1", "l0"].map((norm) =>
        make("span", { class: "chip" }, make("b", { text: NORMS[norm] }), norm === "l0" ? `${radii[norm]} px` : atMost(radii[norm])));
      box.append(make("p", { text: `Proven: of no image nearer than this is another class than ${answer.names[answer.label]} the likeliest` }), make("div", { class: "chips" }, ...chips));
    } else if (this.state.prover !== null && this.state.prover !== this.state.model) {
      const switcher = make("button", { type: "button", class: "link", text: `prove one with ${this.state.prover}` });
      switcher.addEventListener("click", () => this.state.choose(this.state.prover));
      box.append(make("p", {}, "No certified radius for this model: ", switcher));
    }
  }

  clear() {
    erase(element("seen"));
    this.panel.classList.add("empty");
    element("label").textContent = "–";
    element("label").className = "label";
    element("sure").textContent = "Nothing yet: draw a digit, drop a picture, or take a test image.";
    bars(element("posterior"), this.state.names ?? DIGITS, null, -1, false);
    this.cells(this.state.names ?? DIGITS);
    for (const cell of element("explanations").children) {
      erase(cell.children[0]);
      cell.children[1].children[1].textContent = "";
      cell.className = "";
    }
    element("explained").hidden = false;
    element("certified").replaceChildren();
    this.status("");
    this.seen(null, null);
  }

  fail(message) {
    this.status(message, "failed");
    const retry = make("button", { type: "button", class: "link", text: "Try again" });
    retry.addEventListener("click", () => this.again());
    element("look-status").append(" ", retry);
  }

  status(text, kind = "") {
    element("look-status").textContent = text;
    element("look-status").className = `status ${kind}`;
  }
}
