"""A run's course so far, from its rows: the levels its AUCs reached, their noise, the row at hand. Verdicts read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trainables.config import FineTuneConfig
from trainables.metrics import hanley_mcneil_error

Verdict = Literal[
    "no_fault",
    "non_finite",
    "ema_lag",
    "collapsed_after_drw",
    "collapsed",
    "saturated",
    "never_learned",
    "train_validation_gap",
    "loss_spike",
    "too_noisy",
]
"""What the epochs of a run show: the first fault of these that applies, in this order, or `no_fault`."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

HEALTHY = "healthy"
"""The verdict on a trial without a fault that has completed, with an AUC above chance. See `trial_verdict`."""

WITHOUT_FAULT: tuple[str, ...] = ("no_fault", HEALTHY)
"""Verdicts on a trial that name no fault. Versions up to 0.1 wrote `healthy` for both."""

Evidence = dict[str, float | int | str]

SMALLEST_PEAK = 0.62
"""AUC; a run that never reached it has nothing to lose."""

LEARNED_ERRORS = 1.96
"""Standard errors above chance at which the best level counts as learned, where raw and averaged weights both have to ..."""

LEARNED_ERRORS_ALONE = 2.58
"""... and where there is one AUC only: the best of many epochs at chance is far above chance."""

UNKNOWN_ERROR = 0.05
"""Standard error taken for an AUC that comes without interval and counts: that of .85 at 20 positives and 80 negatives."""


@dataclass(frozen=True)
class Healed:
    """A fall that was confirmed and settled, and from which the run recovered unaided."""

    verdict: Verdict
    first: int
    """First epoch of the fault."""
    last: int
    """Last epoch of it."""
    advice: str

    @property
    def epochs(self) -> int:
        """Epochs it lasted."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Diagnosis:
    """What one run has come to by its last row."""

    verdict: Verdict
    epoch: int | None
    """First epoch of the fault; None without one."""
    evidence: Evidence
    """The numbers it rests on: AUC, epochs, counts, shares."""
    summary: str
    """One sentence with those numbers."""
    advice: str
    """Which hyperparameters to change, with values; empty without a fault."""
    settled: bool = True
    """False while waiting may still change it (an average that is warming up): act on settled ones only."""
    healed: tuple[Healed, ...] = ()
    """Falls the run came back from; `summary` names them, and where nothing else is wrong `advice` is the last one's."""

    @property
    def healed_epochs(self) -> int:
        """Epochs spent in falls that healed."""
        return sum(fall.epochs for fall in self.healed)


NO_FAULT = Diagnosis("no_fault", None, {}, "nothing found", "")


def trial_verdict(found: str, state: str, auc_low: float) -> str:
    """Return the verdict on a trial: the fault of its run, or without one `healthy` or `no_fault`.

    `healthy` needs a trial that has completed, and an AUC above chance: `auc_low`, the lower end of its 95 % interval
    in the epoch whose weights are kept, is above .5. A trial that was stopped, runs or failed is never healthy.
    """
    if found not in WITHOUT_FAULT:
        return found
    return HEALTHY if state == "completed" and auc_low > 0.5 else NO_FAULT.verdict


def run_verdict(recorded: str) -> str:
    """Return the verdict on a run, from a file of any version: `no_fault` where the file has a trial's `healthy`."""
    return NO_FAULT.verdict if recorded == HEALTHY else recorded


def expected_error(auc: float, positive: int, negative: int) -> float:
    """Return the standard error of an AUC at these class counts: Hanley and McNeil's, but never none.

    An AUC near 1 is moved half a misranked volume of the smaller class away from it: the formula gives no error there.
    """
    edge = 1 - 0.5 / max(min(positive, negative), 1)
    return hanley_mcneil_error(min(max(auc, 1 - edge), edge), positive, negative)


class Settings:
    """A config, its overrides or nothing, read by name; the defaults fill missing values."""

    __slots__ = ("_given", "known")

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None) -> None:
        self.known = config is not None
        self._given = dict(config) if config is not None else {}

    def __getitem__(self, name: str) -> Any:
        return self._given[name] if name in self._given else DEFAULTS[name].default


DEFAULTS = FineTuneConfig.model_fields


class DrwStart:
    """The epoch in which a run's deferred class weights began, once they have: `follow()` with each row.

    The rows know best (`drw_active`); where they lack it, the config's `drw_start_epoch` decides. Weights that were there
    in the first row did not begin, they always were.
    """

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None = None) -> None:
        self.epoch: int | None = None
        self._configured = int(Settings(config)["drw_start_epoch"]) if config is not None else 0
        self._was_plain = False

    def follow(self, epoch: int, row: Mapping[str, Any]) -> int | None:
        """Return the first epoch with class weights, None before it."""
        if self.epoch is None:
            active = row.get("drw_active")
            if active is None:
                self.epoch = self._configured if 1 < self._configured <= epoch else None
            elif not active:
                self._was_plain = True
            elif self._was_plain:
                self.epoch = epoch
        return self.epoch


@dataclass(slots=True)
class Streak:
    """Epochs in a row in which something held."""

    length: int = 0
    first: int = 0

    def count(self, epoch: int, holds: bool) -> None:
        if not holds:
            self.length = 0
            return
        if not self.length:
            self.first = epoch
        self.length += 1


@dataclass(slots=True)
class Level:
    """The best 3-epoch median so far, and the noise at that point."""

    auc: float = -math.inf
    error: float = UNKNOWN_ERROR
    epoch: int = 0

    def above_chance(self, errors: float) -> bool:
        """Whether it reaches SMALLEST_PEAK and is more than `errors` standard errors above chance."""
        return self.auc >= SMALLEST_PEAK and self.auc - errors * self.error > 0.5


@dataclass(slots=True)
class Recent:
    """The last three epochs of one AUC, and its best median among the epochs before a drop."""

    values: list[float] = field(default_factory=list)
    best: Level = field(default_factory=Level)

    def add(self, epoch: int, auc: float, error: float) -> None:
        self.values.append(auc if math.isfinite(auc) else -math.inf)
        del self.values[:-3]
        if len(self.values) == 3:
            median = sorted(self.values)[1]
            if median > self.best.auc:
                self.best.auc, self.best.epoch = median, epoch - 1
                self.best.error = error if math.isfinite(error) else self.best.error


@dataclass(slots=True)
class Fall:
    """A fall that lasts, under all the names it has had: a fall of the average alone looks different while it recovers."""

    first: int
    last: int = 0
    names: dict[Verdict, tuple[int, str]] = field(default_factory=dict)
    """Verdict -> epochs it was given, and the advice of the last one."""

    def add(self, epoch: int, found: Diagnosis) -> None:
        self.last = epoch
        self.names[found.verdict] = self.names.get(found.verdict, (0, ""))[0] + 1, found.advice

    def healed(self) -> Healed:
        """Return it as it will be known: by the name it had for the longest time."""
        verdict, (_, advice) = max(self.names.items(), key=lambda item: item[1][0])
        return Healed(verdict, self.first, self.last, advice)


class Course:
    """A run up to the row at hand: `read()` with each row, then `add()` once what compares with the epochs before has."""

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None) -> None:
        self.setting = Settings(config)
        self.drw = DrwStart(config)
        self.drw_begins = False
        """Whether class weights begin in this row."""
        self.deployed, self.raw_level = Recent(), Recent()
        self.row: Mapping[str, Any] = {}
        self.epoch = 0
        self.auc = self.error = self.raw = self.raw_error = self.ema = self.ema_error = math.nan
        self.one_class = False
        """Whether the validation fold lacks a class."""
        self.updates = 0.0
        self.fall: Fall | None = None
        """The fall that lasts, kept by the monitor."""

    def read(self, row: Mapping[str, Any]) -> None:
        """Take the next row."""
        self.row, self.epoch = row, int(row["epoch"])
        self.drw_begins = self.drw.epoch is None and self.drw.follow(self.epoch, row) is not None
        self.auc, self.error = auc_of(row, "")
        self.raw, self.raw_error = auc_of(row, "_raw")
        self.ema, self.ema_error = auc_of(row, "_ema")
        self.one_class = row.get("val_positive") == 0 or row.get("val_negative") == 0
        if isinstance(updates := row.get("updates"), int | float):
            self.updates = float(updates)

    def add(self) -> None:
        """Count the row among the epochs that later ones are compared with."""
        self.deployed.add(self.epoch, self.auc, self.error)
        self.raw_level.add(self.epoch, self.raw, self.raw_error)

    @property
    def sound_auc(self) -> float:
        """AUC of the raw weights, or of the deployed ones where that is all there is."""
        return self.raw if math.isfinite(self.raw) else self.auc

    def learned(self) -> bool:
        """Whether there is a level to lose."""
        best, raw = self.deployed.best, self.raw_level.best
        if not raw.epoch:
            return best.above_chance(LEARNED_ERRORS_ALONE)
        return best.above_chance(LEARNED_ERRORS) and raw.above_chance(LEARNED_ERRORS)


def number(value: Any) -> float:
    """Return `value` as a float, NaN where it is missing or no number: rows store NaN as null."""
    return float(value) if isinstance(value, int | float) else math.nan


def auc_of(row: Mapping[str, Any], weights: str) -> tuple[float, float]:
    """Return an AUC of the row and its standard error, from the interval, the class counts or, without both, a guess."""
    auc = number(row.get(f"val_auc{weights}"))
    if weights == "_ema" and "val_auc_ema" not in row:
        auc = number(row.get("val_auc"))
    if not math.isfinite(auc):
        return math.nan, math.nan
    low, high = (
        number(row.get(f"val_auc{weights}_low")),
        number(row.get(f"val_auc{weights}_high")),
    )
    positive, negative, _ = class_sizes(row)
    error = (high - low) / 3.92 if math.isfinite(high - low) else math.nan
    if error >= 0.02 or not (positive and negative):
        return auc, max(error, 0.01) if math.isfinite(error) else UNKNOWN_ERROR
    formula = expected_error(auc, positive, negative)
    # Near an AUC of 1 intervals are clipped, and DeLong's, in rows of earlier versions, shrink: half the formula's at least
    return auc, max(error, formula / 2) if math.isfinite(error) else formula


def class_sizes(row: Mapping[str, Any]) -> tuple[int | None, int | None, str]:
    """Return how many subjects of class 1 and above, and of class 0, validate, and `subjects`.

    In rows of versions that did not count them, the volumes, and `volumes`; None where the row has neither.
    """
    for unit, end in (("subjects", "_subjects"), ("volumes", "")):
        positive, negative = (row.get(f"val_{sign}{end}") for sign in ("positive", "negative"))
        if positive is not None and negative is not None:
            return int(positive), int(negative), unit
    return None, None, "volumes"


def auc_low(row: Mapping[str, Any], weights: Literal["raw", "ema"]) -> float:
    """Return the lower end of the 95 % interval of an AUC of the row: of the raw weights, or of the deployed ones.

    From the AUC's error where no interval is recorded; NaN where there is no AUC.
    """
    column = "_raw" if weights == "raw" else ""
    low = number(row.get(f"val_auc{column}_low"))
    if math.isfinite(low):
        return low
    auc, error = auc_of(row, column)
    return auc - 1.96 * error


def noise_of(first: float, second: float) -> float:
    """Return the difference of two AUCs of one run that noise alone explains (95 %, correlation 1/2: module docstring).

    Where one has no error, because it is no number, the other's stands for both.
    """
    if not math.isfinite(first) or not math.isfinite(second):
        first = second = first if math.isfinite(first) else second
    return 1.96 * math.hypot(first, second) / math.sqrt(2)
