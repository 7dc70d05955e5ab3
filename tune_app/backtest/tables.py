"""Recorded tables as searches meet them: the part that a strategy may see, and the truth that only the judge reads.

A table is a Parquet file of whole curves with a column `hold_auc`: `medtune bench record` writes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from search_spaces.spaces import SPACES
from trainables.objective import RunningValue
from tune_app.backtest.curves import CurveError
from tune_app.study.prior import Floats, Prior
from tune_app.study.surrogate import (
    HIGH_RATE,
    LOW_RATE,
    RATE,
    RATE_LENGTH,
    RATE_SD,
    Axis,
    logit,
)

HIDDEN = ("hold_auc", "hold_scores", "val_scores")
"""Columns that no strategy is shown."""

CLAIM_FIT = 0.8
"""Rank correlation of a surrogate with the recorded runs below which nothing is claimed from its curves."""

LOG_PARAMETERS = frozenset(
    parameter.name
    for space in SPACES.values()
    for parameter in space.parameters.values()
    if getattr(parameter.distribution, "log", False)
)
"""Parameters that the named spaces search on a logarithmic scale."""

CONFIGURATION_SD = 0.25
"""Logits; what configurations of one rate differ by, as a prior is learned."""


class Scored:
    """Scores of single volumes, for judging several runs together: the mean of their calibrated log-odds.

    `val` and `hold` are cells of a table by trial and epoch, `val_labels` of each trial's validation volumes,
    `hold_labels` of the held-out ones, in the order of the scores.
    """

    def __init__(
        self,
        val: Sequence[Sequence[bytes]],
        hold: Sequence[Sequence[bytes]],
        val_labels: Sequence[Floats],
        hold_labels: Floats,
    ) -> None:
        self._val, self._hold = val, hold
        self._val_labels, self._hold_labels = val_labels, hold_labels
        self._calibrated: dict[tuple[int, int], Floats] = {}

    def auc(self, runs: Iterable[tuple[int, int]]) -> float:
        """Return the held-out AUC of runs together, each a trial and the index of the epoch whose weights it deploys."""
        return roc_auc(np.mean([self._log_odds(*run) for run in runs], axis=0), self._hold_labels)

    def part(self, chosen: npt.NDArray[np.int64]) -> "Scored":
        """Return the scores of the chosen trials."""
        return Scored(
            [self._val[i] for i in chosen],
            [self._hold[i] for i in chosen],
            [self._val_labels[i] for i in chosen],
            self._hold_labels,
        )

    def _log_odds(self, trial: int, epoch: int) -> Floats:
        """Held-out scores under a slope and an offset that are fitted to the validation scores, as an export's are."""
        if (trial, epoch) not in self._calibrated:
            val, hold = (
                np.frombuffer(cells[trial][epoch], dtype="<f2").astype(float)
                for cells in (self._val, self._hold)
            )
            scale = max(float(val.std()), 1e-6)
            sign = 2 * self._val_labels[trial] - 1

            def loss(at: Floats) -> tuple[float, Floats]:
                margin = sign * (at[0] * val / scale + at[1])
                pull = -sign * expit(-margin)
                value = np.logaddexp(0, -margin).sum() + 0.005 * at[0] ** 2
                return float(value), np.array([pull @ val / scale + 0.01 * at[0], pull.sum()])

            slope, offset = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
            self._calibrated[trial, epoch] = slope * hold / scale + offset
        return self._calibrated[trial, epoch]


def roc_auc(scores: Floats, labels: Floats) -> float:
    """Return the area under the ROC curve of scores (n,) of volumes labelled 0 or 1; ties count half."""
    positive = labels == 1
    count = int(positive.sum())
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(labels) - count)))


def supports_claims(truth: float, value: float) -> bool:
    """Whether anything is claimed from curves of a surrogate with these rank correlations; NaN: recorded curves."""
    return not min(truth, value) < CLAIM_FIT


@dataclass(frozen=True)
class Fit:
    """Out-of-bag rank correlations of a surrogate of whole curves with the recorded runs."""

    truth: float
    """Of the held-out AUC of the deployed weights."""
    value: float
    """Of the objective."""
    importance: tuple[float, ...]
    """Share of each encoded column in what it predicts."""


@dataclass(frozen=True)
class Table:
    """Whole curves of the configurations of one cohort, one run each."""

    name: str
    cohort: str
    """Tables of one cohort judge each other's priors never."""
    trials: tuple[str, ...]
    origins: tuple[str, ...]
    """`random`, or the name of a known setting."""
    samples: tuple[dict[str, Any], ...]
    configs: tuple[dict[str, Any], ...]
    rows: tuple[list[dict[str, Any]], ...]
    """By trial and epoch, without the hidden columns."""
    auc: Floats
    """(trials, epochs): the epoch's validation AUC."""
    value: Floats
    """(trials, epochs): the objective by then, the best 3-epoch median."""
    hold: Floats
    """(trials, epochs): the epoch's held-out AUC."""
    truth: Floats
    """(trials, epochs): held-out AUC of the weights that the objective would deploy by then."""
    seconds: Floats
    """(trials, epochs)."""
    deployed: npt.NDArray[np.int64]
    """(trials, epochs): index of the epoch whose weights the objective would deploy by then."""
    scored: Scored | None = None
    """Scores by volume; None where the table does not hold them."""
    fit: Fit | None = None
    """How well the surrogate ranks that these curves were drawn from; None for recorded curves."""

    @property
    def size(self) -> int:
        return len(self.trials)

    @property
    def epochs(self) -> int:
        return int(self.auc.shape[1])

    @cached_property
    def axes(self) -> list[Axis]:
        """The parameters, on the ranges that the table covers."""
        names = dict.fromkeys(name for sample in self.samples for name in sample)
        return [_axis(name, [s[name] for s in self.samples if name in s]) for name in names]

    def part(self, chosen: npt.NDArray[np.int64]) -> "Table":
        """Return the table of the chosen configurations; one that is chosen twice is there twice."""

        def picked(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in chosen)

        return replace(
            self,
            trials=tuple(f"{self.trials[i]}.{place}" for place, i in enumerate(chosen)),
            origins=picked(self.origins),
            samples=picked(self.samples),
            configs=picked(self.configs),
            rows=picked(self.rows),
            auc=self.auc[chosen],
            value=self.value[chosen],
            hold=self.hold[chosen],
            truth=self.truth[chosen],
            seconds=self.seconds[chosen],
            deployed=self.deployed[chosen],
            scored=None if self.scored is None else self.scored.part(chosen),
        )


def read_table(path: Path, cohort: str | None = None) -> Table:
    """Return the table in a Parquet file, by default of the cohort that its name begins with.

    Of configurations that were run on several folds or with several seeds, the first run counts.
    Raises CurveError that names missing columns, and trials of unequal length.
    """
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise CurveError([f"{path}: cannot be read: {error}"]) from None
    labels = frame.attrs.get("labels")
    needed = ("trial", "epoch", "val_auc", "hold_auc", "epoch_s")
    if missing := [name for name in needed if name not in frame.columns]:
        raise CurveError([f"{path}: column {name!r} is missing" for name in missing])
    if "configuration" in frame.columns:
        first = frame.drop_duplicates(["configuration"])[["configuration", "trial"]]
        frame = frame[frame["trial"].isin(first["trial"])]
    frame = frame.sort_values(["trial", "epoch"], kind="stable")
    lengths = frame.groupby("trial", sort=True)["epoch"].agg(["min", "max", "size"])
    epochs = int(lengths["max"].max())
    uneven = lengths[(lengths["min"] != 1) | (lengths["size"] != epochs)]
    if len(uneven):
        raise CurveError(
            [f"{path}: trial {t} has not the epochs 1 to {epochs}" for t in uneven.index[:5]]
        )
    cohort = cohort or path.stem.split("_")[0].rstrip("0123456789")
    return _table(path, cohort, frame, len(lengths), _scored(frame, labels, epochs))


def _scored(frame: pd.DataFrame, labels: Mapping[str, Any] | None, epochs: int) -> Scored | None:
    if labels is None or not {"val_scores", "hold_scores", "fold", "hold_fold"} <= set(frame):
        return None
    cells = {
        name: [list(part) for part in frame[name].to_numpy().reshape(-1, epochs)]
        for name in ("val_scores", "hold_scores")
    }
    known = {fold: np.asarray(each, dtype=float) for fold, each in labels.items()}
    folds = frame["fold"].astype(str).to_numpy().reshape(-1, epochs)[:, 0]
    held = str(frame["hold_fold"].iloc[0])
    return Scored(
        cells["val_scores"], cells["hold_scores"], [known[fold] for fold in folds], known[held]
    )


def _table(
    path: Path, cohort: str, frame: pd.DataFrame, count: int, scored: Scored | None
) -> Table:
    def grid(name: str) -> Floats:
        return np.asarray(frame[name].to_numpy(dtype=float).reshape(count, -1))

    first = frame.drop_duplicates("trial")
    visible = frame.drop(
        columns=[c for c in frame.columns if c in HIDDEN or c.startswith(("config.", "sample."))]
    )
    plain = visible.astype(object).where(visible.notna(), None)
    records: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} for row in plain.to_dict("records")
    ]
    epochs = len(frame) // count
    auc, hold = grid("val_auc"), grid("hold_auc")
    value, deployed = objective_by_epoch(auc)
    return Table(
        name=path.stem,
        cohort=cohort,
        trials=tuple(map(str, first["trial"])),
        origins=tuple(first["origin"]) if "origin" in first.columns else ("random",) * count,
        samples=tuple(_prefixed(row, "sample.") for row in first.to_dict("records")),
        configs=tuple(_prefixed(row, "config.") for row in first.to_dict("records")),
        rows=tuple(records[i * epochs : (i + 1) * epochs] for i in range(count)),
        auc=auc,
        value=value,
        hold=hold,
        truth=np.take_along_axis(hold, deployed, axis=1),
        seconds=grid("epoch_s"),
        deployed=deployed,
        scored=scored,
    )


def objective_by_epoch(auc: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the objective by each epoch, and the index of the epoch whose weights it stands for."""
    value, deployed = np.empty_like(auc), np.zeros(auc.shape, dtype=np.int64)
    for trial, curve in enumerate(auc):
        running = RunningValue("best_median3")
        best, before = 0, -np.inf
        for epoch, one in enumerate(curve):
            now = running.update(float(one))
            if epoch <= 2 or now > before:  # up to the third epoch: the lowest
                window = list(curve[max(0, epoch - 2) : epoch + 1])
                best = max(0, epoch - 2) + window.index(now) if now in window else epoch
            value[trial, epoch], deployed[trial, epoch], before = now, best, now
    return value, deployed


def _prefixed(row: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for name, value in row.items():
        if str(name).startswith(prefix) and value is not None and value == value:
            found[str(name).removeprefix(prefix)] = (
                value.item() if hasattr(value, "item") else value
            )
    return found


def _axis(name: str, values: Sequence[Any]) -> Axis:
    if any(isinstance(value, str | bool) for value in values):
        return Axis(name, choices=tuple(sorted(set(values))))
    return Axis(name, float(min(values)), float(max(values)), name in LOG_PARAMETERS)


def learn_prior(tables: Sequence[Table], points: int = 37) -> Prior:
    """Return the evidence in the held-out AUC of these tables about the backbone's rate.

    On each table a Gaussian process of the rate alone, with the scales of the search's own, is fitted to
    the logits of the held-out AUC of whole runs; its mean, less its average over the document's range,
    is weighted with its precision. Raises ValueError for tables without the rate.
    """
    unit = np.log(HIGH_RATE / LOW_RATE)
    grid = np.linspace(-0.5, 1.3, points)
    usual = (grid >= 0) & (grid <= 1)
    lifts, weights = [], []
    for table in tables:
        if any(RATE not in sample for sample in table.samples):
            raise ValueError(f"{table.name}: {RATE} was not searched")
        rates = (np.log([sample[RATE] for sample in table.samples]) - np.log(LOW_RATE)) / unit
        values = logit(table.truth[:, -1])
        between = RATE_SD**2 * np.exp(-((grid[:, None] - rates) ** 2) / (2 * RATE_LENGTH**2))
        among = RATE_SD**2 * np.exp(-((rates[:, None] - rates) ** 2) / (2 * RATE_LENGTH**2))
        known = among + CONFIGURATION_SD**2 * np.eye(len(rates))
        level = np.linalg.solve(known, np.column_stack([values, np.ones_like(values)]))
        mean = float(level[:, 0].sum() / level[:, 1].sum())
        lift = between @ np.linalg.solve(known, values - mean)
        variance = RATE_SD**2 - np.einsum("ij,ji->i", between, np.linalg.solve(known, between.T))
        lifts.append(lift - lift[usual].mean())
        weights.append(1 / (variance + 0.05))
    lift = np.average(lifts, axis=0, weights=np.array(weights))
    provenance = {
        "learned_from": [
            f"{table.name}: {table.size} runs of {table.epochs} epochs" for table in tables
        ],
        "value": "logit of the held-out AUC, above its mean over rates from 2e-5 to 5e-4",
        "holds_for": "runs from random weights with Adam",
    }
    return Prior(
        tuple(round(float(x), 6) for x in grid * unit + np.log(LOW_RATE)),
        tuple(round(float(x), 4) for x in lift),
        provenance,
    )
