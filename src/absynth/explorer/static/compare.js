// All models side by side on what is no digit.
import { Answers, element, paint } from "./paint.js";
import { decodeImage, get, lines } from "./wire.js";

export class Compare {
  constructor() {
    this.subject = null;
    this.control = null;
    for (const button of document.querySelectorAll("[data-sample]")) {
      button.addEventListener("click", () => this.sample(button.dataset.sample));
    }
    element("compare-own").addEventListener("click", () => this.run(this.subject.encoded, "the image above", false));
  }

  ready(subject) {
    this.subject = subject;
    element("compare-own").disabled = subject === null;
  }

  async sample(kind) {
    try {
      const seed = Math.floor(Math.random() * 2 ** 31);
      const { image } = await get(`/api/sample/${kind}/${seed}`);
      await this.run(image, kind === "noise" ? "noise" : `a ${kind}`, true);
    } catch (error) {
      this.status(error.message, "failed");
    }
  }

  async run(image, title, blank) {
    this.control?.abort();
    const control = (this.control = new AbortController());
    element("comparison").hidden = false;
    paint(element("compared"), decodeImage(image));
    element("compare").setAttribute("aria-busy", "true");
    this.status(`Asking every model about ${title} …`, "busy");
    const answers = new Answers(element("compare-answers"), { blank });
    let refused = 0, able = 0, fooled = 0;
    try {
      for await (const event of lines("/api/answers", { image }, control.signal)) {
        answers.set(event);
        if (event.event !== "answer") continue;
        able += event.answer.can_refuse;
        refused += event.answer.refused;
        fooled += !event.answer.refused && Math.max(...event.answer.probabilities) > 0.5;
      }
      this.status(blank ? `${refused} of ${able} models that can refuse say “no digit”; ${fooled} ${fooled === 1 ? "model is" : "models are"} more than half sure of a digit.` : "Done.", "done");
    } catch (error) {
      if (error.name === "AbortError") return; // a newer comparison has begun
      this.status(error.message, "failed");
    }
    element("compare").setAttribute("aria-busy", "false");
  }

  status(text, kind = "") {
    element("compare-status").textContent = text;
    element("compare-status").className = `status ${kind}`;
  }
}
