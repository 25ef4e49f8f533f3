// The drawing pad: strokes by mouse, finger or pen (pointer events), or by keys.
import { encodeBytes, SIDE } from "./wire.js";

const SENT = 112; // pixels a side of what is sent
const PEN = 20; // of the pad's 280 pixels

export class Pad {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.changed = changed;
    this.strokes = [];
    this.image = null; // a finished image is shown instead of strokes
    this.pen = null; // the place of the pen when keys move it
    this.down = false;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.go(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.lift());
    this.draw();
  }

  get empty() {
    return this.strokes.length === 0 && this.image === null;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.lift();
    this.pointer = event.pointerId;
    this.start(this.place(event));
  }

  go(event) {
    if (event.pointerId !== this.pointer) return;
    const moves = event.getCoalescedEvents?.() ?? [];
    for (const one of moves.length ? moves : [event]) this.strokes.at(-1).push(this.place(one));
    this.draw();
    this.changed();
  }

  end() {
    this.pointer = undefined;
  }

  start(place) {
    this.image = null;
    this.strokes.push([place]);
    this.draw();
    this.changed();
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key === "Backspace" || event.key === "Delete") this.clear();
    else if (event.key === " " || event.key === "Enter") {
      this.pen ??= [140, 60];
      this.down = !this.down;
      if (this.down) this.start([...this.pen]);
      else this.draw();
    } else if (step) {
      this.pen ??= [140, 60];
      const length = event.shiftKey ? 4 : 12;
      this.pen = this.pen.map((at, axis) => Math.min(Math.max(at + length * step[axis], 0), 280));
      if (this.down) {
        this.strokes.at(-1).push([...this.pen]);
        this.changed();
      }
      this.draw();
    } else return;
    event.preventDefault();
  }

  lift() {
    this.pen = null;
    this.down = false;
    this.draw();
  }

  undo() {
    if (this.image !== null) this.image = null;
    else this.strokes.pop();
    this.down = false;
    this.draw();
    this.changed();
  }

  clear() {
    this.strokes = [];
    this.image = null;
    this.down = false;
    this.draw();
    this.changed();
  }

  // Show a finished image; drawing on it begins anew.
  show(image) {
    this.strokes = [];
    this.image = image;
    this.draw();
  }

  draw() {
    const { context, canvas } = this;
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.image !== null) {
      const size = canvas.width / SIDE;
      this.image.forEach((value, i) => {
        const gray = Math.round(255 * value);
        context.fillStyle = `rgb(${gray} ${gray} ${gray})`;
        if (gray) context.fillRect((i % SIDE) * size, Math.floor(i / SIDE) * size, size, size);
      });
    }
    this.ink(context, 1);
    if (this.pen !== null) {
      context.beginPath();
      context.arc(...this.pen, PEN / 2 + 3, 0, 7);
      context.lineWidth = 3;
      context.strokeStyle = this.down ? "#3ecf9f" : "#98a1b5";
      context.stroke();
    }
  }

  ink(context, scale) {
    context.lineWidth = PEN * scale;
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "#fff";
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * scale, stroke[0][1] * scale);
      for (const [x, y] of stroke.length > 1 ? stroke : [...stroke, stroke[0]]) context.lineTo(x * scale, y * scale);
      context.stroke();
    }
  }

  // The strokes as gray bytes: the server scales and centers them as MNIST's images were.
  bytes() {
    const small = new OffscreenCanvas(SENT, SENT);
    const context = small.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#000";
    context.fillRect(0, 0, SENT, SENT);
    this.ink(context, SENT / this.canvas.width);
    const { data } = context.getImageData(0, 0, SENT, SENT);
    const gray = Uint8Array.from({ length: SENT * SENT }, (_, i) => data[4 * i]);
    return gray.some((value) => value > 0) ? { width: SENT, height: SENT, data: encodeBytes(gray) } : null;
  }
}
