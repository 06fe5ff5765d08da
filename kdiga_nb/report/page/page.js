// The page: controls, one card per net, the curve of published accuracies.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const made = {};
const net = (key) => (made[key] ??= ready(DATA.nets[key])); // unpacked at first use
const at = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(
    ["svg", "path", "circle", "line", "text", "polyline"].includes(tag) ? "http://www.w3.org/2000/svg" : document.documentElement.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const state = { image: DATA.digits[0].pixels, label: DATA.digits[0].label, digit: 0, epsilon: 0.1, drawn: false };
const percent = (p) => (p < 0.001 ? "0" : (100 * p).toFixed(p < 0.1 ? 1 : 0)) + " %";
const decimals = (value) => value.toFixed(3).replace(/0$/, "");

// ---- pictures ----

function paint(canvas, colors) {
  canvas.width = canvas.height = DATA.side;
  const context = canvas.getContext("2d"), pixels = context.createImageData(DATA.side, DATA.side);
  colors.forEach((color, i) => pixels.data.set([...color, 255], 4 * i));
  context.putImageData(pixels, 0, 0);
}
const ink = (image) => Array.from(image, (value) => { const grey = Math.round(255 * (1 - value)); return [grey, grey, grey]; });
function signed(values) {
  const largest = Math.max(...values.map(Math.abs)) || 1, ends = [[33, 102, 172], [178, 24, 43]];
  return Array.from(values, (value) => {
    const share = Math.abs(value) / largest, end = ends[value > 0 ? 1 : 0];
    return end.map((channel) => Math.round(247 + share * (channel - 247)));
  });
}

// ---- controls ----

const picker = at("digits");
DATA.digits.forEach((digit, i) => {
  const canvas = make("canvas", { "aria-hidden": "true" });
  paint(canvas, ink(digit.pixels));
  const button = make("button", { type: "button", role: "radio", "aria-label": `digit ${digit.label}, image ${i + 1} of ${DATA.digits.length}` }, canvas);
  button.addEventListener("click", () => choose(i));
  picker.append(button);
});
picker.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose((state.digit + step + DATA.digits.length) % DATA.digits.length);
  picker.children[state.digit].focus();
});

function choose(i) {
  Object.assign(state, { digit: i, image: DATA.digits[i].pixels, label: DATA.digits[i].label, drawn: false });
  at("drawing-label").value = "auto";
  drawPad();
  refresh();
}

// ε has the bar at the top; λ and the loop have sliders in their cards.
const slider = (id, least, most, value) => make("input", { id, type: "range", min: least, max: most, step: 1, value });
const epsilon = at("epsilon"), weight = slider("lambda", 0, DATA.lambdas.length - 1, DATA.lambdas.indexOf(DATA.lambda)), loop = slider("loop", 1, DATA.loops, 1);
for (const one of [epsilon, weight, loop]) one.addEventListener("input", () => refresh());
const labelled = { kdiga: make("label", {}, "weight λ", weight), isd_wot: make("label", {}, "loop", loop) };

// ---- a digit of one's own ----

const pad = at("pad");
let cursor = [3, 3], stroke = false;
function drawPad() {
  paint(pad, ink(state.image));
  [...picker.children].forEach((button, i) => {
    const chosen = !state.drawn && i === state.digit;
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = i === state.digit ? 0 : -1;
  });
}
function dab([column, row], erase) {
  const image = Float64Array.from(state.image);
  for (let y = 0; y < DATA.side; y++)
    for (let x = 0; x < DATA.side; x++) {
      const distance = Math.hypot(x - column, y - row), strength = Math.max(0, 1 - distance / 1.5);
      const i = y * DATA.side + x;
      image[i] = erase ? Math.max(0, image[i] - strength) : Math.min(1, image[i] + 0.8 * strength);
    }
  edit(image);
}
function edit(image) {
  Object.assign(state, { image, drawn: true });
  drawPad();
  refresh();
}
const cell = (event) => {
  const box = pad.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top].map((value, i) => Math.floor((value / (i ? box.height : box.width)) * DATA.side));
};
pad.addEventListener("pointerdown", (event) => { stroke = true; pad.setPointerCapture(event.pointerId); dab(cell(event), event.shiftKey); });
pad.addEventListener("pointermove", (event) => { if (stroke) dab(cell(event), event.shiftKey); });
for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => (stroke = false));
pad.addEventListener("keydown", (event) => {
  const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (move) cursor = cursor.map((value, i) => Math.min(DATA.side - 1, Math.max(0, value + move[i])));
  else if (event.key === " " || event.key === "Delete" || event.key === "Backspace") dab(cursor, event.key !== " ");
  else return;
  event.preventDefault();
  at("cursor").textContent = `Pen at column ${cursor[0] + 1}, row ${cursor[1] + 1}.`;
});
at("clear").addEventListener("click", () => edit(new Float64Array(DATA.side ** 2)));
at("drawing-label").addEventListener("change", () => refresh());
for (let digit = 0; digit < 10; digit++) at("drawing-label").append(make("option", { value: digit }, String(digit)));

// ---- one card per net ----

const cards = Object.fromEntries(DATA.columns.map((column) => {
  const part = (name, tag = "div") => make(tag, { class: name });
  const view = {
    title: part("title", "h3"), verdict: part("verdict", "p"), attack: part("picture", "canvas"), gradient: part("picture", "canvas"),
    bars: part("bars"), radius: part("radius", "p"), scale: part("scale"), tally: part("tally", "p"),
  };
  for (let digit = 0; digit < 10; digit++) view.bars.append(make("span", {}, make("i"), make("b", {}, String(digit))));
  view.scale.append(make("i"), make("b"));
  const figure = (canvas, text) => make("figure", {}, canvas, make("figcaption", {}, text));
  const card = make("article", { class: "card", style: `--method: ${column.color}`, "aria-label": column.name },
    view.title, labelled[column.id] ?? make("p", { class: "what" }, column.what), view.verdict, make("div", { class: "pair" }, figure(view.attack, "attacked image"), figure(view.gradient, "input gradient")),
    view.bars, view.radius, view.scale, view.tally);
  at("cards").append(card);
  return [column.id, { ...view, card, column }];
}));

const keyOf = (column) => ({ kdiga: `kdiga_${weight.value}`, isd_wot: `isd_wot_${loop.value}` })[column.id] || column.id;
const nameOf = (column) => ({ kdiga: `KDIGA, λ = ${DATA.lambdas[weight.value]}`, isd_wot: `ISD-WoT, loop ${loop.value}` })[column.id] || column.name;

function labelNow() {
  if (!state.drawn) return state.label;
  const chosen = at("drawing-label").value;
  return chosen === "auto" ? best(logits(net("trades_teacher"), state.image)) : Number(chosen);
}

let turn = 0;
function refresh() {
  state.epsilon = Number(epsilon.value);
  at("epsilon-value").textContent = decimals(state.epsilon);
  epsilon.setAttribute("aria-valuetext", `${decimals(state.epsilon)} of the range from black to white`);
  weight.setAttribute("aria-valuetext", String(DATA.lambdas[weight.value]));
  const label = labelNow(), said = [];
  at("drawing-label").disabled = !state.drawn;
  at("drawing-says").textContent = state.drawn ? `Your digit counts as a ${label}.` : `The image is a ${label}.`;
  for (const column of DATA.columns) said.push(show(column, label));
  at("summary").textContent = `At ε = ${decimals(state.epsilon)}: ${said.join("; ")}.`;
  plot();
  later(++turn, label);
}

function show(column, label) {
  const view = cards[column.id], model = net(keyOf(column));
  const adversarial = attacked(model, state.image, label, state.epsilon), belief = softmax(logits(model, adversarial));
  const answer = best(belief), holds = answer === label;
  view.title.textContent = nameOf(column);
  view.verdict.textContent = holds ? `✓ holds: still a ${label}` : `✗ fooled: says ${answer}`;
  view.card.classList.toggle("fooled", !holds);
  paint(view.attack, ink(adversarial));
  paint(view.gradient, signed(inputGradient(model, state.image, label)));
  view.attack.setAttribute("role", "img");
  view.attack.setAttribute("aria-label", `the image after the attack on ${nameOf(column)}`);
  view.gradient.setAttribute("role", "img");
  view.gradient.setAttribute("aria-label", `input gradient of ${nameOf(column)}: red pixels raise the loss, blue ones lower it`);
  [...view.bars.children].forEach((bar, digit) => {
    bar.firstChild.style.height = `${100 * belief[digit]}%`;
    bar.className = digit === label ? "true" : digit === answer ? "answer" : "";
    bar.title = `${digit}: ${percent(belief[digit])}`;
  });
  view.scale.lastChild.style.left = `${Math.min(100, (100 * state.epsilon) / 0.3)}%`;
  return `${nameOf(column)} ${holds ? "holds" : `says ${answer}`}`;
}

// ---- what takes longer comes after a pause, net by net ----

const radii = new Map(), tallies = new Map();
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
async function later(mine, label) {
  await pause(60);
  for (const column of DATA.columns) {
    if (mine !== turn) return;
    const key = keyOf(column), view = cards[column.id], memory = `${key} ${label} ${Array.from(state.image)}`;
    if (!radii.has(memory)) radii.set(memory, smallestEpsilon(net(key), state.image, label));
    const radius = radii.get(memory);
    view.radius.textContent = radius === null ? "no ε up to 0.5 fools it" : radius === 0 ? "wrong without an attack" : `smallest ε that fools it: ${radius.toFixed(3)}`;
    view.scale.firstChild.style.width = `${Math.min(100, (100 * (radius ?? 0.5)) / 0.3)}%`;
    await pause(0);
  }
  await pause(250);
  for (const column of DATA.columns) {
    const key = keyOf(column), memory = `${key} ${state.epsilon}`;
    if (!tallies.has(memory)) {
      let held = 0;
      for (const digit of DATA.digits) {
        if (mine !== turn) return;
        held += best(logits(net(key), attacked(net(key), digit.pixels, digit.label, state.epsilon))) === digit.label;
        await pause(0);
      }
      tallies.set(memory, held);
    }
    if (mine !== turn) return;
    cards[column.id].tally.textContent = `holds on ${tallies.get(memory)} of the ${DATA.digits.length} digits above`;
  }
}

// ---- published accuracies against ε ----

function plot() {
  const narrow = window.innerWidth < 640, width = narrow ? 340 : 720, height = narrow ? 240 : 300, left = 40, right = narrow ? 12 : 150, top = 12, bottom = 40;
  const x = (value) => left + (value / 0.2) * (width - left - right), y = (value) => top + (1 - value / 100) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": DATA.curveText });
  for (const tick of [0, 25, 50, 75, 100]) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const tick of [0, 0.05, 0.1, 0.15, 0.2]) svg.append(make("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle" }, String(tick)));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "ε, in pixels of [0, 1]"));
  const ends = [];
  for (const curve of DATA.curves) {
    const style = `--method: ${curve.color}`;
    svg.append(make("polyline", { class: "curve", style, points: curve.points.map((p) => `${x(p.epsilon)},${y(p.value)}`).join(" ") }));
    for (const p of curve.points) {
      svg.append(make("line", { class: "interval", style, x1: x(p.epsilon), x2: x(p.epsilon), y1: y(p.low), y2: y(p.high) }));
      svg.append(make("circle", { class: "point", style, cx: x(p.epsilon), cy: y(p.value), r: 3 }));
    }
    const last = curve.points[curve.points.length - 1];
    ends.push({ curve, style, y: y(last.value) });
  }
  if (!narrow) {
    ends.sort((a, b) => a.y - b.y);
    ends.forEach((end, i) => (end.y = i ? Math.max(end.y, ends[i - 1].y + 15) : end.y));
    const over = Math.max(0, ends[ends.length - 1].y - y(0));
    ends.forEach((end) => svg.append(make("text", { class: "name", style: end.style, x: x(0.2) + 10, y: end.y - over + 4 }, end.curve.name)));
  }
  const here = Math.min(state.epsilon, 0.2);
  svg.append(make("line", { class: "now", x1: x(here), x2: x(here), y1: top, y2: height - bottom }));
  at("curve").replaceChildren(svg);
  at("legend").replaceChildren(...(narrow ? DATA.curves.map((curve) => make("span", { style: `--method: ${curve.color}` }, curve.name)) : []));
}
window.addEventListener("resize", plot);

// The start: the first image on which the nets differ.
const differ = (digit) => ["kd", `kdiga_${weight.value}`].map((key) => best(logits(net(key), attacked(net(key), digit.pixels, digit.label, 0.1))) === digit.label).join() === "false,true";
choose(Math.max(0, DATA.digits.findIndex(differ)));
