// Boxes as nested elements, and the arrows of each level as curves over them.

const SVG = "http://www.w3.org/2000/svg";
const LANE = 13; // pixels between arrows that pass boxes at the side

// Returns an element with attributes and children; strings become text, never HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== ""));
  return element;
}

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// Returns the element of a level: rows of boxes, each made by `makeBox`.
function makeLevel(box, makeBox) {
  const level = make("div", { class: "level" });
  for (const row of box.rows) {
    level.append(make("div", { class: "row" }, ...row.map((i) => makeBox(box.boxes[i]))));
  }
  level.box = box;
  level.append(svg("svg", { "aria-hidden": "true" }));
  return level;
}

// Draws the arrows of every level on the page; inner levels first: lanes make boxes wider.
function drawArrows(root, withShapes) {
  const levels = [...root.querySelectorAll(".level")].reverse();
  root.classList.toggle("shapes", withShapes);
  for (const level of levels) reserveLanes(level);
  for (const level of levels) drawLevel(level, withShapes);
}

// Returns the arrows of a level that pass other boxes, each with a lane of its own where it must.
function sideArrows(box) {
  const row = {};
  box.rows.forEach((line, i) => line.forEach((k) => (row[k] = i)));
  const ends = []; // of each lane: the row where it is free again
  const lanes = new Map();
  const far = box.arrows
    .filter(([source, target]) => row[target] - row[source] > 1)
    .sort((a, b) => row[a[1]] - row[a[0]] - (row[b[1]] - row[b[0]]) || row[a[0]] - row[b[0]]);
  for (const arrow of far) {
    const taken = (lane) =>
      (ends[lane] ?? []).some(([from, to]) => row[arrow[0]] < to && from < row[arrow[1]]);
    let lane = 0;
    while (taken(lane)) lane++;
    (ends[lane] ??= []).push([row[arrow[0]], row[arrow[1]]]);
    lanes.set(arrow, lane);
  }
  return { lanes, count: ends.length };
}

function reserveLanes(level) {
  level.sides = sideArrows(level.box);
  const space = level.sides.count ? (level.sides.count + 0.8) * LANE : 0;
  level.style.paddingLeft = level.style.paddingRight = `${space}px`; // boxes stay in the middle
}

function drawLevel(level, withShapes) {
  const canvas = level.lastElementChild;
  canvas.replaceChildren(arrowHead(canvas));
  const origin = level.getBoundingClientRect();
  const places = level.box.boxes.map((box) => {
    const place = box.element.getBoundingClientRect();
    const [x, y] = [place.left - origin.left, place.top - origin.top];
    return { left: x, top: y, right: x + place.width, bottom: y + place.height,
      width: place.width, middle: x + place.width / 2, height: place.height };
  });
  const right = Math.max(...places.map((place) => place.right));
  const lines = level.box.rows.map((row) => ({
    top: Math.min(...row.map((i) => places[i].top)),
    bottom: Math.max(...row.map((i) => places[i].bottom)),
    right: Math.max(...row.map((i) => places[i].right)),
  }));
  level.box.rows.forEach((row, k) => row.forEach((i) => (places[i].row = lines[k])));
  const byTop = level.box.arrows.filter((arrow) => !comesFromSide(level, arrow, places, 1));
  const byBottom = level.box.arrows.filter((arrow) => !comesFromSide(level, arrow, places, 0));
  for (const arrow of level.box.arrows) {
    const lane = level.sides.lanes.get(arrow);
    const [source, target] = [places[arrow[0]], places[arrow[1]]];
    const x1 = byBottom.includes(arrow) ? spread(byBottom, arrow, 0, places) : null;
    const x2 = byTop.includes(arrow) ? spread(byTop, arrow, 1, places) : null;
    const path = lane === undefined
      ? across(x1, source.bottom, x2, target.top)
      : around(source, target, x1, x2, right + LANE * (lane + 1.4), lane);
    canvas.append(svg("path", { d: path.d, "marker-end": `url(#${canvas.dataset.head})` }));
    if (withShapes && arrow[2]) {
      const atSource = lane === undefined && byTop.filter((other) => other[1] === arrow[1]).length > 1;
      const [x, y] = atSource ? [x1, source.bottom + 13] : [path.x, path.y];
      const text = svg("text", { x: x + 4, y });
      text.textContent = arrow[2];
      canvas.append(text);
    }
  }
}

let heads = 0;
function arrowHead(canvas) {
  canvas.dataset.head ??= `head-${heads++}`;
  const marker = svg("marker", { id: canvas.dataset.head, viewBox: "0 0 8 8", refX: 7, refY: 4,
    markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" });
  marker.append(svg("path", { d: "M0 0L8 4L0 8z" }));
  return marker;
}

// Whether an arrow leaves (end 0) or reaches (end 1) a box at its right side: nothing stands there.
function comesFromSide(level, arrow, places, end) {
  const place = places[arrow[end]];
  return level.sides.lanes.has(arrow) && place.right >= place.row.right - 1;
}

// Returns where along a box's edge an arrow starts (end 0) or ends (end 1), among those there.
function spread(arrows, arrow, end, places) {
  const box = places[arrow[end]];
  const there = arrows.filter((other) => other[end] === arrow[end]);
  there.sort((a, b) => places[a[1 - end]].middle - places[b[1 - end]].middle);
  const part = Math.min(60, box.width / (there.length + 1));
  return box.middle + part * (there.indexOf(arrow) - (there.length - 1) / 2);
}

function across(x1, y1, x2, y2) {
  const bend = Math.min(40, Math.abs(y2 - y1) / 2);
  return { d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2 - 1}`,
    x: x2, y: y2 - 9 };
}

// Returns the path of an arrow in a lane at x: out of the side of the source, or of its bottom at x1
// and through the gap below its row; into the side of the target, or its top at x2.
function around(source, target, x1, x2, x, lane) {
  const shift = 3 * (lane % 3);
  const y1 = x1 === null ? Math.max(source.top + source.height * 0.6, source.bottom - 16)
    : source.row.bottom + 6 + shift;
  const y2 = x2 === null ? target.top + Math.min(target.height * 0.4, 22) : target.row.top - 9 - shift;
  const r = 6;
  const start = x1 === null ? `M${source.right} ${y1}` : `M${x1} ${source.bottom}V${y1 - r}q0 ${r} ${r} ${r}`;
  const end = x2 === null ? `H${target.right + 1}` : `H${x2 + r}q${-r} 0 ${-r} ${r}V${target.top - 1}`;
  return { d: `${start}H${x - r}q${r} 0 ${r} ${r}V${y2 - r}q0 ${r} ${-r} ${r}${end}`,
    x, y: (y1 + y2) / 2 + 12 * lane };
}
