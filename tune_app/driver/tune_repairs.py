"""What Ray and Ray Tune get wrong in a search, mended in their own objects for as long as one runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.parameter
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


@contextmanager
def lost_processes_told_once() -> Iterator[None]:
    """Let a process that dies while Tune makes it ready for its next trial cost that trial one failure, as any other does.

    Tune reports such a death twice, for the process and for the call it was in: by the first the trial is to start again,
    by the second, which finds it waiting, it ends for good, whatever its `max_failures`; and it would never have
    started, as it still counts as being made ready (`TuneController._actor_failed` and `_schedule_trial_reset`, as of
    Ray 2.60). The same holds for an error in a process that is made ready, such as a folder that is gone: it is taken as
    that of a trial that runs, as Tune itself does in `_actor_failed`.
    """
    tell = TuneController._trial_task_failure

    def tell_once(controller: TuneController, trial: Trial, exception: Exception) -> None:
        if trial in controller._resetting_trials and trial.status == Trial.PENDING:
            controller._resetting_trials.discard(trial)
            if trial not in controller._trial_to_actor:
                return  # told already
            controller._set_trial_status(trial, Trial.RUNNING)
            controller._unstage_trial_with_resources(trial)
        tell(controller, trial, exception)

    TuneController._trial_task_failure = tell_once
    try:
        yield
    finally:
        TuneController._trial_task_failure = tell


@contextmanager
def processes_named(name: Callable[[Trial], str]) -> Iterator[None]:
    """Have Ray show `name(trial)` while a process works on that trial: as the name of its tasks, and as its title.

    Tune gives its calls no name (`TuneController._schedule_trial_task`, as of Ray 2.60), and Ray then shows the names of a
    class and a method. Ray asks a process for its own name only once, and trials follow each other in one process.
    """
    schedule = TuneController._schedule_trial_task

    def schedule_named(controller: TuneController, trial: Trial, *args: Any, **options: Any) -> Any:
        live = controller._actor_manager._live_actors_to_ray_actors_resources
        tracked = controller._trial_to_actor[trial]
        if tracked not in live:  # lost: Tune schedules nothing
            return schedule(controller, trial, *args, **options)
        actor, resources = live[tracked]
        live[tracked] = _NamedCalls(actor, name(trial)), resources
        try:
            return schedule(controller, trial, *args, **options)
        finally:
            live[tracked] = actor, resources

    TuneController._schedule_trial_task = schedule_named
    try:
        yield
    finally:
        TuneController._schedule_trial_task = schedule


class _NamedCalls:
    """An actor whose methods are called under a name."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name

    def __getattr__(self, method: str) -> Any:
        return getattr(self._actor, method).options(name=self._name)


@contextmanager
def agent_on_a_free_port() -> Iterator[None]:
    """Let the agent of a Ray that is started in the block listen on a free port.

    `ray.init` has no option for it: it takes 52365, and a head that is started later on the same machine then has no
    agent that runs jobs (as of Ray 2.60).
    """
    parameters = ray._private.parameter.RayParams

    def with_a_free_port(**fields: Any) -> Any:
        return parameters(**{"dashboard_agent_listen_port": 0, **fields})

    ray._private.parameter.RayParams = with_a_free_port
    try:
        yield
    finally:
        ray._private.parameter.RayParams = parameters
