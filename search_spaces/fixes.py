"""The fixes as data: what each one changes, why, and where that is known from.

A fix holds the values before it; the values after it are the defaults of `FineTuneConfig`, so that neither can drift
from what runs. Six come from the document this project started from, two were found while reproducing its collapse.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from trainables.config import FineTuneConfig, Scalar


@dataclass(frozen=True)
class Fix:
    """One change to the training recipe. `before` names the hyperparameters it touches, and no other fix touches them."""

    key: str
    """Short name, as used in the names of variants."""
    title: str
    why: str
    source: str
    """Where the fix and its reason come from."""
    before: Mapping[str, Scalar]
    option: Mapping[str, Scalar] = field(default_factory=dict)
    """Its settings on request, where the default leaves the fix off; our choice, the document names no values."""
    documented: bool = True
    """Whether the document lists it."""

    @property
    def optional(self) -> bool:
        """Whether the defaults leave this fix off."""
        return bool(self.option)

    @property
    def after(self) -> dict[str, Scalar]:
        """The values with the fix on: the defaults, or `option` where the fix is optional."""
        return {name: self.option.get(name, default_of(name)) for name in self.before}


FIXES: tuple[Fix, ...] = (
    Fix(
        key="differential-lr",
        title="Differential learning rates",
        why="One rate is too high for the pretrained backbone and too low for the new head: features learnt in "
        "pretraining are overwritten before the head can use them.",
        source="document, 1",
        before={"backbone_lr": 2e-4, "classifier_lr": 2e-4},
    ),
    Fix(
        key="reduced-ldam",
        title="Smaller LDAM margins and scale",
        why="Large margins times a large scale make large, unsteady losses from the first batch on. Under Adam the "
        "scale alone is a weak knob.",
        source="document, 2",
        before={"max_m": 0.3, "s": 20.0},
    ),
    Fix(
        key="delayed-drw",
        title="Later re-weighting (DRW)",
        why="Class weights that begin before features are learnt, while the learning rate is still high, disturb them; "
        "LDAM as published begins at 80 % of training, together with a drop of the rate.",
        source="document, 3; Cao et al. 2019, arXiv:1906.07413",
        before={"drw_start_epoch": 15},
    ),
    Fix(
        key="looser-clip",
        title="Looser gradient clipping",
        why="A low threshold clips most steps of a new head. Under Adam, which cancels constant factors, a weak knob "
        "alone.",
        source="document, 4",
        before={"grad_clip": 0.5},
    ),
    Fix(
        key="faster-ema",
        title="Faster averaged weights (EMA)",
        why="At decay 0.999 and 14 updates an epoch, 43 % of the average are still the initial weights after 60 epochs; "
        "at 0.995, 1.5 %.",
        source="document, 5",
        before={"ema_decay": 0.999},
    ),
    Fix(
        key="gradual-unfreezing",
        title="Frozen backbone first, then thawed stage by stage",
        why="A head that starts from random weights sends large gradients into the backbone: it may learn first, alone. "
        "Off by default, as in the document.",
        source="document, 6; stage by stage: Howard and Ruder 2018, arXiv:1801.06146",
        before={"freeze_backbone_epochs": 0, "unfreeze_stage_epochs": 0},
        option={"freeze_backbone_epochs": 5, "unfreeze_stage_epochs": 1},
    ),
    Fix(
        key="ema-warmup",
        title="EMA warm-up with averaged BatchNorm statistics",
        why="An average that is still close to the initial weights, run with the BatchNorm statistics of the current "
        "network, saturates or overflows layer by layer: the raw network never collapsed, its average did.",
        source="found here, reproducing the collapse",
        before={"ema_warmup": False, "ema_buffers": "copied"},
        documented=False,
    ),
    Fix(
        key="cosine-head",
        title="Normalised (cosine) head under LDAM",
        why="Margins mean something only on a bounded scale. LDAM was published with unit features and unit weights; on "
        "a linear head its logits grow without bound.",
        source="found here; Cao et al. 2019, arXiv:1906.07413",
        before={"head": "linear"},
        documented=False,
    ),
)

DOCUMENT_EPOCHS = int(FineTuneConfig.model_fields["epochs"].default)
"""Epochs the documented settings were written for; epochs in them are scaled by it for runs of another length."""


def default_of(name: str) -> Scalar:
    """Return the default of a hyperparameter that is a scalar."""
    value: Scalar = FineTuneConfig.model_fields[name].default
    return value


def with_fixes(keys: Iterable[str] = (), epochs: int = DOCUMENT_EPOCHS) -> dict[str, Scalar]:
    """Return overrides that put the named fixes on and every other fix off, all their hyperparameters written out.

    For another length than the document's 60 epochs, the epochs in them keep their share of the run: at 8 epochs
    re-weighting begins in epoch 3 before the fix and 4 after it, where 15 and 25 would both mean never.
    Under 4 epochs it begins in the same one either way.
    Raises ValueError naming the unknown keys.
    """
    on = set(keys)
    known = [fix.key for fix in FIXES]
    if unknown := sorted(on - set(known)):
        raise ValueError(
            f"unknown fixes {', '.join(map(repr, unknown))}: there are {', '.join(known)}"
        )
    overrides: dict[str, Scalar] = {}
    for fix in FIXES:
        overrides |= fix.after if fix.key in on else fix.before
    return {name: _scaled(name, value, epochs) for name, value in overrides.items()}


def baseline(epochs: int = DOCUMENT_EPOCHS) -> dict[str, Scalar]:
    """Return the document's original settings: every fix off."""
    return with_fixes((), epochs)


def documented_after(epochs: int = DOCUMENT_EPOCHS) -> dict[str, Scalar]:
    """Return the document's recommended settings, exactly: its fixes on, the optional one and ours off.

    The document keeps a linear head and an average with copied statistics. With ours these settings would no longer
    measure the effect of the document's own fixes; the defaults, `all_fixes`, are these settings and ours.
    """
    return with_fixes((fix.key for fix in FIXES if fix.documented and not fix.optional), epochs)


def all_fixes(epochs: int = DOCUMENT_EPOCHS) -> dict[str, Scalar]:
    """Return the defaults, written out: every fix on but the optional one."""
    return with_fixes((fix.key for fix in FIXES if not fix.optional), epochs)


def drw_start_at(share: float, epochs: int) -> int:
    """Return the first re-weighted epoch when `share` of the run goes before it; a share of 1 is never."""
    return 1 + round(share * epochs)


class FixRow(NamedTuple):
    """A fix as a line of a table: what `medtune fixes` prints and the README carries."""

    key: str
    title: str
    before: tuple[str, ...]
    """One text a hyperparameter: its name and value."""
    after: tuple[str, ...]
    why: str
    source: str


def fix_rows() -> list[FixRow]:
    """Return one row a fix, in the document's order and ours after it."""
    return [
        FixRow(
            fix.key,
            fix.title + (" (optional)" if fix.optional else ""),
            _settings(fix.before),
            _settings(fix.after),
            fix.why,
            fix.source,
        )
        for fix in FIXES
    ]


def fixes_markdown() -> str:
    """Return the same rows as a Markdown table, ending in a newline."""
    lines = ["| Fix | Before | After | Why | Source |", "|---|---|---|---|---|"]
    for row in fix_rows():
        before, after = "<br>".join(row.before), "<br>".join(row.after)
        lines.append(
            f"| {row.title} (`{row.key}`) | {before} | {after} | {row.why} | {row.source} |"
        )
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """Return a value as people write it: 0.0002 as 2e-4, True as yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3 or abs(value) >= 1e6:
            mantissa, exponent = f"{value:e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:g}"
    return "none" if value is None else str(value)


def _settings(values: Mapping[str, Scalar]) -> tuple[str, ...]:
    return tuple(f"{name} {shown(value)}" for name, value in values.items())


def _scaled(name: str, value: Scalar, epochs: int) -> Scalar:
    if name == "drw_start_epoch" and isinstance(value, int):
        return drw_start_at((value - 1) / DOCUMENT_EPOCHS, epochs)
    if name == "freeze_backbone_epochs" and isinstance(value, int) and value:
        # Frozen for no epoch would be another variant
        return max(1, round(value / DOCUMENT_EPOCHS * epochs))
    return value
