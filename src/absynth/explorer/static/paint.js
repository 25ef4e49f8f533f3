// Pixels, bars and rows.
import { SIDE } from "./wire.js";

export const element = (id) => document.getElementById(id);
export const percent = (share) =>
  share > 0.9995 && share < 1 ? "> 99.9 %" : `${(100 * share).toFixed(share < 0.0995 || share > 0.9 ? 1 : 0)} %`;
// What is proven must not be promised farther than it is: never rounded up.
const atMostFormat = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3, roundingMode: "floor", useGrouping: false });
export const atMost = (radius) => atMostFormat.format(radius);

export const NORMS = { l0: "L0", l1: "L1", l2: "L2", linf: "L∞" };

export function make(tag, { text, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Gray values, 0 to `full`, white on black.
export function paint(canvas, values, full = 1) {
  const pixels = new ImageData(SIDE, SIDE);
  values.forEach((value, i) => pixels.data.set([0, 1, 2].map(() => (255 * value) / full).concat(255), 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

export function erase(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

// What was added and what was taken away, in two colors, as strong as the largest change allows.
export function paintDifference(canvas, from, to) {
  const colors = getComputedStyle(document.documentElement);
  const [more, less] = ["--more", "--less"].map((name) => colors.getPropertyValue(name).trim().split(" ").map(Number));
  const change = to.map((value, i) => value - from[i]);
  const largest = change.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const pixels = new ImageData(SIDE, SIDE);
  change.forEach((value, i) => {
    const strength = largest ? Math.sqrt(Math.abs(value) / largest) : 0;
    pixels.data.set([...(value > 0 ? more : less), 255 * strength], 4 * i);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return largest;
}

// Vertical bars, one a class; made once, then moved, so that they glide.
export function bars(container, names, shares, best, refused) {
  if (container.children.length !== names.length) {
    container.replaceChildren(
      ...names.map(() => make("div", { class: "bar" }, make("span", { class: "value" }), make("i"), make("b"))),
    );
  }
  names.forEach((name, k) => {
    const bar = container.children[k];
    const share = shares === null ? 0 : shares[k];
    bar.className = "bar" + (k === best ? (refused ? " best refused" : " best") : "");
    bar.children[0].textContent = shares !== null && share >= 0.005 ? share.toFixed(2).replace("1.00", "1") : "";
    bar.style.setProperty("--share", share);
    bar.children[2].textContent = name;
  });
  const told = shares === null ? "empty" : names.map((name, k) => `${name}: ${percent(shares[k])}`).join(", ");
  container.setAttribute("aria-label", `Posterior, ${told}`);
}

export function says(answer) {
  return answer.refused ? "no digit" : answer.names[answer.label];
}

// A table of what models say: `rows.set(event)` for every event of the stream.
export class Answers {
  // `blank`: "no digit" is the right answer; `expected`: this is.
  constructor(container, { blank, expected }) {
    this.container = container;
    this.blank = blank;
    this.expected = expected;
    this.rows = new Map();
    container.replaceChildren();
  }

  row(model) {
    if (!this.rows.has(model)) {
      const row = make("div", { class: "answer" }, make("span", { class: "name", text: model }), make("span", { class: "says" }), make("span", { class: "meter" }, make("i")), make("span", { class: "share" }));
      row.dataset.model = model;
      this.rows.set(model, row);
      this.container.append(row);
    }
    return this.rows.get(model);
  }

  set(event) {
    const model = event.model ?? event.answer.model;
    const row = this.row(model);
    const [, said, meter, share] = row.children;
    row.className = "answer";
    if (event.event === "asking") {
      row.classList.add("waiting");
      said.textContent = event.loading ? "loading …" : "…";
    } else if (event.event === "error") {
      row.classList.add("failed");
      said.textContent = event.error;
    } else {
      const { answer } = event;
      const most = Math.max(...answer.probabilities);
      said.textContent = says(answer);
      meter.firstChild.style.setProperty("--share", most);
      share.textContent = percent(most);
      if (this.blank) row.classList.add(answer.refused ? "right" : most > 0.5 ? "wrong" : "unsure");
      else if (answer.refused) row.classList.add("refused");
      else if (this.expected !== undefined && answer.names[answer.label] !== this.expected) row.classList.add("wrong");
    }
  }
}
