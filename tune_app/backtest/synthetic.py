"""Synthetic learning curves with known truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from tune_app.backtest.curves import COLLAPSING, Curve, Floats, Kind, Truth

MIX: dict[Kind, float] = {
    "healthy": 0.36,
    "dipping": 0.14,
    "noisy": 0.06,
    "late_bloomer": 0.10,
    "saturating": 0.05,
    "lagging": 0.03,
    "never_learning": 0.06,
    "collapsing_average": 0.08,
    "collapsing_after_drw": 0.06,
    "collapsing": 0.04,
    "diverging": 0.02,
}
"""Shares of the kinds, roughly those of a search whose space contains the documented before-settings."""


SMALLEST_COLLAPSE = 0.2
"""AUC a collapsing run loses at least; the source document's own run fell from .72 to .51."""


def generate_curves(
    count: int,
    *,
    epochs: int = 60,
    seed: int = 0,
    positives: int = 20,
    negatives: int = 80,
    mix: Mapping[Kind, float] | None = None,
) -> list[Curve]:
    """Return `count` runs of one study of `epochs` epochs, validated on the same volumes, with their truth.

    A run's level follows from how far its hyperparameters are from the best ones: the ceiling of the data less a
    quadratic penalty (chi-square with three degrees of freedom), as a response is flat near its optimum.
    """
    if epochs < 24:
        raise ValueError(
            f"epochs={epochs}: runs need at least 24 to rise, to collapse and to stay collapsed"
        )
    rng = np.random.default_rng(seed)
    shares = dict(mix or MIX)
    weights = np.array(list(shares.values()), dtype=float)
    kinds = rng.choice(list(shares), size=count, p=weights / weights.sum())
    ceiling = rng.uniform(0.87, 0.93)
    runs = [_draw_run(rng, kind, epochs, ceiling) for kind in kinds]
    noise = _ScoreNoise(rng, positives, negatives, epochs)
    curves = []
    for index, run in enumerate(runs):
        rows = _rows(rng, run, noise, epochs)
        curves.append(
            Curve(
                f"{index:05d}",
                rows,
                run.config,
                Truth(run.kind, run.onset, tuple(map(float, run.ema))),
            )
        )
    return curves


@dataclass
class _Run:
    """The truth about one run: AUC of its raw and of its averaged weights by epoch."""

    kind: Kind
    config: dict[str, Any]
    raw: Floats
    ema: Floats
    onset: int | None


def _draw_run(rng: np.random.Generator, kind: Kind, epochs: int, ceiling: float) -> _Run:
    """Draw until a collapsing run loses enough: what never rose cannot collapse."""
    while True:
        config: dict[str, Any] = {
            "epochs": epochs,
            "drw_start_epoch": max(2, int(rng.choice([15, 20, 25, 30])) * epochs // 60),
        }
        raw, ema = _true_aucs(rng, kind, config, ceiling)
        if kind == "diverging":
            onset = int(rng.integers(4, epochs - 5))
            raw[onset - 1 :] = ema[onset - 1 :] = math.nan
            return _Run(kind, config, raw, ema, onset)
        if kind not in COLLAPSING:
            return _Run(kind, config, raw, ema, None)
        first = _onset(ema)
        if first is not None:
            return _Run(kind, config, raw, ema, first)


def _true_aucs(
    rng: np.random.Generator, kind: Kind, config: dict[str, Any], ceiling: float
) -> tuple[Floats, Floats]:
    """Return raw and averaged AUC by epoch, and add to `config` what makes such a run."""
    epochs, drw_start = config["epochs"], config["drw_start_epoch"]
    steady = _steady_course(rng, kind, epochs, ceiling)
    # Weights wander, and away from a good place more than towards a better one: a few hundredths of AUC for the raw
    # network, a third of it for its average
    wander = 0.12 * math.exp(0.4 * rng.standard_normal()) * (4.0 if kind == "noisy" else 1.0)
    raw = steady + _slope(steady) * wander * _mostly_down(_autoregressive(rng, epochs, 0.3))
    dips, ema_dips = _dips(rng, kind, epochs, drw_start)

    floor = rng.uniform(0.45, 0.6)
    place = None
    if kind == "collapsing":
        place = int(rng.integers(8, epochs - 10)), int(rng.integers(1, 4))
    elif kind == "collapsing_after_drw":
        place = drw_start + int(rng.integers(0, 4)), int(rng.integers(1, 4))
    if place is not None:
        raw, steady = _fall(raw, place, floor), _fall(steady, place, floor)

    if kind == "lagging":
        config |= {"ema_decay": 0.999, "ema_warmup": False}
        at_chance = np.arange(1, epochs + 1) < rng.uniform(6, 20)
        ema = _average(np.where(at_chance, 0.5 + 0.04 * rng.standard_normal(epochs), steady), 0.5)
    else:
        half_life_epochs = rng.uniform(0.3, 2.0)
        ema = _average(steady, 1 - 0.5 ** (1 / half_life_epochs))
    ema = (
        ema
        + 0.01 * (ema > 0.6)
        + _slope(ema) * wander / 3 * _mostly_down(_autoregressive(rng, epochs, 0.7))
    )
    raw, ema = _bounded(raw - dips), _bounded(ema - ema_dips)

    if kind == "collapsing_average":
        config |= {"ema_decay": 0.999, "ema_buffers": "copied"}
        start, length = int(rng.integers(5, epochs // 2)), int(rng.integers(1, 5))
        ema = _fall(ema, (start, length), floor)
        returns = start + length + int(rng.integers(15, 26)) if rng.random() < 0.2 else epochs
        if rng.random() < 0.4:  # activations overflow
            ema[start + int(rng.integers(2, 7)) : returns] = math.nan
        ema[returns:] = _bounded(steady[returns:])
    return raw, ema


def _steady_course(rng: np.random.Generator, kind: Kind, epochs: int, ceiling: float) -> Floats:
    """Return the AUC a run would have if nothing happened to it: a rise towards what its hyperparameters allow."""
    reached = max(0.6, ceiling - 0.017 * rng.chisquare(3))
    if kind in COLLAPSING:
        reached = max(
            0.65, reached - rng.uniform(0, 0.12)
        )  # a run that collapses was rarely the best before
    if kind == "never_learning":
        reached = rng.uniform(0.5, 0.56)
    t = np.arange(1, epochs + 1, dtype=float)
    delay = rng.uniform(0.1, 0.35) * epochs if kind == "late_bloomer" else 0.0
    pace = 4.0 * math.exp(0.6 * rng.standard_normal()) * epochs / 60
    steady = 0.5 + (reached - 0.5) * (1 - np.exp(-np.clip(t - delay, 0.3, None) / pace))
    if rng.random() < 0.3:  # slow overfitting
        steady -= rng.uniform(0, 0.03) * np.clip((t - epochs / 2) / (epochs / 2), 0, None)
    return np.asarray(steady)


def _dips(
    rng: np.random.Generator, kind: Kind, epochs: int, drw_start: int
) -> tuple[Floats, Floats]:
    """Return what raw and averaged AUC lose for a moment, by epoch."""
    raw, ema = np.zeros(epochs), np.zeros(epochs)
    for epoch in range(epochs):  # early on raw networks fall for an epoch, and are back in the next
        if rng.random() < 0.06 * math.exp(-epoch / 15):
            raw[epoch] += rng.uniform(0.1, 0.35)
    if kind == "dipping":
        # Of one epoch, or of two; four epochs apart or more, or they would be one long one
        places = rng.choice(
            np.arange(4, epochs, 6),
            size=min(int(rng.integers(1, 5)), (epochs - 4) // 6),
            replace=False,
        )
        for start in places + rng.integers(0, 2):
            length, depth = 1 + int(rng.random() < 0.3), rng.uniform(0.15, 0.4)
            raw[start : start + length] += depth
            ema[start : start + length] += depth * rng.uniform(0.5, 1)
        if rng.random() < 0.3:  # re-weighting costs AUC first; half of it is back each epoch
            lost = rng.uniform(0.1, 0.3) * 0.5 ** np.arange(epochs - drw_start + 1)
            raw[drw_start - 1 :] += lost
            ema[drw_start - 1 :] += lost
    return raw, ema


def _fall(auc: Floats, place: tuple[int, int], floor: float) -> Floats:
    """Return the curve falling towards `floor` from epoch `place[0]` on, over `place[1]` epochs, and staying there."""
    start, length = place
    t = np.arange(1, len(auc) + 1)
    left = np.clip(1 - (t - start + 1) / length, 0, 1)
    return np.where(
        t >= start, floor + (auc - floor) * left + 0.1 * (auc - auc[start - 1]) * (1 - left), auc
    )


def _onset(auc: Floats) -> int | None:
    """Return the first epoch that has lost a tenth of all that is lost, None if that is no collapse."""
    known = np.where(np.isfinite(auc), auc, 0.5)
    peak_at = int(np.argmax(known[: _bottom(known) + 1]))
    lost = known[peak_at] - known[_bottom(known)]
    if lost < SMALLEST_COLLAPSE:
        return None
    # From the last epoch that was still near the peak: a dip long before is not the beginning
    near = np.flatnonzero(known[: _bottom(known)] >= known[peak_at] - 0.1 * lost)
    return int(near[-1]) + 2


def _bottom(auc: Floats) -> int:
    """Return where the deepest fall from an earlier value ends."""
    return int(np.argmax(np.maximum.accumulate(auc) - auc))


def _average(auc: Floats, follow: float) -> Floats:
    """Return the curve of an average that takes `follow` of the way to the raw one each epoch."""
    averaged = np.empty_like(auc)
    level = auc[0]
    for index, value in enumerate(auc):
        level += follow * (value - level)
        averaged[index] = level
    return averaged


def _autoregressive(rng: np.random.Generator, length: int, memory: float) -> Floats:
    """Return a stationary series of unit variance whose neighbours correlate by `memory`."""
    shocks = rng.standard_normal(length)
    series = np.empty(length)
    level = shocks[0]
    for index in range(length):
        level = (
            shocks[0] if index == 0 else memory * level + math.sqrt(1 - memory**2) * shocks[index]
        )
        series[index] = level
    return series


def _mostly_down(series: Floats) -> Floats:
    return np.where(series > 0, 0.3 * series, series)


def _bounded(auc: Floats) -> Floats:
    return np.clip(auc, 0.35, 0.985)


def _separation(auc: Floats) -> Floats:
    """Distance of the classes' mean scores, in standard deviations, that has this AUC under equal normal scores."""
    return np.asarray(math.sqrt(2) * ndtri(auc))


def _slope(auc: Floats) -> Floats:
    """Return dAUC / dseparation."""
    d = _separation(np.clip(auc, 0.02, 0.98))
    return np.asarray(np.exp(-(d**2) / 4) / math.sqrt(4 * math.pi))


class _ScoreNoise:
    """What volumes add to scores: one part for all runs, one for a run, one that changes over its epochs.

    A network at chance finds other volumes hard than one that has learned: the shared part fades with the AUC.
    """

    ALL_RUNS = 0.5
    CHANGING = (0.25, 0.15)
    """Of raw and of averaged weights: averaged ones change less, ..."""
    MEMORY = (0.5, 0.9)
    """... and more slowly."""

    def __init__(
        self, rng: np.random.Generator, positives: int, negatives: int, epochs: int
    ) -> None:
        self.rng, self.positives, self.negatives, self.epochs = rng, positives, negatives, epochs
        self.volumes = rng.standard_normal(positives + negatives)

    def of_run(self, raw: Floats, ema: Floats) -> list[Floats]:
        """Return the noise of raw and of averaged weights' scores (epoch, volume), unit variance, given their AUCs."""
        own = self.rng.standard_normal(len(self.volumes))
        noises = []
        for auc, changing, memory in zip((raw, ema), self.CHANGING, self.MEMORY, strict=True):
            sound = (
                math.sqrt(self.ALL_RUNS) * self.volumes
                + math.sqrt(1 - self.ALL_RUNS - changing) * own
                + math.sqrt(changing) * self._moving(memory)
            )
            skill = np.clip((np.where(np.isfinite(auc), auc, 0.5) - 0.5) / 0.15, 0, 1)[:, None]
            noises.append(np.asarray(skill * sound + np.sqrt(1 - skill**2) * self._moving(memory)))
        return noises

    def _moving(self, memory: float) -> Floats:
        moving = self.rng.standard_normal((self.epochs, len(self.volumes)))
        for epoch in range(1, self.epochs):
            moving[epoch] = memory * moving[epoch - 1] + math.sqrt(1 - memory**2) * moving[epoch]
        return moving


def auc_and_error(scores: Floats, positives: int) -> tuple[Floats, Floats]:
    """Return AUC and DeLong standard error by row of `scores` (row, volume); the first `positives` volumes are positive.

    DeLong, DeLong and Clarke-Pearson, Biometrics 1988. Ties are not looked for: generated scores have none.
    """
    rows, volumes = scores.shape
    positive = np.argsort(scores, axis=1) < positives
    beaten = np.cumsum(~positive, axis=1)[positive].reshape(rows, positives) / (volumes - positives)
    beaten_by = (
        1 - np.cumsum(positive, axis=1)[~positive].reshape(rows, volumes - positives) / positives
    )
    variance = beaten.var(axis=1, ddof=1) / positives + beaten_by.var(axis=1, ddof=1) / (
        volumes - positives
    )
    return beaten.mean(axis=1), np.sqrt(variance)


def _rows(
    rng: np.random.Generator, run: _Run, noise: _ScoreNoise, epochs: int
) -> list[dict[str, Any]]:
    positives, negatives = noise.positives, noise.negatives
    columns: dict[str, Sequence[Any]] = {}
    for name, truth, noises in zip(
        ("raw", "ema"), (run.raw, run.ema), noise.of_run(run.raw, run.ema), strict=True
    ):
        finite = np.isfinite(truth)
        scores = noises
        scores[:, :positives] += _separation(np.where(finite, truth, 0.5))[:, None]
        auc, error = auc_and_error(scores, positives)
        known = auc if run.kind != "saturating" else auc.copy()
        lost = np.zeros(epochs)
        if run.kind == "saturating":
            begins = int(rng.integers(epochs // 6, epochs // 2))
            lost[begins:] = np.minimum((auc[begins:] - 0.5).clip(0), rng.uniform(0.08, 0.35))
        columns |= {
            f"val_auc_{name}": _nullable(known, finite),
            f"val_auc_{name}_low": _nullable((known - 1.96 * error).clip(0, 1), finite),
            f"val_auc_{name}_high": _nullable((known + 1.96 * error).clip(0, 1), finite),
            f"val_auc_probability_{name}": _nullable(known - lost, finite),
            f"val_tied_{name}": [float(value) for value in np.where(lost > 0, 0.5, 0.0)],
            f"val_nonfinite_{name}": [0.0 if value else 1.0 for value in finite],
        }
    for end in ("", "_low", "_high"):
        columns[f"val_auc{end}"] = columns[f"val_auc_ema{end}"]

    t = np.arange(1, epochs + 1)
    drw_start = run.config["drw_start_epoch"]
    loss = (
        (0.3 + 1.2 * np.exp(-t / 10))
        * np.exp(0.08 * rng.standard_normal(epochs))
        * np.where(t >= drw_start, 0.7, 1.0)
    )
    if rng.random() < 0.05:
        loss[rng.integers(4, epochs)] *= rng.uniform(3, 6)
    sound = np.isfinite(run.raw)
    train = np.clip(
        ndtr(_separation(np.where(sound, run.raw, 0.5)) * 1.2 / math.sqrt(2))
        + 0.02 * rng.standard_normal(epochs),
        0,
        1,
    )
    seconds = rng.uniform(20, 60) * np.exp(0.03 * rng.standard_normal(epochs))
    columns |= {
        "epoch": [int(epoch) for epoch in t],
        "updates": [int(value) for value in np.cumsum(np.where(sound, 99, 0))],
        "skipped_updates": [0 if value else 99 for value in sound],
        "train_loss": _nullable(loss, sound),
        "train_auc": _nullable(train, sound),
        "drw_active": [bool(epoch >= drw_start) for epoch in t],
        "val_positive": [positives] * epochs,
        "val_negative": [negatives] * epochs,
        "epoch_s": [float(value) for value in seconds],
    }
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _nullable(values: Floats, known: npt.NDArray[np.bool_]) -> list[float | None]:
    """Return Python floats, None where a run would have stored null."""
    return [float(value) if there else None for value, there in zip(values, known, strict=True)]
