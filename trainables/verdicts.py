"""The verdicts on a run: one small class each, with the thresholds it goes by.

`follow()` takes in the course's row at hand, `found()` returns the diagnosis when the verdict applies by now.
"""

import math
from collections.abc import Mapping
from typing import Any

from trainables.course import (
    Course,
    Diagnosis,
    Evidence,
    Streak,
    class_sizes,
    noise_of,
    number,
)
from trainables.errors import those_that_hold


class Rule:
    """One verdict on a run, with its memory of the rows."""

    def __init__(self, course: Course, drop: "Drop") -> None:
        self.course, self.drop = course, drop

    def follow(self) -> None:
        """Take in the row at hand."""

    def found(self) -> Diagnosis | None:
        """Return the diagnosis as of the row at hand, None where the verdict does not apply."""
        raise NotImplementedError

    def divided(self, name: str, by: int) -> str:
        """Return the change of a hyperparameter to a fraction of its value."""
        return f"{name}={short(self.course.setting[name] / by)}"


def advice_of(changes: Mapping[str, object]) -> str:
    """Return the advice to make the changes whose condition is true."""
    return "set " + ", ".join(those_that_hold(changes))


def finite(value: float) -> float | str:
    """Return a score as evidence has it: rounded, or `not finite`."""
    return round(value, 4) if math.isfinite(value) else "not finite"


CONFIRMING_EPOCHS = 3
"""Epochs in a row that must agree before a drop or a lag counts: raw networks dip for one epoch, and for two, and recover."""

SMALLEST_DROP = 0.08
"""AUC; a smaller loss is no collapse, however large the validation set."""

LARGEST_SHARE_KEPT = 2 / 3
"""A collapsed run has lost at least a third of its AUC above chance: .92 -> .85 is overfitting, .72 -> .60 is not."""


def collapse_depth(best: float) -> float:
    """Return the drop below the best AUC from which a fall is a collapse."""
    return max(SMALLEST_DROP, (1 - LARGEST_SHARE_KEPT) * (best - 0.5))


SMALLEST_SUDDEN_DROP = 0.1
"""AUC; a drop within a few epochs from where the run stood counts from here on, ..."""

USUAL_EPOCHS = 10
"""... against the median of this number of epochs before it, ..."""

SCATTERS = 3.0
"""... if it exceeds the scatter of those epochs by this factor: epochs of one run are scored on the same volumes, so that a
sharp fall from a steady course is real even where the interval of each AUC is wider."""

SHARE_REGAINED = 1 / 3
"""Of the lost AUC; a run that has regained this much is recovering, and its epochs confirm no collapse."""

LONGEST_WAIT = 2
"""Epochs in a row on the way back that a beginning collapse is kept in mind for."""


class Drop:
    """How far the deployed AUC is below its best median, and below its usual level before."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.below, self.unclear = Streak(), Streak()
        self.noise = 0.0
        self.usual = self.scatter = math.inf
        self._lowest = math.inf
        self._waited = 0
        self._before: list[float] = []

    def follow(self) -> None:
        """Compare with the best median of the epochs before: call it before the course adds the row."""
        epoch, best = self.course.epoch, self.course.deployed.best
        auc = self.course.auc if math.isfinite(self.course.auc) else -math.inf
        if not self.course.learned():
            self.below.count(epoch, False)
            self.unclear.count(epoch, False)
        else:
            drop, deep = best.auc - auc, collapse_depth(best.auc)
            self.noise = noise_of(best.error, self.course.error)
            depth = self._depth(drop, deep, auc)
            # No AUC and one below chance are worth as much as chance: from there a run has come back, or it has not
            known = max(auc, 0.5)
            self._lowest = min(self._lowest, known) if self.below.length else known
            returning = known - self._lowest > SHARE_REGAINED * (best.auc - self._lowest)
            # Part of the way back counts for neither side: noise must not hide a collapse, or a recovery become one
            if (
                self.below.length
                and depth > 0.5
                and (returning or depth <= 1)
                and self._waited < LONGEST_WAIT
            ):
                self._waited += 1
            else:
                self._waited = 0
                self.below.count(epoch, depth > 1 and not returning)
            self.unclear.count(epoch, drop > deep)
        self._follow_usual(auc)

    def _depth(self, drop: float, deep: float, auc: float) -> float:
        """The drop in units of one that is a collapse: below the best AUC, or suddenly below the usual level."""
        depth = drop / max(deep, self.noise)
        if math.isinf(self.scatter):
            return depth
        sudden = max(SMALLEST_SUDDEN_DROP, deep, SCATTERS * self.scatter)
        return max(depth, min(drop / deep, (self.usual - auc) / sudden))

    def _follow_usual(self, auc: float) -> None:
        """Take in an AUC that is not part of a fall as one of the usual ones."""
        if not self.below.length and math.isfinite(auc):
            self._before.append(auc)
            del self._before[:-USUAL_EPOCHS]
            if len(self._before) == USUAL_EPOCHS:
                self.usual, self.scatter = _median_and_scatter(self._before)


def _median_and_scatter(values: list[float]) -> tuple[float, float]:
    """Return the median and the robust standard deviation, 1.48 times the median distance from it; a trend is scatter."""
    median = sorted(values)[len(values) // 2]
    return median, 1.48 * sorted(abs(value - median) for value in values)[len(values) // 2]


class NonFinite(Rule):
    """The run itself is broken: not only its average, and not for want of a class to compare with.

    Two epochs in a row, or one whose loss is not finite either: a single overflow in half precision recovers.
    """

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        self._broken = Streak()
        self._updates = 0.0

    def follow(self) -> None:
        course = self.course
        stuck = False
        if isinstance(course.row.get("updates"), int | float):
            stuck = bool(course.row.get("skipped_updates")) and course.updates <= self._updates
            self._updates = course.updates
        auc = course.raw if "val_auc_raw" in course.row else course.auc
        unscored = not math.isfinite(auc) and not course.one_class
        self._broken.count(course.epoch, unscored or stuck)

    def found(self) -> Diagnosis | None:
        row = self.course.row
        streak = self._broken
        loss_lost = "train_loss" in row and not math.isfinite(number(row["train_loss"]))
        if not streak.length or (streak.length < 2 and not loss_lost):
            return None
        evidence: Evidence = {"epochs": streak.length}
        for name in ("skipped_updates", "val_nonfinite_raw", "grad_norm_max"):
            if math.isfinite(number(row.get(name))):
                evidence[name] = row[name]
        lost = "scores and training loss are" if loss_lost else "scores are"
        setting = self.course.setting
        changes = {
            "amp=bf16 (or off)": setting["amp"] == "fp16",
            self.divided("backbone_lr", 3): True,
            self.divided("classifier_lr", 3): True,
            "grad_clip=1.0": not 0 < setting["grad_clip"] <= 1,
        }
        return Diagnosis(
            "non_finite",
            streak.first,
            evidence,
            f"not finite since epoch {streak.first} ({streak.length} epochs): {lost} NaN or infinite, or no update went through",
            advice_of(changes),
        )


SMALLEST_LAG = 0.06
"""AUC by which the raw weights must lead the averaged ones."""

LAG_PATIENCE = 10
"""Epochs, or a third of the run if that is more, that an average which never caught up is given before the lag is settled:
without warm-up it starts at chance, and mostly gets there."""

CARRIED_TO_THE_END = 0.5
"""Share of the initial weights in the last epoch's average above which a lag is settled at once: measured averages came
back when the share fell to between 40 and 20 %."""


class EmaLag(Rule):
    """The averaged weights are far behind sound raw ones."""

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        self._lag = Streak()
        self._caught_up = False
        self._patience = max(LAG_PATIENCE, math.ceil(course.setting["epochs"] / 3))

    def follow(self) -> None:
        course, row = self.course, self.course.row
        raw, raw_error, ema, ema_error = course.raw, course.raw_error, course.ema, course.ema_error
        lags = False
        both = "val_auc_raw" in row and ("val_auc_ema" in row or "val_auc" in row)
        # an average lags by one or two epochs anyway
        if both and math.isfinite(raw) and course.epoch > 2:
            if not math.isfinite(ema):
                lags = True
            else:
                far = max(
                    SMALLEST_LAG,
                    (1 - LARGEST_SHARE_KEPT) * (raw - 0.5),
                    noise_of(raw_error, ema_error),
                )
                lags = raw - 1.96 * raw_error > 0.5 and raw - ema > far
                if not lags and ema - 1.96 * ema_error > 0.5:
                    self._caught_up = True
        self._lag.count(course.epoch, lags)

    def found(self) -> Diagnosis | None:
        raw, ema, lag = self.course.raw, self.course.ema, self._lag
        # A drop of the deployed AUC that is confirmed while the raw weights lead is the average's, too
        fell = self.drop.below.length >= CONFIRMING_EPOCHS
        if lag.length < CONFIRMING_EPOCHS and not (lag.length and fell):
            return self._returns(raw, ema) if fell and not lag.length else None
        carried = self._carried()
        # A non-finite average is not warming up, and one that stays mostly initial weights to the end has no time to
        lost = (
            math.isfinite(carried)
            and carried ** (self.course.setting["epochs"] / self.course.epoch) > CARRIED_TO_THE_END
        )
        settled = fell or lost or lag.length >= self._patience or not math.isfinite(ema)
        return Diagnosis(
            "ema_lag",
            lag.first,
            self._evidence(carried),
            self._summary(carried, fell=fell, settled=settled),
            self._quicker_average(),
            settled,
        )

    def _summary(self, carried: float, *, fell: bool, settled: bool) -> str:
        epoch, raw, ema, lag = self.course.epoch, self.course.raw, self.course.ema, self._lag
        read = f"{ema:.3f}" if math.isfinite(ema) else "no finite score"
        what = "fell behind" if self._caught_up or fell else "never caught up with"
        summary = (
            f"averaged weights {what} the raw ones: {read} against {raw:.3f} at epoch {epoch}, "
            f"apart since epoch {lag.first} ({lag.length} epochs); the raw network is sound"
        )
        if carried > 0.05:
            summary += f", the average still carries {carried:.0%} of the initial weights"
        return summary if settled else f"{summary}; it may still catch up"

    def _carried(self) -> float:
        """The share of the initial weights in the average; NaN where the decay warms up or updates are not counted."""
        if not self.course.updates or self.course.setting["ema_warmup"]:
            return math.nan
        carried: float = self.course.setting["ema_decay"] ** self.course.updates
        return carried

    def _evidence(self, carried: float) -> Evidence:
        row, raw, ema = self.course.row, self.course.raw, self.course.ema
        best = self.course.deployed.best
        evidence: Evidence = {
            "auc_raw": round(raw, 4),
            "epochs": self._lag.length,
            "auc_ema": finite(ema),
        }
        if math.isfinite(ema):
            evidence["lead_of_raw"] = round(raw - ema, 4)
        if self._caught_up:
            evidence |= {"best_auc": round(best.auc, 4), "best_epoch": best.epoch}
        if math.isfinite(carried):
            evidence["initial_weight"] = round(carried, 4)
        for name in ("val_logit_gap_ema", "val_auc_probability_ema"):
            if math.isfinite(number(row.get(name))):
                evidence[name] = round(float(row[name]), 4)
        return evidence

    def _returns(self, raw: float, ema: float) -> Diagnosis | None:
        """The average, which fell behind a sound network, is near it again, and still below its earlier level."""
        best, below = self.course.raw_level.best, self.drop.below
        if (
            self.course.fall is None
            or "ema_lag" not in self.course.fall.names
            or not raw > best.auc - collapse_depth(best.auc)
        ):
            return None
        before = self.course.deployed.best
        return Diagnosis(
            "ema_lag",
            self.course.fall.first,
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
        decay = float(self.course.setting["ema_decay"])
        lower = 0.995 if decay > 0.995 else 0.98
        if decay <= 0.98:
            lower = max(0.0, round(1 - 4 * (1 - decay), 4))
        changes = {
            "ema_buffers=averaged": self.course.setting["ema_buffers"] == "copied",
            "ema_warmup=true": not self.course.setting["ema_warmup"],
        }
        changes[f"ema_decay={lower:g}"] = decay > 0.98 or not any(changes.values())
        return advice_of(changes)


DRW_WINDOW = 8
"""Epochs after the start of the deferred weights in which the beginning of a collapse is put down to them."""


class Collapsed(Rule):
    """The deployed AUC fell, and stays down; attributed to the class weights where they had just started."""

    def found(self) -> Diagnosis | None:
        auc = self.course.auc
        below = self.drop.below
        if below.length < CONFIRMING_EPOCHS:
            return None
        best = self.course.deployed.best
        drop = best.auc - auc
        evidence: Evidence = {
            "best_auc": round(best.auc, 4),
            "best_epoch": best.epoch,
            "auc": finite(auc),
            "epochs": below.length,
            "noise": round(self.drop.noise, 4),
        }
        read, usual = self._read(drop)
        evidence |= usual
        if math.isfinite(auc):
            evidence["drop"] = round(drop, 4)
        summary = (
            f"validation AUC fell from {best.auc:.3f} (epoch {best.epoch}) to {read}, "
            f"below it since epoch {below.first} ({below.length} epochs)"
        )
        setting = self.course.setting
        start = self.course.drw.epoch
        if (
            start is not None
            and start <= below.first <= start + DRW_WINDOW
            and best.epoch <= start + 1
        ):
            evidence["drw_start_epoch"] = start
            late = round(0.8 * setting["epochs"])
            later = {
                f"drw_start_epoch={late if late > start else start + 10}": True,
                "drw_beta=0.99": setting["drw_beta"] > 0.99,
                self.divided("backbone_lr", 2): True,
            }
            return Diagnosis(
                "collapsed_after_drw",
                below.first,
                evidence,
                f"{summary}; the deferred weights began at epoch {start}",
                advice_of(later),
            )
        ldam = setting["loss"] == "ldam"
        changes = {
            self.divided("backbone_lr", 2): True,
            "max_m=0.2": ldam and setting["max_m"] > 0.2,
            "s=15": ldam and setting["s"] > 15,
            "ema_buffers=averaged": setting["ema_buffers"] == "copied",
            "warmup_epochs=3": not setting["warmup_epochs"],
            "freeze_backbone_epochs=5": not setting["freeze_backbone_epochs"],
        }
        return Diagnosis("collapsed", below.first, evidence, summary, advice_of(changes))

    def _read(self, drop: float) -> tuple[str, Evidence]:
        """The score in words, and the usual level where the words compare with it."""
        auc, noise = self.course.auc, self.drop.noise
        usual, scatter = self.drop.usual, self.drop.scatter
        if not math.isfinite(auc):
            return "no finite score", {}
        if drop > noise:
            return f"{auc:.3f}, {drop / noise:.1f} times what noise explains", {}
        if math.isinf(scatter):  # the epochs before had no score, or were too few for a usual level
            return f"{auc:.3f}, which is within noise but no recovery", {}
        known: Evidence = {"usual_auc": round(usual, 4), "scatter": round(scatter, 4)}
        return f"{auc:.3f}, a sharp fall from a steady {usual:.3f} +- {scatter:.3f}", known


SATURATED_GAP = 0.05
"""AUC lost when it is computed from probabilities instead of logits: the same ranking, so any real gap is saturation."""

SATURATED_TIES = 0.25
"""Share of scores tied with another one, which float32 logits of distinct volumes hardly ever are."""


class Saturated(Rule):
    """Scores are tied, or lose their ranking as probabilities."""

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        self._saturated = Streak()

    def follow(self) -> None:
        self._saturated.count(
            self.course.epoch,
            any(saturates(self.course.row, weights) for weights in ("raw", "ema")),
        )

    def found(self) -> Diagnosis | None:
        streak, setting = self._saturated, self.course.setting
        if streak.length < 2:
            return None
        evidence: Evidence = {"epochs": streak.length}
        parts = [
            f"{name} weights: {self._signs(weights, evidence)}"
            for weights, name in (("raw", "raw"), ("ema", "averaged"))
            if saturates(self.course.row, weights)
        ]
        changes = {
            "head=cosine": setting["head"] == "linear",
            f"s={15 if setting['s'] > 15 else 10}": setting["s"] > 10 and setting["loss"] == "ldam",
            "ema_buffers=averaged": setting["ema_buffers"] == "copied",
        }
        changes[self.divided("classifier_lr", 3)] = not any(changes.values())
        return Diagnosis(
            "saturated",
            streak.first,
            evidence,
            f"scores saturate since epoch {streak.first}: {'; '.join(parts)}",
            f"{advice_of(changes)}; rank by logits, not by this run's probabilities",
        )

    def _signs(self, weights: str, evidence: Evidence) -> str:
        """The signs that one network's scores are saturated, in words; their numbers are added to `evidence`."""
        row, signs = self.course.row, []
        logits, probabilities = (
            number(row.get(f"val_auc_{of}{weights}")) for of in ("", "probability_")
        )
        tied = number(row.get(f"val_tied_{weights}"))
        if math.isfinite(probabilities) and math.isfinite(logits):
            evidence[f"auc_{weights}"] = round(logits, 4)
            evidence[f"auc_probability_{weights}"] = round(probabilities, 4)
            signs.append(f"AUC {probabilities:.3f} from probabilities, {logits:.3f} from logits")
        if math.isfinite(tied):
            evidence[f"tied_{weights}"] = round(tied, 4)
            signs.append(f"{tied:.0%} of scores tied")
        return ", ".join(signs)


def saturates(row: Mapping[str, Any], weights: str) -> bool:
    if f"val_auc_probability_{weights}" not in row and f"val_tied_{weights}" not in row:
        return False
    auc, probability = (
        number(row.get(f"val_auc_{weights}")),
        number(row.get(f"val_auc_probability_{weights}")),
    )
    return (
        auc - probability > SATURATED_GAP or number(row.get(f"val_tied_{weights}")) > SATURATED_TIES
    )


NEVER_LEARNED_EPOCHS = 10
"""Epochs of full training before chance level counts as a finding, or a quarter of the run if that is more."""

CHANCE_BAND = 0.6
"""AUC; a run whose best 3-epoch median stays below has not learned anything of use."""


class NeverLearned(Rule):
    """No better than chance after epochs enough, on training volumes neither."""

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        setting = course.setting
        self._held_back = setting["freeze_backbone_epochs"] + math.ceil(setting["warmup_epochs"])
        self._time_to_learn = max(
            NEVER_LEARNED_EPOCHS, setting["epochs"] / 4 if setting.known else 0
        )
        self._best_train_auc = -math.inf

    def follow(self) -> None:
        train = number(self.course.row.get("train_auc"))
        self._best_train_auc = max(self._best_train_auc, train)

    def found(self) -> Diagnosis | None:
        epoch = self.course.epoch
        trained = epoch - self._held_back
        if trained < self._time_to_learn:
            return None
        setting = self.course.setting
        best = (
            self.course.raw_level.best
            if self.course.raw_level.best.auc > self.course.deployed.best.auc
            else self.course.deployed.best
        )
        train = self._best_train_auc
        # Learned, if only by heart: that is another finding. And chance must be distinguishable from a useful run at all.
        if best.auc >= CHANCE_BAND or train >= 0.75 or best.auc + 1.96 * best.error > 0.85:
            return None
        evidence: Evidence = {
            "best_auc": finite(best.auc),
            "best_epoch": best.epoch,
            "error": round(best.error, 4),
            "epochs": epoch,
        }
        if math.isfinite(train):
            evidence["train_auc"] = round(train, 4)
        changes = {
            "pretrained_path=<a MedicalNet file>": setting.known and not setting["pretrained_path"],
            f"backbone_lr={short(setting['backbone_lr'] * 3)}": True,
            f"classifier_lr={short(setting['classifier_lr'] * 3)}": True,
        }
        reached = "is no number"
        if math.isfinite(best.auc):
            reached = f"{best.auc:.3f} +- {1.96 * best.error:.3f}"
        return Diagnosis(
            "never_learned",
            1,
            evidence,
            f"not above chance in {epoch} epochs: best 3-epoch median {reached}",
            "look at labels, `spacing_mm`, `intensity` and `volume_shape` with `medtune data check` first, which costs no "
            f"training; then {advice_of(changes)}",
            settled=trained >= 2 * self._time_to_learn,
        )


GAP = 0.15
"""AUC by which the training volumes lead the validation volumes, beyond the interval, in an overfitted run."""


class TrainValidationGap(Rule):
    """Training volumes are ranked far better than validation volumes.

    Five epochs in a row without a new best: a gap that closes without a change is training, not overfitting.
    """

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        self._gap = Streak()

    def follow(self) -> None:
        auc, error = self.course.sound_auc, self.course.error
        train = number(self.course.row.get("train_auc"))
        wide = (
            math.isfinite(train)
            and math.isfinite(auc)
            and train - auc > GAP
            and train > auc + 1.96 * error
        )
        self._gap.count(self.course.epoch, wide)

    def found(self) -> Diagnosis | None:
        row, auc = self.course.row, self.course.sound_auc
        gap = self._gap
        best = (
            self.course.raw_level.best
            if math.isfinite(self.course.raw_level.best.auc)
            else self.course.deployed.best
        )
        if gap.length < 5 or int(row["epoch"]) - best.epoch < 5:
            return None
        train = float(row["train_auc"])
        setting = self.course.setting
        changes = {
            "dropout=0.5": setting["dropout"] < 0.5,
            "augmentation_strength=1.5": setting["augmentation_strength"] < 1.5,
            f"weight_decay={short(max(10 * setting['weight_decay'], 1e-4))}": True,
            "freeze_backbone_epochs=5": not setting["freeze_backbone_epochs"],
        }
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
            advice_of(changes),
        )


LOSS_SPIKE_FACTOR = 3.0
"""Training loss against the median of the epochs before."""


class LossSpike(Rule):
    """The training loss jumped."""

    def __init__(self, course: Course, drop: Drop) -> None:
        super().__init__(course, drop)
        self._losses: list[float] = []
        self._spike: tuple[int, float, float] | None = None
        self._epochs_since_spike = 0

    def follow(self) -> None:
        epoch, row = self.course.epoch, self.course.row
        if self.course.drw_begins:
            self._losses.clear()  # the loss is on another scale from here on
        if "train_loss" not in row:
            return
        loss = number(row["train_loss"])
        usual = sorted(self._losses)[len(self._losses) // 2] if self._losses else math.nan
        if not math.isfinite(loss) or (
            len(self._losses) >= 3 and loss > LOSS_SPIKE_FACTOR * usual > 0
        ):
            if self._spike is None or self._epochs_since_spike:
                self._spike = (epoch, loss, usual)
            self._epochs_since_spike = 0
        else:
            self._epochs_since_spike += 1
            self._losses.append(loss)  # a spike does not become the usual
            del self._losses[:-5]
            if self._epochs_since_spike >= 5:
                self._spike = None

    def found(self) -> Diagnosis | None:
        if self._spike is None:
            return None
        epoch, loss, usual = self._spike
        evidence: Evidence = {"loss": finite(loss)}
        if math.isfinite(usual):
            evidence["usual_loss"] = round(usual, 4)
        times = (
            f"{loss / usual:.1f} times the median {usual:.3g} of the epochs before"
            if math.isfinite(loss)
            else "not finite"
        )
        setting = self.course.setting
        changes = {
            self.divided("backbone_lr", 2): True,
            "grad_clip=1.0": not 0 < setting["grad_clip"] <= 1,
            "warmup_epochs=3": not setting["warmup_epochs"],
        }
        summary = f"training loss {times} at epoch {epoch}"
        return Diagnosis("loss_spike", epoch, evidence, summary, advice_of(changes))


class TooNoisy(Rule):
    """The fold is too small to distinguish a fall from noise, or lacks a class."""

    def found(self) -> Diagnosis | None:
        row, auc, one_class = self.course.row, self.course.auc, self.course.one_class
        best, noise = self.course.deployed.best, self.drop.noise
        unclear = self.drop.unclear
        if not one_class and (unclear.length < 5 or not best.auc - auc <= noise):
            return None
        positive, negative, unit = class_sizes(row)
        counts: Evidence = {}
        sizes = ""
        if positive is not None and negative is not None:
            counts = {"positive": positive, "negative": negative}
            sizes = f" with {positive} positive and {negative} negative {unit}"
        advice = (
            f"set num_folds={max(2, min(3, int(self.course.setting['num_folds']) - 1))} for a larger validation fold, and compare "
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


IN_ORDER: tuple[type[Rule], ...] = (
    NonFinite,
    EmaLag,
    Collapsed,
    Saturated,
    NeverLearned,
    TrainValidationGap,
    LossSpike,
    TooNoisy,
)
"""A run gets the first that applies."""


def short(value: float) -> str:
    return f"{value:.2g}"
