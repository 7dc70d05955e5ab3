// Draws the figures of a report and joins them: groups shown or hidden, trials picked in one place are marked in all.
// Everything shown comes from the JSON in the page; text is set as text, never as HTML.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const figures = read("figures");
  const palette = read("palette");
  const root = document.documentElement;
  const DARK = "(prefers-color-scheme: dark)";
  const systemDark = matchMedia(DARK); // to listen to only: asked just after a change, it would not report that change
  const coarse = matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();
  const picked = new Set();
  const brushes = new Map(); // axis -> [low, high]
  let printing = false;

  // Theme: figures carry the colours of the light page, and are repainted one by one -------------------------------

  const isDark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia(DARK).matches);

  function painted(node, dark) {
    if (typeof node === "string") return dark && palette[node] ? palette[node] : node;
    if (Array.isArray(node)) return node.map((item) => painted(item, dark));
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, painted(value, dark)]));
    }
    return node;
  }

  // Drawing -----------------------------------------------------------------------------------------------------------

  function traces(figure) {
    const data = figure.data.map((trace) => ({ ...trace, meta: { ...trace.meta } }));
    for (const trace of data) {
      const meta = trace.meta;
      if (meta.picked) Object.assign(trace, pickedPoints(figure));
      else {
        if (hidden.has(meta.group) || (meta.drw && hidden.has("drw"))) trace.visible = false;
        if (picked.size && (meta.group || meta.tier)) trace.opacity = 0.25 * (trace.opacity ?? 1);
      }
    }
    return data;
  }

  function pickedPoints(figure) {
    const x = [], y = [], customdata = [];
    if (picked.size) {
      for (const trace of figure.data) {
        if (!trace.customdata || trace.meta?.picked || trace.meta?.drw || trace.meta?.best) continue;
        if (figure.joined && !(trace.mode || "").includes("lines")) continue;
        let last = null;
        trace.customdata.forEach((trial, i) => {
          if (!picked.has(trial)) { last = null; return; }
          if (last !== null && last !== trial) { x.push(null); y.push(null); customdata.push(null); }
          x.push(trace.x[i]); y.push(trace.y[i]); customdata.push(trial);
          last = trial;
        });
        if (x.length && x[x.length - 1] !== null) { x.push(null); y.push(null); customdata.push(null); }
      }
    }
    return { x, y, customdata };
  }

  // Figures in view are drawn at once, the rest when the browser has nothing to do: with twenty figures of many trials a
  // change would otherwise be felt.
  const whenIdle = (then) => (window.requestIdleCallback ? requestIdleCallback(then, { timeout: 500 }) : setTimeout(then, 30));
  let waiting = false;
  const inView = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inView.add(target); else inView.delete(target);
    }
    drawStale();
  }, { rootMargin: "400px" });

  function draw() {
    for (const div of all(".plot")) div.dataset.stale = "yes";
    drawStale();
  }

  function drawStale() {
    const dark = isDark();
    for (const line of all(".chip line")) line.setAttribute("stroke", painted(line.dataset.colour, dark));
    for (const div of all(".plot[data-stale]")) if (printing || inView.has(div)) drawOne(div, dark);
    if (waiting) return;
    waiting = true;
    whenIdle(drawRest);
  }

  function drawRest() {
    const div = document.querySelector(".plot[data-stale]");
    if (div) {
      drawOne(div, isDark());
      whenIdle(drawRest);
    } else waiting = false;
  }

  function drawOne(div, dark) {
    delete div.dataset.stale;
    const figure = figures[div.dataset.figure];
    const layout = { ...figure.layout, selections: [] };
    if (printing) Object.assign(layout, { width: div.dataset.slice ? 330 : 690, autosize: false });
    if (printing && div.dataset.figure === "parallel") Object.assign(layout, staggered(layout));
    else layout.autosize = true;
    layout.dragmode = coarse ? false : div.dataset.figure === "parallel" ? "select" : "zoom";
    Plotly.react(div, painted(traces(figure), dark), painted(layout, dark), {
      responsive: true,
      displaylogo: false,
      displayModeBar: false, // it covers the data under the pointer; dragging zooms, a double click zooms out
    });
    if (!div.dataset.listens) listen(div);
  }

  // On paper the axes are too close for their names side by side: every other name is a line higher.
  function staggered({ annotations, height, margin, yaxis }) {
    const raised = annotations.map((note) => (/^head-\d*[13579]$/.test(note.name || "") ? { ...note, y: 1.27 } : note));
    return { annotations: raised, height: height + 40, margin, yaxis: { ...yaxis, range: [yaxis.range[0], 1.4] } };
  }

  function listen(div) {
    div.dataset.listens = "yes";
    div.on("plotly_click", (event) => {
      const trial = event.points[0]?.customdata;
      if (typeof trial === "string" && /^[0-9A-Za-z_-]+$/.test(trial)) toggle(trial);
    });
    if (div.dataset.figure !== "parallel") return;
    div.on("plotly_selected", (event) => {
      if (!event?.range) return;
      const [left, right] = event.range.x, [low, high] = event.range.y;
      const axes = figures.parallel.layout.meta.axes;
      axes.forEach((_, i) => { if (i > left - 0.3 && i < right + 0.3) brushes.set(i, [low, high]); });
      pickBrushed();
    });
    div.on("plotly_deselect", clear);
    div.on("plotly_doubleclick", clear);
  }

  // Picking -----------------------------------------------------------------------------------------------------------

  function pickBrushed() {
    const passed = new Map(); // trial -> brushed axes it passes
    for (const trace of figures.parallel.data) {
      (trace.customdata || []).forEach((trial, i) => {
        const range = brushes.get(trace.x[i]);
        if (trial && range && trace.y[i] >= range[0] && trace.y[i] <= range[1]) {
          passed.set(trial, (passed.get(trial) || 0) + 1);
        }
      });
    }
    picked.clear();
    for (const [trial, count] of passed) if (count === brushes.size) picked.add(trial);
    show();
  }

  function toggle(trial) {
    brushes.clear();
    const had = picked.has(trial) && picked.size === 1;
    picked.clear();
    if (!had) picked.add(trial);
    show();
  }

  function clear() {
    brushes.clear();
    picked.clear();
    show();
  }

  function show() {
    for (const row of all("tr[data-trial]")) row.classList.toggle("picked", picked.has(row.dataset.trial));
    for (const button of all("button.id")) button.setAttribute("aria-pressed", String(picked.has(button.dataset.trial)));
    for (const select of all("select.pick")) select.value = picked.size === 1 ? [...picked][0] : "";
    const brushed = [...brushes.keys()].map((i) => figures.parallel.layout.meta.axes[i]);
    const names = [...picked].sort();
    const pickText = names.length === 0 && !brushed.length ? "none picked"
      : `${names.length} picked${brushed.length ? ` by ${brushed.join(", ")}` : ""}: ${names.slice(0, 8).join(", ")}${names.length > 8 ? ", ..." : ""}`;
    for (const note of all(".picks")) note.textContent = pickText;
    draw();
  }

  // Controls ----------------------------------------------------------------------------------------------------------

  for (const chip of all(".chip[data-group]")) {
    chip.addEventListener("click", () => {
      const group = chip.dataset.group;
      if (hidden.has(group)) hidden.delete(group); else hidden.add(group);
      for (const twin of all(".chip[data-group]")) {
        if (twin.dataset.group === group) twin.setAttribute("aria-pressed", String(!hidden.has(group)));
      }
      draw();
    });
  }
  for (const button of all("button.id")) button.addEventListener("click", () => toggle(button.dataset.trial));
  for (const select of all("select.pick")) {
    select.addEventListener("change", () => { if (select.value) { picked.clear(); toggle(select.value); } else clear(); });
  }
  for (const button of all(".clear")) button.addEventListener("click", clear);

  const themeButton = document.getElementById("theme");
  const words = { "": "theme: system", light: "theme: light", dark: "theme: dark" };
  themeButton?.addEventListener("click", () => {
    const next = { "": "light", light: "dark", dark: "" }[root.dataset.theme || ""];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    themeButton.textContent = words[next];
    draw();
  });
  systemDark.addEventListener("change", () => draw());

  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    all("th", table).forEach((head, column) => {
      head.querySelector("button")?.addEventListener("click", () => {
        const first = head.dataset.first || "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        all("th", table).forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const rows = [...body.rows].sort((a, b) => {
          const left = value(a), right = value(b);
          if (left === "" || right === "") return (left === "") - (right === ""); // missing values last, either way
          const difference = Number(left) - Number(right);
          return sign * (Number.isNaN(difference) ? left.localeCompare(right) : difference);
        });
        body.append(...rows);
      });
    });
  }
  for (const input of all("input.filter")) {
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const count = document.getElementById(input.dataset.count);
      if (count) count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    });
  }

  // Paper: light colours, one width, nothing folded away ------------------------------------------------------------------

  let folded = [];
  addEventListener("beforeprint", () => {
    printing = true;
    folded = all("details:not([open])");
    for (const each of folded) each.open = true;
    draw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const each of folded) each.open = false;
    draw();
  });

  for (const div of all(".plot")) {
    div.style.minHeight = `${figures[div.dataset.figure].layout.height}px`; // its place, before it is drawn
    div.dataset.stale = "yes";
    observer.observe(div);
  }
  root.dataset.ready = "yes";
})();
