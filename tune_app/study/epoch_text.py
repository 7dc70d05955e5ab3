"""One line per epoch on the console."""

import math
from collections.abc import Mapping
from typing import Any

HEADER = "  epoch lr backbone/head DRW    loss AUC raw  AUC EMA [95 % CI]    acc     s"


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """One epoch in 80 columns: the values that the source document recommends to watch."""
    return (
        f"{row['epoch']:>3}/{epochs:<3} {row['lr_backbone']:.1e}/{row['lr_classifier']:.1e} "
        f"{'on ' if row['drw_active'] else 'off'} {row['train_loss']:>7.3f}   {_score(row['val_auc_raw'])}"
        f"    {_score(row['val_auc'])} [{_score(row['val_auc_low'])}, {_score(row['val_auc_high'])}]"
        f" {_score(row['val_accuracy_ema'])} {row['epoch_s']:>5.1f}"
    )


def _score(value: float | None) -> str:
    return "  nan" if value is None or math.isnan(value) else f"{value:.3f}"
