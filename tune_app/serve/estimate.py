"""How long a study will take, from epochs that earlier studies have measured."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from trainables.config import build_config
from tune_app.results.study import Study
from tune_app.study.rows import ENDED
from tune_app.study.spec import StudySpec

COSTS = ("depth", "width", "geometry", "volume_shape", "in_channels", "batch_size", "amp")
"""Hyperparameters that decide the cost of an epoch of the same volumes; a study that differs in one measures nothing."""

LEAST_EPOCHS = 5
"""Measured epochs below which a study predicts nothing about the pace of another."""

LONGEST_GAP = 5
"""A pause between two rows that is longer than this number of epochs is an interruption, and no work."""


class Pace(NamedTuple):
    """The measurements of a study."""

    epoch_s: float
    """Seconds of the clock for each epoch of any trial, with as many trials at a time as there were."""
    at_once: float
    """Trials at a time."""
    volumes: float
    """Volumes that an epoch trains on and validates."""
    share: float
    """Of a whole trial's epochs, the part that an ended trial ran; 1 where none was stopped."""


class Estimate(NamedTuple):
    likely_s: float
    """Where trials are stopped as early as in the study that measured."""
    latest_s: float
    """Where every trial runs to its last epoch."""
    study: str
    """Name of the study that measured."""
    host: str
    epoch_s: float
    """Seconds of one epoch of one trial."""
    at_once: float


def pace_of(study: Study) -> Pace | None:
    """Return the pace of a study by its rows; None for too few of them."""
    rows = study.epochs[study.epochs["epoch_s"].notna()]
    times = np.sort(rows["time"].dropna().to_numpy("float64"))
    if len(times) <= LEAST_EPOCHS:
        return None
    usual = float(rows["epoch_s"].median())
    clock = float(np.minimum(np.diff(times), LONGEST_GAP * usual).sum())
    if not clock > 0 or not usual > 0:
        return None
    trained = rows["volumes_per_s"] * rows["train_s"]
    volumes = float((trained + rows["val_positive"] + rows["val_negative"]).median())
    trials = study.trials_full[study.trials_full["state"].isin(ENDED)]
    trials = trials[trials["stopped_by"].fillna("") != "requested"]
    asked = float(trials["epochs"].sum())
    share = float(trials["epochs_run"].sum()) / asked if asked else 1.0
    epoch_s = clock / (len(times) - 1)
    return Pace(epoch_s, max(1.0, usual / epoch_s), volumes, min(1.0, share))


def estimate(spec: StudySpec, volumes: int | None, studies: Iterable[Study]) -> Estimate | None:
    """Return how long `spec` will take by the last of `studies` that trained a network of the same cost; None: none has.

    `volumes`: rows of its table; a study over another table is scaled by it, and needs it. Reading and preparing the
    volumes comes on top.
    """
    wanted = _costs(spec)
    newest = sorted(studies, key=lambda study: study.info.get("created") or 0.0, reverse=True)
    newest.sort(key=lambda study: study.spec.data != spec.data)  # its own table first
    for study in newest:
        if _costs(study.spec) != wanted or (pace := pace_of(study)) is None:
            continue
        scale = 1.0
        if study.spec.data != spec.data:
            if volumes is None or not (math.isfinite(pace.volumes) and pace.volumes > 0):
                continue
            scale = volumes / pace.volumes
        at_once = min(pace.at_once, spec.max_concurrent or math.inf, spec.num_trials)
        epoch_s = pace.epoch_s * pace.at_once * scale
        latest = spec.num_trials * spec.epochs * epoch_s / at_once
        share = pace.share if spec.kind == "search" and study.spec.kind == "search" else 1.0
        host = str(study.info.get("hardware", {}).get("host", ""))
        return Estimate(latest * share, latest, study.name, host, epoch_s, round(at_once, 1))
    return None


def _costs(spec: StudySpec) -> list[Any]:
    config = build_config(spec.shared)
    return [getattr(config, name) for name in COSTS]
