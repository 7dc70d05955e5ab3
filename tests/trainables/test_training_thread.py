"""Tests for the thread in which all trials of a process train."""

import contextlib
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainables import ray_trainable
from trainables.ray_trainable import TrialSetting, run_trial
from trainables.training_thread import in_training_thread


def from_another_thread(function: Callable[[], Any]) -> Any:
    """Call it as Ray Tune calls a trial: in a thread that did not exist before and ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_all_callers_share_one_thread() -> None:
    seen = {from_another_thread(lambda: in_training_thread(threading.get_ident)) for _ in range(3)}
    seen |= {in_training_thread(threading.get_ident)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_callers_at_the_same_time_are_served_one_after_the_other_by_one_thread() -> None:
    running: list[int] = []

    def alone(number: int) -> tuple[int, int]:
        running.append(number)
        assert len(running) == 1
        assert running.pop() == number
        return number, threading.get_ident()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: in_training_thread(alone, number), range(64)))
    assert [number for number, _ in answers] == list(range(64))
    assert len({thread for _, thread in answers}) == 1


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(0), KeyboardInterrupt()])
def test_what_it_raises_reaches_the_caller_and_it_works_on(error: BaseException) -> None:
    def fail() -> None:
        raise error

    before = in_training_thread(threading.get_ident)
    with pytest.raises(type(error)):
        in_training_thread(fail)
    assert in_training_thread(threading.get_ident) == before


def test_a_trial_that_was_ended_leaves_nothing_in_memory() -> None:
    class Network:
        """Stands for what fills a GPU."""

    held: list[weakref.ref[Network]] = []

    def train() -> None:
        network = Network()
        held.append(weakref.ref(network))
        sys.exit(0)

    gc.collect()
    gc.disable()  # objects in a reference cycle would live until the collector runs, and the next trial would not fit
    try:
        with contextlib.suppress(SystemExit):
            in_training_thread(train)
        assert held[0]() is None
    finally:
        gc.enable()


def test_the_thread_does_not_wait_for_itself() -> None:
    with pytest.raises(RuntimeError, match="cannot wait for itself"):
        in_training_thread(in_training_thread, threading.get_ident)


def test_trials_of_a_process_train_in_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or torch, which keeps cuDNN's algorithms for each thread, would look for them again in each trial."""
    threads: list[int] = []

    def run(trial: object, setting: object, files: object, alive: object) -> None:
        threads.append(threading.get_ident())
        logging.getLogger("medtune.trial").info("trained")

    monkeypatch.setattr(ray_trainable, "_run", run)
    setting = TrialSetting(study=str(tmp_path), table="", cohort="")
    for name in ("00000", "00001"):
        from_another_thread(lambda name=name: run_trial({"trial": name, "overrides": {}}, setting))  # type: ignore[misc]
        assert "trained" in (tmp_path / "trials" / name / "trial.log").read_text()
    assert len(set(threads)) == 1
