// What is seen and touched: a photo comes in by drop, choice or paste, a worker segments it, the result is drawn.
import { maskPng } from "./png.mjs";

const at = (id) => document.getElementById(id);
const folder = new URL(".", import.meta.url).href;
const worker = startWorker();
const say = (text, kind = "") => {
  at("status").textContent = text;
  at("status").className = `status ${kind}`;
};
let contract, threads; // what the file says of itself
let shown = null; // the result on screen: name, mask, width, height, chosen class or null
let busy = true;

/** A worker that may load what this page may load: one made from a blob inherits the page's security policy. */
function startWorker() {
  const start = new Blob([`import ${JSON.stringify(new URL("worker.mjs", folder).href)};`], { type: "text/javascript" });
  return new Worker(URL.createObjectURL(start), { type: "module" });
}

/** One task for the worker; throws what went wrong there. */
function ask(message) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.error === undefined ? resolve(data) : reject(new Error(data.error)));
    worker.onerror = (event) => reject(new Error(event.message || "a file of this page is missing or blocked"));
    worker.postMessage(message);
  });
}

async function open() {
  say("Loading the model ...", "busy");
  ({ contract, threads } = await ask({ task: "open", folder }));
  at("model").textContent = contract.name;
  at("about").textContent = contract.about.join(" / ");
  busy = false;
  at("drop").classList.remove("off");
  say("Ready.");
}

async function segment(photo) {
  if (busy) return;
  busy = true;
  at("drop").classList.add("off");
  say(`Segmenting ${photo.name} ...`, "busy");
  try {
    const result = await ask({ task: "segment", photo });
    shown = { ...result, name: photo.name, chosen: null };
    await draw(result.bitmap);
    say("");
  } catch (error) {
    say(`${photo.name} could not be segmented: ${error.message}`, "bad");
  } finally {
    busy = false;
    at("drop").classList.remove("off");
    at("file").value = "";
  }
}

async function draw(bitmap) {
  const { width, height, mask, windows, size, note, network, whole, name } = shown;
  const surface = Object.assign(at("photo"), { width, height });
  const context = surface.getContext("2d");
  context.fillStyle = "white"; // as the network saw it
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  drawOverlay();
  drawClasses();
  milliseconds("network", network);
  milliseconds("whole", whole);
  at("threads").textContent = `on ${threads === 1 ? "1 thread" : `${threads} threads`}`;
  at("seen").textContent =
    `, ${width} x ${height}, seen at ${size[1]} x ${size[0]}${windows > 1 ? ` in ${windows} windows` : ""}`;
  document.querySelector(".layers").style.setProperty("--ratio", width / height);
  at("note").textContent = [...contract.notes, note].join(" ");
  at("name").textContent = name;
  const link = at("download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(await maskPng(mask, width, height, contract.palette));
  link.download = `${name.replace(/\.[^.]*$/, "")}.mask.png`;
  at("drop").classList.add("small");
  at("result").hidden = false;
}

function milliseconds(id, value) {
  const unit = document.createElement("span");
  unit.textContent = " ms";
  at(id).replaceChildren(value < 10 ? value.toFixed(1) : value.toFixed(0), unit);
}

/** The mask in colours; with a class chosen the others are dark. */
function drawOverlay() {
  const { width, height, mask, chosen } = shown;
  const context = Object.assign(at("overlay"), { width, height }).getContext("2d");
  const image = context.createImageData(width, height);
  const colours = new Uint32Array(image.data.buffer); // little-endian: 0xAABBGGRR
  const table = contract.palette.map(([r, g, b], id) =>
    chosen === null || chosen === id ? 0xff000000 + (b << 16) + (g << 8) + r : 0xff101010,
  );
  for (let i = 0; i < mask.length; i++) colours[i] = table[mask[i]];
  context.putImageData(image, 0, 0);
}

/** The classes in the photo, the largest first; pointing at one or pressing it shows it alone. */
function drawClasses() {
  const counts = new Uint32Array(contract.classes.length);
  for (const id of shown.mask) counts[id]++;
  const found = [...counts.keys()].filter((id) => counts[id]).sort((a, b) => counts[b] - counts[a]);
  const choose = (id) => {
    shown.chosen = id;
    drawOverlay();
  };
  let pressed = null;
  const items = found.map((id) => {
    const part = counts[id] / shown.mask.length;
    const button = element("button", "");
    const meter = element("span", "meter", element("div", ""));
    const swatch = element("span", "swatch");
    swatch.style.background = `rgb(${contract.palette[id]})`;
    meter.firstChild.style.width = `${100 * part}%`;
    button.append(swatch, element("span", "name", contract.classes[id]), meter, element("span", "share", percent(part)));
    button.title = `class ${id}: ${counts[id]} pixels`;
    button.ariaPressed = "false";
    button.onpointerenter = () => choose(id);
    button.onpointerleave = () => choose(pressed);
    button.onclick = () => {
      pressed = pressed === id ? null : id;
      for (const other of at("classes").querySelectorAll("button")) other.ariaPressed = "false";
      button.ariaPressed = String(pressed === id);
      choose(pressed);
    };
    return element("li", "", button);
  });
  at("classes").replaceChildren(...items);
}

function element(tag, style, ...children) {
  const made = document.createElement(tag);
  if (style) made.className = style;
  made.append(...children);
  return made;
}

function percent(part) {
  return part < 0.001 ? "< 0.1 %" : `${(100 * part).toFixed(1)} %`;
}

function take(files) {
  const photo = [...(files ?? [])].find((file) => file.type.startsWith("image/"));
  if (photo) segment(photo);
  else if (files?.length) say("That is no photo: drop a JPEG, PNG or WebP file.", "bad");
}

at("drop").classList.add("off");
at("file").onchange = () => take(at("file").files);
document.ondragover = (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
};
document.ondragleave = () => at("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files);
};
document.onpaste = (event) => take(event.clipboardData.files);
at("opacity").oninput = () => {
  at("overlay").style.opacity = at("opacity").value / 100;
  at("shown").textContent = `${at("opacity").value} %`;
};
at("opacity").oninput();
at("overlay").onpointermove = ({ offsetX, offsetY }) => {
  const box = at("overlay").getBoundingClientRect();
  const x = Math.min(Math.max(Math.floor((offsetX / box.width) * shown.width), 0), shown.width - 1);
  const y = Math.min(Math.max(Math.floor((offsetY / box.height) * shown.height), 0), shown.height - 1);
  at("under").textContent = contract.classes[shown.mask[y * shown.width + x]];
};
at("overlay").onpointerleave = () => (at("under").textContent = "");

open().catch((error) => say(`The model could not be opened: ${error.message}`, "bad"));
