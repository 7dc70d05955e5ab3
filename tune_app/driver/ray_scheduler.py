"""The stopping policy behind Ray Tune's scheduler interface. Apart from `scheduler.py` because importing Ray takes seconds.

Nothing of it is saved or restored by Ray: `Tuner.restore` loses a scheduler's rungs. Each start of a search gives it a
`Policy` that has replayed the study's epochs.jsonl.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.result import (
    AUTO_RESULT_KEYS,
    DEBUG_METRICS,
    DEFAULT_EXPERIMENT_INFO_KEYS,
    DONE,
    SHOULD_CHECKPOINT,
)
from ray.tune.schedulers.trial_scheduler import FIFOScheduler, TrialScheduler

from trainables.checkpoints import without_nonfinite
from trainables.ray_trainable import FATAL
from tune_app.study.policy import Decision, Policy, stop_reason

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

RAYS_OWN = {
    *AUTO_RESULT_KEYS,
    *DEBUG_METRICS,
    *DEFAULT_EXPERIMENT_INFO_KEYS,
    DONE,
    SHOULD_CHECKPOINT,
}
"""Keys that Ray adds to a trial's report; they belong to its attempt, not to the run."""


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray is not typed
    """Starts trials in order, and stops them when `policy` decides so, or when a trial reports that its failure is final.

    A trial's Ray config holds `trial` (its id) and `overrides` (a dict of hyperparameters); `base` are the study's own,
    which the overrides go before. Each report with a new `epoch` is given to `record` first, as the row
    `{"trial", "time", **metrics}` with None for values that are not finite: a decision never rests on a row that a
    killed driver would lose. `requested` returns the request to stop a trial, in words, or None. Then `log` gets the
    decision, and `stopped` the reason of one that stops. `fatal` holds failures for good by trial; `begun` and `failed`
    get Tune's trials. `spent` returns whether no other trial must use a trial's process.
    """

    # Buffered results would be decided on in bursts, epochs after the first of them.
    _supports_buffered_results = False

    def __init__(
        self,
        policy: Policy,
        record: Callable[[dict[str, Any]], None],
        log: Callable[[Decision], None],
        base: Mapping[str, Any] | None = None,
        *,
        requested: Callable[[str], str | None] = lambda trial: None,
        begun: Callable[[Trial], object] = lambda trial: None,
        failed: Callable[[Trial], None] = lambda trial: None,
        stopped: Callable[[str, str], None] = lambda trial, reason: None,
        fatal: dict[str, str] | None = None,
        spent: Callable[[str], bool] = lambda trial: False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self._record = record
        self._log = log
        self._base = dict(base or {})
        self._requested, self._begun, self._failed = requested, begun, failed
        self._tell_stopped = stopped
        self._fatal = {} if fatal is None else fatal
        self._spent = spent

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments, for a restore that is never asked for

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept every metric and mode of Tune: the policy has its own ones."""
        self._metric = metric
        return True

    def on_trial_result(
        self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]
    ) -> str:
        """Record, decide and log a new epoch; CONTINUE for a known one, unless the trial has been stopped before."""
        name = trial_name(trial)
        self._begun(trial)
        if FATAL in result:
            self._fatal[name] = str(result[FATAL])
            return str(TrialScheduler.STOP)
        if "epoch" not in result:
            return str(TrialScheduler.CONTINUE)
        row = {
            key: value
            for key, value in result.items()
            if key not in RAYS_OWN and not key.startswith(("config/", "__"))
        }
        # Decide on what will be read again: rows are stored as JSON, which has no NaN.
        row = {"trial": name, "time": time.time(), **without_nonfinite(row)}
        new = not self.policy.known(name, int(row["epoch"]))
        if new:
            self._record(row)
        config = {**self._base, **trial.config.get("overrides", {})}
        decision = self.policy.decide(name, config, row, self._requested(name))
        if new:
            self._log(decision)
        if decision.stops:
            self._tell_stopped(name, stop_reason(decision))
        return str(TrialScheduler.STOP if decision.stops else TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]
    ) -> None:
        """Have Tune end a process that no other trial must use.

        Tune asks this just before it keeps the process for the next trial, and keeps only those that it has seen start.
        """
        super().on_trial_complete(tune_controller, trial, result)
        if self._spent(trial_name(trial)):
            tune_controller._started_actors.discard(tune_controller._trial_to_actor.get(trial))

    def on_trial_error(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Record a failure for good before the searcher does: a driver killed in between would find it settled without a reason."""
        # ERROR is set before this, not after, where the trial is going to be tried again.
        if trial.status != Trial.ERROR:
            self._failed(trial)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: epochs.jsonl is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the policy was rebuilt from epochs.jsonl."""


def trial_name(trial: Any) -> str:
    """Return the study's own name of a trial of Tune's: 00003."""
    return str(trial.config["trial"])
