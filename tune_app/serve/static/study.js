// A study, one of its trials, and two of them side by side. Whatever comes from a study is set as text.
import { Curves, drawFigure, lineFigure, paint } from "./charts.js";
import { act, api, askToken, badge, confirmThat, enc, h, number, page, prose, say, span, studyHash } from "./parts.js";

const live = document.getElementById("live");

// One study ---------------------------------------------------------------------------------------------------------------

// Only the rows in view are in the document: a thousand trials scroll as easily as ten.
class TrialTable {
  constructor(host, { onPick, onOpen, onOrder }) {
    Object.assign(this, { onPick, onOpen, onOrder });
    this.columns = []; this.rows = []; this.shown = []; this.picked = []; this.at = null; this.sort = null; this.filter = ""; this.only = null;
    this.head = h("tr");
    this.body = h("tbody");
    this.table = h("table", { class: "trials" }, h("thead", {}, this.head), this.body);
    this.scroll = h("div", { class: "scroll rows", tabindex: 0, role: "region", "aria-label": "trials" }, this.table);
    this.scroll.addEventListener("scroll", () => this.draw());
    host.append(this.scroll);
    this.height = 33;
  }
  set(table) { this.columns = table.columns; this.rows = table.rows; this.heads(); this.arrange(); }
  update(rows) {
    const places = new Map(this.rows.map((row, i) => [row.trial, i]));
    for (const row of rows) {
      if (row.columns) { this.columns = row.columns; this.rows = []; places.clear(); this.heads(); continue; }
      if (places.has(row.trial)) this.rows[places.get(row.trial)] = row;
      else { places.set(row.trial, this.rows.length); this.rows.push(row); }
    }
    this.arrange();
  }
  heads() {
    const shown = this.columns.map((column) => {
      const head = h("th", { scope: "col", class: column.numeric ? "number" : "" }, h("button", { type: "button", onclick: () => this.order(column) }, column.title));
      head.dataset.column = column.name;
      return head;
    });
    this.head.replaceChildren(...shown, h("th", { scope: "col" }, "why it ended"));
  }
  order(column) {
    const other = { ascending: "descending", descending: "ascending" };
    this.sort = this.sort?.name === column.name ? { name: column.name, way: other[this.sort.way] } : { name: column.name, way: column.first };
    this.arrange();
    this.onOrder();
  }
  arrange() {
    const wanted = this.filter.toLowerCase();
    let rows = this.rows;
    if (this.only) rows = rows.filter((row) => this.only.has(row.trial));
    else if (wanted) rows = rows.filter((row) => `${row.texts.join(" ")} ${row.why}`.toLowerCase().includes(wanted));
    const place = this.columns.findIndex((column) => column.name === this.sort?.name);
    if (place >= 0) {
      const sign = this.sort.way === "ascending" ? 1 : -1;
      rows = [...rows].sort((a, b) => {
        const left = a.values[place], right = b.values[place];
        if (left === null || right === null) return (left === null) - (right === null);
        return sign * (typeof left === "number" ? left - right : String(left).localeCompare(String(right)));
      });
    }
    for (const head of this.head.children) {
      if (head.dataset.column === this.sort?.name) head.setAttribute("aria-sort", this.sort.way); else head.removeAttribute("aria-sort");
    }
    this.shown = rows;
    this.drawn = null;
    this.draw();
    this.onArranged?.(rows.length, this.rows.length);
  }
  draw() {
    const first = Math.max(0, Math.floor(this.scroll.scrollTop / this.height) - 8);
    const last = Math.min(this.shown.length, first + Math.ceil((this.scroll.clientHeight || 600) / this.height) + 16);
    if (this.drawn === `${first}-${last}`) return;
    this.drawn = `${first}-${last}`;
    const gap = (rows) => { const row = h("tr", { class: "gap", "aria-hidden": "true" }); row.style.height = `${rows * this.height}px`; return row; };
    this.body.replaceChildren(gap(first), ...this.shown.slice(first, last).map((row) => this.line(row)), gap(this.shown.length - last));
    this.table.setAttribute("aria-rowcount", this.shown.length);
  }
  line(row) {
    const cells = row.texts.map((text, i) => {
      const column = this.columns[i];
      if (column.name === "trial") return h("td", {}, h("button", { type: "button", class: "id", "aria-pressed": String(this.picked.includes(row.trial)), onclick: () => this.onPick(row.trial) }, text), " ", h("a", { href: this.onOpen(row.trial), "aria-label": `open trial ${row.trial}` }, "open"));
      if (column.name === "state") return h("td", {}, badge(text));
      return h("td", { class: column.numeric ? "number" : "" }, text);
    });
    const classes = [this.picked.includes(row.trial) ? "picked" : "", this.at === row.trial ? "at" : ""].join(" ").trim();
    return h("tr", { class: classes, data: { trial: row.trial } }, cells, h("td", { class: "why", title: row.why }, row.why));
  }
  move(by) {
    const now = this.shown.findIndex((row) => row.trial === this.at);
    const next = Math.min(this.shown.length - 1, Math.max(0, now < 0 ? 0 : now + by));
    this.at = this.shown[next]?.trial ?? null;
    const top = next * this.height;
    if (top < this.scroll.scrollTop || top > this.scroll.scrollTop + this.scroll.clientHeight - 3 * this.height) this.scroll.scrollTop = top - this.scroll.clientHeight / 2;
    this.drawn = null;
    this.draw();
  }
}

function swatch(group) {
  const node = h("span", { class: "swatch" });
  node.style.borderTopColor = paint(group.colour);
  node.style.borderTopStyle = group.dash === "solid" ? "solid" : group.dash === "dot" ? "dotted" : "dashed";
  return node;
}

export function studyView(id, query) {
  const base = `studies/${enc(id)}`;
  const parts = Object.fromEntries(["top", "tiles", "cautions", "curves", "table", "figures", "log"].map((name) => [name, h("div")]));
  page.replaceChildren(h("p", { class: "faint" }, "Reading the study."));
  let overview = null, table = null, panels = [], source = null, timer = 0, closed = false, ready = false, changed = 0, stateText = "";
  const hidden = new Set();
  let picked = (query.get("pick") || "").split(",").filter(Boolean).slice(0, 2);
  const figures = new Map();

  async function load() {
    let told, trials, curves;
    try {
      told = await api(base);
      if (told.found && !closed) [trials, curves] = await Promise.all([api(`${base}/trials`), api(`${base}/curves`)]);
    } catch (error) {
      if (closed) return;
      if (error.status === 401 && (await askToken())) return load();
      if (closed) return;
      page.replaceChildren(h("h1", {}, id), h("p", { class: "bad" }, error.message), h("p", {}, h("a", { href: "#/" }, "all studies")));
      if (error.status !== 401) timer = setTimeout(load, 5000); // it may be about to begin, or the service about to come back
      return;
    }
    if (closed) return;
    if (!told.found) { waiting(told); return; }
    build();
    show(told);
    table.set(trials);
    groupsOf(trials.rows);
    for (const [trial, curve] of Object.entries(curves.trials)) {
      for (const panel of panels) {
        const values = [];
        curve.epoch.forEach((epoch, i) => { values[epoch - 1] = curve[panel.key][i]; });
        panel.set(trial, Array.from(values, (value) => value ?? null), aboutOf(trial, curve.drw));
      }
    }
    for (const panel of panels) panel.redraw();
    pick(picked);
    follow(curves.seen);
    ready = true;
    document.documentElement.dataset.ready = "yes";
  }

  function waiting(told) { // no study.json yet: it waits, starts, or could not start
    page.replaceChildren(h("h1", {}, told.name), h("p", {}, badge(told.state, told.place ? ` (place ${told.place})` : "")),
      buttons(told), h("h2", {}, "What its driver says"), parts.log);
    logPart(["console"]);
    document.documentElement.dataset.ready = "yes";
    timer = setTimeout(load, 1500);
  }

  function buttons(told) {
    const start = told.state === "interrupted" ? "resume" : "start";
    return h("div", { class: "tools" },
      told.can_start ? h("button", { class: "tool main", id: "start", onclick: async () => { if (await act(`${base}/start`, "waiting for the machine")) refresh(); } }, start) : "",
      told.can_retry ? h("button", { class: "tool", id: "retry", onclick: async () => { if (await act(`${base}/start?retry_failed=true`, "waiting for the machine")) refresh(); } }, "let failed trials go on") : "",
      told.can_stop ? h("button", { class: "tool", id: "stop", onclick: async () => {
        if (told.state === "queued" || (await confirmThat("Stop the study? Its trials keep their checkpoints, and it can be resumed.", "stop the study"))) {
          if (await act(`${base}/stop`, told.state === "queued" ? "taken from the queue" : "asked to stop")) refresh();
        }
      } }, told.stopping ? "stopping" : told.state === "queued" ? "take from the queue" : "stop") : "",
      told.found ? h("a", { class: "tool", href: `api/${base}/report`, download: "" }, "download report") : "");
  }

  const refresh = () => { clearTimeout(timer); if (!ready) timer = setTimeout(load, 600); else api(base).then(show).catch(() => {}); };

  function build() {
    page.replaceChildren(...Object.values(parts));
    const host = () => h("div", { class: "canvas" });
    const ema = host(), raw = host();
    parts.chips = h("div", { class: "chips", role: "group", "aria-label": "what the curves show" });
    parts.picks = h("p", { class: "faint picks", role: "status" }, "Click a curve or a trial to pick it; two can be compared.");
    parts.curves.replaceChildren(h("h2", { id: "curves" }, "Validation AUC by epoch"), parts.chips,
      h("div", { class: "pair" }, h("figure", {}, h("figcaption", {}, "Averaged weights (EMA): what would be deployed"), ema), h("figure", {}, h("figcaption", {}, "Raw weights, as trained"), raw)), parts.picks);
    const onPick = (trial) => toggle(trial);
    panels = [new Curves(ema, { key: "ema", label: "validation AUC of the averaged weights by epoch, a line a trial", onPick }), new Curves(raw, { key: "raw", label: "validation AUC of the raw weights by epoch, a line a trial", onPick })];
    const filter = h("input", { type: "search", id: "filter", placeholder: "part of any cell, or best_val_auc > 0.8", value: query.get("where") || "" });
    const count = h("span", { class: "faint", role: "status" });
    let wait = 0;
    filter.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => { applyFilter(filter.value); address(); }, 200); });
    parts.table.replaceChildren(h("h2", { id: "trials" }, "Trials"), h("div", { class: "tools" }, h("label", {}, "Filter ", filter), count));
    table = new TrialTable(parts.table, { onPick, onOpen: (trial) => studyHash(id, `/trial/${enc(trial)}`), onOrder: () => address() });
    table.onArranged = (shown, all) => { count.textContent = shown === all ? `${all} trials` : `${shown} of ${all} trials`; };
    const sort = query.get("sort") || "-objective";
    table.sort = { name: sort.replace(/^-/, ""), way: sort.startsWith("-") ? "descending" : "ascending" };
    if (filter.value) applyFilter(filter.value);
    logPart(["study", "console"]);
  }

  async function applyFilter(text) {
    table.filter = text.trim();
    table.only = null;
    if (/[<>=~]/.test(text)) {
      try {
        const found = await api(`${base}/trials?where=${enc(text)}`);
        table.only = new Set(found.rows.map((row) => row.trial));
        
      } catch (error) { say(error.message, true); table.only = new Set(); }
    }
    table.arrange();
  }

  function address() {
    const kept = new URLSearchParams();
    if (table.sort && !(table.sort.name === "objective" && table.sort.way === "descending")) kept.set("sort", (table.sort.way === "descending" ? "-" : "") + table.sort.name);
    if (table.filter) kept.set("where", table.filter);
    if (picked.length) kept.set("pick", picked.join(","));
    history.replaceState(null, "", studyHash(id, kept.size ? `?${kept}` : ""));
  }

  const about = new Map(); // trial -> {group, ended}
  function groupsOf(rows) {
    for (const row of rows) {
      if (!row.trial) continue;
      const state = row.texts[table.columns.findIndex((column) => column.name === "state")];
      about.set(row.trial, { group: row.group, ended: state === "stopped" || state === "failed" });
      for (const panel of panels) if (panel.about(row.trial, about.get(row.trial))) panel.redraw();
    }
  }
  const aboutOf = (trial, drw) => ({ drw, ...(about.get(trial) || { group: "healthy", ended: false }) });

  function show(told) {
    if (closed || !told.found) return;
    overview = told;
    document.title = `${told.name} · medtune`;
    parts.top.replaceChildren(h("div", { class: "title" }, h("h1", {}, told.name), badge(told.state, told.place ? ` (place ${told.place})` : "")), h("p", { class: "faint" }, told.path), told.trouble ? h("p", { class: "bad", id: "trouble" }, told.trouble) : "",
      h("p", { class: "asked" }, told.asked), h("p", { class: "found" }, told.found), buttons(told));
    tiles(told);
    parts.cautions.replaceChildren(told.cautions.length ? h("details", { class: "doubts" }, h("summary", {}, `Before you trust this (${told.cautions.length})`),
      h("ul", { class: "cautions" }, told.cautions.map((each) => h("li", {}, h("b", {}, each.title), h("p", {}, prose(each.text)), h("p", { class: "faint" }, prose(each.remedy)))))) : "");
    if (open) parts.cautions.querySelector("details")?.setAttribute("open", "");
    parts.cautions.querySelector("details")?.addEventListener("toggle", (event) => { open = event.target.open; });
    chips(told.groups);
    for (const panel of panels) {
      if (panel.best !== told.best_trial || String(panel.rungs) !== String(told.rungs)) { panel.best = told.best_trial; panel.rungs = told.rungs; panel.redraw(); }
      if (panel.epochs < told.full_epochs) { panel.epochs = told.full_epochs; panel.redraw(); }
    }
    figurePart(told.figures);
    const news = JSON.stringify([told.states, told.epochs]);
    if (news !== stateText) { stateText = news; changed += 1; }
  }
  let open = false;

  function tiles(told) {
    const progress = told.progress, done = Object.values(told.states).reduce((a, b) => a + b, 0);
    const tile = (value, text) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, text));
    const list = [tile(number(told.best), told.best_trial ? `${told.objective}, trial ${told.best_trial}` : told.objective),
      tile(`${done} of ${told.trials}`, `trials: ${Object.entries(told.states).map(([state, count]) => `${count} ${state}`).join(", ") || "none yet"}`), tile(String(told.epochs), "epochs run")];
    if (told.state === "running") {
      const now = Date.now() / 1000;
      list.push(tile(progress.likely ? `~${span(progress.likely - now)}` : "-", progress.latest ? `left, ${span(progress.latest - now)} if nothing more is stopped` : "left: not known yet"));
      const gpus = progress.gpus ? `${progress.gpus_held} of ${progress.gpus} GPUs held` : `${progress.running} at a time, no GPU`;
      const more = [gpus, progress.memory_gib ? `${progress.memory_gib.toFixed(1)} GiB at most` : "", progress.volumes_per_s ? `${progress.volumes_per_s.toFixed(0)} volumes/s` : ""].filter(Boolean).join(", ");
      list.push(tile(progress.busy === null ? "-" : `${Math.round(100 * progress.busy)} %`, `busy in epochs; ${more}`));
    }
    parts.tiles.className = "tiles";
    parts.tiles.replaceChildren(...list);
  }

  function chips(groups) {
    for (const panel of panels) for (const group of groups) panel.groups.set(group.key, group);
    const text = JSON.stringify([groups, [...hidden]]);
    if (parts.chips.dataset.text === text) return;
    parts.chips.dataset.text = text;
    parts.chips.replaceChildren(...groups.map((group) => h("button", { type: "button", class: "chip", data: { group: group.key }, "aria-pressed": String(!hidden.has(group.key)), onclick: () => {
      if (hidden.has(group.key)) hidden.delete(group.key); else hidden.add(group.key);
      for (const panel of panels) { panel.hidden = hidden; panel.redraw(); }
      chips(overview.groups);
    } }, swatch(group), `${group.glyph} ${group.title} (${group.count})`)));
  }

  // Picking: at most two, the older one goes
  function toggle(trial) { pick(picked.includes(trial) ? picked.filter((each) => each !== trial) : [...picked.slice(-1), trial]); }
  function pick(trials) {
    picked = trials;
    table.picked = picked;
    table.drawn = null;
    table.draw();
    for (const panel of panels) { panel.picked = picked; panel.later(); }
    for (const [name, each] of figures) if (each.figure) draw(name);
    parts.picks.replaceChildren(...(picked.length ? [`picked: `, ...picked.flatMap((trial) => [h("a", { href: studyHash(id, `/trial/${enc(trial)}`) }, trial), " "]),
      picked.length === 2 ? h("a", { class: "tool", id: "compare", href: studyHash(id, `/compare/${picked.map(enc).join("/")}`) }, "compare the two") : "", " ",
      h("button", { type: "button", class: "tool", onclick: () => pick([]) }, "clear")] : ["Click a curve or a trial to pick it; two can be compared."]));
    address();
  }

  // Figures: loaded when they come into view, and again when the study has news
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const each = figures.get(target.dataset.figure);
      if (each) { each.visible = isIntersecting; if (isIntersecting) freshen(target.dataset.figure); }
    }
  }, { rootMargin: "300px" });

  function figurePart(names) {
    const text = names.map((each) => each.name).join();
    if (parts.figures.dataset.names === text) { for (const [name, each] of figures) if (each.visible && Date.now() - each.at > (name === "importance" ? 120000 : 20000)) freshen(name); return; }
    parts.figures.dataset.names = text;
    const slices = [];
    const whole = [];
    for (const { name, title } of names) {
      let each = figures.get(name);
      if (!each) {
        each = { host: h("div", { class: "plot" }), caption: h("figcaption"), at: 0, seen: -1 };
        each.box = h("figure", { data: { figure: name }, class: name === "parallel" ? "wide" : "" }, h("h3", {}, title), name === "parallel" ? h("div", { class: "scroll" }, each.host) : each.host, each.caption);
        figures.set(name, each);
        seen.observe(each.box);
      }
      (name.startsWith("slice-") ? slices : whole).push(each.box);
    }
    parts.figures.replaceChildren(names.length ? h("h2", { id: "figures" }, "What it says") : "", ...whole, slices.length ? h("div", { class: "slices" }, slices) : "");
  }

  async function freshen(name) {
    const each = figures.get(name);
    if (each.busy || each.seen === changed) return;
    each.busy = true;
    try {
      const told = await api(`${base}/figures/${enc(name)}`);
      each.figure = told.figure;
      each.caption.textContent = told.caption;
      draw(name);
    } catch (error) { if (!each.figure) each.caption.textContent = `Not told: ${error.message}`; }
    each.busy = false;
    each.seen = changed;
    each.at = Date.now();
  }
  function draw(name) { const each = figures.get(name); drawFigure(each.host, each.figure, { onPick: toggle, picked }); }

  function logPart(which) {
    const text = h("pre", { class: "log", tabindex: 0 });
    const choice = h("select", { "aria-label": "which log" }, which.map((each) => h("option", {}, each)));
    const details = h("details", { id: "log" }, h("summary", {}, "Log"), h("div", { class: "tools" }, choice), text);
    if (which[0] === "console") details.setAttribute("open", "");
    let wait = 0;
    const read = async () => {
      clearTimeout(wait);
      if (closed || !details.open || !details.isConnected) return;
      try {
        const told = await api(`${base}/log?which=${choice.value}`);
        const low = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
        text.textContent = told.lines.join("\n") || "nothing yet";
        if (low) text.scrollTop = text.scrollHeight;
      } catch { /* the next look may tell */ }
      wait = setTimeout(read, 3000);
    };
    details.addEventListener("toggle", read);
    choice.addEventListener("change", read);
    parts.log.replaceChildren(details);
    setTimeout(read, 50);
  }

  function follow(from) {
    source = new EventSource(`api/${base}/events?seen=${from}`);
    // A browser keeps six connections to a host: one that a page left behind is kept from the next
    addEventListener("pagehide", () => source.close(), { once: true });
    const told = (text, good) => { live.textContent = text; live.className = good ? "live on" : "live"; };
    source.onopen = () => told("live", true);
    source.onerror = () => told("connection lost, trying again", false);
    source.addEventListener("rows", (event) => {
      const news = JSON.parse(event.data);
      document.documentElement.dataset.lag = String(Math.round(Date.now() - news.sent * 1000));
      for (const [trial, epoch, raw, ema, drw] of news.rows) {
        for (const panel of panels) {
          panel.add(trial, epoch, panel.key === "raw" ? raw : ema);
          const line = panel.trials.get(trial);
          if (drw && line && !line.drw) { line.drw = epoch; panel.redraw(); }
        }
      }
      document.documentElement.dataset.rows = String(Number(document.documentElement.dataset.rows || 0) + news.rows.length);
    });
    source.addEventListener("trials", (event) => { const rows = JSON.parse(event.data); table.update(rows); groupsOf(rows); });
    source.addEventListener("study", (event) => show(JSON.parse(event.data)));
  }

  load();
  return {
    crumbs: [[id, studyHash(id)]],
    close: () => { closed = true; clearTimeout(timer); source?.close(); seen.disconnect(); live.textContent = ""; live.className = "live"; },
    repaint: () => { if (overview) { delete parts.chips.dataset.text; chips(overview.groups); } for (const panel of panels) panel.redraw(); for (const [name, each] of figures) if (each.figure) draw(name); },
    keys: {
      j: () => table?.move(1), k: () => table?.move(-1), x: () => table?.at && toggle(table.at),
      Enter: () => { if (table?.at) location.hash = studyHash(id, `/trial/${enc(table.at)}`); },
      c: () => { if (picked.length === 2) location.hash = studyHash(id, `/compare/${picked.map(enc).join("/")}`); },
      "/": () => document.getElementById("filter")?.focus(),
    },
  };
}

// One trial ---------------------------------------------------------------------------------------------------------------

const LINES = [
  ["Validation AUC", [["averaged", "val_auc_ema", "#00609c", "solid"], ["raw", "val_auc_raw", "#c75300", "dash"]], { range: [0.4, 1.02], band: ["val_auc_low", "val_auc_high"] }],
  ["Training loss", [["loss", "train_loss", "#303030", "solid"]], {}],
  ["AUC on training volumes", [["train", "train_auc", "#0b7a5e", "solid"], ["validation, raw", "val_auc_raw", "#c75300", "dash"]], { range: [0.4, 1.02] }],
  ["Learning rates", [["head", "lr_classifier", "#00609c", "solid"], ["backbone", "lr_backbone", "#c75300", "dash"]], {}],
  ["Gradient norm before clipping", [["median", "grad_norm", "#5a3db4", "solid"]], {}],
];

function trialFigures(told, host) {
  const drawn = [];
  for (const [title, lines, options] of LINES) {
    const found = lines.filter(([, name]) => told.curves[name]);
    if (!told.curves[lines[0][1]] || !told.curves.epoch.length) continue;
    const band = options.band?.every((name) => told.curves[name]) ? options.band.map((name) => told.curves[name]) : undefined;
    const low = Math.min(0.4, ...[...found.map(([, name]) => told.curves[name]), ...(band || [])].flat().filter((value) => value !== null)) - 0.02;
    const figure = lineFigure(title, told.curves.epoch, found.map(([name, column, colour, dash]) => ({ name, values: told.curves[column], colour, dash })),
      { ...options, band, range: options.range ? [Math.max(0, low), 1.02] : undefined, rungs: told.rungs, drw: told.drw });
    const plot = h("div", { class: "plot", role: "img", "aria-label": `${title} by epoch` });
    host.append(h("figure", {}, h("h3", {}, title), plot));
    drawn.push(() => drawFigure(plot, figure));
  }
  drawn.forEach((draw) => draw());
  return drawn;
}

export function trialView(study, trial) {
  const base = `studies/${enc(study)}`;
  let closed = false, timer = 0, drawn = [], before = "";
  async function load() {
    let told;
    try { told = await api(`${base}/trials/${enc(trial)}`); } catch (error) {
      if (error.status === 401 && (await askToken())) return load();
      page.replaceChildren(h("h1", {}, `Trial ${trial}`), h("p", { class: "bad" }, error.message));
      return;
    }
    const text = JSON.stringify(told);
    if (!closed && text !== before) { before = text; show(told); }
    if (!closed && told.state === "running") timer = setTimeout(load, 3000);
  }
  function show(told) {
    const healthy = !told.verdict || told.verdict === "healthy";
    const title = healthy ? (told.verdict ? "healthy" : "not diagnosed yet") : `${told.group_title === "stopped at a rung" ? told.verdict : told.group_title}${told.since_epoch ? ` since epoch ${told.since_epoch}` : ""}`;
    const interval = told.best_val_auc_low === null ? "" : ` [${number(told.best_val_auc_low)}, ${number(told.best_val_auc_high)}]`;
    const tile = (value, words) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, words));
    const plots = h("div", { class: "plots" });
    const log = h("pre", { class: "log", tabindex: 0 });
    const details = h("details", { ontoggle: async (event) => { if (event.target.open) log.textContent = (await api(`${base}/log?which=trial&trial=${enc(trial)}`)).lines.join("\n") || "nothing"; } }, h("summary", {}, "Log of the trial"), log);
    page.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, `Trial ${told.trial}`), badge(told.state), told.variant ? h("span", { class: "faint" }, told.variant) : ""),
      h("section", { class: `diagnosis ${healthy ? "good" : "bad"}`, "aria-label": "diagnosis" }, h("b", { id: "verdict" }, title), h("p", { id: "summary" }, prose(told.verdict_summary || (healthy ? "Nothing is wrong by now." : ""))), told.advice ? h("p", { class: "advice" }, h("b", {}, "What to change: "), prose(told.advice)) : ""),
      told.reason && told.state !== "running" && !told.reason.includes(told.verdict_summary) ? h("p", {}, `Ended: ${told.reason}`) : "", told.error ? h("pre", { class: "log" }, told.error) : "",
      h("div", { class: "tools" }, told.stoppable ? h("button", { class: "tool main", id: "stop-trial", disabled: told.stop_asked, onclick: async () => {
        if ((await confirmThat(`Stop trial ${trial} after the epoch it is in? It will not be run again.`, "stop the trial")) && (await act(`${base}/trials/${enc(trial)}/stop`, "asked: it ends with its epoch"))) load();
      } }, told.stop_asked ? "asked to stop" : "stop this trial") : "", h("a", { class: "tool", href: studyHash(study, `?pick=${enc(trial)}`) }, "show among the others")),
      h("div", { class: "tiles" }, tile(number(told.objective), "objective"), tile(number(told.best_val_auc), `AUC${interval} in epoch ${told.best_epoch ?? "-"}`), tile(`${told.epochs_run} of ${told.epochs}`, "epochs"), tile(told.work || "-", "in its epochs")),
      plots,
      h("h2", {}, "Decisions"), told.decisions.length ? h("table", { class: "stack" }, h("thead", {}, h("tr", {}, ["epoch", "decision", "on what"].map((each) => h("th", { scope: "col" }, each)))),
        h("tbody", {}, told.decisions.map((each) => h("tr", {}, h("td", { "data-label": "epoch" }, each.epoch), h("td", { "data-label": "decision" }, `${each.action}: ${each.reason}`), h("td", { class: "text" }, each.summary))))) : h("p", { class: "faint" }, "None worth a line yet."),
      h("h2", {}, "Settings"), h("p", { class: "faint" }, "Bold and ≠: differs from what the document ends with, or from the default where it says nothing."), settingsTable(told), details,
    );
    drawn = trialFigures(told, plots);
    document.title = `${told.trial} · ${told.study} · medtune`;
    document.documentElement.dataset.ready = "yes";
  }
  load();
  return { crumbs: [[study, studyHash(study)], [trial, studyHash(study, `/trial/${enc(trial)}`)]], close: () => { closed = true; clearTimeout(timer); }, repaint: () => drawn.forEach((draw) => draw()),
    keys: { Escape: () => { location.hash = studyHash(study); } } };
}

function settingsTable(told) {
  const row = (each) => h("tr", { class: each.differs ? "differs" : "" }, h("td", {}, each.name, each.searched ? h("span", { class: "faint" }, " searched") : ""), h("td", {}, `${each.value}${each.differs ? " ≠" : ""}`), h("td", {}, each.documented), h("td", { class: "faint roomy" }, prose(each.meaning)));
  const head = h("thead", {}, h("tr", {}, ["hyperparameter", "this trial", "document's"].map((each) => h("th", { scope: "col" }, each)), h("th", { scope: "col", class: "roomy" }, "meaning")));
  const telling = told.settings.filter((each) => each.differs || each.searched), rest = told.settings.filter((each) => !telling.includes(each));
  return h("div", {}, h("table", { class: "settings" }, head, h("tbody", {}, telling.map(row))), h("details", {}, h("summary", {}, `${rest.length} others`), h("table", { class: "settings" }, h("tbody", {}, rest.map(row)))));
}

// Two trials --------------------------------------------------------------------------------------------------------------

export function compareView(study, first, second) {
  let drawn = [];
  api(`studies/${enc(study)}/compare?first=${enc(first)}&second=${enc(second)}`).then((told) => {
    const heads = told.trials.map((trial) => h("th", { scope: "col" }, h("a", { href: studyHash(study, `/trial/${enc(trial)}`) }, trial)));
    const table = (name, rows, more) => h("table", { class: "settings" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, name), heads.map((head) => head.cloneNode(true)), more ? h("th", { class: "roomy", scope: "col" }, more) : "")), h("tbody", {}, rows));
    const words = told.pages.map((each) => h("div", { class: "diagnosis" }, h("b", {}, `${each.trial}: ${each.verdict ? each.group_title : "not diagnosed yet"}`), h("p", {}, prose(each.verdict_summary || ""))));
    const plots = h("div", { class: "plots" });
    page.replaceChildren(h("h1", {}, `${first} against ${second}`), table("outcome", told.outcome.map((row) => h("tr", {}, row.map((text) => h("td", {}, text))))), plots,
      h("div", { class: "pair" }, words), h("h2", {}, "Settings that differ"), told.settings.length ? table("hyperparameter", told.settings.map((each) => h("tr", { data: { name: each.name } }, h("td", {}, each.name), each.values.map((text) => h("td", {}, text)), h("td", { class: "faint roomy" }, prose(each.meaning)))), "meaning") : h("p", {}, "None."),
      h("p", { class: "faint" }, `${told.same} others are equal.`));
    for (const [title, column, range] of [["Averaged weights: validation AUC", "val_auc_ema", true], ["Raw weights: validation AUC", "val_auc_raw", true], ["Training loss", "train_loss", false]]) {
      const pages = told.pages.filter((each) => each.curves[column]);
      if (!pages.length) continue;
      const epochs = pages.reduce((longest, each) => (each.curves.epoch.length > longest.length ? each.curves.epoch : longest), []);
      const figure = lineFigure(title, epochs, pages.map((each, i) => ({ name: each.trial, values: epochs.map((_, at) => each.curves[column][at] ?? null), colour: i ? "#c75300" : "#00609c", dash: i ? "dash" : "solid" })), { range: range ? [0.35, 1.02] : undefined });
      const plot = h("div", { class: "plot", role: "img", "aria-label": `${title} of both` });
      plots.append(h("figure", {}, h("h3", {}, title), plot));
      drawn.push(() => drawFigure(plot, figure));
    }
    drawn.forEach((draw) => draw());
    document.title = `${first} against ${second} · medtune`;
    document.documentElement.dataset.ready = "yes";
  }).catch((error) => page.replaceChildren(h("p", { class: "bad" }, error.message)));
  return { crumbs: [[study, studyHash(study)], [`${first} against ${second}`, location.hash]], close: () => {}, repaint: () => drawn.forEach((draw) => draw()), keys: { Escape: () => { location.hash = studyHash(study); } } };
}

