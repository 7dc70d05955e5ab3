// The page of `medtune serve`: the list of studies, the form for a new one, and getting about. Addresses after # are the
// page's own, so that any view can be sent to a colleague.
import { acrossView } from "./across.js";
import { isDark, setPalette } from "./charts.js";
import { api, askToken, badge, clock, dialog, h, logIn, number, page, ProblemList, prose, showMessage, showSession, state, studyHash, timeText } from "./parts.js";
import { compareView, studyView, trialView } from "./study.js";

let view = null; // the view on the page: {close, crumbs, repaint, keys}

// The list ----------------------------------------------------------------------------------------------------------------

function listView() {
  const body = h("tbody");
  const empty = h("p", { class: "faint", hidden: true }, "No study here yet. Start one with ", h("a", { href: "#/new" }, "new study"), ", or with ", h("code", {}, "medtune run"), " into this folder.");
  const where = h("p", { class: "faint" }), trouble = h("p", { class: "bad", id: "trouble" });
  const heads = ["study", "state", "best", "trials ended", "epochs", "last news"];
  page.replaceChildren(h("h1", {}, "Studies"), where, trouble, h("div", { class: "scroll" }, h("table", { class: "list stack", id: "studies" },
    h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))), body)), empty);
  let timer = 0, before = "", closed = false;
  const chosen = new Set();
  const compare = h("button", { type: "button", class: "tool", id: "side-by-side", disabled: true, onclick: () => { location.hash = `#/across/${[...chosen].map(encodeURIComponent).join("/")}`; } }, "side by side");
  page.querySelector("#studies").closest(".scroll").after(h("div", { class: "tools" }, compare, h("span", { class: "faint" }, "for two to six studies that are ticked")));
  const tick = (study) => h("input", { type: "checkbox", class: "tick", "aria-label": `choose ${study.name}`, checked: chosen.has(study.id), data: { row: `tick ${study.id}` }, onchange: (event) => {
    if (event.target.checked) chosen.add(study.id); else chosen.delete(study.id);
    compare.disabled = chosen.size < 2 || chosen.size > 6;
  } });
  async function load() {
    try {
      const answer = await api("studies");
      const text = JSON.stringify(answer.studies);
      where.textContent = answer.folder;
      trouble.textContent = answer.trouble || "";
      empty.hidden = answer.studies.length > 0;
      if (text !== before) {
        before = text;
        const order = { running: 0, starting: 1, queued: 2 };
        answer.studies.sort((a, b) => (order[a.state] ?? 3) - (order[b.state] ?? 3) || (b.last ?? b.created ?? 0) - (a.last ?? a.created ?? 0));
        const at = document.activeElement?.dataset.row;
        body.replaceChildren(...answer.studies.map(line));
        if (at) body.querySelector(`[data-row="${CSS.escape(at)}"]`)?.focus();
      }
    } catch (error) {
      if (error.status === 401) { if (await askToken()) load(); return; }
      showMessage(error.message, true);
    }
    if (!closed) timer = setTimeout(load, document.hidden ? 15000 : 2000);
  }
  function line(study) {
    const states = Object.entries(study.states || {}).map(([state, count]) => `${count} ${state}`).join(", ");
    const cells = [
      h("td", { class: "name" }, study.epochs ? tick(study) : "", " ", h("a", { href: studyHash(study.id), data: { row: study.id } }, study.name), study.folder && study.folder !== "." ? h("span", { class: "faint" }, ` in ${study.folder}`) : "",
        h("span", { class: "faint under" }, [study.kind, study.space].filter(Boolean).join(" · "), (study.tags || []).map((tag) => h("span", { class: "tag" }, tag)))),
      h("td", { "data-label": "state" }, badge(study.state, study.place ? ` (${study.place})` : ""), study.stopping ? h("span", { class: "faint" }, " stopping") : ""),
      h("td", { "data-label": "best" }, study.best === null || study.best === undefined ? "-" : h("b", {}, number(study.best)), study.best_trial ? h("span", { class: "faint" }, ` trial ${study.best_trial}`) : ""),
      h("td", { "data-label": "trials ended" }, study.trials ? `${study.ended} of ${study.trials}` : "-", h("span", { class: "faint under" }, study.error || states)),
      h("td", { "data-label": "epochs" }, study.epochs ?? "-"),
      h("td", { "data-label": "last news" }, clock(study.last || study.created)),
    ];
    return h("tr", {}, cells);
  }
  load();
  return { close: () => { closed = true; clearTimeout(timer); }, crumbs: [] };
}

// A value as a study file has it, and back.
const written = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value));
function scalar(text) {
  if (text !== "" && !Number.isNaN(Number(text))) return Number(text);
  return { true: true, false: false, null: null }[text] ?? (text === "null" ? null : text);
}

// A new study -------------------------------------------------------------------------------------------------------------

function newView() {
  const form = state.form;
  const fields = form.fields;
  const field = (name, node, hint) => h("label", { class: "field" }, h("span", {}, name), node, hint ? h("small", { class: "faint" }, prose(hint.replace(/\bNone\b/g, "empty"))) : "");
  const stamp = new Date().toISOString().slice(0, 16).replace(/[-:]/g, "").replace("T", "-");
  const inputs = {
    name: h("input", { id: "f-name", required: true, pattern: "[A-Za-z0-9][A-Za-z0-9 _.\\-]{0,63}", value: `search-${stamp}` }),
    data: h("input", { id: "f-data", required: true, placeholder: "/data/table.csv" }),
    pretrained_path: h("input", { id: "f-weights", placeholder: "/data/resnet_50_23dataset.pth" }),
    preset: h("select", { id: "f-preset" }, h("option", { value: "" }, "none"), Object.keys(form.presets).map((name) => h("option", {}, name))),
    space: h("select", { id: "f-space" }, form.spaces.map((space) => h("option", { value: space.name }, `${space.name}: ${space.title}`))),
    trials: h("input", { id: "f-trials", type: "number", min: 1, value: 20 }),
    epochs: h("input", { id: "f-epochs", type: "number", min: 1, placeholder: form.hyperparameters.find((each) => each.name === "epochs").default }),
    objective: h("select", { id: "f-objective" }, form.objectives.map((each) => h("option", { value: each.name, title: each.title }, each.name))),
    sampler: h("select", { id: "f-sampler" }, form.samplers.map((each) => h("option", {}, each))),
    seed: h("input", { id: "f-seed", type: "number", min: 0, value: 0 }),
    gpus_per_trial: h("input", { id: "f-gpus", placeholder: "automatic" }),
    max_concurrent: h("input", { id: "f-concurrent", type: "number", min: 1, placeholder: "as many as fit" }),
    config: h("textarea", { id: "f-config", rows: 5, spellcheck: "false", placeholder: "depth = 50\nvolume_shape = 96" }),
  };
  inputs.objective.value = "best_median3";
  const ranges = h("tbody"), outcome = h("p", { class: "faint", role: "status", id: "outcome" });
  const known = new Set(form.hyperparameters.map((each) => each.name));
  const meaning = (name) => form.hyperparameters.find((each) => each.name === name).meaning;
  let parameters = [], more = {}; // more: fields of a preset that have no input
  const list = new ProblemList((name) => {
    const parameter = parameters.find((each) => each.parameter.name === name);
    if (parameter) return parameter.low || parameter.choices;
    return (Object.hasOwn(inputs, name) && inputs[name]) || (known.has(name) ? inputs.config : null);
  });
  // A preset fills in visible fields, so that nothing is set behind the form.
  function fillIn() {
    const { config = {}, trials, gpus_per_trial, ...others } = form.presets[inputs.preset.value] || {};
    more = others;
    if (trials === undefined) return;
    inputs.trials.value = trials;
    inputs.gpus_per_trial.value = gpus_per_trial;
    const { epochs, ...rest } = config;
    inputs.epochs.value = epochs ?? "";
    const kept = inputs.config.value.split("\n").filter((line) => line.trim() && !Object.keys(rest).includes(line.split("=")[0].trim()));
    inputs.config.value = [...kept, ...Object.entries(rest).map(([name, value]) => `${name} = ${value}`)].join("\n");
    expect();
  }
  function showSpace() {
    const space = form.spaces.find((each) => each.name === inputs.space.value);
    parameters = space.parameters.map((parameter) => {
      const on = h("input", { type: "checkbox", checked: true, "aria-label": `search ${parameter.name}` });
      const text = (value) => h("input", { class: "range", value: typeof value === "number" ? written(value) : String(value), "aria-label": `${parameter.name}` });
      const low = parameter.choices ? null : text(parameter.low), high = parameter.choices ? null : text(parameter.high);
      const choices = parameter.choices ? text(parameter.choices.map((each) => JSON.stringify(each)).join(", ")) : null;
      const row = h("tr", {}, h("td", {}, h("label", {}, on, " ", parameter.name), parameter.role === "retune" ? h("span", { class: "faint" }, " retuned") : "", parameter.sets !== parameter.name ? h("span", { class: "faint under" }, `sets ${parameter.sets}`) : ""),
        h("td", {}, choices || h("span", { class: "ends" }, low, " to ", high)), h("td", { class: "faint roomy" }, parameter.choices ? "choices" : parameter.log ? "log" : ""), h("td", { class: "faint roomy" }, `default ${parameter.default}${parameter.before ? `, before ${parameter.before}` : ""}`));
      return { parameter, on, low, high, choices, row };
    });
    ranges.replaceChildren(...parameters.map((each) => each.row));
  }
  // The space as a study file has it: its name where nothing was changed, written out otherwise.
  function spaceGiven() {
    const space = form.spaces.find((each) => each.name === inputs.space.value);
    const written = { name: space.name, search: {}, retune: {}, fixed: space.fixed };
    let changed = false;
    for (const { parameter, on, low, high, choices } of parameters) {
      if (!on.checked) { changed = true; continue; }
      const range = {};
      for (const name of ["low", "high", "log", "step", "choices", "why"]) if (parameter[name] !== undefined) range[name] = parameter[name];
      if (choices) {
        const given = choices.value.split(",").map((text) => text.trim()).filter(Boolean).map((text) => { try { return JSON.parse(text); } catch { return text; } });
        if (JSON.stringify(given) !== JSON.stringify(parameter.choices)) { range.choices = given; changed = true; }
      } else {
        for (const [name, input] of [["low", low], ["high", high]]) {
          const value = Number(input.value);
          if (value !== parameter[name]) { range[name] = input.value.trim() === "" || Number.isNaN(value) ? input.value : value; changed = true; }
        }
      }
      written[parameter.role][parameter.name] = range;
    }
    return changed ? { ...written, name: `${space.name} (changed)` } : space.name;
  }
  function given() {
    const spec = { ...more, data: inputs.data.value.trim(), space: spaceGiven(), config: {} };
    for (const name of ["objective", "sampler"]) spec[name] = inputs[name].value;
    for (const name of ["trials", "seed", "max_concurrent"]) if (inputs[name].value !== "") spec[name] = Number(inputs[name].value);
    const gpus = inputs.gpus_per_trial.value.trim();
    if (gpus) spec.gpus_per_trial = gpus === "auto" ? gpus : Number(gpus);
    for (const line of inputs.config.value.split("\n")) {
      const [, name, value] = line.match(/^\s*([^=\s]+)\s*=\s*(.*?)\s*$/) || [];
      if (name) spec.config[name] = scalar(value);
    }
    if (inputs.pretrained_path.value.trim()) spec.config.pretrained_path = inputs.pretrained_path.value.trim();
    if (inputs.epochs.value !== "") spec.config.epochs = Number(inputs.epochs.value);
    return spec;
  }
  async function send(check) {
    list.clear();
    outcome.textContent = "";
    if (!state.session.logged_in && !(await askToken())) return;
    try {
      if (check) {
        const found = await api("check", { method: "POST", body: given() });
        outcome.textContent = `In order: ${found.trials} trials of at most ${found.epochs} epochs over ${found.space.filter((row) => row.role !== "fixed").length} hyperparameters. ${timeText(found)}`;
      } else {
        const found = await api("studies", { method: "POST", body: { name: inputs.name.value.trim(), spec: given() } });
        location.hash = studyHash(found.study);
      }
    } catch (error) { list.show(error.detail || [error.message]); }
  }
  // An epoch of this study on the service's machine: measured there in a separate process, once, and remembered.
  let closed = false;
  const measureButton = h("button", { class: "tool", type: "button", id: "measure", onclick: measure }, "measure on this machine");
  async function measure() {
    list.clear();
    if (!state.session.logged_in && !(await askToken())) return;
    measureButton.disabled = true;
    clearTimeout(wait);
    outcome.textContent = "Measuring on this machine: seconds for small volumes, five minutes at most.";
    try {
      let found = await api("measure", { method: "POST", body: given() });
      while (found.state === "measuring" && !closed) {
        await new Promise((resolve) => { setTimeout(resolve, 1000); });
        found = await api(`measure/${found.key}`);
      }
      if (closed) return;
      if (found.state === "failed") { outcome.textContent = ""; list.show(found.problems); } else await send(true);
    } catch (error) { outcome.textContent = ""; list.show(error.detail || [error.message]); } finally { measureButton.disabled = false; }
  }
  // The time that it will take, while the form is filled in; problems are shown when asked for.
  let wait = 0;
  function expect() {
    clearTimeout(wait);
    if (!state.session.logged_in || !inputs.data.value.trim() || measureButton.disabled) return;
    wait = setTimeout(async () => {
      const found = await api("check", { method: "POST", body: given() }).catch(() => null);
      if (!measureButton.disabled) outcome.textContent = found ? timeText(found) : "";
    }, 600);
  }
  for (const input of Object.values(inputs)) input.addEventListener("change", expect);
  inputs.space.addEventListener("change", showSpace);
  inputs.preset.addEventListener("change", fillIn);
  const meanings = h("details", {}, h("summary", {}, "Hyperparameters and their meaning"), h("table", { class: "settings" }, h("tbody", {}, form.hyperparameters.map((each) => h("tr", {}, h("td", {}, each.name), h("td", {}, each.default), h("td", { class: "faint" }, prose(each.meaning)))))));
  page.replaceChildren(h("h1", {}, "New study"), h("form", { class: "new", onsubmit: (event) => { event.preventDefault(); send(false); } },
    h("div", { class: "grid" }, field("name", inputs.name, "Name of the study's folder."), field("data", inputs.data, fields.data), field("preset", inputs.preset, "Size of trials and search for a machine: laptop, one GPU, several GPUs. It fills in the fields below."), field("pretrained_path", inputs.pretrained_path, meaning("pretrained_path")),
      field("trials", inputs.trials, fields.trials.split(". ")[0]), field("epochs", inputs.epochs, "Epochs of a trial that is not stopped."), field("objective", inputs.objective, fields.objective), field("sampler", inputs.sampler, fields.sampler), field("seed", inputs.seed, fields.seed), field("gpus_per_trial", inputs.gpus_per_trial, fields.gpus_per_trial), field("max_concurrent", inputs.max_concurrent, fields.max_concurrent)),
    h("h2", {}, "Search space"), field("space", inputs.space), h("div", { class: "scroll" }, h("table", { class: "ranges" }, ranges)),
    h("h2", {}, "Fixed hyperparameters"), field("config", inputs.config, "Hyperparameters of every trial, one per line: name = value, as in a study file. Values set here are not searched."), meanings,
    list.node, outcome, h("div", { class: "tools" }, h("button", { class: "tool main", type: "submit", id: "begin" }, "queue it"), h("button", { class: "tool", type: "button", id: "check", onclick: () => send(true) }, "check only"), measureButton)));
  showSpace();
  document.documentElement.dataset.ready = "yes";
  return { crumbs: [["new study", "#/new"]], close: () => { closed = true; } };
}

// Getting about -----------------------------------------------------------------------------------------------------------

async function route() {
  const [path, search] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  view?.close();
  delete document.documentElement.dataset.ready;
  delete document.documentElement.dataset.rows;
  document.title = "medtune";
  if (!state.form) {
    try { state.form = await api("form"); setPalette(state.form.palette); } catch (error) {
      if (error.status === 401 && (await askToken())) return route();
      page.replaceChildren(h("p", { class: "bad" }, error.message), h("button", { class: "tool", onclick: route }, "try again"));
      return;
    }
  }
  if (parts[0] === "study" && parts[2] === "trial" && parts[3]) view = trialView(parts[1], parts[3]);
  else if (parts[0] === "study" && parts[2] === "compare" && parts[4]) view = compareView(parts[1], parts[3], parts[4]);
  else if (parts[0] === "study" && parts[1]) view = studyView(parts[1], new URLSearchParams(search || ""));
  else if (parts[0] === "across" && parts.length > 2) view = acrossView(parts.slice(1, 7));
  else if (parts[0] === "new") view = newView();
  else { view = listView(); document.documentElement.dataset.ready = "yes"; }
  document.getElementById("crumbs").replaceChildren(...view.crumbs.flatMap(([text, href]) => [" / ", h("a", { href }, text)]));
  scrollTo(0, 0);
}

const KEYS = [["g", "list of studies"], ["n", "new study"], ["/", "filter trials"], ["j  k", "down, up the table"], ["x", "pick the trial"], ["Enter", "open the trial"], ["c", "compare the two picked"], ["Esc", "back to the study"], ["?", "these keys"]];
function showKeys() {
  dialog.replaceChildren(h("h2", {}, "Keys"), h("table", {}, h("tbody", {}, KEYS.map(([key, what]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, what))))), h("div", { class: "tools" }, h("button", { class: "tool", onclick: () => dialog.close() }, "close")));
  dialog.showModal();
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (typing) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "Enter" && /^(A|BUTTON|SUMMARY)$/.test(event.target.tagName)) return;
  const own = { g: () => { location.hash = "#/"; }, n: () => { location.hash = "#/new"; }, "?": showKeys };
  const action = view?.keys?.[event.key] || own[event.key];
  if (action) { event.preventDefault(); action(); }
});

const root = document.documentElement;
const theme = document.getElementById("theme");
function setTheme(next) {
  if (next) root.dataset.theme = next; else delete root.dataset.theme;
  theme.textContent = `theme: ${next || "system"}`;
  try { localStorage.setItem("theme", next); } catch { /* private mode: for this page only */ }
  view?.repaint?.();
}
theme.addEventListener("click", () => setTheme({ "": "light", light: "dark", dark: "" }[root.dataset.theme || ""]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view?.repaint?.());
// Paper is white: figures of a dark view are drawn again in the light theme. Chromium prints nothing of a canvas that is
// drawn again here: the style inverts its lightness.
let screenTheme = null;
addEventListener("beforeprint", () => {
  if (!isDark()) return;
  screenTheme = root.dataset.theme || "";
  root.dataset.theme = "light";
  root.dataset.darkCanvas = "";
  view?.repaint?.(true);
});
addEventListener("afterprint", () => {
  if (screenTheme === null) return;
  if (screenTheme) root.dataset.theme = screenTheme; else delete root.dataset.theme;
  delete root.dataset.darkCanvas;
  screenTheme = null;
  view?.repaint?.();
});
let resized = 0;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => view?.repaint?.(), 150); });
document.getElementById("keys").addEventListener("click", showKeys);
document.getElementById("login").addEventListener("click", async () => {
  if (state.session.logged_in) { state.session = await api("session", { method: "DELETE" }); showSession(); showMessage("logged out"); } else await askToken();
});

async function begin() {
  try { setTheme(localStorage.getItem("theme") || ""); } catch { setTheme(""); }
  const token = location.hash.match(/^#token=(.+)$/);
  if (token) {
    history.replaceState(null, "", "#/"); // the token is in no history, and never leaves in a request's address
    await logIn(decodeURIComponent(token[1])).catch((error) => showMessage(error.message, true));
  } else {
    state.session = await api("session").catch(() => state.session);
  }
  showSession();
  addEventListener("hashchange", route);
  await route();
}
begin();
