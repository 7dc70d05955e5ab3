// Curves of all trials on a canvas: any metric by epoch, updates or time, a line per trial. Lines are on one canvas that is
// drawn again only when something about all of them changed; a new epoch is added to it. Picked trials and the trial under
// the pointer are on a second canvas above. Panels that share a `Link` share zoom, hover, picks, smoothing and, for scores,
// the scale.
import { DASHES, paint } from "./charts.js";

const INK = "#1b2430", FAINT = "#5b6675", GRID = "#dfe3e8", PAPER = "#ffffff";
const SCORE = /auc|auprc|accuracy|sensitivity|brier|ece|tied|share|probability|threshold/;
const isScore = (metric) => SCORE.test(metric); // values from 0 to 1
const ON_TOP = ["no_fault", "healthy"]; // groups drawn above the others, the last one highest
const PICKS = ["#e0007a", "#0087c9", "#5b8f00", "#8c2be2", "#008f7a", "#b35c00"];
const DARK_PICKS = ["#ff5cb0", "#4cc2ff", "#a5d936", "#c79bff", "#3fe0c5", "#ffb066"];

export const MOST_PICKS = PICKS.length;
export const pickColour = (place, dark) => (dark ? DARK_PICKS : PICKS)[place % PICKS.length];

// Exponential smoothing as in TensorBoard, without its bias towards zero at the beginning.
export function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, mass = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = sum * weight + value * (1 - weight);
    mass = mass * weight + (1 - weight);
    return sum / mass;
  });
}

// What panels share.
export class Link {
  constructor({ onPick, isDark }) {
    this.onPick = onPick;
    this.isDark = isDark;
    this.panels = [];
    this.trials = new Map(); // id -> {group, drw, ended}
    this.groups = new Map(); // key -> {colour, dash}
    this.hidden = new Set(); // groups
    this.only = null; // ids that the table's filter lets through; null: all
    this.picked = [];
    this.best = null;
    this.pointed = null; // {id, share}: the trial, and where along the horizontal axis
    this.rungs = [];
    this.epochs = 1;
    this.zoom = null; // [low, high] of the horizontal axis
    this.smoothing = 0;
  }
  shows(id) { return !this.hidden.has(this.trials.get(id)?.group) && (!this.only || this.only.has(id)); }
  redraw() { for (const panel of this.panels) panel.redraw(); }
  later() { for (const panel of this.panels) panel.later(); }
  resetZoom() { this.zoom = null; for (const panel of this.panels) panel.zoom = null; this.redraw(); this.onZoom?.(false); }
  about(id, about) { // true when its line has to be drawn another way
    const before = this.trials.get(id);
    this.trials.set(id, { drw: null, ...before, ...about });
    return !before || before.group !== about.group || before.ended !== about.ended;
  }
}

export class Panel {
  constructor(host, link, metric) {
    Object.assign(this, { host, link, metric, axis: "epoch", lines: new Map(), zoom: null, news: [], waiting: null });
    this.under = document.createElement("canvas");
    this.over = document.createElement("canvas");
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    host.classList.add("curves");
    host.setAttribute("role", "img");
    host.append(this.under, this.over, this.tip);
    new ResizeObserver(() => this.redraw()).observe(host);
    link.panels.push(this);
    this.follow();
  }

  // Data --------------------------------------------------------------------------------------------------------------------

  set(metric, axis, lines) { // lines: id -> {x, y}
    this.metric = metric;
    this.axis = axis;
    this.host.setAttribute("aria-label", `${metric} by ${axis}, one line per trial`);
    this.lines = new Map(Object.entries(lines).map(([id, { x, y }]) => [id, { x, y, s: null }]));
    this.zoom = null;
    this.redraw();
  }
  add(id, x, y) { // a new epoch: its segment is added to the drawing
    if (!this.lines.has(id)) this.lines.set(id, { x: [], y: [], s: null });
    const line = this.lines.get(id);
    const known = line.x.indexOf(x);
    if (known >= 0 && line.y[known] === y) return;
    if (known >= 0) line.y[known] = y; else { line.x.push(x); line.y.push(y); }
    line.s = null;
    const grown = x > this.right || (y !== null && (y < this.low || y > this.high));
    if (grown || known >= 0 || this.link.smoothing || this.link.zoom) this.redraw(); else { this.news.push(id); this.later(); }
  }
  values(line) {
    if (!this.link.smoothing) return line.y;
    if (line.weight !== this.link.smoothing) { line.s = null; line.weight = this.link.smoothing; }
    line.s ||= smoothed(line.y, this.link.smoothing);
    return line.s;
  }

  // Scales ------------------------------------------------------------------------------------------------------------------

  extent() {
    let low = Infinity, high = -Infinity, right = this.axis === "epoch" ? this.link.epochs : 0;
    for (const [id, line] of this.lines) {
      if (!this.link.shows(id)) continue;
      for (const value of this.values(line)) if (value !== null && value !== undefined) { if (value < low) low = value; if (value > high) high = value; }
      const last = line.x[line.x.length - 1];
      if (last > right) right = last;
    }
    return { low, high, right };
  }
  scale() {
    const own = this.extent();
    const score = isScore(this.metric);
    let { low, high } = own;
    if (score) { // all scores share a scale, so that panels can be compared
      for (const panel of this.link.panels) if (panel !== this && isScore(panel.metric)) low = Math.min(low, panel.extent().low);
      low = Math.max(0, Math.min(Number.isFinite(low) ? low - 0.03 : 0.42, 0.85));
      high = 1.01;
    } else if (Number.isFinite(low)) {
      const room = (high - low || Math.abs(high) || 1) * 0.05;
      low = low >= 0 ? Math.max(0, low - room) : low - room;
      high += room;
    } else { low = 0; high = 1; }
    this.left = this.axis === "epoch" ? 1 : 0;
    this.right = Math.max(own.right, this.left + 1e-6);
    if (this.link.zoom) [this.left, this.right] = this.link.zoom;
    [this.low, this.high] = this.zoom || [low, high];
  }
  px(x) { return this.box.left + ((x - this.left) / (this.right - this.left || 1)) * (this.box.right - this.box.left); }
  py(y) { return this.box.bottom - ((y - this.low) / (this.high - this.low || 1)) * (this.box.bottom - this.box.top); }
  atX(px) { return this.left + ((px - this.box.left) / (this.box.right - this.box.left)) * (this.right - this.left); }
  atY(py) { return this.low + ((this.box.bottom - py) / (this.box.bottom - this.box.top)) * (this.high - this.low); }

  // Drawing -----------------------------------------------------------------------------------------------------------------

  redraw() { this.whole = true; this.later(); }
  later() { this.waiting ||= requestAnimationFrame(() => { this.waiting = null; this.draw(); }); }
  size() {
    const width = this.host.clientWidth, height = this.host.clientHeight, ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.under, this.over]) {
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
        this.whole = true;
      }
    }
    this.box = { left: 44, top: 16, right: width - 10, bottom: height - 26, width, height, ratio };
  }
  draw() {
    this.size();
    if (this.box.width < 60) return;
    const started = performance.now();
    const pen = this.under.getContext("2d");
    pen.setTransform(this.box.ratio, 0, 0, this.box.ratio, 0, 0);
    if (this.whole) { this.scale(); this.drawAll(pen); } else this.drawNews(pen);
    this.whole = false;
    this.news = [];
    this.drawOver();
    this.host.dataset.ms = (performance.now() - started).toFixed(1);
    this.host.dataset.drawn = String(this.lines.size);
    this.host.dataset.shown = String([...this.lines.keys()].filter((id) => this.link.shows(id)).length);
  }
  drawAxes(pen) {
    const { left, top, right, bottom, width, height } = this.box;
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    pen.lineWidth = 1;
    pen.fillStyle = paint(FAINT);
    pen.strokeStyle = paint(GRID);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of ticks(this.low, Math.min(this.high, isScore(this.metric) ? 1 : Infinity), (bottom - top) / 40)) {
      pen.beginPath(); pen.moveTo(left, this.py(value)); pen.lineTo(right, this.py(value)); pen.stroke();
      pen.fillText(tickText(value), left - 6, this.py(value));
    }
    pen.textBaseline = "top";
    const name = this.axis === "time" ? "minutes" : this.axis;
    pen.textAlign = "left";
    pen.fillText(name, left, bottom + 8);
    const free = left + pen.measureText(name).width + 14;
    pen.textAlign = "center";
    for (const value of ticks(this.left, this.right, (right - left) / 56)) {
      if (this.axis !== "time" && value % 1) continue;
      if (this.px(value) > free && this.px(value) < right + 1) pen.fillText(tickText(value), this.px(value), bottom + 8);
    }
  }
  drawAll(pen) {
    this.drawAxes(pen);
    const { left, top, right, bottom } = this.box;
    pen.setLineDash([2, 3]);
    pen.textBaseline = "bottom";
    pen.strokeStyle = paint(FAINT);
    if (this.axis === "epoch") {
      this.link.rungs.forEach((rung, i) => {
        if (rung < this.left || rung > this.right) return;
        const x = this.px(rung);
        pen.globalAlpha = 0.6;
        pen.beginPath(); pen.moveTo(x, top); pen.lineTo(x, bottom); pen.stroke();
        pen.globalAlpha = 1;
        pen.fillText(i ? String(rung) : `rung ${rung}`, Math.max(x, left + 16), top - 1);
      });
    }
    pen.setLineDash([6, 4]);
    if (/auc/.test(this.metric) && !/auprc/.test(this.metric) && this.low < 0.5 && this.high > 0.5) { pen.beginPath(); pen.moveTo(left, this.py(0.5)); pen.lineTo(right, this.py(0.5)); pen.stroke(); }
    pen.setLineDash([]);
    pen.save();
    pen.beginPath(); pen.rect(left - 3, top - 2, right - left + 6, bottom - top + 4); pen.clip();
    const by = new Map();
    for (const [id, line] of this.lines) {
      if (!this.link.shows(id)) continue;
      const key = this.link.trials.get(id)?.group ?? "no_fault";
      if (!by.has(key)) by.set(key, []);
      by.get(key).push([id, line]);
    }
    for (const key of [...by.keys()].sort((a, b) => ON_TOP.indexOf(a) - ON_TOP.indexOf(b))) this.drawGroup(pen, key, by.get(key));
    pen.restore();
  }
  drawGroup(pen, key, lines) {
    const group = this.link.groups.get(key) || { colour: "#00609c", dash: "solid" };
    const usual = ON_TOP.includes(key) ? 1.5 : 1.2;
    pen.strokeStyle = paint(group.colour);
    pen.lineWidth = lines.length > 150 ? 1 / this.box.ratio : usual; // one pixel needs no outline: many times faster
    pen.setLineDash(lines.length > 150 ? [] : DASHES[group.dash] || []); // dashes of hundreds of lines are noise, and slow
    pen.globalAlpha = lines.length < 15 ? 0.9 : lines.length < 150 ? 0.55 : 0.22;
    for (const [, line] of lines) { // a path each: one path of all lines takes seconds to fill with pixels
      pen.beginPath();
      this.trace(pen, line);
      pen.stroke();
    }
    pen.setLineDash([]);
    pen.globalAlpha = lines.length < 150 ? 0.9 : 0.5;
    pen.fillStyle = pen.strokeStyle;
    for (const [id, line] of lines) this.marks(pen, id, line);
    pen.globalAlpha = 1;
  }
  trace(pen, line, from = 0) {
    const values = this.values(line);
    let open = false;
    for (let i = from; i < values.length; i += 1) {
      if (line.x[i + 1] < this.left) continue; // what lies outside a zoomed panel costs as much as what it shows
      if (line.x[i - 1] > this.right) break;
      const value = values[i];
      if (value === null || value === undefined) { open = false; continue; }
      const x = this.px(line.x[i]), y = this.py(value);
      if (open) pen.lineTo(x, y); else { pen.moveTo(x, y); open = true; }
    }
    if (values.length - from === 1 && open) pen.lineTo(this.px(line.x[from]) + 1, this.py(values[from]));
  }
  marks(pen, id, line) {
    const trial = this.link.trials.get(id), values = this.values(line), last = values.length - 1;
    if (trial?.ended && values[last] !== null && values[last] !== undefined) pen.fillRect(this.px(line.x[last]) - 2, this.py(values[last]) - 4, 2.5, 8);
    if (!trial?.drw || this.lines.size >= 150) return; // of more, DRW starts are a cloud
    const at = this.axis === "epoch" ? line.x.indexOf(trial.drw) : trial.drw - 1;
    if (values[at] === null || values[at] === undefined) return;
    const x = this.px(line.x[at]), y = this.py(values[at]);
    pen.beginPath(); pen.moveTo(x - 2.5, y - 3.5); pen.lineTo(x + 3.5, y); pen.lineTo(x - 2.5, y + 3.5); pen.closePath();
    pen.lineWidth = 1; pen.stroke();
  }
  drawNews(pen) {
    for (const id of this.news) {
      if (!this.link.shows(id)) continue;
      const group = this.link.groups.get(this.link.trials.get(id)?.group) || { colour: "#00609c" };
      const line = this.lines.get(id);
      pen.strokeStyle = paint(group.colour);
      pen.lineWidth = 1.5;
      pen.globalAlpha = 0.9;
      pen.beginPath();
      this.trace(pen, line, Math.max(0, line.x.length - 2));
      pen.stroke();
      pen.globalAlpha = 1;
    }
  }
  strong(pen, id, colour, width, label) { // with a halo, so that it stands out of any crowd
    const line = this.lines.get(id);
    if (!line?.x.length) return;
    pen.lineJoin = "round";
    for (const [stroke, wide] of [[paint(PAPER), width + 3], [colour, width]]) {
      pen.strokeStyle = stroke;
      pen.lineWidth = wide;
      pen.beginPath(); this.trace(pen, line); pen.stroke();
    }
    const values = this.values(line), last = values.length - 1;
    if (!label || values[last] === null || values[last] === undefined) return;
    pen.font = "600 11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "bottom";
    pen.lineWidth = 3;
    pen.strokeStyle = paint(PAPER);
    const x = Math.min(this.px(line.x[last]), this.box.right), y = this.py(values[last]) - 3;
    pen.strokeText(label, x, y);
    pen.fillStyle = colour;
    pen.fillText(label, x, y);
  }
  drawOver() {
    const pen = this.over.getContext("2d"), { left, top, right, bottom, ratio, width, height } = this.box;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.save();
    pen.beginPath(); pen.rect(left - 3, top - 14, right - left + 13, bottom - top + 17); pen.clip();
    const { best, picked, pointed } = this.link;
    if (best && this.link.shows(best) && !picked.includes(best)) this.strong(pen, best, paint(INK), 2.4, `${best} best`);
    picked.forEach((id, i) => this.strong(pen, id, pickColour(i, this.link.isDark()), 3, id));
    if (pointed) {
      const place = picked.indexOf(pointed.id);
      this.strong(pen, pointed.id, place < 0 ? paint(INK) : pickColour(place, this.link.isDark()), 2.6);
      this.dot(pen, pointed);
    }
    pen.restore();
    if (this.box0) {
      const [x0, y0, x1, y1] = this.box0;
      pen.fillStyle = paint(FAINT); pen.globalAlpha = 0.15; pen.fillRect(x0, y0, x1 - x0, y1 - y0); pen.globalAlpha = 1;
      pen.strokeStyle = paint(FAINT); pen.lineWidth = 1; pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    this.showTip();
  }
  dot(pen, { id, at }) {
    const line = this.lines.get(id), i = line ? nearestIndex(line.x, at) : -1;
    const value = i < 0 ? null : this.values(line)[i];
    if (value === null || value === undefined) return;
    pen.beginPath(); pen.arc(this.px(line.x[i]), this.py(value), 4, 0, 7);
    pen.fillStyle = paint(INK); pen.fill();
  }
  showTip() {
    const pointed = this.link.pointed, line = pointed && this.lines.get(pointed.id);
    const i = line ? nearestIndex(line.x, pointed.at) : -1;
    const value = i < 0 ? null : this.values(line)[i];
    this.tip.hidden = value === null || value === undefined || this.link.panels.some((panel) => panel.axis !== this.axis);
    if (this.tip.hidden) return;
    this.tip.textContent = `${pointed.id}, ${this.axis === "time" ? `${line.x[i].toFixed(1)} min` : `${this.axis} ${line.x[i]}`}: ${tickText(value, 4)}`;
    const x = this.px(line.x[i]), y = this.py(value);
    this.tip.style.left = `${Math.max(0, Math.min(x + 12, this.box.width - 190))}px`;
    this.tip.style.top = `${Math.max(0, y - 34)}px`;
  }

  // Pointing, picking, zooming ------------------------------------------------------------------------------------------------

  follow() {
    const place = (event) => { const rect = this.over.getBoundingClientRect(); return [event.clientX - rect.left, event.clientY - rect.top]; };
    let from = null, span = null;
    this.over.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button) return;
      from = place(event);
      span = event.shiftKey ? [this.left, this.right, this.low, this.high] : null;
      this.over.setPointerCapture(event.pointerId);
    });
    this.over.addEventListener("pointermove", (event) => {
      const at = place(event);
      if (from && span) { this.pan(span, at[0] - from[0], at[1] - from[1]); return; }
      if (from && Math.hypot(at[0] - from[0], at[1] - from[1]) > 6) { this.box0 = [...from, ...at]; this.later(); return; }
      this.link.pointed = this.nearest(...at);
      this.link.later();
    });
    this.over.addEventListener("pointerleave", () => { this.link.pointed = null; this.link.later(); });
    this.over.addEventListener("pointerup", () => {
      const box = this.box0;
      this.box0 = null;
      from = null;
      if (box) { this.zoomTo(box); this.zoomed = true; }
    });
    this.over.addEventListener("click", (event) => {
      if (this.zoomed || span) { this.zoomed = false; span = null; return; } // the end of a drag is no click
      const found = this.nearest(...place(event));
      if (found) this.link.onPick(found.id);
    });
    this.over.addEventListener("dblclick", () => this.link.resetZoom());
    this.over.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
      event.preventDefault();
      const [x] = place(event), at = this.atX(x), by = event.deltaY > 0 ? 1.25 : 0.8;
      this.link.zoom = [at - (at - this.left) * by, at + (this.right - at) * by];
      this.link.redraw();
      this.link.onZoom?.(true);
    }, { passive: false });
  }
  zoomTo([x0, y0, x1, y1]) {
    const [left, right] = [this.atX(Math.min(x0, x1)), this.atX(Math.max(x0, x1))];
    const y = [this.atY(Math.max(y0, y1)), this.atY(Math.min(y0, y1))];
    this.link.zoom = [left, right];
    for (const panel of this.link.panels) if (panel === this || (isScore(panel.metric) && isScore(this.metric))) panel.zoom = y;
    this.link.redraw();
    this.link.onZoom?.(true);
  }
  pan([left, right, low, high], dx, dy) {
    const byX = (-dx / (this.box.right - this.box.left)) * (right - left), byY = (dy / (this.box.bottom - this.box.top)) * (high - low);
    this.link.zoom = [left + byX, right + byX];
    for (const panel of this.link.panels) if (panel === this || (isScore(panel.metric) && isScore(this.metric))) panel.zoom = [low + byY, high + byY];
    this.link.redraw();
    this.link.onZoom?.(true);
  }
  nearest(x, y) {
    if (!this.box) return null;
    const at = this.atX(x);
    let found = null, least = 24;
    for (const [id, line] of this.lines) {
      if (!this.link.shows(id)) continue;
      const i = nearestIndex(line.x, at);
      const value = i < 0 ? null : this.values(line)[i];
      if (value === null || value === undefined) continue;
      const away = Math.abs(this.py(value) - y) + 0.25 * Math.max(0, Math.abs(this.px(line.x[i]) - x) - 8);
      if (away < least) { least = away; found = { id, at: line.x[i] }; }
    }
    return found;
  }
}

function nearestIndex(sorted, at) {
  let low = 0, high = sorted.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (sorted[middle] <= at) low = middle; else high = middle; }
  return Math.abs(sorted[low] - at) <= Math.abs(sorted[high] - at) ? low : high;
}

function ticks(low, high, most) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const size = 10 ** Math.floor(Math.log10(span));
  const step = [0.1, 0.2, 0.5, 1, 2, 5].map((part) => part * size).find((each) => span / each <= most) || size * 10;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * span; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}
const tickText = (value, digits = 3) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(digits + (Math.abs(value) >= 1 ? 1 : 0)))));
