// Drawing without a library: thousands of live curves on a canvas, and the figures of figures.py (Plotly's form) as SVG.
// Text is set as text; colours of the light page are replaced one by one on the dark one.

const DASHES = { solid: [], dot: [2, 4], dash: [8, 5], longdash: [13, 6], dashdot: [8, 4, 2, 4], longdashdot: [13, 4, 2, 4] };
const SVG = "http://www.w3.org/2000/svg";
let palette = {};

export const setPalette = (colours) => { palette = colours; };
export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
export const paint = (colour) => (isDark() && palette[colour]) || colour;
const INK = "#1b2430", FAINT = "#5b6675", GRID = "#dfe3e8", PICKED = "#c75300";

// Curves on a canvas ------------------------------------------------------------------------------------------------------

// One panel: a metric by epoch, a line a trial. Lines lie on one canvas that is drawn again only when something about all
// of them changed; what is new is added to it, and what is picked or pointed at lies on a second one above.
export class Curves {
  constructor(host, { key, label, onPick }) {
    this.key = key;
    this.onPick = onPick;
    this.trials = new Map(); // id -> {values: [by epoch], group, drw, ended}
    this.groups = new Map(); // key -> {colour, dash}
    this.hidden = new Set();
    this.picked = [];
    this.best = null;
    this.rungs = [];
    this.epochs = 1;
    this.low = 0.42;
    this.under = document.createElement("canvas");
    this.over = document.createElement("canvas");
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    host.classList.add("curves");
    host.setAttribute("role", "img");
    host.setAttribute("aria-label", label);
    host.append(this.under, this.over, this.tip);
    this.host = host;
    this.waiting = null;
    this.news = [];
    new ResizeObserver(() => this.redraw()).observe(host);
    this.over.addEventListener("pointermove", (event) => this.point(event));
    this.over.addEventListener("pointerleave", () => this.point(null));
    this.over.addEventListener("click", (event) => { const id = this.nearest(event); if (id) this.onPick(id); });
  }

  set(id, values, about) {
    this.trials.set(id, { values, ...about });
    this.grow(values);
  }

  about(id, about) { // true when the line has to be drawn another way
    const trial = this.trials.get(id);
    if (!trial) return false;
    const other = trial.group !== about.group || trial.ended !== about.ended;
    Object.assign(trial, about);
    return other;
  }

  grow(values) {
    let grown = false;
    for (const value of values) {
      if (value !== null && value !== undefined && value < this.low) { this.low = Math.max(0, value - 0.03); grown = true; }
    }
    if (values.length > this.epochs) { this.epochs = values.length; grown = true; }
    return grown;
  }

  add(id, epoch, value) { // a new epoch: its segment is drawn onto what is there
    let trial = this.trials.get(id);
    if (!trial) { trial = { values: [], group: "healthy", drw: null, ended: false }; this.trials.set(id, trial); }
    while (trial.values.length < epoch) trial.values.push(null);
    if (trial.values[epoch - 1] === value) return;
    trial.values[epoch - 1] = value;
    if (this.grow(trial.values)) this.redraw(); else { this.news.push([id, epoch]); this.later(false); }
  }

  redraw() { this.whole = true; this.later(); }
  later() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  size() {
    const width = this.host.clientWidth, height = this.host.clientHeight, ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.under, this.over]) {
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
        this.whole = true;
      }
    }
    this.box = { left: 38, top: 16, right: width - 8, bottom: height - 26, width, height, ratio };
  }

  x(epoch) { return this.box.left + ((epoch - 1) / Math.max(1, this.epochs - 1)) * (this.box.right - this.box.left); }
  y(value) { return this.box.bottom - ((value - this.low) / (1.01 - this.low)) * (this.box.bottom - this.box.top); }

  draw() {
    this.size();
    if (this.box.width < 40) return;
    const started = performance.now();
    const below = this.under.getContext("2d");
    below.setTransform(this.box.ratio, 0, 0, this.box.ratio, 0, 0);
    if (this.whole) this.drawAll(below); else this.drawNews(below);
    this.whole = false;
    this.news = [];
    this.drawOver();
    this.host.dataset.ms = (performance.now() - started).toFixed(1);
    this.host.dataset.drawn = String(this.trials.size);
  }

  drawAll(pen) {
    const { left, top, right, bottom, width, height } = this.box;
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    pen.lineWidth = 1;
    pen.fillStyle = paint(FAINT);
    pen.strokeStyle = paint(GRID);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let step = Math.ceil(this.low * 10); step <= 10; step += 1) {
      const y = this.y(step / 10);
      pen.beginPath(); pen.moveTo(left, y); pen.lineTo(right, y); pen.stroke();
      pen.fillText((step / 10).toFixed(1), left - 6, y);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    const every = niceStep(this.epochs, (right - left) / 44);
    for (let epoch = every; epoch <= this.epochs; epoch += every) if (this.x(epoch) > left + 44) pen.fillText(String(epoch), this.x(epoch), bottom + 6);
    pen.textAlign = "left";
    pen.fillText("epoch", left, bottom + 6);
    pen.setLineDash([2, 3]);
    pen.textBaseline = "bottom";
    pen.strokeStyle = paint(FAINT);
    this.rungs.forEach((rung, i) => {
      if (rung > this.epochs) return;
      pen.globalAlpha = 0.6;
      pen.beginPath(); pen.moveTo(this.x(rung), top); pen.lineTo(this.x(rung), bottom); pen.stroke();
      pen.globalAlpha = 1;
      pen.textAlign = "center";
      pen.fillText(i ? String(rung) : `rung ${rung}`, Math.max(this.x(rung), left + 16), top - 1);
    });
    pen.setLineDash([6, 4]);
    if (this.low < 0.5) { pen.beginPath(); pen.moveTo(left, this.y(0.5)); pen.lineTo(right, this.y(0.5)); pen.stroke(); }
    const by = new Map();
    for (const [id, trial] of this.trials) {
      if (this.hidden.has(trial.group)) continue;
      if (!by.has(trial.group)) by.set(trial.group, []);
      by.get(trial.group).push([id, trial]);
    }
    const order = [...by.keys()].sort((a, b) => (a === "healthy") - (b === "healthy"));
    for (const key of order) {
      const group = this.groups.get(key) || { colour: "#00609c", dash: "solid" };
      const lines = by.get(key);
      pen.strokeStyle = paint(group.colour);
      pen.lineWidth = key === "healthy" ? 1.5 : 1.2;
      pen.setLineDash(lines.length > 150 ? [] : DASHES[group.dash] || []); // dashes of hundreds of lines are noise, and slow
      pen.globalAlpha = lines.length < 15 ? 0.9 : lines.length < 150 ? 0.55 : 0.22;
      pen.beginPath();
      for (const [, trial] of lines) this.trace(pen, trial.values);
      pen.stroke();
      pen.setLineDash([]);
      pen.globalAlpha = lines.length < 150 ? 0.9 : 0.5;
      pen.fillStyle = pen.strokeStyle;
      for (const [, trial] of lines) this.marks(pen, trial, this.trials.size < 150); // of more, DRW starts are a cloud
      pen.globalAlpha = 1;
    }
  }

  trace(pen, values, from = 0) {
    let open = false;
    for (let i = from; i < values.length; i += 1) {
      const value = values[i];
      if (value === null || value === undefined) { open = false; continue; }
      if (open) pen.lineTo(this.x(i + 1), this.y(value)); else { pen.moveTo(this.x(i + 1), this.y(value)); open = true; }
    }
    if (values.length - from === 1 && open) pen.lineTo(this.x(from + 1) + 1, this.y(values[from]));
  }

  marks(pen, trial, drw) {
    if (trial.ended) {
      const last = trial.values.length;
      const value = trial.values[last - 1];
      if (value !== null && value !== undefined) pen.fillRect(this.x(last) - 2, this.y(value) - 4, 2.5, 8);
    }
    const at = trial.drw;
    if (drw && at && trial.values[at - 1] !== null && trial.values[at - 1] !== undefined) {
      const x = this.x(at), y = this.y(trial.values[at - 1]);
      pen.beginPath(); pen.moveTo(x - 2.5, y - 3.5); pen.lineTo(x + 3.5, y); pen.lineTo(x - 2.5, y + 3.5); pen.closePath();
      pen.lineWidth = 1; pen.stroke();
    }
  }

  drawNews(pen) {
    for (const [id, epoch] of this.news) {
      const trial = this.trials.get(id);
      if (!trial || this.hidden.has(trial.group)) continue;
      const group = this.groups.get(trial.group) || { colour: "#00609c", dash: "solid" };
      pen.strokeStyle = paint(group.colour);
      pen.lineWidth = 1.5;
      pen.globalAlpha = 0.9;
      pen.beginPath();
      this.trace(pen, trial.values.slice(0, epoch), Math.max(0, epoch - 2));
      pen.stroke();
      pen.globalAlpha = 1;
    }
  }

  drawOver() {
    const pen = this.over.getContext("2d");
    pen.setTransform(this.box.ratio, 0, 0, this.box.ratio, 0, 0);
    pen.clearRect(0, 0, this.box.width, this.box.height);
    const thick = (id, colour, width) => {
      const trial = this.trials.get(id);
      if (!trial) return;
      pen.strokeStyle = paint(colour);
      pen.lineWidth = width;
      pen.beginPath(); this.trace(pen, trial.values); pen.stroke();
    };
    if (this.best) {
      thick(this.best, INK, 2.6);
      const drw = this.trials.get(this.best)?.drw;
      if (drw) {
        pen.setLineDash([6, 4]); pen.lineWidth = 1.2;
        pen.beginPath(); pen.moveTo(this.x(drw), this.box.top); pen.lineTo(this.x(drw), this.box.bottom); pen.stroke();
        pen.setLineDash([]);
        pen.font = "11px system-ui, sans-serif"; pen.fillStyle = paint(FAINT);
        const right = this.x(drw) > this.box.right - 90;
        pen.textAlign = right ? "right" : "left";
        pen.fillText("DRW begins (best)", this.x(drw) + (right ? -4 : 4), this.box.bottom - 4);
      }
    }
    this.picked.forEach((id, i) => { pen.setLineDash(i ? [7, 4] : []); thick(id, PICKED, 3); });
    pen.setLineDash([]);
    if (this.pointed) thick(this.pointed, PICKED, 2);
  }

  nearest(event) {
    const rect = this.over.getBoundingClientRect();
    const x = event.clientX - rect.left, y = event.clientY - rect.top;
    const share = (x - this.box.left) / (this.box.right - this.box.left);
    const epoch = Math.round(share * (this.epochs - 1)) + 1;
    let found = null, least = 24;
    for (const [id, trial] of this.trials) {
      if (this.hidden.has(trial.group)) continue;
      const value = trial.values[epoch - 1];
      if (value === null || value === undefined) continue;
      const away = Math.abs(this.y(value) - y);
      if (away < least) { least = away; found = id; }
    }
    this.pointedAt = found ? { x, y, epoch, value: this.trials.get(found).values[epoch - 1] } : null;
    return found;
  }

  point(event) {
    const id = event ? this.nearest(event) : null;
    if (id === this.pointed && !id) return;
    this.pointed = id;
    this.tip.hidden = !id;
    if (id) {
      const at = this.pointedAt;
      this.tip.textContent = `${id}, epoch ${at.epoch}: ${at.value.toFixed(3)}`;
      this.tip.style.left = `${Math.min(at.x + 12, this.box.width - 150)}px`;
      this.tip.style.top = `${Math.max(0, at.y - 30)}px`;
    }
    this.later();
  }
}

function niceStep(span, most) {
  for (const step of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]) if (span / step <= most) return step;
  return 5000;
}

// Figures as SVG -----------------------------------------------------------------------------------------------------------

function make(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== undefined) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const ENTITIES = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'", "&amp;": "&" };
// figures.py escapes what comes from a study, for Plotly; here it becomes text again, and stays text.
const linesOf = (markup) => String(markup ?? "").replace(/<\/?b>/g, "").split("<br>")
  .map((line) => line.replace(/&lt;|&gt;|&quot;|&#x27;|&amp;/g, (found) => ENTITIES[found]));

function shape(symbol, r) {
  const name = symbol.replace("-open", "");
  const polygon = (n, turn, inner) => {
    const corners = [];
    for (let i = 0; i < n * (inner ? 2 : 1); i += 1) {
      const radius = inner && i % 2 ? r * inner : r, angle = turn + (i * 2 * Math.PI) / (n * (inner ? 2 : 1));
      corners.push(`${(radius * Math.sin(angle)).toFixed(2)},${(-radius * Math.cos(angle)).toFixed(2)}`);
    }
    return `M${corners.join("L")}Z`;
  };
  switch (name) {
    case "square": return polygon(4, Math.PI / 4);
    case "diamond": return polygon(4, 0);
    case "triangle-up": return polygon(3, 0);
    case "triangle-down": return polygon(3, Math.PI);
    case "triangle-right": return polygon(3, Math.PI / 2);
    case "pentagon": return polygon(5, 0);
    case "hexagon": return polygon(6, 0);
    case "star": return polygon(5, 0, 0.45);
    case "cross": return `M${-r},0H${r}M0,${-r}V${r}`;
    case "x": return `M${-r * 0.75},${-r * 0.75}L${r * 0.75},${r * 0.75}M${-r * 0.75},${r * 0.75}L${r * 0.75},${-r * 0.75}`;
    case "line-ns": return `M0,${-r}V${r}`;
    default: return `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`;
  }
}

class Axis {
  constructor(given, values, categories) {
    this.given = given || {};
    this.categories = categories;
    if (categories) { this.low = -0.5; this.high = categories.length - 0.5; }
    else if (this.given.range) [this.low, this.high] = this.given.range;
    else {
      const finite = values.filter((value) => Number.isFinite(value));
      this.low = finite.length ? Math.min(...finite) : 0;
      this.high = finite.length ? Math.max(...finite) : 1;
      if (this.given.rangemode === "tozero") this.low = Math.min(0, this.low);
      const room = (this.high - this.low || Math.abs(this.high) || 1) * 0.06;
      if (this.given.rangemode !== "tozero") this.low -= room;
      this.high += room;
    }
    this.reversed = this.given.autorange === "reversed";
  }
  value(raw) { return this.categories ? this.categories.indexOf(raw) : raw; }
  share(raw) {
    const share = (this.value(raw) - this.low) / (this.high - this.low || 1);
    return this.reversed ? 1 - share : share;
  }
  ticks(most) {
    if (this.categories) return this.categories.map((name) => [name, linesOf(name).join(" ")]);
    if (this.given.tickvals) return this.given.tickvals.map((value, i) => [value, linesOf(this.given.ticktext?.[i] ?? value).join(" ")]);
    const span = this.high - this.low, size = 10 ** Math.floor(Math.log10(span || 1));
    const step = [0.1, 0.2, 0.5, 1, 2, 5].map((part) => part * size).find((each) => span / each <= most) || size * 10;
    const found = [], digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let i = Math.ceil(this.low / step - 1e-9); i * step <= this.high + 1e-9 * span; i += 1) found.push([i * step, (i * step).toFixed(digits)]);
    return found;
  }
}

function filled(template, point) {
  return template.replace(/<extra>(.*?)<\/extra>/, (_, name) => (name ? ` (${name})` : ""))
    .replace(/%\{(\w+)(?::([+]?)\.(\d)f)?\}/g, (_, name, sign, digits) => {
      const value = point[name];
      if (digits === undefined || typeof value !== "number") return value ?? "";
      return (sign && value > 0 ? "+" : "") + value.toFixed(Number(digits));
    });
}

// Draw a figure into `host`; `onPick` gets the trial of a mark or line that is clicked.
export function drawFigure(host, figure, { onPick = () => {}, picked = [] } = {}) {
  const { data, layout } = figure;
  const width = Math.max(host.clientWidth, 240), height = layout.height || 300;
  host.replaceChildren();
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "presentation" }, host);
  const traces = data.filter((trace) => (trace.x || []).length);
  const all = (name) => traces.flatMap((trace) => trace[name] || []).filter((value) => value !== null);
  const texts = (name) => { const found = all(name).filter((value) => typeof value === "string"); return found.length ? found : null; };
  const categoriesOf = (name, axis) => (texts(name) ? layout[axis]?.categoryarray || [...new Set(texts(name))] : null);
  const yCategories = categoriesOf("y", "yaxis");
  const barSums = layout.barmode === "stack" ? stackSums(traces) : [];
  const withErrors = traces.flatMap((trace) => (trace.error_x ? trace.x.flatMap((x, i) => [x + (trace.error_x.array[i] ?? 0), x - (trace.error_x.arrayminus[i] ?? 0)]) : []));
  const bars = traces.some((trace) => trace.type === "bar");
  const xGiven = bars ? { rangemode: "tozero", ...layout.xaxis } : layout.xaxis;
  const x = new Axis(xGiven, [...all("x"), ...withErrors, ...barSums], categoriesOf("x", "xaxis"));
  const y = new Axis(layout.yaxis, all("y"), yCategories);
  const legend = layout.showlegend ? traces.filter((trace) => trace.showlegend !== false && trace.name) : [];
  const yTicks = layout.yaxis?.visible === false ? [] : y.ticks(height / 44);
  const room = Math.min(width * 0.45, Math.max(0, ...yTicks.map(([, text]) => text.length)) * 6.6 + 12);
  const box = {
    left: layout.yaxis?.visible === false ? 10 : room + (layout.yaxis?.title ? 18 : 0),
    right: width - Math.max(10, Math.min(layout.margin?.r ?? 14, 48)),
    top: (layout.margin?.t ?? 20) + (legend.length ? 18 : 0),
    bottom: height - (layout.xaxis?.visible === false ? 8 : layout.xaxis?.title ? 40 : 24),
  };
  const px = (value) => box.left + x.share(value) * (box.right - box.left);
  const py = (value) => box.bottom - y.share(value) * (box.bottom - box.top);
  const text = (left, top, content, attributes = {}) => make("text", { x: left, y: top, fill: paint(FAINT), "font-size": 11, ...attributes }, svg, content);

  for (const [value, label] of yTicks) {
    if (y.share(value) < -0.001 || y.share(value) > 1.001) continue;
    if (layout.yaxis?.showgrid !== false) make("line", { x1: box.left, x2: box.right, y1: py(value), y2: py(value), stroke: paint(GRID) }, svg);
    const most = Math.floor((box.left - 10) / 6.2);
    const node = text(box.left - 6, py(value), label.length > most ? `${label.slice(0, most - 1)}…` : label, { "text-anchor": "end", "dominant-baseline": "middle" });
    if (label.length > most) make("title", {}, node, label);
  }
  if (layout.xaxis?.visible !== false) {
    for (const [value, label] of x.ticks((box.right - box.left) / 52)) {
      if (x.share(value) < -0.001 || x.share(value) > 1.001) continue;
      make("line", { x1: px(value), x2: px(value), y1: box.top, y2: box.bottom, stroke: paint(GRID) }, svg);
      text(px(value), box.bottom + 14, label, { "text-anchor": "middle" });
    }
    if (layout.xaxis?.zerolinecolor) make("line", { x1: px(0), x2: px(0), y1: box.top, y2: box.bottom, stroke: paint(INK), "stroke-width": 1.5 }, svg);
  }
  if (layout.xaxis?.title) text((box.left + box.right) / 2, height - 6, linesOf(layout.xaxis.title.text).join(" "), { "text-anchor": "middle", "font-size": 12 });
  if (layout.yaxis?.title) text(0, 0, linesOf(layout.yaxis.title.text).join(" "), { transform: `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle", "font-size": 12 });
  for (const each of layout.shapes || []) {
    const place = (value, ref, to, low, high) => (ref === "paper" ? low + value * (high - low) : to(value));
    make("line", {
      x1: place(each.x0, each.xref, px, box.left, box.right), x2: place(each.x1, each.xref, px, box.left, box.right),
      y1: place(each.y0, each.yref, py, box.bottom, box.top), y2: place(each.y1, each.yref, py, box.bottom, box.top),
      stroke: paint(each.line.color), "stroke-width": each.line.width, "stroke-dasharray": (DASHES[each.line.dash] || []).join(" ") || undefined,
    }, svg);
  }
  const offsets = new Map();
  for (const trace of traces) {
    if (trace.type === "bar") drawBars(svg, trace, { px, py, x, y, box, offsets, stack: layout.barmode === "stack" });
    else drawScatter(svg, trace, { px, py, onPick, picked });
  }
  for (const note of layout.annotations || []) {
    const left = (note.xref === "paper" ? box.left + note.x * (box.right - box.left) : px(note.x)) + (note.xshift || 0);
    const top = note.yref === "paper" ? box.bottom - note.y * (box.bottom - box.top) - 3 : py(note.y);
    const anchor = { left: "start", right: "end" }[note.xanchor] || "middle";
    const lines = linesOf(note.text);
    lines.forEach((line, i) => text(left, top + (i - (lines.length - 1) / 2) * 12, line, {
      "text-anchor": anchor, "font-size": note.font?.size || 11, fill: paint(note.font?.color || FAINT), "dominant-baseline": note.yref === "paper" ? undefined : "middle",
      "font-weight": /<b>/.test(note.text) ? 600 : undefined, class: "veil",
    }));
  }
  let left = box.left;
  for (const trace of legend) {
    const colour = paint(trace.marker?.color || trace.line?.color || INK);
    make("path", { d: shape(trace.marker?.symbol || "circle", 4.5), transform: `translate(${left + 6} 12)`, fill: /open/.test(trace.marker?.symbol || "") ? "none" : colour, stroke: colour, "stroke-width": 1.5 }, svg);
    const name = linesOf(trace.name).join(" ");
    text(left + 15, 16, name);
    left += 28 + name.length * 6.4;
  }
}

function stackSums(traces) {
  const sums = new Map();
  for (const trace of traces) trace.y.forEach((name, i) => sums.set(name, (sums.get(name) || 0) + trace.x[i]));
  return [...sums.values()];
}

function drawBars(svg, trace, { px, py, y, box, offsets, stack }) {
  const band = ((box.bottom - box.top) / Math.max(1, y.categories.length)) * 0.62;
  const veiled = Boolean(trace.marker?.pattern?.shape);
  trace.y.forEach((name, i) => {
    const from = stack ? offsets.get(name) || 0 : 0, to = from + trace.x[i];
    offsets.set(name, to);
    const bar = make("rect", { x: px(from), y: py(name) - band / 2, width: Math.max(0, px(to) - px(from)), height: band, fill: paint(trace.marker.color), opacity: veiled ? 0.45 : 1 }, svg);
    make("title", {}, bar, linesOf(filled(trace.hovertemplate || "%{y}: %{x}", { x: trace.x[i], y: name })).join(" "));
    const label = trace.text?.[i];
    if (label && px(to) - px(from) > label.length * 6.4) make("text", { x: (px(from) + px(to)) / 2, y: py(name) + 4, "text-anchor": "middle", "font-size": 11, fill: paint(veiled ? INK : "#ffffff") }, svg, label);
    errorBar(svg, trace, i, px, py(name));
  });
}

function errorBar(svg, trace, i, px, top) {
  if (!trace.error_x) return;
  const low = px(trace.x[i] - (trace.error_x.arrayminus[i] ?? 0)), high = px(trace.x[i] + (trace.error_x.array[i] ?? 0));
  make("path", { d: `M${low},${top}H${high}M${low},${top - 4}v8M${high},${top - 4}v8`, stroke: paint(trace.error_x.color), "stroke-width": trace.error_x.thickness || 1.2, fill: "none" }, svg);
}

const isTrial = (value) => typeof value === "string" && /^[0-9A-Za-z_-]+$/.test(value);

function drawScatter(svg, trace, { px, py, onPick, picked }) {
  const mode = trace.mode || "lines", opacity = trace.opacity ?? 1;
  const pick = (node, id) => {
    if (!isTrial(id) || !/^\d/.test(id)) return;
    node.classList.add("pickable");
    node.addEventListener("click", () => onPick(id));
  };
  if (mode.includes("lines")) {
    let line = [], id = null;
    const close = () => {
      if (line.length) {
        const chosen = picked.includes(id);
        const node = make("path", { d: `M${line.join("L")}`, fill: "none", stroke: paint(chosen ? PICKED : trace.line?.color || INK), "stroke-width": chosen ? 3 : trace.line?.width || 1.5, "stroke-dasharray": (DASHES[trace.line?.dash] || []).join(" ") || undefined, opacity: chosen ? 1 : opacity }, svg);
        if (id) make("title", {}, node, linesOf(id).join(" "));
        if (trace.meta?.tier) pick(node, id);
      }
      line = [];
    };
    let before = null;
    trace.x.forEach((value, i) => {
      if (value === null || trace.y[i] === null) { close(); before = null; return; }
      const at = [px(value), py(trace.y[i])];
      if (before && trace.line?.shape === "hv") line.push(`${at[0].toFixed(1)},${before[1].toFixed(1)}`);
      line.push(`${at[0].toFixed(1)},${at[1].toFixed(1)}`);
      id = trace.customdata?.[i] ?? null;
      before = at;
    });
    close();
  }
  if (mode.includes("markers") && !trace.meta?.tier) {
    const symbol = trace.marker?.symbol || "circle", colour = trace.marker?.color || INK;
    const hollow = /open|^x|cross|line/.test(symbol);
    trace.x.forEach((value, i) => {
      if (value === null || trace.y[i] === null) return;
      const top = py(trace.y[i]), id = trace.customdata?.[i], chosen = picked.includes(id);
      errorBar(svg, trace, i, px, top);
      const mark = make("path", { d: shape(symbol, (trace.marker?.size || 8) / 2 + (chosen ? 2 : 0)), transform: `translate(${px(value).toFixed(1)} ${top.toFixed(1)})`, fill: hollow ? "none" : paint(chosen ? PICKED : colour), stroke: paint(chosen ? PICKED : colour), "stroke-width": chosen ? 2.5 : 1.5, opacity: trace.marker?.opacity ?? 1 }, svg);
      make("title", {}, mark, linesOf(filled(trace.hovertemplate || "%{x}, %{y}", { x: value, y: trace.y[i], customdata: id, text: trace.text?.[i] })).join(" "));
      pick(mark, id);
    });
  }
}

// One trial's columns by epoch as a small figure in Plotly's form.
export function lineFigure(title, epochs, lines, { height = 220, range, rungs = [], drw, band } = {}) {
  const data = lines.map(({ name, values, colour, dash }) => ({ type: "scatter", mode: "lines", name, x: epochs, y: values, line: { color: colour, width: 2, dash } }));
  if (band) {
    band.forEach((values) => data.unshift({ type: "scatter", mode: "lines", name: "interval", x: epochs, y: values, showlegend: false, opacity: 0.5, line: { color: "#8b939e", width: 1, dash: "dot" } }));
  }
  const upright = (at, dash, colour) => ({ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line: { color: colour, width: 1.2, dash } });
  const shapes = rungs.filter((rung) => rung <= epochs[epochs.length - 1]).map((rung) => upright(rung, "dot", "#8b939e"));
  const annotations = [];
  if (drw) {
    shapes.push(upright(drw, "dash", INK));
    annotations.push({ x: drw, xref: "x", y: 0, yref: "paper", text: "DRW", xanchor: "left", xshift: 3, font: { size: 10 } });
  }
  const room = { xaxis: { title: { text: "epoch" }, range: [0.5, Math.max(epochs[epochs.length - 1] || 1, 2) + 0.5] }, yaxis: range ? { range } : {} };
  return { title, data, layout: { height, margin: { t: 8, r: 12 }, showlegend: lines.length > 1, shapes, annotations, ...room } };
}
