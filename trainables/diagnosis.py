"""What a run's epochs say: healthy, or what went wrong, since which epoch, on what evidence, and what to change.

Pure arithmetic on the rows that the run reports; no torch, no Ray, and a few microseconds an epoch, so that the same
code decides inside a search, explains in a report and is replayed over thousands of recorded runs.

Every comparison is held against the noise of the AUC, taken from the interval in the rows or, where there is
none, from the class counts (Hanley and McNeil, Radiology 1982). Two networks of one run are scored on the same volumes,
so their errors go together: their difference is taken to have the noise of one of them, not sqrt(2) times it (a
correlation of 1/2; measured ones are higher, so that this errs on the side of waiting).

How well it does depends on the validation fold. On generated runs of 60 epochs (`tune_app.backtest.curves`), stopped within five
epochs of the onset of their collapse, and stopped though healthy or dipping: 99 % and 0.3 % with 50 positive and 200
negative volumes, 91 % and 0.5 % with 20 and 80, 68 % and 1.1 % with 10 and 30 (seeds 30 to 35, which no constant here
was chosen on). The rest of the small folds' collapses is not to be seen in the AUC: with 10 and 30 one fall in five is
within what noise explains.

Rows of other origin may hold no more than `epoch` and `val_auc`. What cannot be told from the columns that are there
is not said: without raw and averaged values there is no `ema_lag`, without `train_auc` no `train_validation_gap`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from trainables.config import FineTuneConfig
from trainables.metrics import hanley_mcneil_error

Verdict = Literal[
    "healthy",
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
"""In this order a run gets the first that applies, after healthy, which is what remains."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

Evidence = dict[str, float | int | str]

CONFIRMING_EPOCHS = 3
"""Epochs in a row that must agree before a drop or a lag counts: raw networks dip for one epoch, and for two, and recover."""

SMALLEST_DROP = 0.08
"""AUC; a smaller loss is no collapse, however large the validation set."""

LARGEST_SHARE_KEPT = 2 / 3
"""A collapsed run has lost at least a third of what it was above chance: .92 -> .85 is overfitting, .72 -> .60 is not."""

SMALLEST_LAG = 0.06
"""AUC by which the raw weights must lead the averaged ones."""

LAG_PATIENCE = 10
"""Epochs, or a third of the run if that is more, that an average which never caught up is given before the lag is settled:
without warm-up it starts at chance, and mostly gets there."""

CARRIED_TO_THE_END = 0.5
"""Share of the initial weights in the last epoch's average above which a lag is settled at once: measured averages came
back when the share fell to between 40 and 20 %."""

DRW_WINDOW = 8
"""Epochs after the start of the deferred weights in which the beginning of a collapse is put down to them."""

NEVER_LEARNED_EPOCHS = 10
"""Epochs of full training before chance level counts as a finding, or a quarter of the run if that is more."""

CHANCE_BAND = 0.6
"""AUC; a run whose best 3-epoch median stays below has not learned anything of use."""

SATURATED_GAP = 0.05
"""AUC lost when it is computed from probabilities instead of logits: the same ranking, so any real gap is saturation."""

SATURATED_TIES = 0.25
"""Share of scores tied with another one, which float32 logits of distinct volumes hardly ever are."""

LOSS_SPIKE_FACTOR = 3.0
"""Training loss against the median of the epochs before."""

GAP = 0.15
"""AUC by which the training volumes lead the validation volumes, beyond the interval, in an overfitted run."""

SMALLEST_PEAK = 0.62
"""AUC; a run that never reached it has nothing to lose."""

LEARNED_ERRORS = 1.96
"""Standard errors above chance at which the best level counts as learned, where raw and averaged weights both have to ..."""

LEARNED_ERRORS_ALONE = 2.58
"""... and where there is one AUC only: the best of many epochs at chance is far above chance."""

SMALLEST_SUDDEN_DROP = 0.1
"""AUC; a drop within a few epochs from where the run stood counts from here on, ..."""

USUAL_EPOCHS = 10
"""... against the median of so many epochs before it, ..."""

SCATTERS = 3.0
"""... if it is beyond so many of those epochs' own scatter: epochs of one run are scored on the same volumes, so that a
sharp fall from a steady course is real even where the interval of each AUC is wider."""

SHARE_REGAINED = 1 / 3
"""Of what was lost; a run that has come back so far is recovering, and its epochs confirm no collapse."""

LONGEST_WAIT = 2
"""Epochs in a row on the way back that a beginning collapse is kept in mind for."""

FALLS: tuple[Verdict, ...] = ("non_finite", "ema_lag", "collapsed_after_drw", "collapsed")
"""Verdicts that say what is deployed was lost; it may come back, which no later row would tell."""

HEALED_SHOWN = 4
"""Falls that healed which a summary names, the last ones."""

UNKNOWN_ERROR = 0.05
"""Standard error taken for an AUC that comes without interval and counts: that of .85 at 20 positives and 80 negatives."""


@dataclass(frozen=True)
class Healed:
    """A fall that was confirmed and settled, and that the run came back from by itself."""

    verdict: Verdict
    first: int
    """First epoch of what was wrong."""
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
    """First epoch of what is wrong; None for healthy."""
    evidence: Evidence
    """The numbers it rests on: AUC, epochs, counts, shares."""
    summary: str
    """One sentence with those numbers."""
    advice: str
    """Which hyperparameters to change, with values; empty for healthy."""
    settled: bool = True
    """False while waiting may still change it (an average that is warming up): act on settled ones only."""
    healed: tuple[Healed, ...] = ()
    """Falls the run came back from; `summary` names them, and where nothing else is wrong `advice` is the last one's."""

    @property
    def healed_epochs(self) -> int:
        """Epochs spent in falls that healed."""
        return sum(fall.epochs for fall in self.healed)


def diagnose(
    rows: Iterable[Mapping[str, Any]], config: FineTuneConfig | Mapping[str, Any] | None = None
) -> Diagnosis:
    """Return the diagnosis of a run from its rows, in the order of their epochs.

    `config` is the run's config or its overrides; the defaults hold for what it leaves out. Without any (None: a curve
    of unknown origin) the start of the deferred weights is read from the rows alone. A run without rows is healthy.
    """
    monitor = RunMonitor(config)
    diagnosis = monitor.diagnosis
    for row in rows:
        diagnosis = monitor.update(row)
    return diagnosis


def expected_error(auc: float, positive: int, negative: int) -> float:
    """Return the standard error of an AUC at these class counts: Hanley and McNeil's, but never none.

    An AUC near 1 is moved half a misranked volume of the smaller class away from it: the formula gives no error there.
    """
    edge = 1 - 0.5 / max(min(positive, negative), 1)
    return hanley_mcneil_error(min(max(auc, 1 - edge), edge), positive, negative)


class DrwStart:
    """The epoch in which a run's deferred class weights began, once they have: `follow()` with each row.

    The rows know best (`drw_active`); where they do not say, the config's `drw_start_epoch` does. Weights that were there
    in the first row did not begin, they always were.
    """

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None = None) -> None:
        self.epoch: int | None = None
        self._configured = int(_Settings(config)["drw_start_epoch"]) if config is not None else 0
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
class _Streak:
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
class _Level:
    """The best 3-epoch median so far, and what the noise was there."""

    auc: float = -math.inf
    error: float = UNKNOWN_ERROR
    epoch: int = 0

    def above_chance(self, errors: float) -> bool:
        """Whether it is worth something, and so many standard errors above chance."""
        return self.auc >= SMALLEST_PEAK and self.auc - errors * self.error > 0.5


@dataclass(slots=True)
class _Recent:
    """The last three epochs of one AUC, and its best median among the epochs before a drop."""

    values: list[float] = field(default_factory=list)
    best: _Level = field(default_factory=_Level)

    def add(self, epoch: int, auc: float, error: float) -> None:
        self.values.append(auc if math.isfinite(auc) else -math.inf)
        del self.values[:-3]
        if len(self.values) == 3:
            median = sorted(self.values)[1]
            if median > self.best.auc:
                self.best.auc, self.best.epoch = median, epoch - 1
                self.best.error = error if math.isfinite(error) else self.best.error


@dataclass(slots=True)
class _Fall:
    """A fall that lasts, under all the names it has had: what an average has lost looks otherwise while it comes back."""

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


class RunMonitor:
    """The diagnosis of a run kept up to date: `update()` with each row, in the order of the epochs, costs O(1)."""

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None = None) -> None:
        self.diagnosis: Diagnosis = HEALTHY
        self._setting = _Settings(config)
        self._drw = DrwStart(config)
        self._deployed, self._raw = _Recent(), _Recent()
        # The drop of the deployed AUC: from its best, and from where it usually stood before
        self._below, self._unclear = _Streak(), _Streak()
        self._noise = 0.0
        self._lowest = math.inf
        self._waited = 0
        self._before: list[float] = []
        self._usual = self._scatter = math.inf
        # The averaged weights against the raw ones
        self._lag = _Streak()
        self._caught_up = False
        self._patience = max(LAG_PATIENCE, math.ceil(self._setting["epochs"] / 3))
        # Whether there is anything to drop from
        self._held_back = self._setting["freeze_backbone_epochs"] + math.ceil(
            self._setting["warmup_epochs"]
        )
        self._time_to_learn = max(
            NEVER_LEARNED_EPOCHS, self._setting["epochs"] / 4 if config is not None else 0
        )
        # The rest
        self._broken, self._saturated, self._gap = _Streak(), _Streak(), _Streak()
        self._updates = 0.0
        self._best_train_auc = -math.inf
        self._losses: list[float] = []
        self._spike: tuple[int, float, float] | None = None
        self._epochs_since_spike = 0
        self._fall: _Fall | None = None
        self._healed: tuple[Healed, ...] = ()

    def update(self, row: Mapping[str, Any]) -> Diagnosis:
        """Return the diagnosis with this row added. Columns: the contract of `finetune`, all but `epoch` optional."""
        epoch = int(row["epoch"])
        if self._drw.epoch is None and self._drw.follow(epoch, row):
            self._losses.clear()  # the loss is on another scale from here on
        auc, error = _auc(row, "")
        raw, raw_error = _auc(row, "_raw")
        ema, ema_error = _auc(row, "_ema")
        one_class = row.get("val_positive") == 0 or row.get("val_negative") == 0

        self._judge_lag(epoch, row, raw, raw_error, ema, ema_error)
        self._judge_broken(epoch, row, auc, raw, one_class)
        self._judge_drop(epoch, auc, error)
        self._deployed.add(epoch, auc, error)
        self._raw.add(epoch, raw, raw_error)
        self._judge_saturation(epoch, row)
        self._judge_gap(epoch, row, raw if math.isfinite(raw) else auc, error)
        self._judge_loss(epoch, row)

        found = (
            self._non_finite(row)
            or self._ema_lag(row, raw, ema)
            or self._collapse(auc)
            or self._saturation(row)
            or self._never_learned(epoch)
            or self._train_validation_gap(row, raw if math.isfinite(raw) else auc)
            or self._loss_spike()
            or self._too_noisy(row, auc, one_class)
            or HEALTHY
        )
        self._follow_fall(epoch, found)
        self.diagnosis = self._with_healed(found)
        return self.diagnosis

    # What each row adds -----------------------------------------------------------------------------------------------

    def _judge_lag(
        self,
        epoch: int,
        row: Mapping[str, Any],
        raw: float,
        raw_error: float,
        ema: float,
        ema_error: float,
    ) -> None:
        lags = False
        both = "val_auc_raw" in row and ("val_auc_ema" in row or "val_auc" in row)
        if (
            both and math.isfinite(raw) and epoch > 2
        ):  # one or two epochs behind is what an average is
            if not math.isfinite(ema):
                lags = True
            else:
                far = max(
                    SMALLEST_LAG,
                    (1 - LARGEST_SHARE_KEPT) * (raw - 0.5),
                    _noise(raw_error, ema_error),
                )
                lags = raw - 1.96 * raw_error > 0.5 and raw - ema > far
                if not lags and ema - 1.96 * ema_error > 0.5:
                    self._caught_up = True
        self._lag.count(epoch, lags)

    def _judge_broken(
        self, epoch: int, row: Mapping[str, Any], auc: float, raw: float, one_class: bool
    ) -> None:
        """The run itself is broken: not only its average, and not for want of a class to compare with."""
        updates = row.get("updates")
        stuck = False
        if isinstance(updates, int | float):
            stuck = bool(row.get("skipped_updates")) and updates <= self._updates
            self._updates = float(updates)
        unscored = not math.isfinite(raw if "val_auc_raw" in row else auc) and not one_class
        self._broken.count(epoch, unscored or stuck)

    def _judge_drop(self, epoch: int, auc: float, error: float) -> None:
        """Compare with the best median of the epochs before the drop, which is why this runs before they are added."""
        best = self._deployed.best
        drop = best.auc - auc if math.isfinite(auc) else math.inf
        if not self._learned():
            self._below.count(epoch, False)
            self._unclear.count(epoch, False)
        else:
            deep = _deep(best.auc)
            self._noise = _noise(best.error, error)
            depth = drop / max(deep, self._noise)
            if self._scatter < math.inf:
                sudden = max(SMALLEST_SUDDEN_DROP, deep, SCATTERS * self._scatter)
                depth = max(
                    depth,
                    min(
                        drop / deep,
                        (self._usual - auc) / sudden if math.isfinite(auc) else math.inf,
                    ),
                )
            # No AUC and one below chance are worth as much as chance: from there a run has come back, or it has not
            known = max(auc, 0.5) if math.isfinite(auc) else 0.5
            self._lowest = min(self._lowest, known) if self._below.length else known
            returning = known - self._lowest > SHARE_REGAINED * (best.auc - self._lowest)
            # Part of the way back is neither recovered nor confirmed: noise must not hide a collapse, nor a recovery be one
            if (
                self._below.length
                and depth > 0.5
                and (returning or depth <= 1)
                and self._waited < LONGEST_WAIT
            ):
                self._waited += 1
            else:
                self._waited = 0
                self._below.count(epoch, depth > 1 and not returning)
            self._unclear.count(epoch, drop > deep)
        if not self._below.length and math.isfinite(auc):
            self._before.append(auc)
            del self._before[:-USUAL_EPOCHS]
            if len(self._before) == USUAL_EPOCHS:
                self._usual, self._scatter = _median_and_scatter(self._before)

    def _learned(self) -> bool:
        best, raw = self._deployed.best, self._raw.best
        if not raw.epoch:
            return best.above_chance(LEARNED_ERRORS_ALONE)
        return best.above_chance(LEARNED_ERRORS) and raw.above_chance(LEARNED_ERRORS)

    def _judge_saturation(self, epoch: int, row: Mapping[str, Any]) -> None:
        self._saturated.count(epoch, any(_saturates(row, weights) for weights in ("raw", "ema")))

    def _judge_gap(self, epoch: int, row: Mapping[str, Any], auc: float, error: float) -> None:
        train = _number(row.get("train_auc"))
        self._best_train_auc = max(self._best_train_auc, train)
        wide = (
            math.isfinite(train)
            and math.isfinite(auc)
            and train - auc > GAP
            and train > auc + 1.96 * error
        )
        self._gap.count(epoch, wide)

    def _judge_loss(self, epoch: int, row: Mapping[str, Any]) -> None:
        if "train_loss" not in row:
            return
        loss = _number(row["train_loss"])
        usual = sorted(self._losses)[len(self._losses) // 2] if self._losses else math.nan
        if not math.isfinite(loss) or (
            len(self._losses) >= 3 and loss > LOSS_SPIKE_FACTOR * usual > 0
        ):
            self._spike = (
                (epoch, loss, usual)
                if self._spike is None or self._epochs_since_spike
                else self._spike
            )
            self._epochs_since_spike = 0
        else:
            self._epochs_since_spike += 1
            self._losses.append(loss)  # a spike does not become the usual
            del self._losses[:-5]
            if self._epochs_since_spike >= 5:
                self._spike = None

    def _follow_fall(self, epoch: int, found: Diagnosis) -> None:
        if (
            found.verdict in FALLS
            and (found.settled or self._fall is not None)
            and found.epoch is not None
        ):
            self._fall = self._fall or _Fall(found.epoch)
            self._fall.add(epoch, found)
        elif self._fall is not None:
            self._healed, self._fall = (*self._healed, self._fall.healed()), None

    def _with_healed(self, found: Diagnosis) -> Diagnosis:
        if not self._healed:
            return found
        shown = self._healed[-HEALED_SHOWN:]
        told = [
            f"{verdict} in epochs "
            + ", ".join(f"{fall.first} to {fall.last}" for fall in shown if fall.verdict == verdict)
            for verdict in dict.fromkeys(fall.verdict for fall in shown)
        ]
        if earlier := len(self._healed) - len(shown):
            told.append(f"{earlier} time{'s' if earlier > 1 else ''} before")
        return replace(
            found,
            summary=f"{found.summary}; healed: {', '.join(told)}",
            advice=found.advice or self._healed[-1].advice,
            healed=self._healed,
        )

    # The verdicts -----------------------------------------------------------------------------------------------------

    def _non_finite(self, row: Mapping[str, Any]) -> Diagnosis | None:
        """Two epochs in a row, or one whose loss is not finite either: a single overflow in half precision recovers."""
        streak = self._broken
        loss_lost = "train_loss" in row and not math.isfinite(_number(row["train_loss"]))
        if not streak.length or (streak.length < 2 and not loss_lost):
            return None
        evidence: Evidence = {"epochs": streak.length}
        for name in ("skipped_updates", "val_nonfinite_raw", "grad_norm_max"):
            if math.isfinite(_number(row.get(name))):
                evidence[name] = row[name]
        lost = "scores and training loss are" if loss_lost else "scores are"
        changes = []
        if self._setting["amp"] == "fp16":
            changes.append("amp=bf16 (or off)")
        changes.append(f"backbone_lr={_short(self._setting['backbone_lr'] / 3)}")
        changes.append(f"classifier_lr={_short(self._setting['classifier_lr'] / 3)}")
        if not 0 < self._setting["grad_clip"] <= 1:
            changes.append("grad_clip=1.0")
        return Diagnosis(
            "non_finite",
            streak.first,
            evidence,
            f"not finite since epoch {streak.first} ({streak.length} epochs): {lost} NaN or infinite, or no update went through",
            "set " + ", ".join(changes),
        )

    def _ema_lag(self, row: Mapping[str, Any], raw: float, ema: float) -> Diagnosis | None:
        lag = self._lag
        # A drop of the deployed AUC that is confirmed while the raw weights lead is the average's, too
        fell = self._below.length >= CONFIRMING_EPOCHS
        if lag.length < CONFIRMING_EPOCHS and not (lag.length and fell):
            return self._average_returns(raw, ema) if fell and not lag.length else None
        evidence: Evidence = {"auc_raw": round(raw, 4), "epochs": lag.length}
        if math.isfinite(ema):
            evidence |= {"auc_ema": round(ema, 4), "lead_of_raw": round(raw - ema, 4)}
        else:
            evidence["auc_ema"] = "not finite"
        best = self._deployed.best
        if self._caught_up:
            evidence |= {"best_auc": round(best.auc, 4), "best_epoch": best.epoch}
        decay = float(self._setting["ema_decay"])
        carried = math.nan
        if self._updates and not self._setting["ema_warmup"]:
            carried = decay**self._updates
            evidence["initial_weight"] = round(carried, 4)
        for name in ("val_logit_gap_ema", "val_auc_probability_ema"):
            if math.isfinite(_number(row.get(name))):
                evidence[name] = round(float(row[name]), 4)

        # What is not finite is not warming up, and what will still be mostly initial weights at the end has no time to
        lost = (
            math.isfinite(carried)
            and carried ** (self._setting["epochs"] / int(row["epoch"])) > CARRIED_TO_THE_END
        )
        settled = fell or lost or lag.length >= self._patience or not math.isfinite(ema)
        read = f"{ema:.3f}" if math.isfinite(ema) else "no finite score"
        what = "fell behind" if self._caught_up or fell else "never caught up with"
        summary = (
            f"averaged weights {what} the raw ones: {read} against {raw:.3f} at epoch {int(row['epoch'])}, "
            f"apart since epoch {lag.first} ({lag.length} epochs); the raw network is sound"
        )
        if carried > 0.05:
            summary += f", the average still carries {carried:.0%} of the initial weights"
        if not settled:
            summary += "; it may still catch up"
        return Diagnosis("ema_lag", lag.first, evidence, summary, self._quicker_average(), settled)

    def _average_returns(self, raw: float, ema: float) -> Diagnosis | None:
        """The average, which fell behind a sound network, is near it again, and still below what it was."""
        best, below = self._raw.best, self._below
        if (
            self._fall is None
            or "ema_lag" not in self._fall.names
            or not raw > best.auc - _deep(best.auc)
        ):
            return None
        before = self._deployed.best
        return Diagnosis(
            "ema_lag",
            self._fall.first,
            {
                "auc_raw": round(raw, 4),
                "auc_ema": round(ema, 4),
                "best_auc": round(before.auc, 4),
                "best_epoch": before.epoch,
                "epochs": below.length,
            },
            f"averaged weights fell behind the raw ones and are on the way back: {ema:.3f} against {raw:.3f}, after "
            f"{before.auc:.3f} at epoch {before.epoch}, below it since epoch {below.first} ({below.length} epochs); "
            "the raw network is sound",
            self._quicker_average(),
        )

    def _quicker_average(self) -> str:
        """The advice against an average that stays behind."""
        decay = float(self._setting["ema_decay"])
        changes = []
        if self._setting["ema_buffers"] == "copied":
            changes.append("ema_buffers=averaged")
        if not self._setting["ema_warmup"]:
            changes.append("ema_warmup=true")
        if decay > 0.98 or not changes:
            lower = (
                0.995
                if decay > 0.995
                else 0.98
                if decay > 0.98
                else max(0.0, round(1 - 4 * (1 - decay), 4))
            )
            changes.append(f"ema_decay={lower:g}")
        return "set " + ", ".join(changes)

    def _collapse(self, auc: float) -> Diagnosis | None:
        below = self._below
        if below.length < CONFIRMING_EPOCHS:
            return None
        best = self._deployed.best
        drop = best.auc - auc
        evidence: Evidence = {
            "best_auc": round(best.auc, 4),
            "best_epoch": best.epoch,
            "auc": round(auc, 4) if math.isfinite(auc) else "not finite",
            "epochs": below.length,
            "noise": round(self._noise, 4),
        }
        if not math.isfinite(auc):
            read = "no finite score"
        elif drop > self._noise:
            read = f"{auc:.3f}, {drop / self._noise:.1f} times what noise explains"
        else:
            evidence |= {"usual_auc": round(self._usual, 4), "scatter": round(self._scatter, 4)}
            read = f"{auc:.3f}, a sharp fall from a steady {self._usual:.3f} +- {self._scatter:.3f}"
        if math.isfinite(auc):
            evidence["drop"] = round(drop, 4)
        summary = (
            f"validation AUC fell from {best.auc:.3f} (epoch {best.epoch}) to {read}, "
            f"below it since epoch {below.first} ({below.length} epochs)"
        )
        setting = self._setting
        start = self._drw.epoch
        if (
            start is not None
            and start <= below.first <= start + DRW_WINDOW
            and best.epoch <= start + 1
        ):
            evidence["drw_start_epoch"] = start
            late = round(0.8 * setting["epochs"])
            later = late if late > start else start + 10
            changes = [f"drw_start_epoch={later}"]
            if setting["drw_beta"] > 0.99:
                changes.append("drw_beta=0.99")
            changes.append(f"backbone_lr={_short(setting['backbone_lr'] / 2)}")
            return Diagnosis(
                "collapsed_after_drw",
                below.first,
                evidence,
                f"{summary}; the deferred weights began at epoch {start}",
                "set " + ", ".join(changes),
            )
        changes = [f"backbone_lr={_short(setting['backbone_lr'] / 2)}"]
        if setting["loss"] == "ldam" and setting["max_m"] > 0.2:
            changes.append("max_m=0.2")
        if setting["loss"] == "ldam" and setting["s"] > 15:
            changes.append("s=15")
        if setting["ema_buffers"] == "copied":
            changes.append("ema_buffers=averaged")
        if not setting["warmup_epochs"]:
            changes.append("warmup_epochs=3")
        if not setting["freeze_backbone_epochs"]:
            changes.append("freeze_backbone_epochs=5")
        return Diagnosis("collapsed", below.first, evidence, summary, "set " + ", ".join(changes))

    def _saturation(self, row: Mapping[str, Any]) -> Diagnosis | None:
        streak = self._saturated
        if streak.length < 2:
            return None
        evidence: Evidence = {"epochs": streak.length}
        parts = []
        for weights in ("raw", "ema"):
            if not _saturates(row, weights):
                continue
            logits, probabilities = (
                _number(row.get(f"val_auc_{weights}")),
                _number(row.get(f"val_auc_probability_{weights}")),
            )
            tied = _number(row.get(f"val_tied_{weights}"))
            part = []
            if math.isfinite(probabilities) and math.isfinite(logits):
                evidence |= {
                    f"auc_{weights}": round(logits, 4),
                    f"auc_probability_{weights}": round(probabilities, 4),
                }
                part.append(f"AUC {probabilities:.3f} from probabilities, {logits:.3f} from logits")
            if math.isfinite(tied):
                evidence[f"tied_{weights}"] = round(tied, 4)
                part.append(f"{tied:.0%} of scores tied")
            parts.append(f"{'averaged' if weights == 'ema' else 'raw'} weights: {', '.join(part)}")
        changes = []
        if self._setting["head"] == "linear":
            changes.append("head=cosine")
        if self._setting["s"] > 10 and self._setting["loss"] == "ldam":
            changes.append(f"s={_short(15 if self._setting['s'] > 15 else 10)}")
        if self._setting["ema_buffers"] == "copied":
            changes.append("ema_buffers=averaged")
        if not changes:
            changes.append(f"classifier_lr={_short(self._setting['classifier_lr'] / 3)}")
        return Diagnosis(
            "saturated",
            streak.first,
            evidence,
            f"scores saturate since epoch {streak.first}: {'; '.join(parts)}",
            "set " + ", ".join(changes) + "; rank by logits, probabilities of this run say little",
        )

    def _never_learned(self, epoch: int) -> Diagnosis | None:
        trained = epoch - self._held_back
        if trained < self._time_to_learn:
            return None
        setting = self._setting
        best = (
            self._raw.best if self._raw.best.auc > self._deployed.best.auc else self._deployed.best
        )
        train = self._best_train_auc
        # Learned, if only by heart: that is another finding. And chance must be told from a useful run at all.
        if best.auc >= CHANCE_BAND or train >= 0.75 or best.auc + 1.96 * best.error > 0.85:
            return None
        evidence: Evidence = {
            "best_auc": round(best.auc, 4) if math.isfinite(best.auc) else "not finite",
            "best_epoch": best.epoch,
            "error": round(best.error, 4),
            "epochs": epoch,
        }
        if math.isfinite(train):
            evidence["train_auc"] = round(train, 4)
        changes = (
            []
            if setting["pretrained_path"] or not setting.known
            else ["pretrained_path=<a MedicalNet file>"]
        )
        changes += [
            f"backbone_lr={_short(setting['backbone_lr'] * 3)}",
            f"classifier_lr={_short(setting['classifier_lr'] * 3)}",
        ]
        return Diagnosis(
            "never_learned",
            1,
            evidence,
            f"not above chance in {epoch} epochs: best 3-epoch median "
            + (
                f"{best.auc:.3f} +- {1.96 * best.error:.3f}"
                if math.isfinite(best.auc)
                else "is no number"
            ),
            "set "
            + ", ".join(changes)
            + "; check labels and `volume_shape` with `medtune data check` first",
            settled=trained >= 2 * self._time_to_learn,
        )

    def _train_validation_gap(self, row: Mapping[str, Any], auc: float) -> Diagnosis | None:
        """Five epochs in a row without a new best: a gap that closes by itself is training, not overfitting."""
        gap = self._gap
        best = self._raw.best if math.isfinite(self._raw.best.auc) else self._deployed.best
        if gap.length < 5 or int(row["epoch"]) - best.epoch < 5:
            return None
        train = float(row["train_auc"])
        setting = self._setting
        changes = []
        if setting["dropout"] < 0.5:
            changes.append("dropout=0.5")
        if setting["augmentation_strength"] < 1.5:
            changes.append("augmentation_strength=1.5")
        changes.append(f"weight_decay={_short(max(10 * setting['weight_decay'], 1e-4))}")
        if not setting["freeze_backbone_epochs"]:
            changes.append("freeze_backbone_epochs=5")
        return Diagnosis(
            "train_validation_gap",
            gap.first,
            {
                "train_auc": round(train, 4),
                "auc": round(auc, 4),
                "gap": round(train - auc, 4),
                "epochs": gap.length,
            },
            f"training AUC {train:.3f}, validation AUC {auc:.3f}: over {GAP:g} apart since epoch {gap.first}, "
            f"no better validation median since epoch {best.epoch}",
            "set " + ", ".join(changes),
        )

    def _loss_spike(self) -> Diagnosis | None:
        if self._spike is None:
            return None
        epoch, loss, usual = self._spike
        evidence: Evidence = {"loss": round(loss, 4) if math.isfinite(loss) else "not finite"}
        if math.isfinite(usual):
            evidence["usual_loss"] = round(usual, 4)
        times = (
            f"{loss / usual:.1f} times the median {usual:.3g} of the epochs before"
            if math.isfinite(loss)
            else "not finite"
        )
        changes = [f"backbone_lr={_short(self._setting['backbone_lr'] / 2)}"]
        if not 0 < self._setting["grad_clip"] <= 1:
            changes.append("grad_clip=1.0")
        if not self._setting["warmup_epochs"]:
            changes.append("warmup_epochs=3")
        return Diagnosis(
            "loss_spike",
            epoch,
            evidence,
            f"training loss {times} at epoch {epoch}",
            "set " + ", ".join(changes),
        )

    def _too_noisy(self, row: Mapping[str, Any], auc: float, one_class: bool) -> Diagnosis | None:
        best, noise = self._deployed.best, self._noise
        unclear = self._unclear
        if not one_class and (unclear.length < 5 or not best.auc - auc <= noise):
            return None
        counts: Evidence = {
            name: int(row[f"val_{name}"])
            for name in ("positive", "negative")
            if row.get(f"val_{name}") is not None
        }
        sizes = (
            f" with {counts['positive']} positive and {counts['negative']} negative volumes"
            if len(counts) == 2
            else ""
        )
        advice = (
            f"set num_folds={max(2, min(3, int(self._setting['num_folds']) - 1))} for a larger validation fold, and compare "
            "configurations over folds and seeds (`medtune confirm`)"
        )
        if one_class:
            return Diagnosis(
                "too_noisy",
                int(row["epoch"]),
                dict(counts),
                f"no AUC: the validation fold lacks a class{sizes}",
                advice,
            )
        counts |= {"best_auc": round(best.auc, 4), "auc": round(auc, 4), "noise": round(noise, 4)}
        return Diagnosis(
            "too_noisy",
            unclear.first,
            counts | {"drop": round(best.auc - auc, 4)},
            f"AUC {auc:.3f} after {best.auc:.3f} (epoch {best.epoch}): a drop of {best.auc - auc:.3f}, and noise alone "
            f"explains {noise:.3f}{sizes}",
            advice,
        )


HEALTHY = Diagnosis("healthy", None, {}, "nothing found", "")


class _Settings:
    """A config, its overrides or nothing, read by name; the defaults fill what is missing."""

    __slots__ = ("_given", "known")

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None) -> None:
        self.known = config is not None
        self._given = dict(config) if config is not None else {}

    def __getitem__(self, name: str) -> Any:
        return self._given[name] if name in self._given else DEFAULTS[name].default


DEFAULTS = FineTuneConfig.model_fields


def _deep(best: float) -> float:
    """Return how far below its best an AUC has lost what a collapse loses."""
    return max(SMALLEST_DROP, (1 - LARGEST_SHARE_KEPT) * (best - 0.5))


def _noise(first: float, second: float) -> float:
    """Return the difference of two AUCs of one run that noise alone explains (95 %, correlation 1/2: module docstring).

    Where one has no error, because it is no number, the other's stands for both.
    """
    if not math.isfinite(first) or not math.isfinite(second):
        first = second = first if math.isfinite(first) else second
    return 1.96 * math.hypot(first, second) / math.sqrt(2)


def _median_and_scatter(values: list[float]) -> tuple[float, float]:
    """Return the median and the robust standard deviation, 1.48 times the median distance from it; a trend is scatter."""
    median = sorted(values)[len(values) // 2]
    return median, 1.48 * sorted(abs(value - median) for value in values)[len(values) // 2]


def _number(value: Any) -> float:
    """Return `value` as a float, NaN where it is missing or no number: rows store NaN as null."""
    return float(value) if isinstance(value, int | float) else math.nan


def _auc(row: Mapping[str, Any], weights: str) -> tuple[float, float]:
    """Return an AUC of the row and its standard error, from the interval, the class counts or, without both, a guess."""
    auc = _number(row.get(f"val_auc{weights}"))
    if weights == "_ema" and "val_auc_ema" not in row:
        auc = _number(row.get("val_auc"))
    if not math.isfinite(auc):
        return math.nan, math.nan
    low, high = (
        _number(row.get(f"val_auc{weights}_low")),
        _number(row.get(f"val_auc{weights}_high")),
    )
    positive, negative = row.get("val_positive"), row.get("val_negative")
    error = (high - low) / 3.92 if math.isfinite(high - low) else math.nan
    if error >= 0.02 or not (positive and negative):
        return auc, max(error, 0.01) if math.isfinite(error) else UNKNOWN_ERROR
    formula = expected_error(auc, positive, negative)
    # Near an AUC of 1 intervals are clipped, and DeLong's, in rows of earlier versions, shrink: half the formula's at least
    return auc, max(error, formula / 2) if math.isfinite(error) else formula


def _saturates(row: Mapping[str, Any], weights: str) -> bool:
    if f"val_auc_probability_{weights}" not in row and f"val_tied_{weights}" not in row:
        return False
    auc, probability = (
        _number(row.get(f"val_auc_{weights}")),
        _number(row.get(f"val_auc_probability_{weights}")),
    )
    return (
        auc - probability > SATURATED_GAP
        or _number(row.get(f"val_tied_{weights}")) > SATURATED_TIES
    )


def _short(value: float) -> str:
    return f"{value:.2g}"
