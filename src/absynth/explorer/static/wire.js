// Talking to the server: images as base64 of float32, answers as JSON, streams as lines of JSON.

export const SIDE = 28;

export function decodeImage(text) {
  const bytes = decodeBytes(text);
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

export function encodeImage(values) {
  const view = new DataView(new ArrayBuffer(4 * values.length));
  values.forEach((value, i) => view.setFloat32(4 * i, value, true));
  return encodeBytes(new Uint8Array(view.buffer));
}

export function decodeBytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export function encodeBytes(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

// An error whose message can be shown as it is.
export class Trouble extends Error {}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The explorer does not answer. Is “absynth explore” still running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Trouble(sentence(told?.error ?? `the explorer answered ${response.status}: try again`));
  }
  return response;
}

function request(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

export async function get(path) {
  return (await send(path, {})).json();
}

export async function post(path, body, signal) {
  return (await send(path, request(body, signal))).json();
}

export async function upload(path, blob) {
  return (await send(path, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: blob })).json();
}

// The lines of a streamed answer, one object each.
export async function* lines(path, body, signal) {
  const response = await send(path, request(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The explorer broke off. Is “absynth explore” still running?");
    }
    if (part.done) return;
    const pieces = (rest + part.value).split("\n");
    rest = pieces.pop();
    for (const piece of pieces) if (piece) yield JSON.parse(piece);
  }
}

export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

// Runs `work` for the newest request only: one at a time, those in between are dropped, so that none pile up.
export class Latest {
  constructor(work) {
    this.work = work;
    this.next = null;
    this.control = null;
  }

  ask(request, { drop = false } = {}) {
    this.next = request;
    if (this.control === null) this.run();
    else if (drop) this.control.abort();
  }

  cancel() {
    this.next = null;
    this.control?.abort();
  }

  async run() {
    while (this.next !== null) {
      const request = this.next;
      this.next = null;
      this.control = new AbortController();
      try {
        await this.work(request, this.control.signal);
      } catch (error) {
        if (error.name !== "AbortError") throw error;
      }
    }
    this.control = null;
  }
}
