// What is open and selected, the search, the list of changes, the details, the keys.

const data = JSON.parse(document.getElementById("data").textContent);
const model = data.model;
const at = (id) => document.getElementById(id);
const all = []; // every box, from the outermost inwards
const changes = []; // {box, gone}: what is other, in the order of the graph
const state = { selected: null, path: null, shapes: false, change: -1 };

(function collect(box, parent) {
  box.parent = parent;
  all.push(box);
  box.change ??= "";
  for (const gone of box.removed ?? []) changes.push({ box, gone });
  if (box.change && box.change !== "inside") changes.push({ box });
  for (const key of ["boxes", "arrows", "rows", "paths", "takes", "returns"]) box[key] ??= [];
  for (const inner of box.boxes) collect(inner, box);
})(model, null);

// Boxes.

const opens = (box) => box.kind === "graph" && box.boxes.length > 0;
const count = (n) => n.toLocaleString("en");

function lines(box) {
  const said = box.kind === "block" || box.title === box.formula; // what it takes
  const kind = [box.class, box.quantization, box.given].filter(Boolean).join(", ");
  return [
    kind && make("small", {}, kind),
    box.takes.length && !said && make("small", { class: "takes" }, `◂ ${box.takes.join(", ")}`),
    box.returns.length && make("small", { class: "returns" }, `▸ ${box.returns.join(", ")}`),
    ...(box.removed ?? []).map((name) => make("small", { class: "removed" }, `− ${name}`)),
  ].filter(Boolean);
}

function makeBox(box) {
  const element = make("div", { class: `box ${box.kind} ${box.change}` });
  element.box = box;
  box.element = element;
  fill(box);
  return element;
}

function fill(box) {
  const element = box.element;
  const name = make(box.kind === "operations" ? "i" : "b", {}, box.title ?? "");
  const times = box.times ? make("span", { class: "times" }, `×${box.times}`) : "";
  const role = box.kind === "input" ? {} : { tabindex: 0, role: "button" };
  if (opens(box)) role["aria-expanded"] = String(Boolean(box.opened));
  const label = [box.title, box.class].filter(Boolean).join(", ") || "repeated block";
  const head = make("div", { class: "head", "aria-label": label, ...role }, name, times, ...lines(box));
  const inside = box.boxes.length && (box.opened || box.kind === "block");
  element.classList.toggle("opened", Boolean(inside) && box.kind !== "block");
  element.replaceChildren(head);
  if (inside) element.append(makeLevel(box, makeBox));
}

function setOpen(box, opened) {
  if (!opens(box) || Boolean(box.opened) === opened) return;
  box.opened = opened;
  if (box.element?.isConnected) fill(box);
}

function reveal(box) {
  const around = [];
  for (let outer = box.parent; outer; outer = outer.parent) around.unshift(outer);
  for (const outer of around) if (outer !== model) setOpen(outer, true);
  redraw();
}

function redraw() {
  drawArrows(at("graph"), state.shapes);
  for (const element of document.querySelectorAll(".selected")) element.classList.remove("selected");
  state.selected?.element?.classList.add("selected");
}

function select(box, path, { focus = true, scroll = false } = {}) {
  state.selected = box;
  state.path = path ?? box.paths[0];
  redraw();
  showDetails(box);
  const head = box.element?.firstElementChild;
  if (focus) head?.focus({ preventScroll: true });
  if (scroll) head?.scrollIntoView({ block: "center", inline: "center" });
}

at("graph").addEventListener("click", (event) => {
  const head = event.target.closest(".head");
  const box = head?.parentElement.box;
  if (!box || box.kind === "input") return;
  setOpen(box, !box.opened);
  select(box);
});

function openAll(opened) {
  for (const box of all) if (box !== model) box.opened = opened && opens(box);
  show();
}

function show() {
  at("graph").replaceChildren(makeLevel(model, makeBox));
  redraw();
}

// The details of a box.

function table(rows) {
  return make("table", {}, ...rows.map(([name, ...cells]) =>
    make("tr", {}, make("th", {}, name), ...cells.map((x) => make("td", {}, String(x))))));
}

function section(title, ...content) {
  const kept = content.filter((x) => x && (x.tagName !== "TABLE" || x.rows.length));
  return kept.length ? [make("h3", {}, title), ...kept] : [];
}

function bytes(dtypes) {
  const bits = (dtype) => Number(/\d+/.exec(dtype)?.[0] ?? 8);
  const sum = Object.entries(dtypes).reduce((total, [dtype, n]) => total + (n * bits(dtype)) / 8, 0);
  const unit = sum < 1e6 ? [1e3, "kB"] : sum < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${(sum / unit[0]).toFixed(1)} ${unit[1]}`;
}

function numberRows(box) {
  const { all: total, trainable, dtypes } = box.numbers ?? {};
  if (!total) return [];
  const share = `${count(trainable)} (${((100 * trainable) / total).toFixed(1)} %)`;
  const each = Object.entries(dtypes).map(([dtype, n]) => `${dtype}: ${count(n)}`).join(", ");
  const rows = [["parameters", count(total)], ["trainable", share], ["memory", `${bytes(dtypes)}; ${each}`]];
  const many = box.paths.length;
  return many > 1 ? [...rows, [`in all ${many}`, count(total * many)]] : rows;
}

function weightRows(box) {
  return (box.weights ?? []).map(([name, shape, dtype, trainable]) =>
    [name, shape.length ? `(${shape.join(", ")})` : "scalar", dtype, trainable ? "trains" : "frozen"]);
}

function pathsOf(box) {
  if (box.paths.length < 2) return [];
  const list = make("details", {}, make("summary", {}, `stands for ${box.paths.length} equal layers`));
  list.append(...box.paths.map((path) => make("div", {}, make("code", {}, path))));
  return [list];
}

const WORDS = { added: "new", changed: "other than in the original", inside: "has changes inside" };

function showDetails(box) {
  const path = state.path || (box.kind === "operations" ? "" : box.title);
  const where = box.kind === "operations" ? `in ${path || "the model"}` : path;
  const changed = box.change && make("p", {}, make("span", { class: `swatch ${box.change}` }, WORDS[box.change]));
  const gone = (box.removed ?? []).map((x) => make("div", { class: "removed" }, `− ${x}`));
  const split = (text) => [text.slice(0, text.lastIndexOf(": ")), text.slice(text.lastIndexOf(": ") + 2)];
  at("details").replaceChildren(
    make("h2", {}, box.title || `block ×${box.times}`),
    make("div", {}, make("code", {}, where)),
    ...pathsOf(box),
    ...(changed ? [changed, ...(box.lines ?? []).map((x) => make("div", {}, x))] : []),
    ...gone,
    ...section("", table([["class", box.class], ["called with", box.given], ["quantised", box.quantization]]
      .filter((row) => row[1]))),
    ...section("computes", ...(box.formula ?? "").split("\n").filter(Boolean)
      .map((x) => make("div", {}, make("code", {}, x)))),
    ...section("takes", table((box.inputs ?? []).map(split))),
    ...section("returns", table((box.outputs ?? []).map((x) => [x]))),
    ...section("weights", table(numberRows(box)), table(weightRows(box))),
    ...section("config", table(Object.entries(box.config ?? {}).map(([key, x]) => [key, String(x)]))),
  );
}

// The search.

// Whether a pattern as of `flm.select`, or a part of a path, a class or a formula, describes a text.
function matcher(text) {
  if (!/[*?]/.test(text)) {
    const part = text.toLowerCase();
    return (x) => x.toLowerCase().includes(part);
  }
  const special = { "**/": "(?:.*/)?", "/**": "/.*", "**": ".*", "*": "[^/]*", "?": "[^/]" };
  const pieces = text.split(/(\*\*\/|\/\*\*|\*\*|\*|\?)/);
  const escaped = (x) => x.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const expression = new RegExp(`^${pieces.map((x) => special[x] ?? escaped(x)).join("")}$`, "i");
  return (x) => expression.test(text.includes("/") ? x : x.split("/").pop());
}

const MOST = 100;
let found = [];

function search() {
  const text = at("search").value.trim();
  found = [];
  if (text) {
    const fits = matcher(text);
    for (const box of all.slice(1)) {
      if (box.kind === "operations" ? box.formula && fits(box.formula) : fits(box.class ?? "")) {
        found.push([box, box.paths[0]]);
      } else if (box.kind !== "operations") {
        for (const path of box.paths) if (fits(path)) found.push([box, path]);
      }
    }
  }
  found.sort((a, b) => a[1].length - b[1].length);
  const shown = found.slice(0, MOST).map(([box, path]) => {
    const named = box.kind === "operations" ? `${box.formula} in ${path || "the model"}` : path;
    const more = box.paths.length > 1 && !path.includes("*") ? ` (one of ${box.paths.length})` : "";
    const button = make("button", { class: box.change }, named, " ",
      make("span", { class: "soft" }, (box.class ?? "") + more));
    button.addEventListener("click", () => go(box, path));
    return make("li", {}, button);
  });
  if (text && !found.length) shown.push(make("li", { class: "soft" }, `Nothing matches ${text}.`));
  if (found.length > MOST) shown.push(make("li", { class: "soft" }, `and ${found.length - MOST} more`));
  at("results").replaceChildren(...shown);
  at("results").hidden = !text;
}

function go(box, path) {
  reveal(box);
  select(box, path, { scroll: true });
}

at("search").addEventListener("input", search);
at("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && found.length) go(...found[0]);
  if (event.key === "ArrowDown") at("results").querySelector("button")?.focus();
  if (event.key === "Escape") { at("search").value = ""; search(); at("search").blur(); }
});

// The list of changes.

function listChanges() {
  if (!data.beside) return;
  at("changes").hidden = false;
  const items = changes.map(({ box, gone }, i) => {
    const many = box.paths.length > 1 ? ` ×${box.paths.length}` : "";
    const inside = gone && box !== model ? `in ${box.paths[0] ?? ""}${many}` : "";
    const name = gone ? `− ${gone}` : `${box.kind === "operations" ? box.title : box.paths[0]}${many}`;
    const text = gone ? inside : box.lines?.join("; ") ?? WORDS[box.change];
    const button = make("button", { class: gone ? "gone" : box.change }, name, " ",
      make("span", { class: "soft" }, text));
    button.addEventListener("click", () => step(i));
    return make("li", {}, button);
  });
  if (!items.length) items.push(make("li", { class: "soft" }, `The same as ${data.beside.name}.`));
  at("changes").querySelector("ol").replaceChildren(...items);
  at("at").textContent = changes.length ? `${changes.length} ` : "";
}

function step(i) {
  if (!changes.length) return;
  state.change = (i + changes.length) % changes.length;
  const { box } = changes[state.change];
  if (box === model) showDetails(model);
  else go(box);
  const buttons = [...at("changes").querySelectorAll("li > button")];
  buttons.forEach((button, k) => button.setAttribute("aria-current", String(k === state.change)));
  buttons[state.change].scrollIntoView({ block: "nearest" });
  at("at").textContent = `${state.change + 1} of ${changes.length} `;
}

at("next").addEventListener("click", () => step(state.change + 1));
at("previous").addEventListener("click", () => step(state.change < 0 ? -1 : state.change - 1));

// Keys and buttons.

function moveInto(box) {
  if (opens(box) && !box.opened) { setOpen(box, true); return select(box); }
  box.element.querySelector(":scope > .level .head[tabindex]")?.focus();
}

function moveOut(box) {
  if (box.opened) { setOpen(box, false); return select(box); }
  if (box.parent && box.parent !== model) select(box.parent, undefined, { scroll: true });
}

function moveBy(step) {
  const heads = [...at("graph").querySelectorAll(".head[tabindex]")];
  const next = heads[heads.indexOf(document.activeElement) + step];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

at("graph").addEventListener("focusin", (event) => {
  const box = event.target.parentElement.box;
  if (box && box !== state.selected) select(box, undefined, { focus: false });
});

const BOX_KEYS = {
  Enter: (box) => { setOpen(box, !box.opened); select(box); },
  " ": (box) => { setOpen(box, !box.opened); select(box); },
  ArrowRight: moveInto,
  ArrowLeft: moveOut,
  ArrowDown: () => moveBy(1),
  ArrowUp: () => moveBy(-1),
};
const PAGE_KEYS = {
  "/": () => at("search").focus(),
  n: () => at("next").click(),
  p: () => at("previous").click(),
  o: () => openAll(true),
  c: () => openAll(false),
  s: () => at("shapes").click(),
  t: () => at("theme").click(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.id === "search") return;
  const box = event.target.closest?.(".head")?.parentElement.box;
  const act = (box && BOX_KEYS[event.key]) ?? PAGE_KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act(box);
});

at("open-all").addEventListener("click", () => openAll(true));
at("close-all").addEventListener("click", () => openAll(false));
at("shapes").addEventListener("click", () => {
  state.shapes = !state.shapes;
  at("shapes").setAttribute("aria-pressed", String(state.shapes));
  redraw();
});

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(prefersDark.matches);
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches));
at("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme !== "dark"));

// The start: what changed is open; of an original, the layers of the model are.

function numbersOf({ all: total, trainable }) {
  return `${count(total ?? 0)} parameters, ${count(trainable ?? 0)} trainable`;
}

at("name").textContent = `${model.title} (${model.class || "CompositeLayer"})`;
const besides = data.beside ? `; beside it ${data.beside.name}: ${numbersOf(data.beside.numbers)}` : "";
at("numbers").textContent = numbersOf(model.numbers ?? {}) + besides;
const outer = (box) => box.parent === model || (box.parent.kind === "block" && outer(box.parent));
for (const box of all.slice(1)) {
  box.opened = opens(box) && (data.beside ? box.change === "inside" : outer(box));
}
show();
listChanges();
showDetails(model);
at("graph").scrollLeft = (at("graph").scrollWidth - at("graph").clientWidth) / 2;
new ResizeObserver(redraw).observe(at("graph"));
