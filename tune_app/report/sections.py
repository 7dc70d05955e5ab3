"""The sections of one study's page."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from trainables import medtune_version
from trainables.config import FineTuneConfig
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import effect_lines
from tune_app.report import figures, findings
from tune_app.report.cautions import cautions
from tune_app.report.checklist import checklist
from tune_app.report.parts import Cell, Head, Page, Row, Table, written_at
from tune_app.results.study import Study
from tune_app.results.tables import results_table
from tune_app.results.text import duration, format_value, printable

MOST_ROWS = 500
"""Trials listed in the table of the page, the best ones."""

SLICE = "slice-"
"""Before the hyperparameter in the name of a figure of the objective over it."""

DASHES = {
    "solid": "",
    "dot": "2 4",
    "dash": "8 5",
    "longdash": "13 6",
    "dashdot": "8 4 2 4",
    "longdashdot": "13 4 2 4",
}
"""Plotly's dashes as SVG has them."""


def study_page(study: Study, refresh_s: float | None) -> Page:
    asked, found = findings.summary(study)
    page = Page(
        study.name,
        _subtitle(study),
        asked,
        found,
        _tiles(study),
        _footer(study),
        refresh_s=refresh_s,
    )
    doubts = cautions(study)
    if doubts:
        section = page.section("cautions", "Before you trust this")
        section.parts.append({"kind": "cautions", "cautions": doubts})
    scored = study.scored
    if study.spec.kind != "search":
        _variants(page, study)
    elif (confirmation := findings.confirmation_within(study)) is not None:
        _variants(page, confirmation)
    _test_rows(page, study)
    if scored:
        _best(page, study)
        _checklist(page, study)
    if len(study.epochs):
        _curves(page, study)
    if (study.trials_full["state"] == "stopped").any():
        _stops(page, study)
    if scored and study.spec.kind == "search":
        _search(page, study)
    if len(study.trials_full):
        _trials(page, study)
    _environment(page, study)
    return page


def _subtitle(study: Study) -> str:
    parts = [study.spec.kind + (", running" if study.running else "")]
    created = study.info.get("created")
    if isinstance(created, int | float):
        parts.append(f"started {time.strftime('%Y-%m-%d %H:%M', time.gmtime(created))} UTC")
    parts.append(study.place)
    return " · ".join(parts)


def _footer(study: Study) -> str:
    rows = len(study.epochs)
    return f"Written by medtune {medtune_version()} from {rows} epochs of {len(study.trials_full)} trials, {written_at()} UTC."


def _tiles(study: Study) -> list[dict[str, str]]:
    trials = study.trials_full
    tiles = []
    if study.scored and study.spec.kind == "search":
        value, text = findings.first_tile(study)
        tiles.append({"value": value, "text": text})
    elif study.scored:
        variant = str(findings.leading(study)["variant"])
        mean = trials.loc[
            (trials["variant"] == variant) & (trials["state"] != "failed"), "objective"
        ].mean()
        text = f"highest mean {OBJECTIVES[study.spec.objective].title}: {printable(variant)}"
        tiles.append({"value": f"{mean:.3f}", "text": text})
    value, text = findings.trials_tile(study)
    tiles.append({"value": value, "text": text})
    asked = int(trials["epochs"].sum())
    tiles.append({"value": f"{len(study.epochs)}", "text": f"epochs run, of {asked} for full runs"})
    gpu = float(trials["gpu_s"].sum())
    if gpu:
        tiles.append({"value": duration(gpu), "text": "GPU time, in the epochs of all trials"})
    else:
        tiles.append(
            {
                "value": duration(float(trials["work_s"].sum())),
                "text": "in the epochs of all trials together",
            }
        )
    return tiles


def _best(page: Page, study: Study) -> None:
    best = findings.leading(study)
    search = study.spec.kind == "search"
    section = page.section(
        "best", f"The {'best' if search else 'leading'} configuration against the documented one"
    )
    rows = []
    for row in findings.configuration(study).to_dict("records"):
        name = str(row["name"])
        meaning = (FineTuneConfig.model_fields[name].description or "").split(". ")[0]
        mark = "≠" if row["differs"] else ""
        cells = [
            Cell(name, "nowrap name"),
            *(Cell(str(row[key]), "nowrap") for key in ("before", "after")),
        ]
        cells += [
            Cell(f"{row['best']} {mark}".strip(), "nowrap"),
            Cell(meaning, "text faint roomy"),
        ]
        rows.append(Row(cells, kind="differs" if row["differs"] else ""))
    values = []
    for settings in findings.documented_settings(study).values():
        trial = findings.trial_with(study, settings)
        values.append(
            "not run" if trial is None else f"{trial['objective']:.3f} ({trial['trial']})"
        )
    rows.append(
        Row(
            [
                Cell("objective"),
                *(Cell(value) for value in values),
                Cell(f"{best['objective']:.3f}"),
                Cell("", "roomy"),
            ]
        )
    )
    heads = [Head(text) for text in ("hyperparameter", "before", "after", f"trial {best['trial']}")]
    heads.append(Head("meaning", "roomy"))
    section.text(
        "Before and after: the settings that this project started from, before and after its fixes (docs/fixes.md), epochs "
        "scaled to this study's length. Bold and ≠: the best trial differs from the recommended value after the fixes.",
        style="faint",
    )
    section.table(Table("configurations", heads, rows), style="settings")


def _checklist(page: Page, study: Study) -> None:
    best = findings.leading(study)
    section = page.section("checklist", "Signs of a sound run")
    which = (
        "" if pd.isna(best["variant"]) else f", the best run of {printable(str(best['variant']))}"
    )
    section.text(
        "The success indicators and warning signs that belong to the settings of docs/fixes.md, looked for in trial "
        f"{best['trial']}{which}; the last column counts the trials that show it.",
        style="faint",
    )
    for kind, title in (("success", "Success indicators"), ("warning", "Warning signs")):
        rows = []
        for check in (check for check in checklist(study) if check.kind == kind):
            told = {None: "unclear", True: "yes", False: "no"}[check.present]
            sign = {None: "?", True: "✓", False: "!"}[check.good]
            mark = {None: "open", True: "good", False: "bad"}[check.good]
            cells = [Cell(check.text), Cell(f"{sign} {told}", mark=mark)]
            rows.append(Row([*cells, Cell(check.evidence, "text"), Cell(check.among, "nowrap")]))
        heads = [Head(text) for text in (title.lower(), "present", "evidence", "among all")]
        section.table(Table(title, heads, rows), style="stack fixed")


def _curves(page: Page, study: Study) -> None:
    section = page.section("curves", "Validation AUC by epoch")
    section.parts.append({"kind": "chips", "groups": _chips(study), "drw": True})
    section.parts.append({"kind": "picker", "trials": study.trials_full["trial"].tolist()})
    drawn = min(len(study.trials_full), figures.MOST_CURVES)
    of = (
        f"{drawn} of {len(study.trials_full)} trials are drawn: the best half of them, and others evenly. "
        if drawn < len(study.trials_full)
        else ""
    )
    section.head("Averaged weights (EMA): what would be deployed")
    section.figure(
        page,
        "curves-ema",
        figures.curves(study, "val_auc_ema"),
        "validation AUC of the averaged weights by epoch, a line a trial",
        f"{of}Thick: the best trial. Dashed upright: its class weights begin. "
        + ("Dotted uprights: rungs, where trials are compared. " if study.rungs else "")
        + "Markers end the lines of trials that were stopped or failed; open triangles: class weights begin. Click a line "
        "to pick its trial everywhere.",
    )
    section.head("Raw weights, as trained")
    section.figure(
        page,
        "curves-raw",
        figures.curves(study, "val_auc_raw"),
        "validation AUC of the raw weights by epoch, a line a trial",
    )


def _chips(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "title": figures.GROUPS[key].title,
            "meaning": figures.GROUPS[key].meaning,
            "glyph": figures.GROUPS[key].glyph,
            "colour": figures.GROUPS[key].colour,
            "dashes": DASHES[figures.GROUPS[key].dash],
            "count": count,
        }
        for key, count in figures.groups_of(study).items()
    ]


def _stops(page: Page, study: Study) -> None:
    section = page.section("stops", "Stopped trials, why, and the epochs saved")
    table = findings.stops(study)
    by_user = table["reason"] == "requested"
    trials, spared = int(table.loc[~by_user, "trials"].sum()), int(table["epochs_spared"].sum())
    asked = int(table.loc[by_user, "trials"].sum())
    time_spared, gpu = float(table["time_spared_s"].sum()), float(table["gpu_s_spared"].sum())
    told = (
        f"{trials} of {findings.started(study)} {'was' if trials == 1 else 'were'} stopped early: "
        f"{spared} epochs were not run"
    )
    if time_spared > 0:
        told += f", about {duration(gpu if gpu > 0 else time_spared)} of {'GPU time' if gpu > 0 else 'work'} at the pace of those trials"
    if asked:
        told += (
            f"; {asked} {'was' if asked == 1 else 'were'} stopped on request, which spares nothing"
        )
    section.text(f"{told}.")
    section.figure(page, "stops", figures.stopped(table), "epochs run and spared by reason")
    rows = [
        Row(
            [
                Cell(
                    figures.GROUPS[reason].title if reason in figures.GROUPS else reason, "nowrap"
                ),
                Cell(str(row["trials"]), "number"),
                Cell(str(row["epochs_spared"]), "number"),
                Cell(duration(float(row["time_spared_s"])), "number nowrap"),
                Cell(printable(str(row["example"])), "text"),
            ]
        )
        for row in table.to_dict("records")
        for reason in [str(row["reason"])]
    ]
    heads = [
        Head("reason"),
        Head("trials", "number"),
        Head("epochs spared", "number"),
        Head("time spared", "number"),
        Head("the first of them"),
    ]
    section.table(Table("reasons", heads, rows), style="stack")
    section.table(_each_stop(study), fold=f"Each of the {trials + asked}", style="stack")


def _each_stop(study: Study) -> Table:
    stopped = study.trials_full[study.trials_full["state"] == "stopped"]
    rows = []
    for trial in stopped.to_dict("records"):
        by_diagnosis = trial["stopped_by"] == "diagnosis"
        why = trial["verdict_summary"] if by_diagnosis else trial["reason"]
        advice = trial["advice"] if by_diagnosis else None
        rows.append(
            Row(
                [
                    Cell(trial["trial"], pick=trial["trial"]),
                    Cell(f"{trial['epochs_run']} of {trial['epochs']}", "nowrap"),
                    Cell(_verdict(trial), "nowrap"),
                    Cell(_shown("reason", why), "text"),
                    Cell(_shown("advice", advice), "text"),
                ],
                trial=trial["trial"],
            )
        )
    heads = [Head("trial"), Head("epochs"), Head("verdict"), Head("why"), Head("what to change")]
    return Table("stopped trials", heads, rows)


def _verdict(trial: Mapping[Any, Any]) -> str:
    if pd.isna(trial["verdict"]):
        return "-"
    title = str(trial["verdict"])
    since = trial.get("since_epoch", pd.NA)  # no column where no trial has one
    return title if pd.isna(since) else f"{title} since {since}"


def _shown(column: str, value: Any) -> str:
    text = format_value(column, value)
    return "" if text == "-" else text


def _search(page: Page, study: Study) -> None:
    if len(study.trials_full) > 1:
        section = page.section("progress", "How the search went")
        section.figure(
            page,
            "progress",
            figures.progress(study),
            "objective of each trial in the order they began",
            f"Objective: {OBJECTIVES[study.spec.objective].title}. The line is the best so far.",
        )
    if not study.searched or len(study.trials_full) < 2:
        return
    section = page.section("parallel", "All settings at a glance")
    section.text(
        "A line is a trial; it crosses each axis at its value and ends at its objective.",
    )
    section.text(
        "Drag a box over an axis to keep only the trials that pass there, over several axes if you like; double-click "
        "to clear.",
        style="mouse",
    )
    section.parts.append({"kind": "picker", "trials": study.trials_full["trial"].tolist()})
    wide = max(24, 6 * (len(study.searched) + 1))
    section.figure(
        page,
        "parallel",
        figures.parallel(study),
        "parallel coordinates of all searched hyperparameters",
        "Thick: best tenth. Thin: upper half. Dotted: the rest. A line is interrupted where its run does not read the hyperparameter.",
        wide=wide,
    )
    _importance(page, study)
    section = page.section("slices", "One hyperparameter at a time")
    section.text(
        "Dashed: the value before this project's fixes (docs/fixes.md); solid: after. Every mark is a trial, drawn by its verdict."
    )
    section.parts.append({"kind": "chips", "groups": _chips(study), "drw": False})
    slices = []
    for name in study.searched:
        page.plots[f"{SLICE}{name}"] = figures.slice_of(study, name)
        slices.append({"id": f"{SLICE}{name}", "label": f"objective over {name}"})
    section.parts.append({"kind": "slices", "slices": slices})


def _importance(page: Page, study: Study) -> None:
    section = page.section("importance", "Which hyperparameters mattered")
    least = findings.LEAST_FOR_IMPORTANCE
    if not findings.enough_for_importance(study):
        section.text(
            f"Not shown: fewer than {least} trials have ended, too few for an order.", style="faint"
        )
        return
    try:
        table = study.importance()
    except ValueError as error:
        section.text(f"Not shown: {str(error).split(': ', 1)[-1]}.", style="faint")
        return
    section.figure(
        page,
        "importance",
        figures.importance(table),
        "importance of each hyperparameter",
        f"By {table.attrs['how']}.",
    )


def _variants(page: Page, study: Study) -> None:
    confirmation = study.spec.kind == "confirmation"
    section = page.section(
        "effects",
        "Confirmation over folds and seeds" if confirmation else "What each variant changes",
    )
    if confirmation:
        section.text(
            f"{len(study.trials_full)} of {len(study.spec.planned)} runs, in {study.place}.",
            style="faint",
        )
    tables = findings.effects_tables(study)
    if not tables:
        section.text("Nothing to compare yet: two variants have to begin.", style="faint")
    for number, table in enumerate(tables):
        reference = table.attrs["baseline"]
        if len(tables) > 1:
            section.head(f"Against {reference}")
        lines = findings.confirmation_lines(study) if confirmation else effect_lines(table)
        for line in _joined(lines[:-1]):
            section.text(line)
        if table["mean"].notna().any():
            section.figure(
                page,
                f"effects-{number}",
                figures.effects(table),
                f"difference of each variant from {reference}, with its interval",
                f"{findings.sentence(lines[-1].strip('()'))}. Hollow: the data do not decide.",
            )
        section.table(_effects_table(table), style="stack")
    if study.scored and study.trials_full["variant"].notna().any():
        section.head("Every run")
        section.figure(
            page,
            "runs",
            figures.runs_by_variant(study),
            "objective of every run by variant",
            "A mark is a run, its shape the fold; the bar is the mean.",
        )


def _joined(lines: Sequence[str]) -> list[str]:
    """Lines that are set in belong to the one before."""
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    return joined


def _effects_table(table: pd.DataFrame) -> Table:
    rows = []
    for row in table.to_dict("records"):
        reference = row["variant"] == table.attrs["baseline"]
        call = "reference" if reference else str(row["call"])
        mark = {"better": "good", "worse": "bad"}.get(call, "open")
        sign = {"better": "▲ ", "worse": "▼ ", "cannot tell": "? "}.get(call, "")
        interval = "" if pd.isna(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}"
        rows.append(
            Row(
                [
                    Cell(printable(str(row["variant"])), "nowrap"),
                    Cell(f"{sign}{call}", mark=mark),
                    Cell("" if pd.isna(row["mean"]) else f"{row['mean']:+.3f}", "number"),
                    Cell(interval, "nowrap"),
                    Cell("" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3f}", "number"),
                    Cell("" if pd.isna(row["pairs"]) else str(row["pairs"]), "number"),
                    Cell("" if pd.isna(row["value"]) else f"{row['value']:.3f}", "number"),
                    Cell(
                        f"{row['collapsed']} of {row['runs']}"
                        + (f", {row['healed']} healed" if row["healed"] else "")
                    ),
                    Cell(_shown("verdicts", row["verdicts"]), "text"),
                ]
            )
        )
    heads = [
        Head("variant"),
        Head("call"),
        Head("difference", "number"),
        Head("95 % interval"),
        Head("Holm p", "number"),
        Head("pairs", "number"),
        Head("mean", "number"),
        Head("collapsed"),
        Head("diagnoses"),
    ]
    return Table(f"effects against {table.attrs['baseline']}", heads, rows)


def _test_rows(page: Page, study: Study) -> None:
    lines = findings.test_lines(study)
    if lines:
        section = page.section("test", "The test rows")
        for line in _joined(lines):
            section.text(line)


def _trials(page: Page, study: Study) -> None:
    section = page.section("trials", "Every trial")
    table = results_table(study.ranked, study.searched, sort=(), limit=MOST_ROWS)
    if len(table) < len(study.trials_full):
        section.text(
            f"The best {MOST_ROWS} of {len(study.trials_full)}; `medtune results` lists all.",
            style="faint",
        )
    section.parts.append({"kind": "filter", "table": "all-trials"})
    whys = findings.reasons_of_ends(study)
    joined = {"best_val_auc_low", "best_val_auc_high", "since_epoch"}
    names = [name for name in table.columns if name not in joined]
    headings = {
        "best_val_auc": "AUC [95 % CI]",
        "verdict": "verdict",
        "healed_epochs": "epochs healed",
        "work_s": "time",
        "best_epoch": "best epoch",
        "epochs_run": "epochs",
    }
    heads = []
    for name in names:
        numeric, first = findings.column_order(table[name])
        heads.append(Head(headings.get(name, name), "number" if numeric else "", first))
    heads.append(Head("why it ended early", "text"))
    rows = []
    for row in table.to_dict("records"):
        cells = [_trial_cell(name, row) for name in names]
        cells.append(Cell(whys[row["trial"]], "text"))
        rows.append(Row(cells, trial=row["trial"]))
    section.table(Table("all trials", heads, rows), name="all-trials", style="sortable")


def _trial_cell(name: str, row: Mapping[Any, Any]) -> Cell:
    value = row[name]
    if name == "trial":
        return Cell(value, "nowrap", pick=value)
    if name == "verdict":
        return Cell(_verdict(row), "nowrap")
    if isinstance(value, bool) or not isinstance(value, float | int):
        return Cell(_shown(name, value), "nowrap")
    text, missing = format_value(name, value), pd.isna(value)
    if name == "best_val_auc" and not missing:
        text = findings.auc_with_interval(row)
    return Cell(text, "number nowrap", value="" if missing else repr(float(value)))


def _environment(page: Page, study: Study) -> None:
    section = page.section("environment", "Data, environment and versions")
    info = study.info
    rows: list[tuple[str, str]] = [("data", study.spec.data)]
    rows += [("cohort", str(info["cohort"]))] if "cohort" in info else []
    for group in ("hardware", "versions"):
        rows += [
            (f"{group[:-1] if group == 'versions' else group}: {name}", text)
            for name, text in _flat(info.get(group))
        ]
    nodes = sorted(set(study.trials_full["node"].dropna()))
    if nodes:
        rows.append(("nodes", ", ".join(nodes)))
    precision = sorted(set(study.epochs["precision"].dropna()))
    if precision:
        rows.append(("precision", ", ".join(precision)))
    memory = study.epochs["peak_memory_gib"].max()
    if memory > 0:
        rows.append(("peak device memory", f"{memory:.1f} GiB"))
    rows += [("note", note) for note in study.notes]
    heads = [Head("what"), Head("value")]
    cells = [
        Row([Cell(printable(name), "nowrap"), Cell(printable(value), "text")])
        for name, value in rows
    ]
    section.table(Table("environment", heads, cells), style="narrow")
    spec = study.spec.model_dump(mode="json", exclude_defaults=True)
    settings = [
        Row([Cell(name, "nowrap"), Cell(json.dumps(value), "text")])
        for name, value in spec.items()
        if name != "planned"
    ]
    section.table(
        Table("specification", heads, settings),
        style="narrow stack",
        fold="Specified values that differ from the default",
    )


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name} ")
        else:
            if not name.startswith("node:"):  # Ray's mark of each machine: `nodes` has them
                yield f"{prefix}{name}", _amount(name, item)


def _amount(name: str, item: Any) -> str:
    """An entry of the resources that Ray reports for a machine; its memory is in bytes."""
    if not isinstance(item, float):
        return str(item)
    return f"{item / 2**30:.1f} GiB" if name.endswith("memory") else f"{item:g}"
