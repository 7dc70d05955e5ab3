// Several studies side by side: the results of each budget, their best trials, and the settings that differ.
import { drawFigure, isDark } from "./charts.js";
import { pickColour } from "./curves.js";
import { api, enc, h, number, page, prose, studyHash } from "./parts.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const lines = (comparison, made) => comparison.studies.map((study, i) => ({ type: "scatter", mode: "lines", name: study.name, line: { color: pickColour(i, isDark()), width: 2.2, dash: DASHES[i] }, ...made(i) }));

function budgetFigure(comparison) {
  // On a logarithm: studies of very different sizes are read at the budget they share.
  const data = lines(comparison, (i) => ({ x: comparison.budget[i].spent.map(Math.log10), y: comparison.budget[i].best })).map((trace) => ({ ...trace, line: { ...trace.line, shape: "hv" } }));
  const tickvals = [1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5, 3e5, 1e6];
  return { data, layout: { height: 320, margin: { t: 8, r: 12 }, showlegend: true, xaxis: { title: { text: "epochs spent by all trials" }, tickvals: tickvals.map(Math.log10), ticktext: tickvals.map(String) }, yaxis: { title: { text: "best so far" } } } };
}
function bestFigure(comparison) {
  const data = lines(comparison, (i) => ({ x: comparison.best[i]?.epoch ?? [], y: comparison.best[i]?.val_auc ?? [] }));
  const ends = lines(comparison, (i) => ({ x: comparison.best[i]?.epoch ?? [] })).flatMap((trace, i) => ["val_auc_low", "val_auc_high"].map((name) => ({ ...trace, y: comparison.best[i]?.[name] ?? [], showlegend: false, opacity: 0.45, line: { ...trace.line, width: 1, dash: "dot" } })));
  return { data: [...ends.filter((trace) => trace.x.length), ...data], layout: { height: 320, margin: { t: 8, r: 12 }, showlegend: true, xaxis: { title: { text: "epoch" } }, yaxis: { title: { text: "validation AUC" } } } };
}

export function acrossView(ids) {
  let redraw = () => {};
  api(`studies/${enc(ids[0])}/across?${ids.slice(1).map((id) => `other=${enc(id)}`).join("&")}`).then((comparison) => {
    const heads = comparison.studies.map((study) => h("th", { scope: "col" }, h("a", { href: studyHash(study.id) }, study.name)));
    const table = (first, rows) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": first }, h("table", { class: "settings" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, first), heads.map((head) => head.cloneNode(true)))), h("tbody", {}, rows)));
    const differing = (first, rows) => (rows.length ? table(first, rows.map((row) => h("tr", { data: { name: row.name } }, h("th", { scope: "row", title: row.meaning }, row.name), row.values.map((text) => h("td", {}, text))))) : h("p", { class: "faint" }, "None."));
    const outcome = (name, text) => h("tr", {}, h("th", { scope: "row" }, name), comparison.studies.map((study) => h("td", {}, text(study))));
    const interval = (study) => (study.best_interval?.[0] === null || !study.best_interval ? "" : ` [${number(study.best_interval[0], 2)}, ${number(study.best_interval[1], 2)}]`);
    const budget = h("div", { class: "plot", role: "img", "aria-label": "best objective so far over epochs spent, one line per study" }), best = h("div", { class: "plot", role: "img", "aria-label": "validation AUC of each study's best trial by epoch" });
    page.replaceChildren(h("h1", {}, `${comparison.studies.length} studies`),
      comparison.cautions.length ? h("ul", { class: "cautions" }, comparison.cautions.map((text) => h("li", {}, text))) : "",
      table("outcome", [outcome("best", (study) => `${number(study.best)}${interval(study)}`), outcome("best trial", (study) => study.best_trial ?? "-"), outcome("within its noise", (study) => (study.noise === null ? "-" : `${study.rivals} others`)),
        outcome("trials ended", (study) => `${study.ended} of ${study.trials}`), outcome("epochs spent", (study) => study.epochs), outcome("objective", (study) => study.objective), outcome("table", (study) => study.data)]),
      h("div", { class: "pair" }, h("figure", {}, h("h2", {}, "Results of the budget"), budget), h("figure", {}, h("h2", {}, "The best trials"), best, h("figcaption", {}, "Averaged weights; dotted: 95 % intervals."))),
      h("h2", {}, "Differences of the studies"), differing("field", comparison.asked), h("h2", {}, "Differences of the best trials"), differing("hyperparameter", comparison.settings),
      h("h2", {}, "Findings of each"), ...comparison.studies.map((study) => h("p", {}, h("b", {}, `${study.name}: `), prose(study.found))));
    redraw = () => { drawFigure(budget, budgetFigure(comparison)); drawFigure(best, bestFigure(comparison)); };
    redraw();
    document.title = `${comparison.studies.map((study) => study.name).join(", ")} · medtune`;
    document.documentElement.dataset.ready = "yes";
  }).catch((error) => page.replaceChildren(h("h1", {}, "Studies side by side"), h("p", { class: "bad" }, error.message)));
  return { crumbs: [["side by side", location.hash]], close: () => {}, repaint: () => redraw(), keys: { Escape: () => { location.hash = "#/"; } } };
}
