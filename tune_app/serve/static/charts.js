// The figures of figures.py (Plotly's form) as SVG, without a library.
// Text is set as text; colours of the light page are replaced one by one on the dark one.

export const DASHES = { solid: [], dot: [2, 4], dash: [8, 5], longdash: [13, 6], dashdot: [8, 4, 2, 4], longdashdot: [13, 4, 2, 4] };
const SVG = "http://www.w3.org/2000/svg";
let palette = {};

export const setPalette = (colours) => { palette = colours; };
export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
export const paint = (colour) => (isDark() && palette[colour]) || colour;
const INK = "#1b2430", FAINT = "#5b6675", GRID = "#dfe3e8";

// Figures as SVG -----------------------------------------------------------------------------------------------------------

function make(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== undefined) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const ENTITIES = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'", "&amp;": "&" };
// figures.py escapes the texts of a study for Plotly; here they become text again, and stay text.
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
    else if (this.given.range) {
      [this.low, this.high] = this.given.range;
      this.whole = values.length > 0 && values.every((value) => !Number.isFinite(value) || Number.isInteger(value));
    } else {
      const finite = values.filter((value) => Number.isFinite(value));
      this.low = finite.length ? Math.min(...finite) : 0;
      this.high = finite.length ? Math.max(...finite) : 1;
      if (this.given.rangemode === "tozero") this.low = Math.min(0, this.low);
      const room = (this.high - this.low || Math.abs(this.high) || 1) * 0.06;
      const whole = finite.every(Number.isInteger);
      const least = finite.every((value) => value >= 0) ? 0 : -Infinity; // no AUC and no count is negative
      if (this.given.rangemode !== "tozero") this.low = Math.max(whole ? this.low - 0.5 : least, this.low - room);
      this.high += room;
      this.whole = whole;
      this.most = finite.length && finite.every((value) => value >= 0 && value <= 1) && !whole ? 1 : Infinity;
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
    const high = Math.min(this.high, this.most ?? Infinity);
    const span = this.high - this.low, size = 10 ** Math.floor(Math.log10(span || 1));
    const step = [0.1, 0.2, 0.5, 1, 2, 5].map((part) => part * size).find((each) => span / each <= most && (!this.whole || each >= 1)) || size * 10;
    const found = [], digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let i = Math.ceil(this.low / step - 1e-9); i * step <= high + 1e-9 * span; i += 1) found.push([i * step, (i * step).toFixed(digits)]);
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

// Draw a figure into `host`. `onPick` gets the trial of a mark or line that is clicked, `colourOf` gives a picked trial's
// colour, `shows` decides which trials the table's filter lets through, `onBrush` gets a range of a parallel axis or null.
export function drawFigure(host, figure, { onPick = () => {}, picked = [], colourOf = () => INK, shows = () => true, onBrush, brushes } = {}) {
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
    else drawScatter(svg, trace, { px, py, onPick, picked, colourOf, shows });
  }
  if (onBrush && layout.meta?.axes) drawBrushes(svg, layout.meta.axes, { px, py, box, onBrush, brushes });
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

function drawScatter(svg, trace, { px, py, onPick, picked, colourOf, shows }) {
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
        const chosen = picked.includes(id), dim = isTrial(id) && !shows(id);
        const node = make("path", { d: `M${line.join("L")}`, fill: "none", stroke: chosen ? colourOf(id) : paint(trace.line?.color || INK), "stroke-width": chosen ? 3 : trace.line?.width || 1.5, "stroke-dasharray": (DASHES[trace.line?.dash] || []).join(" ") || undefined, opacity: chosen ? 1 : dim ? 0.06 : opacity }, svg);
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
      const top = py(trace.y[i]), id = trace.customdata?.[i], chosen = picked.includes(id), dim = isTrial(id) && !shows(id);
      errorBar(svg, trace, i, px, top);
      const mark = make("path", { d: shape(symbol, (trace.marker?.size || 8) / 2 + (chosen ? 2 : 0)), transform: `translate(${px(value).toFixed(1)} ${top.toFixed(1)})`, fill: hollow ? "none" : chosen ? colourOf(id) : paint(colour), stroke: chosen ? colourOf(id) : paint(colour), "stroke-width": chosen ? 2.5 : 1.5, opacity: dim ? 0.08 : trace.marker?.opacity ?? 1 }, svg);
      make("title", {}, mark, linesOf(filled(trace.hovertemplate || "%{x}, %{y}", { x: value, y: trace.y[i], customdata: id, text: trace.text?.[i] })).join(" "));
      pick(mark, id);
    });
  }
}

// A range of an axis of the parallel coordinates: drag along it; a click takes the range away.
function drawBrushes(svg, axes, { px, py, box, onBrush, brushes }) {
  axes.forEach((name, i) => {
    const held = brushes?.get(i), wide = 11;
    const mark = make("rect", { x: px(i) - wide / 2, width: wide, y: 0, height: 0, fill: paint(FAINT), opacity: 0.35 }, svg);
    const show = (low, high) => { mark.setAttribute("y", py(high)); mark.setAttribute("height", Math.max(0, py(low) - py(high))); };
    if (held) show(...held);
    const strip = make("rect", { x: px(i) - 13, width: 26, y: py(1.03), height: py(-0.03) - py(1.03), fill: "transparent", class: "brush", "data-axis": name }, svg);
    make("title", {}, strip, `${name}: drag to filter trials by a range`);
    let from = null;
    const at = (event) => { const share = (event.clientY - svg.getBoundingClientRect().top); return (py(0) - share) / (py(0) - py(1)); };
    strip.addEventListener("pointerdown", (event) => { from = at(event); strip.setPointerCapture(event.pointerId); event.preventDefault(); });
    strip.addEventListener("pointermove", (event) => { if (from !== null) show(Math.min(from, at(event)), Math.max(from, at(event))); });
    strip.addEventListener("pointerup", (event) => {
      const to = at(event), far = Math.abs(to - from) * (box.bottom - box.top) > 5;
      const range = [Math.min(from, to), Math.max(from, to)];
      from = null;
      onBrush(i, far ? range : null);
    });
  });
}

// The trials whose lines pass all brushed axes; null where none is brushed.
export function brushed(figure, brushes) {
  if (!brushes.size || !figure) return null;
  const passed = new Map();
  for (const trace of figure.data) {
    if (!trace.meta?.tier) continue;
    trace.x.forEach((axis, i) => {
      const range = brushes.get(axis), value = trace.y[i];
      if (range && value !== null && value >= range[0] && value <= range[1]) passed.set(trace.customdata[i], (passed.get(trace.customdata[i]) || 0) + 1);
    });
  }
  return new Set([...passed].filter(([, count]) => count === brushes.size).map(([id]) => id));
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
