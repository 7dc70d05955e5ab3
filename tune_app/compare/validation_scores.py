"""The validation rows of a confirmation scored by its runs: to judge it where whole folds cannot, and for the ensemble."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainables.checkpoints import load_state, write_json
from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import open_cohort, prepare_cohort
from trainables.metrics import ranking_scores
from tune_app.compare.confirm import unfinished
from tune_app.compare.expected import CANDIDATE
from tune_app.compare.seen_rows import SCORES_FORMAT, scores_file, whole_unseen_folds
from tune_app.compare.test_rows import cohort_of, kept_logits
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.files import StudyFiles, default_cache


def scores_are_needed(study: Study) -> bool:
    """Whether a finished confirmation lacks the scores by row that it has to be judged by, or its ensemble has."""
    return (
        bool(_variants_to_score(study))
        and not unfinished(study)
        and not scores_file(study.path).is_file()
    )


def _variants_to_score(study: Study) -> frozenset[str]:
    """All variants with fewer than two unseen folds, otherwise the candidates of an ensemble."""
    trials = study.trials_full
    variants = frozenset(str(name) for name in trials["variant"].dropna())
    if len(whole_unseen_folds(study.spec, set(trials["fold"].dropna().astype(int)))) < 2:
        return variants
    candidates = frozenset(name for name in variants if name.startswith(CANDIDATE))
    return candidates if len(candidates) > 1 else frozenset()


def score_validation(
    root: Path, *, cache: Path | None = None, notes: Callable[[str], None] = lambda text: None
) -> bool:
    """Score the validation rows of the confirmation in `root` where `scores_are_needed`; returns whether it did.

    Each completed run scores the rows that it was validated on with its kept weights (best.pt), in float32: the runs of
    every variant with fewer than two unseen folds, otherwise those of the candidates. Runs whose weights are gone are
    named in `notes` and left out. Raises the errors of table and volumes.
    """
    study = load_study(root)
    if not scores_are_needed(study):
        return False
    spec = study.spec
    base = build_config(spec.config)
    manifest = read_manifest(Path(spec.data), num_classes=base.num_classes, classes=base.classes)
    first = prepare_cohort(
        manifest, Recipe.from_config(base), cache or Path(spec.cache or default_cache())
    )
    runs: dict[str, Any] = {}
    wanted = study.trials_full["variant"].isin(_variants_to_score(study))
    completed = study.trials_full["state"] == "completed"
    for trial in study.trials_full[wanted & completed].to_dict("records"):
        name = str(trial["trial"])
        path = StudyFiles(study.path).trial(name).best
        if not path.is_file():
            notes(f"trial {name}: its weights are gone, so its validation rows are not scored")
            continue
        folder = cohort_of(study, str(trial["variant"]), manifest, first)
        state = load_state(path)
        rows = state["val_rows"].numpy()
        logits, scale = kept_logits(state, open_cohort(folder).volumes, rows)
        scores = ranking_scores(logits, scale=scale)
        if not np.isfinite(scores).all():
            notes(f"trial {name}: its scores of the validation rows are not finite")
            continue
        runs[name] = {"rows": rows.tolist(), "scores": scores.tolist()}
    written = {
        "format": SCORES_FORMAT,
        "cohort": first.name,
        "labels": [int(label) for label in manifest.rows["label"]],
        "subjects": [str(subject) for subject in manifest.rows["subject"]],
        "runs": runs,
    }
    write_json(scores_file(study.path), written)
    notes(f"scored the validation rows of {len(runs)} runs, row by row")
    return True
