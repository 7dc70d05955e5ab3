// What follows a study: a confirmation of its best, an ablation on its table, and a trial as a model.
import { api, askToken, badge, dialog, enc, h, ProblemList, showMessage, state, studyHash, timeText } from "./parts.js";

const VERBS = { confirm: "confirm the best", ablate: "start an ablation", export: "export a model" };
const MEANING = {
  confirm: "Runs the best configurations again, next to the documented settings, with new seeds on all folds. It shows whether there is a winner.",
  ablate: "Runs variants of the fixes on this study's table with its settings. Nothing is stopped early. It shows which fix matters.",
  export: "Writes weights, threshold, calibration and model card in one folder. The weights first score their validation volumes again, on CPUs.",
};
const named = (text) => text.replace(/[^A-Za-z0-9 _.-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64);

export function followButtons(studyInfo, trials) {
  const button = (kind) => h("button", { type: "button", class: "tool", id: kind, onclick: () => followUp(studyInfo.id, kind, { trials: trials() }) }, VERBS[kind]);
  return [studyInfo.kind === "search" && studyInfo.best_trial && !studyInfo.can_stop ? button("confirm") : "", button("ablate"), studyInfo.best_trial ? button("export") : ""];
}

export async function followUp(id, kind, { trials = [], trial } = {}) {
  if (!state.session.logged_in && !(await askToken())) return;
  const base = `studies/${enc(id)}`;
  const number = (name, value) => h("input", { id: `p-${name}`, type: "number", min: 1, max: 100, value });
  const text = (name, value) => h("input", { id: `p-${name}`, value });
  const select = (name, options) => h("select", { id: `p-${name}` }, options.map(([value, title]) => h("option", { value }, title)));
  const inputs = {
    confirm: () => ({ top: number("top", 3), seeds: number("seeds", 3), folds: text("folds", "all") }),
    ablate: () => ({ name: text("name", named(`${id.slice(0, 50)}-ablation`)), variants: select("variants", state.form.variant_sets.map((each) => [each, each])), seeds: number("seeds", 3), folds: text("folds", "all") }),
    export: () => ({ name: text("name", named(`${id.slice(0, 50)}-${trial || "best"}`)), trial: trial ? select("trial", [[trial, `trial ${trial}`]]) : select("trial", [["", "the best trial"], ["confirmed", "the choice of the confirmation"], ...trials.map((each) => [each, `trial ${each}`])]) }),
  }[kind]();
  const planText = h("p", { class: "faint", id: "plan", role: "status" });
  const list = new ProblemList((name) => Object.hasOwn(inputs, name) && inputs[name], "plan-problems");
  const body = () => {
    const given = Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.type === "number" ? Number(input.value) : input.value]));
    if (kind !== "export") return given;
    return { name: given.name, confirmed: given.trial === "confirmed", trial: ["", "confirmed"].includes(given.trial) ? null : given.trial };
  };
  async function send(check) {
    list.clear();
    try {
      const asked = await api(`${base}/${kind}`, { method: "POST", body: kind === "export" ? body() : { ...body(), check } });
      if (check) { planText.textContent = [`${asked.runs} runs of ${asked.epochs} epochs.`, timeText(asked), ...asked.notes.map((note) => `Note: ${note}.`)].join(" "); return; }
      dialog.close();
      showMessage(asked.became);
      if (kind !== "export") location.hash = studyHash(asked.study); else dispatchEvent(new Event("exported"));
    } catch (error) { planText.textContent = ""; list.show(error.detail || [error.message]); }
  }
  let wait = 0;
  if (kind !== "export") for (const input of Object.values(inputs)) input.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => send(true), 400); });
  dialog.replaceChildren(h("form", { onsubmit: (event) => { event.preventDefault(); clearTimeout(wait); send(false); } }, h("h2", {}, VERBS[kind]), h("p", { class: "faint" }, MEANING[kind]),
    Object.entries(inputs).map(([name, input]) => h("label", { class: "field" }, h("span", {}, name), input)), planText, list.node,
    h("div", { class: "tools" }, h("button", { class: "tool main", type: "submit", id: "go" }, kind === "export" ? "export" : "queue it"), h("button", { class: "tool", type: "button", onclick: () => dialog.close() }, "cancel"))));
  dialog.oncancel = null;
  if (!dialog.open) dialog.showModal();
  if (kind !== "export") send(true);
}

// The models exported from a study; looked at again while one is being written.
export function modelsPart(id) {
  const box = h("div", { class: "models", id: "models" });
  let timer = 0;
  const line = (model) => h("li", { data: { model: model.name } }, badge(model.state), ` ${model.name} `, model.place ? h("span", { class: "faint path" }, model.place) : "", " ",
    model.state === "written" && state.session.logged_in ? h("a", { class: "tool", href: `api/studies/${enc(id)}/models/${enc(model.name)}`, download: "" }, "download") : "",
    model.state === "failed" ? h("pre", { class: "log" }, model.lines.join("\n") || "it ended without a word") : "");
  const load = async () => {
    clearTimeout(timer);
    try {
      const { models } = await api(`studies/${enc(id)}/models`);
      box.replaceChildren(...(models.length ? [h("h2", {}, "Models"), h("ul", { class: "plain" }, models.map(line))] : []));
      if (models.some((model) => model.state === "writing")) timer = setTimeout(load, 1500);
    } catch { /* the rest of the page shows the problem */ }
  };
  addEventListener("exported", load);
  load();
  return { box, close: () => { clearTimeout(timer); removeEventListener("exported", load); } };
}
