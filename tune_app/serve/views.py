"""The studies of one folder as the page shows them: found, read when they change, and turned into plain values for JSON.

The content is computed by `tune_app.results.study`, `findings` and `figures`; here is when to read, and in which shape to send.
Ids are made from the folders on disk and looked up, never joined to a path: nothing outside the folder has one.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from trainables.checkpoints import TrialFiles
from trainables.config import FineTuneConfig
from trainables.data.visible import visible
from trainables.objective import OBJECTIVES
from tune_app.report import figures, findings
from tune_app.report.cautions import cautions
from tune_app.results.study import Study
from tune_app.results.tables import faulty, results_table
from tune_app.results.text import duration, format_value, plain, printable
from tune_app.serve.folder import UnknownError
from tune_app.serve.queue import StudyQueue
from tune_app.study.columns import METRICS
from tune_app.study.files import StudyFiles
from tune_app.study.requests import asked_to_stop
from tune_app.study.rows import ENDED, is_held

LOG_BYTES = 64 * 1024
"""Of a log's end that are read at most."""

RECENT_S = 600.0
"""Seconds over which the occupancy is taken."""

CurveAxis = Literal["epoch", "updates", "time"]
"""Horizontal axes of the curves."""


# Shapes to send --------------------------------------------------------------------------------------------------------


def state_of(path: Path, study: Study | None, queue: StudyQueue) -> str:
    """Return the state of a study: running, starting, queued, new, unstarted (it failed to start), interrupted, ended."""
    files = StudyFiles(path)
    if is_held(files.lock):
        return "running"
    if queue.is_starting(path):
        return "starting"
    if queue.place(path) is not None:
        return "queued"
    if not files.spec.is_file():
        return "unstarted" if files.console.is_file() else "new"
    if study is None:
        return "unread"
    ended = study.trials_full["state"].isin(ENDED)
    return (
        "ended"
        if len(study.trials_full) >= study.spec.num_trials and ended.all()
        else "interrupted"
    )


def failed_trials(study: Study) -> int:
    """Return how many trials have failed for good."""
    return int((study.trials_full["state"] == "failed").sum())


def glance(study: Study) -> dict[str, Any]:
    """Return a study's line in the list."""
    states = {
        str(state): int(count) for state, count in study.trials_full["state"].value_counts().items()
    }
    best = study.best() if study.scored else None
    rivals, noise = findings.rivals_within_noise(study) if study.scored else (0, math.nan)
    last = study.epochs["time"].max()
    return {
        "kind": study.spec.kind,
        "data": study.spec.data,
        "space": _space_name(study),
        "trials": study.spec.num_trials,
        "states": states,
        "epochs": len(study.epochs),
        "objective": OBJECTIVES[study.spec.objective].title,
        "best": plain(best["objective"]) if best is not None else None,
        "best_trial": str(best["trial"]) if best is not None else None,
        "best_auc": plain(best["best_val_auc"]) if best is not None else None,
        "best_interval": None
        if best is None
        else [plain(best["best_val_auc_low"]), plain(best["best_val_auc_high"])],
        "rivals": rivals,
        "noise": plain(noise),
        "ended": int(study.trials_full["state"].isin(ENDED).sum()),
        "created": study.info.get("created"),
        "last": plain(last),
    }


def _space_name(study: Study) -> str | None:
    space = study.space
    return space.name if space is not None else None


def overview(study: Study) -> dict[str, Any]:
    """Return the page's words about a study, and the values that its figures need."""
    asked, found = findings.summary(study)
    return {
        **glance(study),
        "name": visible(study.name),
        "path": visible(study.place),
        "first_tile": findings.first_tile(study) if study.scored else None,
        "trials_tile": findings.trials_tile(study),
        "asked": asked,
        "found": found,
        "full_epochs": study.spec.epochs,
        "cautions": [vars(caution) for caution in cautions(study)],
        "rungs": list(study.rungs),
        "searched": list(study.searched),
        "notes": list(study.notes),
        "groups": [
            {"count": count, **figures.GROUPS[key]._asdict()}
            for key, count in figures.groups_of(study).items()
        ],
        "figures": figure_names(study),
        "metrics": curve_metrics(study),
        "progress": progress(study),
        "stop_requests": asked_to_stop(StudyFiles(study.path)),
        "spec": study.spec.model_dump(mode="json", exclude_defaults=True, exclude={"planned"}),
    }


def progress(study: Study, now: float | None = None) -> dict[str, Any]:
    """Return occupancy and, for a running study, when it will end.

    `likely` takes trials to come for as long as those that ended were, stopped ones included; `latest` takes every one to
    its last epoch. Both are Unix seconds, None while nothing is known. `busy` is the share of the last ten minutes (or
    since the first row) that the trials' places spent in epochs: the rest is starting, checkpoints and waiting.
    """
    now = time.time() if now is None else now
    trials, epochs = study.trials_full, study.epochs
    running = trials[trials["state"] == "running"] if study.running else trials.iloc[:0]
    resources = study.info.get("hardware", {}).get("resources", {})
    told: dict[str, Any] = {
        "running": len(running),
        "gpus": plain(resources.get("GPU")),
        "gpus_held": plain(running["gpus"].fillna(0).sum()),
        "cpus": plain(resources.get("CPU")),
        "memory_gib": plain(epochs["peak_memory_gib"].max()),
        "volumes_per_s": None,
        "busy": None,
        "likely": None,
        "latest": None,
    }
    if not len(running) or epochs.empty:
        return told
    since = max(now - RECENT_S, float(epochs["time"].min()))
    recent = epochs[(epochs["time"] >= since) & epochs["trial"].isin(running["trial"])]
    if now > since and len(recent):
        told["busy"] = min(1.0, float(recent["epoch_s"].sum()) / ((now - since) * len(running)))
        told["volumes_per_s"] = plain(
            recent.groupby("trial", observed=True)["volumes_per_s"].last().sum()
        )
    ended = _ended_by_itself(study.trials_full)
    likely, latest = _epochs_to_come(study, running, ended)
    pace = _pace(study.epochs, ended)
    told["likely"] = now + likely * pace / len(running)
    told["latest"] = now + latest * pace / len(running)
    return told


def _ended_by_itself(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials that predict how long others will run: one that a user stopped does not."""
    by_user = trials["stopped_by"].fillna("") == "requested"
    return trials[trials["state"].isin(ENDED) & trials["wall_s"].notna() & ~by_user]


def _pace(epochs: pd.DataFrame, ended: pd.DataFrame) -> float:
    """Seconds of an epoch, starting and saving included."""
    epoch_s = float(epochs["epoch_s"].mean())
    number = float(ended["epochs_run"].sum())
    return max(epoch_s, float(ended["wall_s"].sum()) / number) if number else epoch_s


def _epochs_to_come(
    study: Study, running: pd.DataFrame, ended: pd.DataFrame
) -> tuple[float, float]:
    """Epochs that the study is likely to run yet, and the most that it can."""
    trials, full = study.trials_full, study.spec.epochs
    usual = float(ended["epochs_run"].mean()) if len(ended) else float(full)
    to_come = max(0, study.spec.num_trials - len(trials))
    left = (full - running["epochs_run"].astype("float64")).clip(lower=0)
    likely = to_come * usual + sum(min(rest, max(usual - (full - rest), 1.0)) for rest in left)
    return likely, to_come * full + float(left.sum())


_HEADINGS = {
    "best_val_auc": "AUC [95 % CI]",
    "since_epoch": "since",
    "work_s": "time",
    "best_epoch": "best epoch",
    "epochs_run": "epochs",
}


def trials_table(study: Study, where: str = "") -> dict[str, Any]:
    """Return the table of trials: columns, and rows of values with the text of each. Raises QueryError for `where`."""
    table = results_table(study.trials_full, study.searched, where=where, sort="number")
    whys = findings.reasons_of_ends(study)
    names = [
        str(name) for name in table.columns if name not in ("best_val_auc_low", "best_val_auc_high")
    ]
    columns = []
    for name in names:
        numeric, first = findings.column_order(table[name])
        columns.append(
            {
                "name": name,
                "title": _HEADINGS.get(name, name),
                "numeric": numeric,
                "first": first,
                "searched": name in study.searched,
            }
        )
    groups = {
        trial["trial"]: figures.group_of(trial)
        for trial in study.trials_full[["trial", "state", "verdict", "stopped_by"]].to_dict(
            "records"
        )
    }
    rows = []
    for row in table.to_dict("records"):
        rows.append(
            {
                "trial": row["trial"],
                "group": groups[row["trial"]],
                "values": [plain(row[name]) for name in names],
                "texts": [_text(name, row) for name in names],
                "why": whys[row["trial"]],
            }
        )
    return {"columns": columns, "rows": rows}


def _text(name: str, row: Mapping[Any, Any]) -> str:
    value = row[name]
    if name == "best_val_auc" and not pd.isna(value) and "best_val_auc_low" in row:
        return findings.auc_with_interval(row)
    text = format_value(name, value)
    return "" if text == "-" else text


SHOWN_FIRST = ("val_auc_ema", "val_auc_raw")
"""Metrics of the two panels of curves before another one is chosen."""


def curve_metrics(study: Study) -> list[dict[str, str]]:
    """Return the numeric metrics that the study's epochs hold, with their meanings; those shown first come first."""
    ordered = [*SHOWN_FIRST, *(name for name in METRICS if name not in SHOWN_FIRST)]
    names = [
        name
        for name in ordered
        if METRICS[name][0] in ("float64", "Int64") and study.epochs[name].notna().any()
    ]
    return [{"name": name, "meaning": METRICS[name][1]} for name in names]


def curves(
    study: Study, metrics: Sequence[str] = SHOWN_FIRST, axis: CurveAxis = "epoch"
) -> dict[str, Any]:
    """Return `metrics` of every trial, a list each, over `x`: epochs, updates, or minutes in the trial's epochs.

    Each trial has its `epoch` and the first epoch with class weights (`drw`) as well. Raises UnknownError.
    """
    if unknown := set(metrics) - {each["name"] for each in curve_metrics(study)} - set(SHOWN_FIRST):
        raise UnknownError(f"no metric {printable(min(unknown))[:100]!r}; the overview lists them")
    epochs = study.epochs
    starts = figures.drw_starts(epochs)
    number = epochs["epoch"].to_numpy("int64")
    by_trial = epochs.groupby("trial", observed=True, sort=False)
    if axis == "time":
        x: list[Any] = _rounded(by_trial["epoch_s"].cumsum() / 60)
    elif axis == "updates":
        x = _rounded(epochs["updates"].astype("Float64"))
    else:
        x = number.tolist()
    columns = {name: _rounded(epochs[name].astype("Float64")) for name in metrics}
    trials = {}
    for trial, places in by_trial.indices.items():
        first, last = int(places[0]), int(places[-1]) + 1  # rows are in order of trial and epoch
        trials[str(trial)] = {
            "epoch": number[first:last].tolist(),
            "x": x[first:last],
            **{name: values[first:last] for name, values in columns.items()},
            "drw": starts.get(str(trial)),
        }
    return {"axis": axis, "trials": trials}


def _rounded(values: pd.Series) -> list[float | None]:
    numbers = values.to_numpy("float64", na_value=math.nan)
    scale = 4 if (np.abs(numbers) > 0.01).any() else 8  # a learning rate is small all along
    return [None if value != value else round(value, scale) for value in numbers.tolist()]


CURVES_OF_A_TRIAL: tuple[str, ...] = (
    "val_auc_raw", "val_auc_ema", "val_auc_low", "val_auc_high", "train_auc", "train_loss", "lr_backbone", "lr_classifier",
    "grad_norm", "val_balanced_accuracy_ema", "val_auprc_ema", "epoch_s",
)  # fmt: skip


def trial_page(study: Study, trial: str) -> dict[str, Any]:
    """Return everything of one trial: diagnosis in words, settings next to the documented ones, curves and decisions.

    Raises UnknownError.
    """
    found = study.trials_full[study.trials_full["trial"] == trial]
    if found.empty:
        raise UnknownError(f"{study.name} has no trial {printable(trial)[:100]!r}")
    row = found.iloc[0]
    rows = study.epochs[study.epochs["trial"] == trial]
    names = (
        "state",
        "stopped_by",
        "verdict",
        "verdict_summary",
        "reason",
        "advice",
        "error",
        "variant",
        "node",
    )
    told: dict[str, Any] = {
        name: None if pd.isna(row[name]) else _lines(str(row[name])) for name in names
    }
    numbers = (
        "number",
        "since_epoch",
        "objective",
        "best_epoch",
        "epochs_run",
        "epochs",
        "failures",
        "gpus",
    )
    told |= {name: plain(row[name]) for name in numbers}
    told |= {
        f"best_{name}": plain(row[f"best_{name}"])
        for name in ("val_auc", "val_auc_low", "val_auc_high")
    }
    group = figures.group_of(row[["state", "verdict", "stopped_by"]].to_dict())
    decisions = study.decisions[study.decisions["trial"] == trial]
    kept = decisions[
        ~decisions["reason"].isin(["between_rungs", "known"]) | decisions["warning"].fillna(False)
    ]
    return {
        "trial": trial,
        "study": study.name,
        "group": group,
        "group_title": figures.GROUPS[group].title,
        "faulty": bool(faulty(found).iloc[0]),
        **told,
        "work": duration(float(row["work_s"])) if pd.notna(row["work_s"]) else None,
        "drw": figures.drw_starts(rows).get(trial),
        "rungs": list(study.rungs),
        "settings": _settings(study, row),
        "curves": {
            "epoch": rows["epoch"].tolist(),
            **{
                name: _rounded(rows[name]) for name in CURVES_OF_A_TRIAL if rows[name].notna().any()
            },
        },
        "decisions": [
            {name: plain(value) for name, value in decision.items() if name in _DECISION_SHOWN}
            for decision in kept.to_dict("records")
        ],
        "stop_asked": trial in asked_to_stop(StudyFiles(study.path)),
        "stoppable": bool(row["state"] in ("running", "interrupted")),
    }


def _settings(study: Study, row: pd.Series) -> list[dict[str, Any]]:
    """A trial's hyperparameters next to the documented ones."""
    settings = []
    documented = findings.documented_settings(study)
    for name, info in FineTuneConfig.model_fields.items():
        recommended = documented["recommended"].get(name, info.default)
        text = format_value(name, row[name])
        settings.append(
            {
                "name": name,
                "value": text,
                "documented": format_value(name, recommended),
                "differs": text != format_value(name, recommended),
                "searched": name in study.searched,
                "meaning": (info.description or "").split(". ")[0],
            }
        )
    return settings


_DECISION_SHOWN = (
    "epoch",
    "action",
    "reason",
    "verdict",
    "summary",
    "rung",
    "rank",
    "arrived",
    "warning",
)


def _lines(text: str) -> str:
    """Text of several lines, each without control characters."""
    return "\n".join(printable(line) for line in text.splitlines())[-4000:]


def comparison(study: Study, first: str, second: str) -> dict[str, Any]:
    """Return two trials side by side: outcomes, and every hyperparameter in which they differ. Raises UnknownError."""
    pages = [trial_page(study, trial) for trial in (first, second)]
    outcome = []
    for title, name, column in (
        ("objective", "objective", "objective"),
        ("best AUC", "best_val_auc", "val_auc"),
        ("best epoch", "best_epoch", "best_epoch"),
        ("epochs", "epochs_run", "epochs_run"),
        ("state", "state", "state"),
        ("verdict", "verdict", "verdict"),
        ("time", "work", "work"),
    ):
        outcome.append([title, *(_outcome(page, name, column) for page in pages)])
    settings = [
        {
            "name": left["name"],
            "values": [left["value"], right["value"]],
            "meaning": left["meaning"],
        }
        for left, right in zip(pages[0]["settings"], pages[1]["settings"], strict=True)
        if left["value"] != right["value"]
    ]
    same = len(pages[0]["settings"]) - len(settings)
    return {
        "trials": [first, second],
        "outcome": outcome,
        "settings": settings,
        "same": same,
        "pages": pages,
    }


def _outcome(page: Mapping[str, Any], name: str, column: str) -> str:
    value = page[name]
    if value is None:
        return "-"
    if name == "verdict":
        return value if page["since_epoch"] is None else f"{value} since {page['since_epoch']}"
    text = format_value(column, value)
    if name == "best_val_auc" and page["best_val_auc_low"] is not None:
        text += f" [{page['best_val_auc_low']:.3f}, {page['best_val_auc_high']:.3f}]"
    return text


# Figures ---------------------------------------------------------------------------------------------------------------


def figure_names(study: Study) -> list[dict[str, str]]:
    """Return the figures that make sense by now, with their titles."""
    names = []
    if study.spec.kind != "search" and study.trials_full["variant"].nunique() > 1:
        names += [("effects", "What each variant changes"), ("runs", "Every run")]
    if study.scored and study.spec.kind == "search" and len(study.trials_full) > 1:
        names += [("progress", "How the search went")]
        if study.searched:
            if findings.enough_for_importance(study):
                names += [("importance", "Which hyperparameters mattered")]
            names += [("parallel", "All settings at a glance")]
            names += [(f"slice-{name}", f"Objective over {name}") for name in study.searched]
    if (study.trials_full["state"] == "stopped").any():
        names += [("stopped", "Stopped trials, and the epochs saved")]
    return [{"name": name, "title": title} for name, title in names]


def figure(study: Study, name: str) -> dict[str, Any]:
    """Return a figure with its caption as `figures` makes it. Raises UnknownError; ValueError where data are too few."""
    if name not in {each["name"] for each in figure_names(study)}:
        raise UnknownError(f"{study.name} has no figure {printable(name)[:100]!r} by now")
    caption = ""
    if name == "effects":
        tables = findings.effects_tables(study)
        if not tables or not tables[0]["mean"].notna().any():
            raise ValueError(
                "nothing to compare yet: two variants have to end on the same fold and seed"
            )
        drawn = figures.effects(tables[0])
        caption = f"{tables[0].attrs['how']}. Hollow: the data do not decide."
    elif name == "importance":
        table = study.importance()
        drawn = figures.importance(table)
        caption = f"By {table.attrs['how']}. Whiskers: lowest and highest of the repeats."
    elif name == "stopped":
        drawn = figures.stopped(findings.stops(study))
    elif name in _WHOLE_STUDY:
        draw, caption = _WHOLE_STUDY[name]
        drawn = draw(study)
    else:
        drawn = figures.slice_of(study, name.removeprefix("slice-"))
        caption = "Dashed: the value before this project's fixes; solid: after."
    return {"figure": plain(drawn), "caption": caption}


_WHOLE_STUDY: dict[str, tuple[Callable[[Study], figures.Figure], str]] = {
    "runs": (figures.runs_by_variant, "A mark is a run, its shape the fold; the bar is the mean."),
    "progress": (figures.progress, "A mark is a trial; the line is the best so far."),
    "parallel": (
        figures.parallel,
        "A line is a trial. Thick: best tenth. Thin: upper half. Dotted: the rest.",
    ),
}
"""Figures that need the study alone, with their captions."""


def importance_among(study: Study, trials: Collection[str]) -> dict[str, Any]:
    """Return the figure of importance over some of the trials. Raises ValueError where too few of them have ended."""
    some = replace(
        study, trials_full=study.trials_full[study.trials_full["trial"].isin(list(trials))]
    )
    if not findings.enough_for_importance(some):
        least = findings.LEAST_FOR_IMPORTANCE
        raise ValueError(f"importance: fewer than {least} of the trials shown have ended")
    return figure(some, "importance")


# Logs ------------------------------------------------------------------------------------------------------------------


def log_tail(path: Path, which: str, trial: str | None, lines: int) -> dict[str, Any]:
    """Return the last lines of a log: study (Ray, Optuna, driver), console, or that of a trial. Raises UnknownError.

    A log that is a link to somewhere else is not followed: a study's folder may have been copied from anywhere.
    """
    files = StudyFiles(path)
    if which == "trial":
        if trial is None or not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", trial):
            raise UnknownError("name a trial of the study")
        log = TrialFiles(files.trials / trial).log
    else:
        log = {"study": files.log, "console": files.console}[which]
    if not log.is_file() or log.resolve() != path.resolve() / log.relative_to(path):
        return {"lines": [], "size": 0}
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    found = [printable(line) for line in text.splitlines()]
    if size > LOG_BYTES:
        found = found[1:]  # cut somewhere
    return {"lines": found[-lines:], "size": size}


# Plain values ----------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """Return JSON for a browser: no NaN, compact."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=plain).encode()
