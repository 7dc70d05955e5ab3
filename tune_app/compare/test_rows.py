"""Confirmed settings scored on the test rows, once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from rich.console import Console

from trainables.checkpoints import load_state, without_nonfinite, write_json
from trainables.config import build_config
from trainables.data.folds import split_of
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import cohort_like, open_cohort, prepare_cohort
from trainables.metrics import auc_interval, ranking_scores
from trainables.subject_auc import compare_auc, score_metrics_over_subjects
from tune_app.compare.confirm import (
    REFERENCE,
    Confirmation,
    judge,
    judged_lines,
    planned_overrides,
    setting_key,
)
from tune_app.compare.test_record import read_test_record, test_file
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, default_cache

WITH_INTERVAL = ("auc", "auc_low", "auc_high")

REPORTED = (
    "auprc",
    "balanced_accuracy",
    "accuracy",
    "brier",
    "ece",
    "auc_probability",
    "logit_gap",
)
"""Scores of the test rows that are recorded in addition to AUC: none whose threshold would be chosen on them."""


def confirmed_on_test(
    search: Path, root: Path, *, cache: Path | None, again: bool, notes: Console
) -> None:
    """Score the test rows for the confirmation in `root`, or report that this was done before; see `score_test`."""
    if not StudyFiles(root).spec.exists():
        raise SpecError(
            f"{root}: no confirmation here: `medtune confirm {quote(str(search))}` runs it, then --test scores it"
        )
    study = load_study(root)
    earlier = read_test_record(test_file(study))
    if earlier and not again:
        notes.print(
            f"The test rows were scored before, which is recorded in {test_file(study)}: shown again, not scored "
            "again. --again scores once more, and counts it.",
            markup=False,
            soft_wrap=True,
        )
        return
    folder = cache or Path(study.spec.cache or default_cache())
    score_test(root, cache=folder, again=again, notes=lambda text: notes.print(text, markup=False))


def score_test(
    root: Path,
    *,
    cache: Path,
    again: bool = False,
    notes: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score the confirmed variant of the study in `root` on the table's test rows, once; return the record.

    Each of its runs scores the test rows with the weights it kept (best.pt). Recorded are every run's AUC, their mean,
    and the ensemble (mean of the runs' log-odds) with its interval; the documented settings next to it, with
    DeLong's paired test, where another variant was confirmed. The record goes to test.json of the search that was
    confirmed, so that a second confirmation does not give a second look. When there is a record it is returned, and
    nothing is scored; with `again` the rows are scored again and the record counts how often that was.

    Raises SpecError when the confirmation is not finished, the table has no test rows, or it changed since.
    """
    study = load_study(root)
    target = test_file(study)
    earlier = read_test_record(target)
    if earlier and not again:
        return earlier[-1]
    found = judge(study)
    if not found.finished:
        raise SpecError(
            judged_lines(study, found)[0] + "; the test rows are scored at the very end"
        )
    spec = study.spec
    base = build_config(spec.config)
    manifest = read_manifest(Path(spec.data), num_classes=base.num_classes, classes=base.classes)
    rows = split_of(
        manifest, study.spec.config_of(planned_overrides(study.spec, found.choice))
    ).test
    if not len(rows):
        raise SpecError(
            f"{spec.data}: no test rows: name them in a column `split` before a search, with the word test"
        )
    labels = manifest.rows["label"].to_numpy()[rows]
    if missing := sorted(set(range(base.num_classes)) - set(labels.tolist())):
        raise SpecError(
            f"{spec.data}: the test rows have no volume of class {', '.join(map(str, missing))}"
        )
    folder = prepare_cohort(manifest, Recipe.from_config(base), cache)
    if folder.name != study.info.get("cohort"):
        raise SpecError(
            f"{spec.data}: the data changed since the confirmation (cohort {study.info.get('cohort')})"
        )
    names = [found.choice] + ([REFERENCE] if found.choice != REFERENCE else [])
    cohorts = {name: cohort_of(study, name, manifest, folder) for name in names}
    scored = {name: _score_variant(study, name, cohorts[name], rows, notes) for name in names}
    record = _as_record(study, found, scored, times=len(earlier) + 1)
    write_json(target, {"scored": [*earlier, record]})
    return record


def cohort_of(study: Study, variant: str, manifest: Manifest, first: Path) -> Path:
    """Return the folder of the variant's own cohort: the runs of a variant that prepares volumes otherwise were trained on another."""
    config = study.spec.config_of(planned_overrides(study.spec, variant))
    own = Recipe.from_config(build_config(study.spec.config))
    return cohort_like(manifest, Recipe.from_config(config), first, own)


@dataclass(frozen=True)
class _Scored:
    """One variant on the test rows."""

    runs: list[dict[str, Any]]
    scores: np.ndarray
    """Log-odds of the ensemble, as `ranking_scores`."""
    metrics: dict[str, float]
    labels: np.ndarray
    """(N,) int64."""
    subjects: np.ndarray
    """(N,): whose volumes they are."""


def _score_variant(
    study: Study,
    variant: str,
    cohort_folder: Path,
    rows: np.ndarray,
    notes: Callable[[str], None],
) -> _Scored:
    cohort = open_cohort(cohort_folder)
    labels = np.asarray(cohort.labels)[rows]
    subjects = np.asarray(cohort.subjects)[rows]
    total: np.ndarray = np.zeros(())
    runs = []
    own = study.trials_full[
        (study.trials_full["variant"] == variant) & (study.trials_full["state"] == "completed")
    ]
    for trial in own.to_dict("records"):
        path = StudyFiles(study.path).trial(str(trial["trial"])).best
        if not path.is_file():
            raise SpecError(
                f"{path}: the weights of trial {trial['trial']} are gone: they score the test rows"
            )
        state = load_state(path)
        if set(rows.tolist()) & {*state["train_rows"].tolist(), *state["val_rows"].tolist()}:
            raise SpecError(
                f"trial {trial['trial']} was trained on test rows: the table's split changed since"
            )
        logits, scale = kept_logits(state, cohort.volumes, rows)
        scores = ranking_scores(logits, scale=scale)
        auc = auc_interval(scores, labels).auc
        of_trial = {name: trial[name] for name in ("trial", "fold", "seed")}
        runs.append(of_trial | {"epoch": state["epoch"], "auc": auc})
        notes(
            f"{variant}, fold {trial['fold']}, seed {trial['seed']}: scored with epoch {state['epoch']}"
        )
        total = total + scale * logits.astype(np.float64)
    if not runs:
        raise SpecError(
            f"{study.path}: no run of {variant} completed: nothing to score the test rows with"
        )
    logits = total / len(runs)
    return _Scored(
        runs,
        ranking_scores(logits, scale=1.0),
        score_metrics_over_subjects(logits, labels, subjects, scale=1.0),
        labels,
        subjects,
    )


def kept_logits(
    state: Mapping[str, Any], volumes: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return logits (N, C) float32 of the weights that best.pt holds on `rows` in float32, and their scale."""
    import torch

    from trainables.losses import logit_scale
    from trainables.network.model import configured_network
    from trainables.saved_run import kept_weights

    config = build_config(state["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = configured_network(config)
    network.load_state_dict(kept_weights(state)[1])
    network.to(device).eval()
    size = config.validation_batch_size
    with torch.no_grad():
        parts = [
            network(
                torch.from_numpy(volumes[rows[start : start + size]].astype(np.float32)).to(device)
            )
            .float()
            .cpu()
            for start in range(0, len(rows), size)
        ]
    return torch.cat(parts).numpy(), logit_scale(config.loss, config.head, config.s)


def _as_record(
    study: Study, found: Confirmation, scored: Mapping[str, _Scored], times: int
) -> dict[str, Any]:
    chosen = scored[found.choice]
    labels, subjects = chosen.labels, chosen.subjects
    values = [run["auc"] for run in chosen.runs]
    record: dict[str, Any] = {
        "time": time.time(),
        "times": times,
        "confirmation": str(study.path),
        "study_hash": study.spec.hash(),
        "variant": found.choice,
        "winner": found.winner is not None,
        "config_hash": setting_key(study.spec, planned_overrides(study.spec, found.choice)),
        "table": study.spec.data,
        "cohort": study.info.get("cohort"),
        "volumes": len(labels),
        "positive": int((labels > 0).sum()),
        "negative": int((labels == 0).sum()),
        "runs": chosen.runs,
        "mean_auc": float(np.mean(values)),
        "lowest_auc": min(values),
        "highest_auc": max(values),
        **{name: chosen.metrics[name] for name in WITH_INTERVAL},
        "metrics": {name: chosen.metrics[name] for name in REPORTED},
    }
    if found.choice != REFERENCE:
        reference = scored[REFERENCE]
        difference = compare_auc(chosen.scores, reference.scores, labels, subjects)
        record["documented"] = {
            **{name: reference.metrics[name] for name in WITH_INTERVAL},
            "mean_auc": float(np.mean([run["auc"] for run in reference.runs])),
            **{name: getattr(difference, name) for name in ("difference", "low", "high", "p")},
        }
    cleaned: dict[str, Any] = without_nonfinite(record)
    return cleaned
