"""When a trial continues and when it stops: asynchronous successive halving on `epoch`, and the diagnosis of each run.

`Policy` is pure: its decisions follow from the rows in the order of their arrival (and the trials' configs) alone.
A killed search is therefore rebuilt by replaying its epochs.jsonl, and a finished one can be replayed through any other
policy (`tune_app.backtest.replay`). No Ray here; `tune_app.driver.ray_scheduler` puts it behind Ray's interface.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from trainables.config import FineTuneConfig
from trainables.diagnosis import NO_FAULT, DrwStart, RunMonitor, Verdict
from trainables.objective import DEFAULT_OBJECTIVE, OBJECTIVES, RunningValue, as_number
from tune_app.study.policy_spec import COMPARED, FIRST_COMPARABLE, PolicySpec

Reason = Literal[
    "between_rungs",
    "rung",
    "finalist",
    "drw_guard",
    "halving",
    "diagnosis",
    "requested",
    "completed",
    "known",
    "stopped_before",
]
"""Why a trial continues (first four) or ends (next four; requested: a user asked for it); known: the row was there before; stopped_before: the trial has
been stopped and still reports, which happens when a search is killed between a decision and its effect."""


@dataclass(frozen=True)
class Decision:
    """The decision on one row, and its grounds."""

    trial: str
    epoch: int
    action: Literal["continue", "stop"]
    reason: Reason
    verdict: Verdict
    verdict_epoch: int | None = None
    """First epoch of the run's fault."""
    warning: bool = False
    """The verdict is to be reported: it is new, and its action is warn, or stop before it is settled."""
    summary: str = ""
    """The diagnosis in a sentence, or the rung's comparison."""
    rung: float | None = None
    """Epoch of the rung the row was compared at."""
    value: float | None = None
    """The compared value; None when it is not finite, which ranks last."""
    cutoff: float | None = None
    """The value to reach; None for the first arrival at a rung."""
    rank: int | None = None
    """1 for the best among those that had arrived at the rung, the trial itself included."""
    arrived: int | None = None
    """How many that were."""

    @property
    def stops(self) -> bool:
        return self.action == "stop"

    def as_row(self) -> dict[str, Any]:
        """Return a flat JSON-ready row of decisions.jsonl, all fields by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Policy:
    """Decisions over the trials of one study, row by row.

    `max_epochs` is the number of epochs a full trial has; `objective` names the objective whose column halving compares,
    and `mode` states whether more or less of it is better.
    """

    def __init__(
        self,
        spec: PolicySpec,
        max_epochs: int,
        mode: Literal["max", "min"] = "max",
        objective: str = DEFAULT_OBJECTIVE,
    ) -> None:
        if max_epochs < 1:
            raise ValueError(f"max_epochs={max_epochs}: a trial has at least one epoch")
        self.spec = spec
        self.metric = OBJECTIVES[objective].column
        self.max_epochs = min(max_epochs, spec.max_epochs or max_epochs)
        self._sign = 1.0 if mode == "max" else -1.0
        share = round(max_epochs * spec.first_rung_share)
        grace = spec.grace_epochs or max(FIRST_COMPARABLE, share)
        self.rungs = rung_epochs(
            min(grace, self.max_epochs), self.max_epochs, spec.reduction_factor
        )
        # Highest first: a row counts at the highest rung it has reached and the trial has not been seen at
        self._arrivals: list[tuple[float, dict[str, float]]] = [
            (rung, {}) for rung in reversed(self.rungs)
        ]
        self._trials: dict[str, _Trial] = {}

    def known(self, trial_id: str, epoch: int) -> bool:
        """Whether this epoch of this trial has been decided on: a restarted trial reports its epochs again."""
        trial = self._trials.get(trial_id)
        return trial is not None and epoch in trial.epochs

    def stopped(self) -> dict[str, Decision]:
        """Return the decision that ended each trial, of those that were ended; completed ones are among them."""
        return {
            name: trial.ended for name, trial in self._trials.items() if trial.ended is not None
        }

    def decide(
        self,
        trial_id: str,
        config: Mapping[str, Any] | None,
        row: Mapping[str, Any],
        requested: str | None = None,
    ) -> Decision:
        """Return the decision on the trial that reports this row.

        `config` holds the trial's hyperparameters (those left out have their defaults), None for a curve of unknown
        origin. A row already known changes nothing. A row of an epoch before the trial's last one (lost and reported
        late) is remembered as known and judged no further.

        `requested`: the request to stop the trial, in words; a trial that would continue after a new row is then stopped.
        The row counts at its rung as if there were no request.
        """
        epoch = int(row["epoch"])
        trial = self._trials.get(trial_id)
        if trial is None:
            trial = self._trials[trial_id] = _Trial(config, self.spec)
        if trial.ended is not None:
            ended = trial.ended
            return Decision(
                trial_id,
                epoch,
                ended.action,
                "stopped_before",
                ended.verdict,
                ended.verdict_epoch,
                summary=ended.summary,
            )
        if epoch <= trial.last_epoch:
            trial.epochs.add(epoch)
            return Decision(trial_id, epoch, "continue", "known", trial.monitor.diagnosis.verdict)
        trial.epochs.add(epoch)
        trial.last_epoch = epoch
        trial.drw.follow(epoch, row)
        value = trial.running.update(self._sign * as_number(row.get(self.metric)))
        trial.value = as_number(value)
        decision = self._decide_new(trial_id, trial, epoch, row)
        if requested is not None and not decision.stops and decision.reason != "completed":
            decision = replace(decision, action="stop", reason="requested", summary=requested)
        if decision.stops or decision.reason == "completed":
            trial.ended = decision
        return decision

    def replay(
        self, rows: Iterable[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any] | None]
    ) -> list[Decision]:
        """Decide on rows of epochs.jsonl in the order of the file; `configs` by trial, as `decide` takes them."""
        return [self.decide(row["trial"], configs.get(row["trial"]), row) for row in rows]

    def _decide_new(
        self, trial_id: str, trial: "_Trial", epoch: int, row: Mapping[str, Any]
    ) -> Decision:
        found = trial.monitor.update(row) if trial.diagnosed else NO_FAULT
        wanted = self.spec.actions[found.verdict]
        warning = wanted != "ignore" and found.verdict not in (NO_FAULT.verdict, trial.told)
        seen = Decision(
            trial_id,
            epoch,
            "continue",
            "between_rungs",
            found.verdict,
            found.epoch,
            warning,
            found.summary,
        )
        if wanted == "stop" and found.settled and epoch < min(self.max_epochs, trial.own_epochs):
            return replace(seen, action="stop", reason="diagnosis", warning=False)
        if wanted != "ignore":
            trial.told = found.verdict
        if epoch >= self.max_epochs:
            # A run in its own last epoch ends without a stop, which would kill it before it has written its last files.
            ends: Literal["continue", "stop"] = "continue" if epoch >= trial.own_epochs else "stop"
            return replace(seen, action=ends, reason="completed")
        due = self._rung_due(trial_id, epoch)
        return seen if due is None else self._at_rung(trial, *due, seen)

    def _at_rung(
        self, trial: "_Trial", rung: float, arrivals: dict[str, float], seen: Decision
    ) -> Decision:
        """Compare the row that `seen` is of at its rung, unless the trial is let alone for its class weights."""
        seen = replace(seen, rung=rung)
        start = trial.drw.epoch
        if start is not None and seen.epoch < start + self.spec.drw_guard_epochs:
            until = start + self.spec.drw_guard_epochs
            summary = f"rung {rung:g} waits for epoch {until}: class weights began at epoch {start}"
            return replace(seen, reason="drw_guard", summary=summary)
        return self._compare(trial.value, arrivals, seen)

    def _rung_due(self, trial_id: str, epoch: int) -> tuple[float, dict[str, float]] | None:
        for rung, arrivals in self._arrivals if self.spec.halving else ():
            if epoch >= rung and trial_id not in arrivals:
                return rung, arrivals
        return None

    def _compare(self, value: float, arrivals: dict[str, float], seen: Decision) -> Decision:
        cutoff = rung_cutoff(list(arrivals.values()), self.spec.reduction_factor)
        better = sum(other > value for other in arrivals.values())
        arrivals[seen.trial] = value
        reason: Reason = "rung"
        # Minus infinity is below no cutoff of minus infinity: where any trial has a value, one without ranks last.
        if (
            cutoff is not None
            and len(arrivals) >= self.spec.judge_from
            and (value < cutoff if math.isfinite(value) else better > 0)
        ):
            reason = "finalist" if self._is_finalist(seen.trial, value) else "halving"
        compared = replace(
            seen,
            action="stop" if reason == "halving" else "continue",
            reason=reason,
            value=self._shown(value),
            cutoff=self._shown(cutoff),
            rank=better + 1,
            arrived=len(arrivals),
        )
        return replace(compared, summary=self._comparison(compared))

    def _shown(self, value: float | None) -> float | None:
        """A compared value with the objective's own sign; None where it is not finite."""
        return self._sign * value if value is not None and math.isfinite(value) else None

    def _comparison(self, found: Decision) -> str:
        """The comparison at a rung in words."""
        shown = "no finite value"
        if found.value is not None:
            shown = f"{self.spec.compared} {self.metric} {found.value:.4f}"
        if found.arrived == 1:
            return f"first at rung {found.rung:g} with {shown}"
        limit = "no cutoff" if found.cutoff is None else f"cutoff {found.cutoff:.4f}"
        text = f"rank {found.rank} of {found.arrived} at rung {found.rung:g}: {shown}, {limit}"
        if found.reason == "finalist":
            text += f"; among the {self.spec.finalists} best of all trials so far"
        return text

    def _is_finalist(self, trial_id: str, value: float) -> bool:
        """Whether fewer than `finalists` other trials have a better compared value by now, stopped ones included."""
        if not self.spec.finalists or not math.isfinite(value):
            return False
        better = sum(
            trial.value > value for name, trial in self._trials.items() if name != trial_id
        )
        return better < self.spec.finalists


def rung_epochs(grace: int, max_epochs: int, reduction_factor: float) -> list[float]:
    """Return the rungs' epochs, grace * reduction_factor^k below or at `max_epochs`, ascending; counted as Ray counts."""
    count = int(np.log(max_epochs / grace) / np.log(reduction_factor) + 1)
    return [grace * reduction_factor**k for k in range(count)]


def rung_cutoff(values: list[float], reduction_factor: float) -> float | None:
    """Return the value that is needed to be in the top 1 / reduction_factor: a linearly interpolated percentile.

    None for no values. Minus infinity stands for values that are not finite; where the percentile falls next to one it
    is minus infinity, too: there is nothing to interpolate with, and no trial is stopped by one without a value.
    """
    if not values:
        return None
    percent = (1 - 1 / reduction_factor) * 100
    finite = [value for value in values if value > -math.inf]
    if len(finite) == len(values):
        return float(np.percentile(values, percent))
    position = (len(values) - 1) * percent / 100
    ordered = np.sort(np.asarray(values))
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return (
        float(low + (high - low) * (position - math.floor(position)))
        if math.isfinite(low)
        else -math.inf
    )


class _Trial:
    """The policy's memory of one trial."""

    def __init__(self, config: Mapping[str, Any] | None, spec: PolicySpec) -> None:
        self.epochs: set[int] = set()
        self.last_epoch = 0
        self.ended: Decision | None = None
        self.running = RunningValue(COMPARED[spec.compared])
        self.value = -math.inf
        self.told: Verdict = NO_FAULT.verdict
        self.diagnosed = any(action != "ignore" for action in spec.actions.values())
        self.monitor = RunMonitor(config)
        known = config or {}
        self.own_epochs = int(known.get("epochs", FineTuneConfig.model_fields["epochs"].default))
        self.drw = DrwStart(config)


def stop_reason(decision: Decision) -> str:
    """Return why the trial was stopped, in a line; nothing for one that reached its end."""
    return f"{decision.reason}: {decision.summary}" if decision.stops else ""
