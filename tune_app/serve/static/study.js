// A study, one of its trials, and two of them side by side. Whatever comes from a study is set as text.
import { brushed, drawFigure, isDark, lineFigure, paint } from "./charts.js";
import { Link, MOST_PICKS, Panel, pickColour } from "./curves.js";
import { followButtons, followUp, modelsPart } from "./follow.js";
import { act, api, askToken, badge, confirmThat, dialog, enc, h, notesPart, number, page, prose, showMessage, showSession, span, state, studyHash } from "./parts.js";
import { TrialTable } from "./table.js";

const live = document.getElementById("live");

// One study ---------------------------------------------------------------------------------------------------------------

function swatch(group) {
  const node = h("span", { class: "swatch" });
  node.style.borderTopColor = paint(group.colour);
  node.style.borderTopStyle = group.dash === "solid" ? "solid" : group.dash === "dot" ? "dotted" : "dashed";
  return node;
}

const REST_MS = 3000; // from the page's first figures to those that are not in view

export function studyView(id, query) {
  const base = `studies/${enc(id)}`;
  const parts = Object.fromEntries(["top", "tiles", "cautions", "curves", "table", "figures", "models", "log"].map((name) => [name, h("div")]));
  page.replaceChildren(h("p", { class: "faint" }, "Reading the study."));
  let overview = null, table = null, link = null, panels = [], source = null, timer = 0, closed = false, ready = false, changed = 0, stateText = "";
  let picked = (query.get("pick") || "").split(",").filter(Boolean).slice(0, MOST_PICKS);
  const figures = new Map(), brushes = new Map();
  const colourOf = (trial) => pickColour(Math.max(0, picked.indexOf(trial)), isDark());
  let axis = ["epoch", "updates", "time"].includes(query.get("x")) ? query.get("x") : "epoch", refetched = 0;

  let connected = false, models = null;
  let open = true; // whether the cautions are
  async function load() {
    let studyInfo, trials, curves;
    try {
      studyInfo = await api(base);
      if (studyInfo.found && !closed) {
        const known = new Set(studyInfo.metrics.map((each) => each.name));
        const wanted = (query.get("y") || "").split(",").filter((name) => known.has(name)).slice(0, 2);
        const metrics = wanted.length === 2 ? wanted : ["val_auc_ema", "val_auc_raw"];
        [trials, curves] = await Promise.all([api(`${base}/trials`), api(curvesPath(metrics))]);
        curves.metrics = metrics;
      }
    } catch (error) {
      if (closed) return;
      if (error.status === 401 && (await askToken())) return load();
      if (closed) return;
      page.replaceChildren(h("h1", {}, id), h("p", { class: "bad" }, error.message), h("p", {}, h("a", { href: "#/" }, "all studies")));
      if (error.status !== 401) timer = setTimeout(load, 5000); // it may be about to begin, or the service about to come back
      return;
    }
    if (closed) return;
    if (!studyInfo.found) { waiting(studyInfo); return; }
    build(studyInfo, curves.metrics);
    show(studyInfo);
    table.set(trials);
    groupsOf(trials.rows);
    fill(curves);
    pick(picked);
    follow(curves.seen);
    ready = true;
    document.documentElement.dataset.ready = "yes";
  }

  const curvesPath = (metrics) => `${base}/curves?axis=${axis}&${[...new Set(metrics)].map((name) => `metrics=${name}`).join("&")}`;
  function fill(curves) {
    for (const [trial, curve] of Object.entries(curves.trials)) link.about(trial, { ...(about.get(trial) || { group: "no_fault", ended: false }), drw: curve.drw });
    for (const panel of panels) panel.set(panel.metric, axis, Object.fromEntries(Object.entries(curves.trials).map(([trial, curve]) => [trial, { x: curve.x, y: curve[panel.metric] }])));
  }
  async function refill() { // other metrics or another axis, and rows that the live events do not hold
    refetched = Date.now();
    try { fill(await api(curvesPath(panels.map((panel) => panel.metric)))); } catch (error) { showMessage(error.message, true); }
  }
  const isLive = () => axis === "epoch" && panels.every((panel) => /^val_auc_(ema|raw)$/.test(panel.metric));

  function waiting(studyInfo) { // no study.json yet: it waits, starts, or could not start
    page.replaceChildren(h("h1", {}, studyInfo.name), h("p", {}, badge(studyInfo.state, studyInfo.place ? ` (place ${studyInfo.place})` : "")),
      buttons(studyInfo), h("h2", {}, "Output of its driver"), parts.log);
    logPart(["console"]);
    document.documentElement.dataset.ready = "yes";
    timer = setTimeout(load, 1500);
  }

  function buttons(studyInfo) {
    const start = studyInfo.state === "interrupted" ? "resume" : "start";
    return h("div", { class: "tools" },
      studyInfo.can_start ? h("button", { class: "tool main", id: "start", onclick: async () => { if (await act(`${base}/start`, "waiting for the machine")) refresh(); } }, start) : "",
      studyInfo.can_retry ? h("button", { class: "tool", id: "retry", onclick: async () => { if (await act(`${base}/start?retry_failed=true`, "waiting for the machine")) refresh(); } }, "retry failed trials") : "",
      studyInfo.can_stop ? h("button", { class: "tool", id: "stop", onclick: async () => {
        if (studyInfo.state === "queued" || (await confirmThat("Stop the study? Its trials keep their checkpoints, and it can be resumed.", "stop the study"))) {
          if (await act(`${base}/stop`, studyInfo.state === "queued" ? "taken from the queue" : "asked to stop")) refresh();
        }
      } }, studyInfo.stopping ? "stopping" : studyInfo.state === "queued" ? "remove from queue" : "stop") : "",
      studyInfo.found ? h("a", { class: "tool", href: `api/${base}/report`, download: "" }, "download report") : "",
      studyInfo.found ? followButtons(studyInfo, () => table?.rows.map((row) => row.trial) ?? []) : "",
      studyInfo.found && !studyInfo.can_stop ? h("button", { class: "tool", id: "manage", onclick: () => manage(studyInfo) }, "rename, archive, delete") : "");
  }

  async function manage(studyInfo) {
    if (!state.session.logged_in && !(await askToken())) return;
    const found = await api(`${base}/contents`);
    const name = h("input", { id: "new-name", value: studyInfo.name }), typed = h("input", { id: "typed-name", autocomplete: "off" });
    const send = async (path, method, body, next) => {
      try { const asked = await api(`${base}${path}`, { method, body }); dialog.close(); showMessage(asked.became); location.hash = next(asked); } catch (error) { showMessage(error.message, true); }
    };
    const size = found.bytes > 1e9 ? `${(found.bytes / 1e9).toFixed(1)} GB` : `${(found.bytes / 1e6).toFixed(1)} MB`;
    dialog.replaceChildren(h("h2", {}, studyInfo.name),
      h("label", { class: "field" }, h("span", {}, "new name"), name), h("button", { class: "tool", id: "rename", onclick: () => send("/rename", "POST", { name: name.value.trim() }, (asked) => studyHash(asked.study)) }, "rename"),
      h("p", {}, "Archive: moves the folder to .medtune/archive, where this page does not look. Nothing is lost."), h("button", { class: "tool", id: "archive", onclick: () => send("/archive", "POST", {}, () => "#/") }, "archive"),
      h("p", {}, `Delete: ${found.trials} trials with their rows, the weights of ${found.with_weights} of them${found.confirmation ? ", the confirmation" : ""}, ${size} in all. There is no way back.`),
      h("label", { class: "field" }, h("span", {}, "its name, to delete it"), typed), h("div", { class: "tools" }, h("button", { class: "tool danger", id: "delete", onclick: () => send("", "DELETE", { name: typed.value }, () => "#/") }, "delete"), h("button", { class: "tool main", onclick: () => dialog.close() }, "cancel")));
    dialog.oncancel = null;
    dialog.showModal();
  }


  const toPaper = (printing) => () => { if (table) { table.printing = printing; table.redraw(); } };
  const [beforePrint, afterPrint] = [toPaper(true), toPaper(false)];
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);

  const refresh = () => { clearTimeout(timer); if (!ready) timer = setTimeout(load, 600); else api(base).then(show).catch(() => {}); };

  function build(studyInfo, metrics) {
    page.replaceChildren(...Object.values(parts));
    models?.close();
    models = modelsPart(id);
    parts.models.replaceChildren(models.box);
    parts.notes = notesPart(base, "study", () => api(`${base}/notes`).then((found) => found.study));
    link = new Link({ onPick: toggle, isDark });
    parts.chips = h("div", { class: "chips", role: "group", "aria-label": "groups of trials that the curves show" });
    parts.picks = h("p", { class: "faint picks", role: "status" });
    const hosts = [h("div", { class: "canvas" }), h("div", { class: "canvas" })];
    const select = (label, names, value, onchange) => { const node = h("select", { "aria-label": label, onchange: () => onchange(node.value) }, names.map(([name, title]) => h("option", { value: name, title }, name))); node.value = value; return node; };
    const choices = hosts.map((_, i) => select(`metric of the ${i ? "right" : "left"} panel`, studyInfo.metrics.map((each) => [each.name, each.meaning]), metrics[i], (name) => { panels[i].metric = name; meaning(i); refill(); address(); }));
    const words = hosts.map(() => h("span", { class: "faint" }));
    const meaning = (i) => { words[i].textContent = studyInfo.metrics.find((each) => each.name === choices[i].value)?.meaning ?? ""; };
    const over = select("horizontal axis", [["epoch", ""], ["updates", "optimiser updates"], ["time", "minutes in the trial's epochs"]], axis, (name) => { axis = name; link.zoom = null; refill(); address(); });
    const smooth = h("input", { type: "range", id: "smoothing", min: 0, max: 0.95, step: 0.05, value: 0, "aria-label": "smoothing", oninput: () => { link.smoothing = Number(smooth.value); amount.textContent = link.smoothing ? smooth.value : "off"; link.redraw(); } });
    const amount = h("output", {}, "off");
    const reset = h("button", { type: "button", class: "tool", id: "unzoom", disabled: true, onclick: () => link.resetZoom() }, "reset zoom");
    link.onZoom = (zoomed) => { reset.disabled = !zoomed; };
    parts.curves.replaceChildren(h("h2", { id: "curves" }, "Curves"), parts.chips,
      h("div", { class: "tools" }, h("label", {}, "over ", over), h("label", { class: "range" }, "smoothing ", smooth, " ", amount), reset, h("span", { class: "faint mouse" }, "drag to zoom, shift-drag to move, double-click to reset")),
      h("div", { class: "pair" }, hosts.map((host, i) => h("figure", {}, h("div", { class: "tools of" }, choices[i], words[i]), host))), parts.picks);
    panels = hosts.map((host, i) => new Panel(host, link, metrics[i]));
    hosts.forEach((_, i) => meaning(i));
    const onPick = (trial) => toggle(trial);
    const filter = h("input", { type: "search", id: "filter", placeholder: "part of any cell, or AUC > 0.8 and epochs >= 10", value: query.get("where") || "" });
    const count = h("span", { class: "faint", role: "status" });
    let wait = 0;
    filter.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => { applyFilter(filter.value); address(); }, 200); });
    parts.table.className = "printed-wide";
    parts.table.replaceChildren(h("h2", { id: "trials" }, "Trials"), h("div", { class: "tools", id: "table-tools" }, h("label", {}, "Filter ", filter), count));
    table = new TrialTable(parts.table, { onPick, onOpen: (trial) => studyHash(id, `/trial/${enc(trial)}`), onOrder: () => address(), colourOf });
    parts.table.querySelector("#table-tools").append(...table.tools(id));
    table.onArranged = (shown, all) => {
      count.textContent = shown === all ? `${all} trials` : `${shown} of ${all} trials`;
      link.only = table.passing(); // the filter acts on curves and figures alike
      link.redraw();
      for (const [name, each] of figures) if (each.figure) draw(name);
      filtered();
    };
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
        const found = await api(`${base}/trials?where=${enc(table.named(text))}`);
        table.only = new Set(found.rows.map((row) => row.trial));
      } catch (error) { showMessage(error.message, true); table.only = new Set(); }
    }
    table.arrange();
  }

  function address() {
    const kept = new URLSearchParams();
    if (table.sort && !(table.sort.name === "objective" && table.sort.way === "descending")) kept.set("sort", (table.sort.way === "descending" ? "-" : "") + table.sort.name);
    if (table.filter) kept.set("where", table.filter);
    if (picked.length) kept.set("pick", picked.join(","));
    if (axis !== "epoch") kept.set("x", axis);
    const metrics = panels.map((panel) => panel.metric).join(",");
    if (metrics !== "val_auc_ema,val_auc_raw") kept.set("y", metrics);
    state.places.set(id, studyHash(id, kept.size ? `?${kept}` : "")); // where Escape goes back to
    history.replaceState(null, "", studyHash(id, kept.size ? `?${kept}` : ""));
  }

  const about = new Map(); // trial -> {group, ended}
  function groupsOf(rows) {
    for (const row of rows) {
      if (!row.trial) continue;
      const state = row.texts[table.columns.findIndex((column) => column.name === "state")];
      about.set(row.trial, { group: row.group, ended: state === "stopped" || state === "failed" });
      if (link.about(row.trial, about.get(row.trial))) link.redraw();
    }
  }

  function show(studyInfo) {
    if (closed || !studyInfo.found) return;
    overview = studyInfo;
    document.title = `${studyInfo.name} · medtune`;
    parts.top.replaceChildren(h("div", { class: "title" }, h("h1", {}, studyInfo.name), badge(studyInfo.state, studyInfo.place ? ` (place ${studyInfo.place})` : "")), h("p", { class: "faint path" }, studyInfo.path), studyInfo.trouble ? h("p", { class: "bad", id: "trouble" }, studyInfo.trouble) : "",
      h("p", { class: "asked" }, studyInfo.asked), h("p", { class: "found" }, studyInfo.found), buttons(studyInfo), parts.notes);
    tiles(studyInfo);
    parts.cautions.replaceChildren(studyInfo.cautions.length ? h("details", { class: "doubts", open }, h("summary", {}, `Before you trust this (${studyInfo.cautions.length})`),
      h("ul", { class: "cautions" }, studyInfo.cautions.map((each) => h("li", {}, h("b", {}, each.title), h("p", {}, prose(each.text)), h("p", { class: "faint" }, prose(each.remedy)))))) : "");
    parts.cautions.querySelector("details")?.addEventListener("toggle", (event) => { open = event.target.open; });
    chips(studyInfo.groups);
    if (link.best !== studyInfo.best_trial || String(link.rungs) !== String(studyInfo.rungs) || link.epochs < studyInfo.full_epochs) {
      Object.assign(link, { best: studyInfo.best_trial, rungs: studyInfo.rungs, epochs: Math.max(link.epochs, studyInfo.full_epochs) });
      link.redraw();
    }
    live.textContent = connected && ["running", "starting"].includes(studyInfo.state) ? "live" : "";
    live.className = live.textContent ? "live on" : "live";
    figurePart(studyInfo.figures);
    const news = JSON.stringify([studyInfo.states, studyInfo.epochs]);
    if (news !== stateText) {
      stateText = news;
      changed += 1;
      if (ready && !isLive() && Date.now() - refetched > 5000) refill();
    }
  }

  function tiles(studyInfo) {
    const progress = studyInfo.progress;
    const tile = (value, text) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, text));
    const list = [tile(...(studyInfo.first_tile || ["-", studyInfo.objective])),
      tile(...studyInfo.trials_tile), tile(String(studyInfo.epochs), "epochs run")];
    if (studyInfo.state === "running") {
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
    const { hidden } = link;
    for (const group of groups) link.groups.set(group.key, group);
    const text = JSON.stringify([groups, [...hidden]]);
    if (parts.chips.dataset.text === text) return;
    parts.chips.dataset.text = text;
    parts.chips.replaceChildren(...groups.map((group) => h("button", { type: "button", class: "chip", data: { group: group.key }, "aria-pressed": String(!hidden.has(group.key)), title: group.meaning || null, onclick: () => {
      if (hidden.has(group.key)) hidden.delete(group.key); else hidden.add(group.key);
      link.redraw();
      chips(overview.groups);
    } }, swatch(group), `${group.glyph} ${group.title} (${group.count})`)));
  }

  // Picking: each pick has its colour; the oldest goes when there are too many
  function toggle(trial) { pick(picked.includes(trial) ? picked.filter((each) => each !== trial) : [...picked.slice(1 - MOST_PICKS), trial]); }
  function pick(trials) {
    picked = trials;
    table.picked = picked;
    table.redraw();
    link.picked = picked;
    link.later();
    for (const [name, each] of figures) if (each.figure) draw(name);
    parts.picks.replaceChildren(...(picked.length ? [`picked: `, ...picked.flatMap((trial) => { const mark = h("span", { class: "swatch" }); mark.style.borderTopColor = colourOf(trial); return [h("a", { class: "chip", href: studyHash(id, `/trial/${enc(trial)}`) }, mark, trial), " "]; }),
      picked.length === 2 ? h("a", { class: "tool", id: "compare", href: studyHash(id, `/compare/${picked.map(enc).join("/")}`) }, "compare the two") : "", " ",
      h("button", { type: "button", class: "tool", onclick: () => pick([]) }, "clear")] : [`Click a curve or a trial to pick it, up to ${MOST_PICKS}; two can be compared.`]));
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
        each = { host: h("div", { class: "plot waiting" }), caption: h("figcaption"), at: 0, seen: -1 };
        each.box = h("figure", { data: { figure: name }, class: name === "parallel" ? "wide" : "" }, h("h3", {}, title), name === "parallel" ? h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, each.host) : each.host, each.caption);
        figures.set(name, each);
        seen.observe(each.box);
      }
      (name.startsWith("slice-") ? slices : whole).push(each.box);
    }
    if (!["running", "starting"].includes(overview.state)) setTimeout(drawRest, REST_MS);
    parts.figures.replaceChildren(names.length ? h("h2", { id: "figures" }, "Figures") : "", ...whole, slices.length ? h("div", { class: "slices" }, slices) : "");
  }

  // Importance is computed again over the trials that the filter lets through; all other figures only hide the rest.
  const amongOf = (name) => (name === "importance" && link.only?.size ? `?trials=${[...link.only].sort().join(",")}` : "");
  let shownTrials = "", later = 0;
  function filtered() {
    const each = figures.get("importance"), now = amongOf("importance");
    if (now === shownTrials) return;
    shownTrials = now;
    if (!each) return;
    each.seen = -1;
    clearTimeout(later);
    later = setTimeout(() => { if (each.visible && !closed) freshen("importance"); }, 400);
  }

  // Those further down, one by one: paper gets all of them. None while a driver runs, which they would slow down.
  async function drawRest() {
    for (const [name, each] of figures) if (!closed && !each.at) await freshen(name);
  }

  async function freshen(name) {
    const each = figures.get(name);
    if (each.busy || each.seen === changed) return;
    each.busy = true;
    const among = amongOf(name);
    try {
      const answer = await api(`${base}/figures/${enc(name)}${among}`);
      each.figure = answer.figure;
      each.caption.textContent = answer.caption;
      draw(name);
    } catch (error) {
      if (among) { each.figure = null; each.host.replaceChildren(); }
      if (!each.figure) each.caption.textContent = `Not shown: ${error.message}`;
    }
    each.host.classList.remove("waiting");
    each.busy = false;
    each.seen = among === amongOf(name) ? changed : -1;
    each.at = Date.now();
  }
  function draw(name) {
    const each = figures.get(name), axes = each.figure.layout.meta?.axes;
    if (axes) each.host.style.minWidth = `${96 * axes.length}px`; // room for every heading
    const onBrush = (place, range) => { if (range) brushes.set(place, range); else brushes.delete(place); table.brushed = brushed(each.figure, brushes); table.arrange(); };
    drawFigure(each.host, each.figure, { onPick: toggle, picked, colourOf, shows: (trial) => !link.only || link.only.has(trial), onBrush, brushes });
  }

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
        const answer = await api(`${base}/log?which=${choice.value}`);
        const low = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
        text.textContent = answer.lines.join("\n") || "nothing yet";
        if (low) text.scrollTop = text.scrollHeight;
      } catch (error) {
        if (error.status === 401) { text.textContent = "Logs take the token: log in to read them."; state.session.logged_in = false; showSession(); }
      }
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
    source.onopen = () => { connected = true; if (overview) show(overview); };
    source.onerror = () => { connected = false; live.textContent = "connection lost, trying again"; live.className = "live"; };
    source.addEventListener("rows", (event) => {
      const news = JSON.parse(event.data);
      document.documentElement.dataset.lag = String(Math.round(Date.now() - news.sent * 1000));
      for (const [trial, epoch, raw, ema, drw] of news.rows) {
        if (!link.trials.has(trial)) link.about(trial, { group: "no_fault", ended: false });
        if (drw && !link.trials.get(trial).drw) { link.about(trial, { ...link.trials.get(trial), drw: epoch }); link.redraw(); }
        if (axis === "epoch") for (const panel of panels) if (/^val_auc_(ema|raw)$/.test(panel.metric)) panel.add(trial, epoch, panel.metric === "val_auc_raw" ? raw : ema);
      }
      document.documentElement.dataset.rows = String(Number(document.documentElement.dataset.rows || 0) + news.rows.length);
    });
    source.addEventListener("trials", (event) => { const rows = JSON.parse(event.data); table.update(rows); groupsOf(rows); });
    source.addEventListener("study", (event) => show(JSON.parse(event.data)));
  }

  load();
  return {
    crumbs: [[id, studyHash(id)]],
    close: () => { closed = true; clearTimeout(timer); source?.close(); seen.disconnect(); models?.close(); removeEventListener("beforeprint", beforePrint); removeEventListener("afterprint", afterPrint); live.textContent = ""; live.className = "live"; },
    repaint: (paper) => { if (!table) return; if (overview) { delete parts.chips.dataset.text; chips(overview.groups); } if (!paper) { link.redraw(); pick(picked); } for (const [name, each] of figures) if (each.figure) draw(name); },
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

function trialFigures(trialInfo, host) {
  const drawn = [];
  for (const [title, lines, options] of LINES) {
    const found = lines.filter(([, name]) => trialInfo.curves[name]);
    if (!trialInfo.curves[lines[0][1]] || !trialInfo.curves.epoch.length) continue;
    const band = options.band?.every((name) => trialInfo.curves[name]) ? options.band.map((name) => trialInfo.curves[name]) : undefined;
    const low = Math.min(0.4, ...[...found.map(([, name]) => trialInfo.curves[name]), ...(band || [])].flat().filter((value) => value !== null)) - 0.02;
    const figure = lineFigure(title, trialInfo.curves.epoch, found.map(([name, column, colour, dash]) => ({ name, values: trialInfo.curves[column], colour, dash })),
      { ...options, band, range: options.range ? [Math.max(0, low), 1.02] : undefined, rungs: trialInfo.rungs, drw: trialInfo.drw });
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
  const notes = notesPart(`${base}/trials/${enc(trial)}`, "trial", () => api(`${base}/notes`).then((found) => found.trials[trial]));
  async function load() {
    let trialInfo;
    try { trialInfo = await api(`${base}/trials/${enc(trial)}`); } catch (error) {
      if (error.status === 401 && (await askToken())) return load();
      page.replaceChildren(h("h1", {}, `Trial ${trial}`), h("p", { class: "bad" }, error.message));
      return;
    }
    const text = JSON.stringify(trialInfo);
    if (!closed && text !== before) { before = text; show(trialInfo); }
    if (!closed && trialInfo.state === "running") timer = setTimeout(load, 3000);
  }
  function show(trialInfo) {
    const title = trialInfo.verdict ? `${trialInfo.verdict}${trialInfo.since_epoch ? ` since epoch ${trialInfo.since_epoch}` : ""}` : "not diagnosed yet";
    const interval = trialInfo.best_val_auc_low === null ? "" : ` [${number(trialInfo.best_val_auc_low)}, ${number(trialInfo.best_val_auc_high)}]`;
    const tile = (value, words) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, words));
    const plots = h("div", { class: "plots" });
    const log = h("pre", { class: "log", tabindex: 0 });
    const details = h("details", { ontoggle: async (event) => { if (event.target.open) log.textContent = (await api(`${base}/log?which=trial&trial=${enc(trial)}`)).lines.join("\n") || "nothing"; } }, h("summary", {}, "Log of the trial"), log);
    page.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, `Trial ${trialInfo.trial}`), badge(trialInfo.state), trialInfo.variant ? h("span", { class: "faint" }, trialInfo.variant) : ""),
      h("section", { class: `diagnosis ${trialInfo.faulty ? "bad" : "good"}`, "aria-label": "diagnosis" }, h("b", { id: "verdict" }, title), h("p", { id: "summary" }, prose(trialInfo.verdict_summary || (trialInfo.faulty ? "" : "Nothing is wrong by now."))), trialInfo.advice ? h("p", { class: "advice" }, h("b", {}, "What to change: "), prose(trialInfo.advice)) : ""),
      trialInfo.reason && trialInfo.state !== "running" && !trialInfo.reason.includes(trialInfo.verdict_summary) ? h("p", {}, `Ended: ${trialInfo.reason}`) : "", trialInfo.error ? h("pre", { class: "log" }, trialInfo.error) : "",
      h("div", { class: "tools" }, trialInfo.stoppable ? h("button", { class: "tool", id: "stop-trial", disabled: trialInfo.stop_asked, onclick: async () => {
        if ((await confirmThat(`Stop trial ${trial} after the epoch it is in? It will not be run again.`, "stop the trial")) && (await act(`${base}/trials/${enc(trial)}/stop`, "asked: it ends with its epoch"))) load();
      } }, trialInfo.stop_asked ? "asked to stop" : "stop this trial") : "", h("button", { type: "button", class: "tool", id: "export", onclick: () => followUp(study, "export", { trial }) }, "export as a model"),
        h("a", { class: "tool", href: studyHash(study, `?pick=${enc(trial)}`) }, "show among the others")),
      notes, h("div", { class: "tiles" }, tile(number(trialInfo.objective), "objective"), tile(number(trialInfo.best_val_auc), `AUC${interval} in epoch ${trialInfo.best_epoch ?? "-"}`), tile(`${trialInfo.epochs_run} of ${trialInfo.epochs}`, "epochs"), tile(trialInfo.work || "-", "in its epochs")),
      h("h2", {}, "Curves"), plots,
      h("h2", {}, "Decisions"), trialInfo.decisions.length ? h("table", { class: "stack" }, h("thead", {}, h("tr", {}, ["epoch", "decision", "on what"].map((each) => h("th", { scope: "col" }, each)))),
        h("tbody", {}, trialInfo.decisions.map((each) => h("tr", {}, h("td", { "data-label": "epoch" }, each.epoch), h("td", { "data-label": "decision" }, `${each.action}: ${each.reason}`), h("td", { class: "text" }, each.summary))))) : h("p", { class: "faint" }, "None worth a line yet."),
      h("h2", {}, "Settings"), h("p", { class: "faint" }, "Bold and ≠: differs from the recommended value, or from the default where there is none."), settingsTable(trialInfo), details,
    );
    drawn = trialFigures(trialInfo, plots);
    document.title = `${trialInfo.trial} · ${trialInfo.study} · medtune`;
    document.documentElement.dataset.ready = "yes";
  }
  load();
  return { crumbs: [[study, studyHash(study)], [trial, studyHash(study, `/trial/${enc(trial)}`)]], close: () => { closed = true; clearTimeout(timer); }, repaint: () => drawn.forEach((draw) => draw()),
    keys: { Escape: () => { location.hash = state.places.get(study) || studyHash(study); } } };
}

function settingsTable(trialInfo) {
  const row = (each) => h("tr", { class: each.differs ? "differs" : "" }, h("td", {}, each.name, each.searched ? h("span", { class: "faint" }, " searched") : ""), h("td", {}, `${each.value}${each.differs ? " ≠" : ""}`), h("td", {}, each.documented), h("td", { class: "faint roomy" }, prose(each.meaning)));
  const head = h("thead", {}, h("tr", {}, ["hyperparameter", "this trial", "recommended"].map((each) => h("th", { scope: "col" }, each)), h("th", { scope: "col", class: "roomy" }, "meaning")));
  const notable = trialInfo.settings.filter((each) => each.differs || each.searched), rest = trialInfo.settings.filter((each) => !notable.includes(each));
  return h("div", {}, h("table", { class: "settings" }, head, h("tbody", {}, notable.map(row))), h("details", {}, h("summary", {}, `${rest.length} others`), h("table", { class: "settings" }, h("tbody", {}, rest.map(row)))));
}

// Two trials --------------------------------------------------------------------------------------------------------------

export function compareView(study, first, second) {
  let drawn = [];
  api(`studies/${enc(study)}/compare?first=${enc(first)}&second=${enc(second)}`).then((comparison) => {
    const heads = comparison.trials.map((trial) => h("th", { scope: "col" }, h("a", { href: studyHash(study, `/trial/${enc(trial)}`) }, trial)));
    const table = (name, rows, more) => h("table", { class: "settings" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, name), heads.map((head) => head.cloneNode(true)), more ? h("th", { class: "roomy", scope: "col" }, more) : "")), h("tbody", {}, rows));
    const words = comparison.pages.map((each) => h("div", { class: "diagnosis" }, h("b", {}, `${each.trial}: ${each.verdict || "not diagnosed yet"}`), h("p", {}, prose(each.verdict_summary || ""))));
    const plots = h("div", { class: "plots" });
    page.replaceChildren(h("h1", {}, `${first} against ${second}`), table("outcome", comparison.outcome.map((row) => h("tr", {}, row.map((text) => h("td", {}, text))))), h("h2", {}, "Curves"), plots,
      h("div", { class: "pair" }, words), h("h2", {}, "Settings that differ"), comparison.settings.length ? table("hyperparameter", comparison.settings.map((each) => h("tr", { data: { name: each.name } }, h("td", {}, each.name), each.values.map((text) => h("td", {}, text)), h("td", { class: "faint roomy" }, prose(each.meaning)))), "meaning") : h("p", {}, "None."),
      h("p", { class: "faint" }, `${comparison.same} others are equal.`));
    for (const [title, column, range] of [["Averaged weights: validation AUC", "val_auc_ema", true], ["Raw weights: validation AUC", "val_auc_raw", true], ["Training loss", "train_loss", false]]) {
      const pages = comparison.pages.filter((each) => each.curves[column]);
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
  return { crumbs: [[study, studyHash(study)], [`${first} against ${second}`, location.hash]], close: () => {}, repaint: () => drawn.forEach((draw) => draw()), keys: { Escape: () => { location.hash = state.places.get(study) || studyHash(study); } } };
}

