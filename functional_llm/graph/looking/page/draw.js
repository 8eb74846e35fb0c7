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
  const space = level.sides.count ? level.sides.count * LANE + 8 : 0;
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
  const direct = level.box.arrows.filter((arrow) => !level.sides.lanes.has(arrow));
  for (const arrow of level.box.arrows) {
    const [source, target] = [places[arrow[0]], places[arrow[1]]];
    const lane = level.sides.lanes.get(arrow);
    const path = lane === undefined
      ? across(spread(direct, arrow, 0, places), source.bottom, spread(direct, arrow, 1, places), target.top)
      : around(source, target, right + 8 + lane * LANE);
    canvas.append(svg("path", { d: path.d, "marker-end": `url(#${canvas.dataset.head})` }));
    if (withShapes && arrow[2]) {
      const text = svg("text", { x: path.x + 4, y: path.y });
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
    x: (x1 + x2) / 2, y: (y1 + y2) / 2 + 3 };
}

function around(source, target, x) {
  const y1 = source.top + source.height * 0.6;
  const y2 = target.top + Math.min(target.height * 0.4, 22);
  const r = Math.max(0, Math.min(8, x - source.right, x - target.right, (y2 - y1) / 2));
  return { d: `M${source.right} ${y1}H${x - r}q${r} 0 ${r} ${r}V${y2 - r}q0 ${r} ${-r} ${r}` +
    `H${target.right + 1}`, x, y: (y1 + y2) / 2 };
}
