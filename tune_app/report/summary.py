"""The result of a study on one screen: the table, stopped trials and why, the best configuration, the places of files."""

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from rich.console import Console

from trainables.config import build_config
from trainables.data.storage import url_of
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import print_ablation
from tune_app.compare.confirm import print_confirmation
from tune_app.report.findings import found, rivals_within_noise, trials_tile
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.tables import came_back, faulty, render_table, results_table
from tune_app.results.text import printable
from tune_app.study.tied import TIED_AUC, nearly_tied

SHOWN_TRIALS = 20


def print_summary(root: Path, console: Console) -> None:
    """Print the summary of the study in `root`, 80 columns wide."""
    study = load_study(root)
    if study.spec.kind != "search":
        console.print()
        (print_ablation if study.spec.kind == "ablation" else print_confirmation)(study, console)
        console.print()
        for line in place_lines(root):
            console.print(line, soft_wrap=True, markup=False)
        return
    width = min(console.width, 100)
    console.print()
    console.print(
        render_table(
            results_table(study.ranked, study.searched, sort=(), limit=SHOWN_TRIALS), width
        )
    )
    if len(study.trials_full) > SHOWN_TRIALS:
        console.print(
            f"(the best {SHOWN_TRIALS} of {len(study.trials_full)} trials; `medtune results` shows all)"
        )
    console.print()
    lines = [*stopped_lines(study), "", *best_lines(study), "", *place_lines(root)]
    for line in [*lines, *next_lines(root)]:
        console.print(line, soft_wrap=True, markup=False)


def study_lines(study: Study) -> list[str]:
    """How many trials have ended, and the finding, as page and report have them; for a study with trials."""
    ended, states = trials_tile(study)
    return [f"{ended} {states}", printable(found(study))]


def stopped_lines(study: Study) -> list[str]:
    """One line for each trial that was stopped by its diagnosis or failed, and one that counts the halving's."""
    trials = study.trials_full
    lines: list[str] = []
    halving = (trials["stopped_by"] == "halving").fillna(False)
    for trial in trials[~halving].fillna({"reason": "", "advice": ""}).to_dict("records"):
        lines += _lines_of_end(trial)
    halved = trials[halving]
    if len(halved):
        lines.append(
            f"{len(halved)} {'was' if len(halved) == 1 else 'were'} stopped at a rung, where others were ahead: "
            f"{', '.join(halved['trial'])}"
        )
    sick = faulty(trials) | came_back(trials)
    warned = trials[(trials["state"] == "completed") & sick]
    lines += [
        f"{trial['trial']} completed, but: {trial['verdict_summary']}"
        for trial in warned.to_dict("records")
    ]
    spent, full = int(trials["epochs_run"].sum()), study.spec.num_trials * study.spec.epochs
    if full and spent < full and not study.running:
        lines.append(f"epochs spent: {spent} of {full} ({100 * spent / full:.0f} %)")
    return lines or ["no trial was stopped"]


def _lines_of_end(trial: Mapping[Any, Any]) -> list[str]:
    reason = str(trial["reason"])
    if trial["state"] == "failed":
        return [f"{trial['trial']} failed: {reason}"]
    if trial["state"] != "stopped":
        return []
    said = reason.removeprefix(f"{trial['stopped_by']}: ")
    advice = [f"      {trial['advice']}"] if trial["advice"] else []
    return [f"{trial['trial']} stopped after epoch {trial['epochs_run']}: {said}", *advice]


def best_lines(study: Study) -> list[str]:
    """The best trial's value, and its settings that differ from the defaults."""
    try:
        best = study.best()
    except ValueError as error:
        return [str(error)]
    record = study.record(str(best["trial"]))
    config = study.spec.config_of(record["overrides"])
    defaults = build_config(study.spec.config)
    changed = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in config
        if value != getattr(defaults, name)
    ]
    lines = [
        f"best: trial {best['trial']}, {study.spec.objective} {best['objective']:.3f}",
        f"      {', '.join(changed) if changed else 'the default settings'}",
    ]
    rivals, half = rivals_within_noise(study)
    if rivals:
        lines.append(
            f"      {rivals} other {'trial is' if rivals == 1 else 'trials are'} within its noise of {half:.3f}"
        )
    together = tied_runs(study)
    if len(together) > 1:
        place = url_of(study.path) or study.path
        lines += [
            f"tied: trials {', '.join(together)} within {TIED_AUC:g} of the best; their ensemble is often better than one:",
            f"      medtune export {quote(str(place))} --ensemble {len(together)} --out model",
        ]
    return lines


def tied_runs(study: Study) -> list[str]:
    """Return the trials of a search with weights that nearly tie with the best of them, the best first.

    None where the objective is no AUC. They are what `medtune export --ensemble` takes.
    """
    if study.spec.kind != "search" or not OBJECTIVES[study.spec.objective].column.startswith(
        "val_auc"
    ):
        return []
    usable = study.exportable[study.exportable["state"] != "failed"]
    near = nearly_tied(usable["objective"].to_numpy(dtype=np.float64))
    return [str(trial) for trial in usable["trial"].iloc[near]]


def place_lines(root: Path) -> list[str]:
    """Where the study lies, and the next commands."""
    place = url_of(root) or root
    return [
        f"study:   {place}",
        f"results: medtune results {quote(str(place))}",
        f"report:  medtune report {quote(str(place))}",
    ]


def next_lines(root: Path) -> list[str]:
    """The next steps after a search: whether the best trial is a winner, and where to look at all trials."""
    place = url_of(root) or root
    above = str(place).rpartition("/")[0] or "."
    return [
        f"confirm: medtune confirm {quote(str(place))}   (the best again, on all folds with new seeds)",
        f"browse:  medtune serve {quote(above)}",
    ]
