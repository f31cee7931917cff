"use strict";
// Volumes are stored as axial slices: x from the patient's right, y from the front, z from above. All three planes are cut from them here.
const data = JSON.parse(document.getElementById("data").textContent);
const element = id => document.getElementById(id);
const AXES = [["Sagittal", "R", "L"], ["Coronal", "A", "P"], ["Axial", "S", "I"]]; // the plane across each axis, and the axis's ends
const PLANES = [[2, 0, 1], [1, 0, 2], [0, 1, 2]]; // across, along the width, along the height
const {grid, counts, first, sides, unit, layers} = data;
const steps = sides.map((side, axis) => side / grid[axis]); // of the volume's voxels, per stored one
const STEPS = 1000; // of the sliders for level and window
const COMPARE = -1;

const at = [0, 0, 0]; // the crosshair, in stored voxels
const windows = {}; // of each kind of layers: black and white
let shown = COMPARE, split = 50, waiting = false;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const voxel = (axis, index) => first[axis] + Math.floor((index + 0.5) * steps[axis]); // in the whole volume, from the right, front or above
const stored = (axis, index) => clamp(Math.floor((index - first[axis]) / steps[axis]), 0, grid[axis] - 1);
const sliceNumber = axis => counts[axis] - voxel(axis, at[axis]); // from 1 at the left, the back, or below
function number(value) { // three digits, and no exponent where people expect none
  const size = Math.abs(value);
  if (size < 1e-9) return "0";
  return size >= 1e6 || size < 1e-3 ? value.toExponential(2) : size >= 100 ? String(Math.round(value)) : String(Number(value.toPrecision(3)));
}
const active = () => layers[shown === COMPARE ? 1 : shown];

// Fills the volumes slice by slice, from the crosshair outwards, so that there is something to see at once.
async function decode(done) {
  const [nx, ny, nz] = grid;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [nx, ny];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const order = [...Array(nz).keys()].sort((a, b) => Math.abs(a - at[2]) - Math.abs(b - at[2]));
  const jobs = order.flatMap(z => layers.map(layer => ({layer, z})));
  const ahead = 8; // pictures that the browser decodes at a time
  const started = [];
  for (const [n, {layer, z}] of jobs.entries()) {
    while (started.length < Math.min(n + ahead, jobs.length)) {
      const next = jobs[started.length], picture = new Image();
      picture.src = "data:image/jpeg;base64," + next.layer.slices[next.z];
      started.push({picture, ready: picture.decode()});
    }
    await started[n].ready;
    context.drawImage(started[n].picture, 0, 0);
    const pixels = context.getImageData(0, 0, nx, ny).data;
    for (let i = 0, start = z * nx * ny; i < nx * ny; i++) layer.voxels[start + i] = pixels[4 * i];
    started[n] = layer.slices[z] = null;
    await done((n + 1) / jobs.length);
  }
}

// Some browsers add noise to the pixels that a page reads back, so that nobody is known by them.
function pixelsAreRead() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [256, 16];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  for (let x = 0; x < 256; x++) {
    context.fillStyle = `rgb(${x}, ${x}, ${x})`;
    context.fillRect(x, 0, 1, 16);
  }
  return context.getImageData(0, 0, 256, 16).data.every((value, i) => i % 4 === 3 || value === (i >> 2) % 256);
}

function colourTable(layer) {
  const colours = layer.colours ??= Uint8Array.from(atob(data.colours[layer.kind]), letter => letter.charCodeAt(0));
  const [low, high] = layer.range, [black, white] = windows[layer.kind];
  const table = new Uint32Array(256); // little-endian, as every browser's machine is
  for (let i = 0; i < 256; i++) {
    const value = low + (high - low) * i / 255;
    const c = 3 * clamp(Math.round(255 * (value - black) / (white - black)), 0, 255);
    table[i] = 0xff000000 | colours[c + 2] << 16 | colours[c + 1] << 8 | colours[c];
  }
  return table;
}

function paint(view) {
  const [across, wide, high] = view.axes;
  const strides = [1, grid[0], grid[0] * grid[1]];
  const [width, height] = [grid[wide], grid[high]];
  const image = view.context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const start = at[across] * strides[across];
  const fill = (layer, from, to) => {
    const table = colourTable(layer);
    for (let v = 0; v < height; v++)
      for (let u = from, i = start + v * strides[high] + from * strides[wide]; u < to; u++, i += strides[wide])
        pixels[v * width + u] = table[layer.voxels[i]];
  };
  if (shown === COMPARE) {
    const edge = Math.round(width * split / 100);
    fill(layers[1], 0, edge);
    fill(layers[0], edge, width);
  } else fill(layers[shown], 0, width);
  view.context.putImageData(image, 0, 0);
  const [name] = AXES[across];
  const text = `slice ${sliceNumber(across)} of ${counts[across]}`;
  view.caption.textContent = `${name}, ${text}`;
  view.slider.value = grid[across] - at[across];
  view.slider.setAttribute("aria-valuetext", text);
  view.box.setAttribute("aria-label", `${name}, ${text}, ${shown === COMPARE ? "result left of the line, input right of it" : layers[shown].name}`);
  view.row.style.top = 100 * (at[high] + 0.5) / height + "%";
  view.column.style.left = 100 * (at[wide] + 0.5) / width + "%";
  view.row.hidden = view.column.hidden = !element("cross").checked;
  view.split.hidden = shown !== COMPARE;
  view.split.style.left = split + "%";
}

function value(layer) {
  const byte = layer.voxels[at[0] + grid[0] * (at[1] + grid[1] * at[2])];
  const [low, high] = layer.range;
  const signs = layer.kind === "signed" ? (byte > 128 ? "+" : "") : "";
  return `${layer.name.toLowerCase()} ${byte === 255 ? "≥ " : ""}${signs}${number(unit * (layer.kind === "signed" && byte === 128 ? 0 : low + (high - low) * byte / 255))}`;
}

function place() {
  const index = at.map((_, axis) => counts[axis] - 1 - voxel(axis, at[axis])); // from the left, the back and below
  return data.affine.map((row, axis) => {
    const mm = row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3];
    return `${AXES[axis][mm >= 0 ? 1 : 2]} ${Math.abs(mm).toFixed(1)}`;
  }).join(", ");
}

function draw() {
  waiting = false;
  views.forEach(paint);
  const layer = active(), [black, white] = windows[layer.kind];
  const table = colourTable(layer), context = element("scale").getContext("2d");
  const strip = context.createImageData(256, 1), pixels = new Uint32Array(strip.data.buffer);
  const [low, high] = layer.range;
  for (let i = 0; i < 256; i++) pixels[i] = table[clamp(Math.round(255 * (black + (white - black) * i / 255 - low) / (high - low)), 0, 255)];
  context.putImageData(strip, 0, 0);
  element("low").textContent = number(black * unit);
  element("high").textContent = number(white * unit);
  const level = (black + white) / 2, width = white - black;
  element("level").value = STEPS * (level - low) / (high - low);
  element("width").value = STEPS * width / (high - low);
  element("level").disabled = layer.kind === "signed";
  for (const [id, number_] of [["level", level], ["width", width]]) {
    element(id + "-value").textContent = number(number_ * unit);
    element(id).setAttribute("aria-valuetext", number(number_ * unit));
  }
  element("split").value = split;
  element("split").setAttribute("aria-valuetext", Math.round(split) + " % result");
  element("splitter").hidden = shown !== COMPARE;
  element("about").textContent = shown === COMPARE ? "Left of the line is the result, right of it the input." : layer.about;
  element("where").textContent = `Crosshair at ${place()} mm: ${layers.map(value).join(", ")}`;
}

function redraw() {
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

function move(axis, by) {
  at[axis] = clamp(at[axis] + by, 0, grid[axis] - 1);
  redraw();
}

function setWindow(level, width) {
  const {kind, range: [low, high]} = active();
  width = clamp(width, (high - low) / STEPS, high - low);
  level = kind === "signed" ? 0 : clamp(level, low, high);
  if (kind === "positive") [level, width] = [width / 2, width];
  windows[kind] = [level - width / 2, level + width / 2];
  redraw();
}

function show(choice) {
  shown = choice;
  element("choice").querySelectorAll("input").forEach(input => { input.checked = Number(input.value) === choice; });
  redraw();
}

function reset() {
  for (const layer of layers) windows[layer.kind] = [...layer.window];
  data.centre.forEach((index, axis) => { at[axis] = stored(axis, index); });
  split = 50;
  redraw();
}

function listen(view) {
  const {box, slider, axes: [across, wide, high]} = view;
  let drag = null, turned = 0;
  slider.addEventListener("input", () => {
    at[across] = grid[across] - Number(slider.value);
    redraw();
  });
  box.addEventListener("wheel", event => {
    event.preventDefault();
    turned += event.deltaMode ? Math.sign(event.deltaY) * 40 : clamp(event.deltaY, -40, 40);
    const by = Math.trunc(turned / 40); // a notch is one slice, a touchpad sends many small turns
    turned -= 40 * by;
    move(across, by);
  }, {passive: false});
  const point = event => {
    const rectangle = box.getBoundingClientRect();
    return [(event.clientX - rectangle.left) / rectangle.width, (event.clientY - rectangle.top) / rectangle.height];
  };
  const cross = event => point(event).forEach((part, n) => {
    const axis = n ? high : wide;
    at[axis] = clamp(Math.floor(part * grid[axis]), 0, grid[axis] - 1);
  });
  box.addEventListener("pointerdown", event => {
    const nearSplit = shown === COMPARE && Math.abs(point(event)[0] - split / 100) * box.clientWidth < 12;
    const kind = nearSplit ? "split" : event.pointerType === "touch" ? "swipe" : event.button || event.shiftKey ? "window" : "cross";
    drag = {kind, x: event.clientX, y: event.clientY, index: at[across], moved: false, window: [...windows[active().kind]]};
    box.setPointerCapture(event.pointerId);
    if (kind === "cross") cross(event);
    redraw();
  });
  box.addEventListener("pointermove", event => {
    if (!drag) return;
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    drag.moved ||= Math.hypot(dx, dy) > 6;
    if (drag.kind === "split") split = clamp(100 * point(event)[0], 0, 100);
    else if (drag.kind === "cross") cross(event);
    else if (drag.kind === "swipe") at[across] = clamp(drag.index + Math.round(dx * grid[across] / box.clientWidth), 0, grid[across] - 1);
    else {
      const [black, white] = drag.window, [low, high] = active().range, perPixel = (high - low) / 400;
      setWindow((black + white) / 2 + dy * perPixel, white - black + dx * perPixel);
    }
    redraw();
  });
  box.addEventListener("pointerup", event => {
    if (drag?.kind === "swipe" && !drag.moved) cross(event);
    drag = null;
    redraw();
  });
  box.addEventListener("pointercancel", () => { drag = null; });
  box.addEventListener("contextmenu", event => event.preventDefault());
  box.addEventListener("keydown", event => {
    const moves = {ArrowLeft: [wide, -1], ArrowRight: [wide, 1], ArrowUp: [high, -1], ArrowDown: [high, 1], PageUp: [across, -1], PageDown: [across, 1]};
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(...moves[event.key]);
  });
}

function build(axes) {
  const [across, wide, high] = axes;
  const [figure, box, caption, slider] = ["figure", "div", "figcaption", "input"].map(tag => document.createElement(tag));
  const size = [wide, high].map(axis => sides[axis] * Math.hypot(...data.affine.map(row => row[axis])));
  figure.style.flexGrow = size[0];
  box.className = "view";
  box.tabIndex = 0;
  box.setAttribute("role", "application"); // so that screen readers pass the arrow keys on
  box.setAttribute("aria-roledescription", "slice");
  box.setAttribute("aria-describedby", "help");
  box.style.aspectRatio = `${size[0]} / ${size[1]}`;
  const canvas = box.appendChild(document.createElement("canvas"));
  [canvas.width, canvas.height] = [grid[wide], grid[high]];
  const [row, column, line] = ["row", "column", "split"].map(name => {
    const mark = box.appendChild(document.createElement("i"));
    mark.className = name;
    return mark;
  });
  for (const [edge, letter] of [["left", AXES[wide][1]], ["right", AXES[wide][2]], ["top", AXES[high][1]], ["bottom", AXES[high][2]]]) {
    const mark = box.appendChild(document.createElement("b"));
    mark.className = edge;
    mark.textContent = letter;
  }
  Object.assign(slider, {type: "range", min: 1, max: grid[across]});
  slider.setAttribute("aria-label", `${AXES[across][0]} slice`);
  figure.append(box, slider, caption);
  element("views").append(figure);
  const view = {axes, box, caption, slider, row, column, split: line, context: canvas.getContext("2d")};
  listen(view);
  return view;
}

function choices() {
  for (const [value, name] of [[COMPARE, "Compare"], ...layers.map((layer, n) => [n, layer.name])]) {
    const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
    Object.assign(input, {type: "radio", name: "layer", value});
    input.addEventListener("change", () => show(value));
    text.textContent = name;
    label.append(input, text);
    element("choice").append(label);
  }
  document.addEventListener("keydown", event => {
    const choice = Number(event.key) - 2;
    if (event.key >= "1" && choice < layers.length && !event.ctrlKey && !event.altKey && !event.metaKey) show(choice);
  });
}

let views = [];
async function main() {
  for (const layer of layers) layer.voxels = new Uint8Array(grid[0] * grid[1] * grid[2]).fill(layer.kind === "signed" ? 128 : 0);
  views = PLANES.map(build);
  choices();
  reset();
  show(COMPARE);
  for (const [id, act] of [
    ["split", event => { split = Number(event.target.value); redraw(); }],
    ["level", event => {
      const {range: [low, high], kind} = active(), [black, white] = windows[kind];
      setWindow(low + (high - low) * event.target.value / STEPS, white - black);
    }],
    ["width", event => {
      const {range: [low, high], kind} = active(), [black, white] = windows[kind];
      setWindow((black + white) / 2, (high - low) * event.target.value / STEPS);
    }],
    ["cross", redraw],
  ]) element(id).addEventListener("input", act);
  element("reset").addEventListener("click", reset);
  let drawn = 0;
  await decode(async part => {
    if (part < 1 && performance.now() - drawn < 100) return;
    element("viewer").hidden = false;
    element("static").hidden = true;
    element("loading").value = part;
    draw();
    await new Promise(resolve => setTimeout(resolve)); // for the screen, and for whoever scrolls already
    drawn = performance.now();
  });
  element("loading").hidden = true;
  element("state").textContent = pixelsAreRead() ? "" : "This browser adds noise to pictures that pages work on (protection against fingerprinting): "
    + "fine detail and values are not exact here.";
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
main().catch(error => {
  element("viewer").hidden = true;
  element("static").hidden = false;
  element("state").textContent = `Only the middle slices can be shown in this browser (${error.message}).`;
});
