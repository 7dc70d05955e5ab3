// The table of trials: sorted, filtered, its columns chosen, copied and saved as it is shown. Only the rows in view are in
// the document: a thousand trials scroll as easily as ten.
import { badge, dialog, h, showMessage } from "./parts.js";

const WHY = { name: "why", title: "why it ended", numeric: false, first: "ascending" };
const ROW_HEIGHT = 33;
const KEPT = "hidden-columns";

// A spreadsheet runs text that begins like a formula.
const harmless = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);

export class TrialTable {
  constructor(host, { onPick, onOpen, onOrder, colourOf }) {
    Object.assign(this, { onPick, onOpen, onOrder, colourOf });
    Object.assign(this, { columns: [], rows: [], shown: [], picked: [], at: null, sort: null, filter: "", only: null, brushed: null });
    try { this.hidden = new Set(JSON.parse(localStorage.getItem(KEPT) || "[]")); } catch { this.hidden = new Set(); }
    this.head = h("tr");
    this.body = h("tbody");
    this.table = h("table", { class: "trials" }, h("thead", {}, this.head), this.body);
    this.scroll = h("div", { class: "scroll rows", tabindex: 0, role: "region", "aria-label": "trials" }, this.table);
    this.scroll.addEventListener("scroll", () => this.draw());
    host.append(this.scroll);
  }

  // Data --------------------------------------------------------------------------------------------------------------------

  set(table) { this.take(table.columns); this.rows = table.rows; this.heads(); this.arrange(); }
  take(columns) { // why it ended comes after the verdict: in view at any width
    this.sent = new Map(columns.map((column, i) => [column.name, i]));
    const at = 1 + Math.max(columns.findIndex((column) => column.name === "verdict"), columns.findIndex((column) => column.name === "state"));
    this.columns = [...columns.slice(0, at), WHY, ...columns.slice(at)];
  }
  update(rows) {
    const places = new Map(this.rows.map((row, i) => [row.trial, i]));
    for (const row of rows) {
      if (row.columns) { this.take(row.columns); this.rows = []; places.clear(); this.heads(); continue; }
      if (places.has(row.trial)) this.rows[places.get(row.trial)] = row;
      else { places.set(row.trial, this.rows.length); this.rows.push(row); }
    }
    this.arrange();
  }
  value(row, column) { return column === WHY ? row.why || null : row.values[this.sent.get(column.name)]; }
  text(row, column) { return column === WHY ? row.why : row.texts[this.sent.get(column.name)]; }
  visible() { return this.columns.filter((column) => column.name === "trial" || !this.hidden.has(column.name)); }

  // Order and filter --------------------------------------------------------------------------------------------------------

  order(column) {
    const other = { ascending: "descending", descending: "ascending" };
    this.sort = this.sort?.name === column.name ? { name: column.name, way: other[this.sort.way] } : { name: column.name, way: column.first };
    this.arrange();
    this.onOrder();
  }
  // A condition with headings in place of names: `AUC > 0.8` asks for best_val_auc.
  named(text) {
    const titles = this.columns.flatMap((column) => [[column.title, column.name], [column.title.replace(/ \[.*/, ""), column.name]]);
    titles.sort((a, b) => b[0].length - a[0].length);
    const escaped = (title) => title.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const name = new Map(titles.map(([title, column]) => [title.toLowerCase(), column]));
    const any = new RegExp(`(^|\\band\\b|\\bor\\b|,|\\()(\\s*)(${[...new Set(titles.map(([title]) => escaped(title)))].join("|")})(?=\\s*(?:[<>=!~]|in\\b))`, "gi");
    return text.replace(any, (_, before, space, title) => `${before}${space}${name.get(title.toLowerCase())}`);
  }
  passing() { // ids that the filter and the brushes let through; null: all
    return this.shown.length === this.rows.length ? null : new Set(this.shown.map((row) => row.trial));
  }
  arrange() {
    const wanted = this.filter.toLowerCase();
    let rows = this.rows;
    if (this.only) rows = rows.filter((row) => this.only.has(row.trial));
    else if (wanted) rows = rows.filter((row) => `${row.texts.join(" ")} ${row.why}`.toLowerCase().includes(wanted));
    if (this.brushed) rows = rows.filter((row) => this.brushed.has(row.trial));
    const column = this.columns.find((each) => each.name === this.sort?.name);
    if (column) {
      const sign = this.sort.way === "ascending" ? 1 : -1;
      rows = [...rows].sort((a, b) => {
        const left = this.value(a, column), right = this.value(b, column);
        if (left === null || right === null) return (left === null) - (right === null);
        return sign * (typeof left === "number" ? left - right : String(left).localeCompare(String(right)));
      });
    }
    for (const head of this.head.children) {
      if (head.dataset.column === this.sort?.name) head.setAttribute("aria-sort", this.sort.way); else head.removeAttribute("aria-sort");
    }
    this.shown = rows;
    this.redraw();
    this.onArranged?.(rows.length, this.rows.length);
  }

  // Drawing -----------------------------------------------------------------------------------------------------------------

  heads() {
    this.head.replaceChildren(...this.visible().map((column) => {
      const head = h("th", { scope: "col", class: column.numeric ? "number" : "" }, h("button", { type: "button", onclick: () => this.order(column) }, column.title));
      head.dataset.column = column.name;
      return head;
    }));
  }
  redraw() { this.drawn = null; this.draw(); }
  draw() {
    const first = this.printing ? 0 : Math.max(0, Math.floor(this.scroll.scrollTop / ROW_HEIGHT) - 8);
    const seen = this.printing ? this.shown.length : Math.ceil((this.scroll.clientHeight || 600) / ROW_HEIGHT) + 16;
    const last = Math.min(this.shown.length, first + seen);
    if (this.drawn === `${first}-${last}`) return;
    this.drawn = `${first}-${last}`;
    const gap = (rows) => { const row = h("tr", { class: "gap", "aria-hidden": "true" }); row.style.height = `${rows * ROW_HEIGHT}px`; return row; };
    this.body.replaceChildren(gap(first), ...this.shown.slice(first, last).map((row) => this.line(row)), gap(this.shown.length - last));
    this.table.setAttribute("aria-rowcount", this.shown.length);
  }
  line(row) {
    const place = this.picked.indexOf(row.trial);
    const cells = this.visible().map((column) => {
      const text = this.text(row, column);
      if (column.name === "trial") return this.idCell(row, text, place);
      if (column.name === "state") return h("td", {}, badge(text));
      if (column === WHY) return h("td", { class: "why", title: text }, text);
      return h("td", { class: column.numeric ? "number" : "" }, text);
    });
    const classes = [place >= 0 ? "picked" : "", this.at === row.trial ? "at" : ""].join(" ").trim();
    return h("tr", { class: classes, data: { trial: row.trial } }, cells);
  }
  idCell(row, text, place) {
    const button = h("button", { type: "button", class: "id", "aria-pressed": String(place >= 0), title: "pick", onclick: () => this.onPick(row.trial) }, text);
    if (place >= 0) button.style.borderColor = this.colourOf(row.trial);
    return h("th", { scope: "row" }, button, " ", h("a", { href: this.onOpen(row.trial), "aria-label": `open trial ${row.trial}` }, "open"));
  }
  move(by) {
    const now = this.shown.findIndex((row) => row.trial === this.at);
    const next = Math.min(this.shown.length - 1, Math.max(0, now < 0 ? 0 : now + by));
    this.at = this.shown[next]?.trial ?? null;
    const top = next * ROW_HEIGHT;
    if (top < this.scroll.scrollTop || top > this.scroll.scrollTop + this.scroll.clientHeight - 3 * ROW_HEIGHT) this.scroll.scrollTop = top - this.scroll.clientHeight / 2;
    this.redraw();
  }

  // Choosing columns, copying, saving -----------------------------------------------------------------------------------------

  tools(name) {
    return [
      h("button", { type: "button", class: "tool", id: "columns", onclick: () => this.choose() }, "columns"),
      h("button", { type: "button", class: "tool", id: "copy", onclick: () => this.copy() }, "copy table"),
      h("button", { type: "button", class: "tool", id: "csv", onclick: () => this.save(name) }, "save as CSV"),
    ];
  }
  choose() {
    const boxes = this.columns.filter((column) => column.name !== "trial").map((column) => {
      const box = h("input", { type: "checkbox", checked: !this.hidden.has(column.name), onchange: () => this.hide(column.name, !box.checked) });
      return h("label", { class: "choice", data: { column: column.name } }, box, ` ${column.title}`);
    });
    const all = h("button", { class: "tool", type: "button", onclick: () => { this.hidden.clear(); this.keep(); dialog.close(); } }, "show all");
    dialog.replaceChildren(h("h2", {}, "Columns"), h("div", { class: "choices" }, boxes), h("div", { class: "tools" }, h("button", { class: "tool main", type: "button", onclick: () => dialog.close() }, "done"), all));
    dialog.oncancel = null;
    dialog.showModal();
  }
  hide(name, hidden) { if (hidden) this.hidden.add(name); else this.hidden.delete(name); this.keep(); }
  keep() {
    try { localStorage.setItem(KEPT, JSON.stringify([...this.hidden])); } catch { /* private mode: for this page only */ }
    this.heads();
    this.arrange();
  }
  cells(ofRow) { return [this.visible().map((column) => column.name), ...this.shown.map((row) => this.visible().map((column) => ofRow(row, column)))]; }
  async copy() {
    const text = this.cells((row, column) => {
      const shown = this.text(row, column).replace(/[\t\n]/g, " ");
      return typeof this.value(row, column) === "string" ? harmless(shown) : shown;
    }).map((cells) => cells.join("\t")).join("\n");
    try { await navigator.clipboard.writeText(text); showMessage(`copied: ${this.shown.length} trials`); } catch { showMessage("the browser does not let this page copy (it needs HTTPS or this machine): save as CSV instead", true); }
  }
  csv() {
    const cell = (value) => {
      const plain = value === null || value === undefined ? "" : String(value);
      const text = typeof value === "string" ? harmless(plain) : plain;
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return `${this.cells((row, column) => this.value(row, column)).map((cells) => cells.map(cell).join(",")).join("\n")}\n`;
  }
  save(name) {
    const link = h("a", { href: URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" })), download: `${name.replace(/[^A-Za-z0-9_.-]+/g, "-")}-trials.csv` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
