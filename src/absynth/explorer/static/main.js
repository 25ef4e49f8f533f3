// The page: where images come from, and who is told of them.
import { Attack } from "./attack.js";
import { Compare } from "./compare.js";
import { Look } from "./look.js";
import { Pad } from "./pad.js";
import { element, make } from "./paint.js";
import { decodeImage, get, upload } from "./wire.js";

const LARGE = 1024; // a larger picture is scaled down here, before it is sent

const state = { model: null, ready: new Set(), names: null, prover: null, seconds: 0, count: null, victimChosen: false, choose };
let pad, look, attack, compare;
let asked = 0; // only what was asked for last is shown, in whatever order the answers come

function tell(text, failed = false) {
  element("source-note").textContent = text;
  element("source-note").classList.toggle("failed", failed);
}

// Let `work` fail into the note beside the pad.
async function guarded(work) {
  try {
    await work();
  } catch (error) {
    tell(error.message, true);
  }
}

function choose(model) {
  state.model = model;
  element("model").value = model;
  if (!state.victimChosen) element("victim").value = model;
  for (const place of document.querySelectorAll("[data-chosen]")) place.textContent = model;
  look.again();
}

function drawn() {
  element("hint").hidden = !pad.empty;
  const ink = pad.image === null ? pad.bytes() : null;
  if (ink !== null) {
    asked += 1;
    tell("");
    look.show({ ink });
  } else if (pad.image === null) {
    tell("");
    look.show(null);
  }
}

function take(picture, note) {
  pad.show(decodeImage(picture.image));
  element("hint").hidden = true;
  tell(note);
  look.show({ image: picture.image });
}

async function testImage(index) {
  const turn = ++asked;
  if (state.count === null) {
    const { count, name } = await get("/api/test");
    state.count = count;
    state.set = name;
    element("index").max = count - 1;
    if (turn !== asked) return;
  }
  const wanted = index === null ? Math.floor(Math.random() * state.count) : (index + state.count) % state.count;
  element("index").value = wanted;
  const picture = await get(`/api/test/${wanted}`);
  if (turn !== asked) return;
  take(picture, `Test image ${wanted} of ${state.set}: a ${picture.label}.`);
}

// Big photographs are scaled down here; what the browser cannot read, the server is asked to.
async function shrunk(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (bitmap === null || Math.max(bitmap.width, bitmap.height) <= LARGE) return file;
  const scale = LARGE / Math.max(bitmap.width, bitmap.height);
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob();
}

async function picture(file) {
  const turn = ++asked;
  tell("Reading the picture …");
  const read = await upload("/api/picture", await shrunk(file));
  if (turn !== asked) return;
  take(read, `Your picture${file.name ? `, ${file.name}` : ""}.`);
}

function sources() {
  const index = () => Number.parseInt(element("index").value, 10) || 0;
  element("clear").addEventListener("click", () => pad.clear());
  element("undo").addEventListener("click", () => pad.undo());
  element("choose").addEventListener("click", () => element("file").click());
  element("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) guarded(() => picture(file));
    event.target.value = "";
  });
  element("index").addEventListener("change", (event) => {
    if (event.target.value.trim() !== "") guarded(() => testImage(index()));
  });
  element("previous").addEventListener("click", () => guarded(() => testImage(index() - 1)));
  element("next").addEventListener("click", () => guarded(() => testImage(index() + (pad.image === null && state.count === null ? 0 : 1))));
  element("random").addEventListener("click", () => guarded(() => testImage(null)));
  const frame = document.body;
  frame.addEventListener("dragover", (event) => {
    event.preventDefault();
    element("drop").hidden = false;
  });
  frame.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) element("drop").hidden = true;
  });
  frame.addEventListener("drop", (event) => {
    event.preventDefault();
    element("drop").hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) guarded(() => picture(file));
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) guarded(() => picture(file));
  });
}

async function open() {
  const told = await get("/api/state");
  element("version").textContent = told.version;
  state.seconds = told.attack_seconds;
  const names = told.models.map((model) => model.name);
  for (const model of told.models) {
    if (model.state === "ready") state.ready.add(model.name);
    for (const place of ["model", "victim"]) element(place).append(make("option", { value: model.name, text: model.name, title: model.description }));
  }
  state.prover = names.find((name) => name.startsWith("prototype")) ?? null;
  attack = new Attack(state);
  compare = new Compare();
  look = new Look(state, (subject, answer) => {
    attack?.ready(subject);
    compare?.ready(subject);
    if (answer && state.names?.join() !== answer.names.join()) {
      state.names = answer.names;
      const kept = element("target").value;
      element("target").replaceChildren(make("option", { value: "", text: "any other" }), ...answer.names.map((name, k) => make("option", { value: k, text: name })));
      element("target").value = kept;
    }
  });
  pad = new Pad(element("pad"), drawn);
  element("model").addEventListener("change", (event) => choose(event.target.value));
  sources();
  choose(names[0]);
  document.body.dataset.state = "open";
}

open().catch((error) => {
  element("trouble").textContent = error.message;
  element("trouble").hidden = false;
});
