"""Names, types and meanings of the columns of a study's dataframes. No pandas here.

`column_meanings` of `tune_app.results.study`, and `medtune results STUDY --meanings`, list them with the hyperparameters.
"""

import re
from dataclasses import fields
from typing import Any

from tune_app.study.policy import Decision

WEIGHTS = ("raw", "ema")
"""The two networks that are validated each epoch: as trained, and averaged. The averaged one is deployed."""

_SCORES = {  # of either network; the ends of an interval keep their place at the end of the name
    "val_auc_{}": "AUC from float32 logit differences",
    "val_auc_{}_low": "lower end of its 95 % interval",
    "val_auc_{}_high": "upper end of its 95 % interval",
    "val_auprc_{}": "area under the precision-recall curve",
    "val_accuracy_{}": "accuracy of the likelier class",
    "val_balanced_accuracy_{}": "balanced accuracy of the likelier class",
    "val_balanced_accuracy_best_{}": "balanced accuracy at the threshold that is best on the validation fold",
    "val_threshold_{}": "that threshold, on the probability of class 1",
    "val_sensitivity_at_90_specificity_{}": "sensitivity at 90 % specificity",
    "val_brier_{}": "Brier score of the predicted probabilities",
    "val_ece_{}": "expected calibration error",
    "val_tied_{}": "share of scores tied with another",
    "val_auc_probability_{}": "AUC from float32 probabilities: far below the AUC when the scores are saturated",
    "val_logit_gap_{}": "mean absolute difference of the scaled logits",
    "val_nonfinite_{}": "share of scores that are not finite",
}

METRICS: dict[str, tuple[str, str]] = {
    "updates": ("Int64", "optimiser updates so far"),
    "skipped_updates": ("Int64", "updates of this epoch skipped for a non-finite gradient"),
    "train_loss": (
        "float64",
        "mean training loss; not comparable between losses, margins and scales",
    ),
    "drw_loss_factor": (
        "float64",
        "training loss divided by the loss without class weights: 1 until they begin",
    ),
    "train_auc": (
        "float64",
        "AUC of the raw weights on a fixed part of the training fold, without augmentation",
    ),
    "lr_backbone": ("float64", "learning rate of the backbone in the epoch's last update"),
    "lr_classifier": ("float64", "learning rate of the head in the epoch's last update"),
    "drw_active": ("boolean", "whether class weights were in the loss"),
    "frozen_stages": ("Int64", "stages that did not train; 0: all trained"),
    "grad_norm": ("float64", "median gradient norm before clipping"),
    "grad_norm_max": ("float64", "largest finite gradient norm before clipping"),
    "clipped_share": ("float64", "share of updates whose gradient was clipped"),
    "val_auc": ("float64", "validation AUC of the averaged weights: what would be deployed"),
    "val_auc_low": ("float64", "lower end of its 95 % interval"),
    "val_auc_high": ("float64", "upper end of its 95 % interval"),
    **{
        name.format(weights): (
            "float64",
            f"{'raw' if weights == 'raw' else 'averaged'} weights: {meaning}",
        )
        for weights in WEIGHTS
        for name, meaning in _SCORES.items()
    },
    "val_positive": ("Int64", "validation volumes of class 1 and above"),
    "val_negative": ("Int64", "validation volumes of class 0"),
    "val_positive_subjects": ("Int64", "subjects of the validation volumes of class 1 and above"),
    "val_negative_subjects": ("Int64", "subjects of the validation volumes of class 0"),
    "val_rarest_subjects": ("Int64", "validation subjects of the class with the fewest"),
    "precision": ("string", "number format of the forward pass"),
    "epoch_s": ("float64", "seconds of the epoch"),
    "train_s": ("float64", "of them in training"),
    "validation_s": ("float64", "of them in validation"),
    "volumes_per_s": ("float64", "training volumes a second"),
    "peak_memory_gib": ("float64", "peak device memory, GiB"),
}
"""Every metric of an epoch -> (dtype, meaning), in column order. NaN: the score does not exist."""

EPOCH_COLUMNS: dict[str, tuple[str, str]] = {
    "trial": ("string", "id of the trial"),
    "epoch": ("int64", "1-based"),
    "arrival": (
        "int64",
        "0-based place in epochs.jsonl: the order in which the driver learnt of it",
    ),
    "time": ("float64", "Unix seconds when the driver read it"),
    **METRICS,
}

ANY_FLOAT32 = (-1e40, 1e40)
"""Bounds of every number of an epoch: no run computes one beyond float32."""

_SHARES = re.compile(
    "train_auc|clipped_share|val_(auc|auprc|accuracy|balanced_accuracy|sensitivity|ece|tied|nonfinite)(_.*)?"
)
_NOT_NEGATIVE = re.compile(
    "(skipped_)?updates|frozen_stages|lr_.*|grad_norm.*|val_(positive|negative|brier_.*|logit_gap_.*)|.*_s|peak_.*"
)


def _bounds(name: str) -> tuple[float, float]:
    if name.endswith(("_low", "_high")):
        return (-1.0, 2.0)  # earlier versions had intervals beyond what an AUC can be
    if _SHARES.fullmatch(name):
        return (-1e-6, 1 + 1e-6)  # rounding
    return (0.0, ANY_FLOAT32[1]) if _NOT_NEGATIVE.fullmatch(name) else ANY_FLOAT32


EPOCH_BOUNDS: dict[str, tuple[float, float]] = {
    "time": (0.0, 1e11),  # seconds: later ones are no dates that Python knows
    **{
        name: _bounds(name) for name, (dtype, _) in METRICS.items() if dtype in ("float64", "Int64")
    },
}
"""Column of numbers -> least and largest value."""

TRIAL_COLUMNS: dict[str, tuple[str, str]] = {
    "trial": ("string", "id of the trial: name of its folder"),
    "number": ("Int64", "number of the Optuna trial"),
    "variant": ("string", "variant that it is an instance of, in ablations and confirmations"),
    "state": (
        "string",
        "running, completed, stopped (early), failed, or interrupted: running, but its driver is gone",
    ),
    "stopped_by": (
        "string",
        "cause of a stop: halving, diagnosis, or requested (a user asked for it)",
    ),
    "verdict": (
        "string",
        "the fault in its epochs; healthy: none, completed, and above chance; no_fault: none, but stopped, not ended, "
        "or not distinguishable from chance",
    ),
    "since_epoch": ("Int64", "epoch from which the verdict holds"),
    "verdict_summary": ("string", "the verdict in a sentence, with its numbers"),
    "healed_epochs": (
        "Int64",
        "epochs spent in collapses that it came back from: no other column shows them",
    ),
    "reason": ("string", "why it was stopped, in words"),
    "advice": ("string", "what to change"),
    "error": ("string", "error that it failed with"),
    "objective": (
        "float64",
        "its value by the study's objective, so far where it did not run to the end",
    ),
    "epochs_run": ("Int64", "epochs it has rows of; `epochs` is the number it was asked for"),
    "best_epoch": (
        "Int64",
        "epoch of the best 3-epoch median of val_auc, the epoch of the `best_` columns",
    ),
    "peak_val_auc": ("float64", "highest val_auc of any single epoch"),
    "peak_epoch": ("Int64", "its epoch"),
    "started": ("datetime64[us, UTC]", "when it started"),
    "ended": ("datetime64[us, UTC]", "when it ended"),
    "wall_s": (
        "float64",
        "seconds from start to end, interruptions included; to its last row while it has no end",
    ),
    "work_s": ("float64", "seconds spent in its epochs"),
    "gpus": ("float64", "GPUs it held"),
    "gpu_s": ("float64", "gpus x work_s"),
    "node": ("string", "machine it ran on"),
    "failures": ("Int64", "times it was started again after a failure"),
    "checkpoint": ("string", "file to resume from; missing when there is none"),
    "best_checkpoint": (
        "string",
        "file with the weights of `best_epoch`; missing when there is none",
    ),
}
"""Columns of `.trials` before the hyperparameters -> (dtype, meaning)."""

_DECISION_DTYPES: dict[Any, str] = {
    int: "Int64",
    int | None: "Int64",
    float: "float64",
    float | None: "float64",
    bool: "boolean",
}

DECISION_COLUMNS = {
    item.name: _DECISION_DTYPES.get(item.type, "string") for item in fields(Decision)
}
"""Columns of `.decisions` -> dtype: the fields of `tune_app.study.policy.Decision`, in their order."""
