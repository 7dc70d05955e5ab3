// What every view of the page uses: making nodes, words for numbers and states, and the REST interface with its session.

export const page = document.getElementById("page");
export const dialog = document.getElementById("dialog");
export const state = { session: { logged_in: false, csrf: null, reading: "open" }, form: null, places: new Map() }; // places: study -> its last address
const notice = document.getElementById("notice");

// Small parts -------------------------------------------------------------------------------------------------------------

export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
export const prose = (text) => String(text ?? "").split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
// As Python writes it, which rounds a half to the even digit: a number is the same in a sentence and on a tile.
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "-";
  const text = Number(value).toFixed(digits), exact = Math.abs(Number(value)).toFixed(Math.min(100, digits + 50));
  const rest = exact.slice(exact.indexOf(".") + 1 + digits);
  if (!/^50*$/.test(rest) || Number(text.at(-1)) % 2 === 0) return text;
  return (Number(value) - Math.sign(value) * 10 ** -(digits + 1)).toFixed(digits);
}
export const clock = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" }) : "-");
export const enc = encodeURIComponent;
export const studyHash = (id, rest = "") => `#/study/${enc(id)}${rest}`;

export function span(seconds) {
  if (seconds < 100) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

// How long a study will take: by the measurements of an earlier one, and by a measurement of this machine.
export function timeText({ estimate, measured }) {
  const times = ({ likely_s, latest_s }, where) => (likely_s < 0.98 * latest_s ? `about ${span(likely_s)} if trials stop as early as ${where}, at most ${span(latest_s)}` : `about ${span(latest_s)}`);
  const epochs = ({ epoch_s, at_once }) => `${number(epoch_s, epoch_s < 10 ? 1 : 0)} s per epoch, ${at_once} ${at_once === 1 ? "trial" : "trials"} at a time`;
  const lines = [];
  if (estimate) lines.push(`Time: ${times(estimate, "there")}. Measured in the study "${estimate.study}"${estimate.host ? ` on ${estimate.host}` : ""}: ${epochs(estimate)}.`);
  if (measured) {
    const { train, val, host, device, threads, trial_gib } = measured;
    const on = device === "CPU" ? `${threads} CPU ${threads === 1 ? "thread" : "threads"} per trial` : device;
    lines.push(`Time on this machine: ${times(measured, "expected")}. Measured on ${host} (${on}) at ${clock(measured.measured)} with this network and random volumes of this size: ${epochs(measured)}, ${train} training and ${val} validation volumes${trial_gib ? `, ${number(trial_gib, 1)} GiB of memory per trial` : ""}.`);
  }
  return lines.join(" ") || "Time: not known, as no study here has trained this network on volumes of this size. It can be measured on this machine.";
}

const STATES = {
  running: ["●", "running"], starting: ["◐", "starting"], queued: ["◔", "queued"], ended: ["✓", "ended"], interrupted: ["‖", "interrupted"],
  failed: ["!", "failed"], unstarted: ["!", "did not start"], new: ["○", "not started yet"], unreadable: ["!", "unreadable"], unread: ["…", "being read"], completed: ["✓", "completed"], stopped: ["■", "stopped"], writing: ["◐", "being written"], written: ["✓", "written"],
};
export const badge = (state, more = "") => h("span", { class: `badge ${state}` }, `${(STATES[state] || ["", state])[0]} ${(STATES[state] || ["", state])[1]}${more}`);

let noticeTimer = 0;
export function showMessage(text, bad = false) {
  notice.textContent = text;
  notice.className = bad ? "bad" : "";
  notice.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { notice.hidden = true; }, bad ? 12000 : 4000);
}

// The interface -----------------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, detail) { super(detail.join("\n")); this.status = status; this.detail = detail; }
}

export async function api(path, { method = "GET", body } = {}) {
  const headers = {};
  if (method !== "GET" && state.session.csrf) headers["X-Medtune-CSRF"] = state.session.csrf;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`api/${path}`, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, ["the service does not answer; studies continue without it"]);
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(answer.status, Array.isArray(content.detail) ? content.detail : [`refused (${answer.status})`]);
  return content;
}

// Do something that changes things: log in first where that is needed, and show the result.
export async function act(path, done, body) {
  if (!state.session.logged_in && !(await askToken())) return false;
  try {
    await api(path, { method: "POST", body });
  } catch (error) {
    if (error.status === 401) { state.session.logged_in = false; showSession(); }
    showMessage(error.message, true);
    return false;
  }
  showMessage(done);
  return true;
}

export function showSession() {
  const button = document.getElementById("login");
  button.textContent = state.session.logged_in ? "log out" : "log in";
}

export async function logIn(token) {
  state.session = await api("session", { method: "POST", body: { token } });
  showSession();
}

export function askToken() {
  return new Promise((resolve) => {
    const field = h("input", { type: "password", id: "token", autocomplete: "current-password", "aria-label": "token" });
    const wrong = h("p", { class: "bad", role: "alert" });
    const close = (result) => { dialog.close(); resolve(result); };
    dialog.replaceChildren(
      h("form", { onsubmit: async (event) => {
        event.preventDefault();
        try { await logIn(field.value.trim()); close(true); } catch (error) { wrong.textContent = error.message; }
      } },
      h("h2", {}, "Log in"), h("p", {}, "Starting and stopping takes the token that ", h("code", {}, "medtune serve"), " printed where it was started."),
      field, wrong, h("div", { class: "tools" }, h("button", { class: "tool main", type: "submit" }, "log in"), h("button", { class: "tool", type: "button", onclick: () => close(false) }, "cancel"))),
    );
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
    field.focus();
  });
}

// The problems of a refused request, all of them in a list, and each line at the field that it names. `fieldOf` finds the input of a name.
export class ProblemList {
  constructor(fieldOf, id = "problems") {
    this.fieldOf = fieldOf;
    this.node = h("div", { class: "bad problems", id, role: "alert" });
    this.marked = [];
  }
  clear() {
    this.node.replaceChildren();
    for (const node of this.marked) if (node.matches(".at-field")) node.remove(); else node.removeAttribute("aria-invalid");
    this.marked = [];
  }
  show(lines) {
    this.node.replaceChildren(h("ul", {}, lines.map((line) => h("li", {}, line))));
    for (const line of lines) {
      const words = line.match(/[a-z][a-z0-9_]*/g) || []; // the most exact name comes last in `config: depth: ...`
      const heads = line.split(/[:=]/).slice(0, -1).map((part) => part.trim().split(/[ .]/).pop().replace(/^['"]|['"]$/g, ""));
      const quoted = [...line.matchAll(/'([a-z_]+)'/g)].map((found) => found[1]);
      const input = [...heads.reverse(), ...quoted, words[0]].map((name) => this.fieldOf(name)).find(Boolean);
      if (!input) continue;
      input.setAttribute("aria-invalid", "true");
      const message = h("small", { class: "bad at-field" }, line);
      (input.closest(".field") || input.closest("td")).append(message);
      this.marked.push(input, message);
    }
    (this.marked[0] || this.node).scrollIntoView({ block: "center" });
  }
}

// Notes and tags of a study or a trial: shown to all, changed by users who are logged in.
export function notesPart(path, name, read) {
  const box = h("div", { class: "notes" });
  const show = (found) => {
    const tags = found.tags.map((tag) => h("span", { class: "tag" }, tag));
    box.replaceChildren(...tags, found.note ? h("p", { class: "note" }, found.note) : "", h("button", { type: "button", class: "tool", id: `note-${name}`, onclick: () => change(found) }, found.note || tags.length ? "edit notes" : "add notes"));
  };
  const change = async (found) => {
    if (!state.session.logged_in && !(await askToken())) return;
    const note = h("textarea", { rows: 4, maxlength: 4000, id: "note-text" }, found.note), tags = h("input", { id: "note-tags", value: found.tags.join(", ") });
    const save = async (event) => {
      event.preventDefault();
      try {
        await api(`${path}/notes`, { method: "PUT", body: { note: note.value, tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean) } });
        dialog.close();
        load();
      } catch (error) { showMessage(error.message, true); }
    };
    dialog.replaceChildren(h("form", { onsubmit: save }, h("h2", {}, "Notes"), h("label", { class: "field" }, h("span", {}, "note"), note), h("label", { class: "field" }, h("span", {}, "tags, separated by commas"), tags),
      h("div", { class: "tools" }, h("button", { class: "tool main", type: "submit", id: "save-note" }, "save"), h("button", { class: "tool", type: "button", onclick: () => dialog.close() }, "cancel"))));
    dialog.oncancel = null;
    dialog.showModal();
    note.focus();
  };
  const load = () => read().then((found) => show(found || { note: "", tags: [] })).catch(() => {});
  load();
  return box;
}

export function confirmThat(text, verb) {
  return new Promise((resolve) => {
    const close = (result) => { dialog.close(); resolve(result); };
    dialog.replaceChildren(h("p", {}, text), h("div", { class: "tools" },
      h("button", { class: "tool danger", id: "yes", onclick: () => close(true) }, verb), h("button", { class: "tool", onclick: () => close(false) }, "cancel")));
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
  });
}

