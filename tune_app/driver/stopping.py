"""A driver that ends when it is asked to, or when its machine is taken away."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.requests import EVERY_S, log

INTERRUPTED, PREEMPTED = 130, 75
"""Exit codes of a driver that left a study which `medtune resume` completes: a user ended it; its machine was to be taken
away, and the same command elsewhere, or later, continues (EX_TEMPFAIL of sysexits.h)."""
STARTING = 143
"""Exit code of a driver that SIGTERM ended before its trials began: that of a process without a handler, as the driver
is while modules are loaded."""
TAKEN_AWAY = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of Slurm, Kubernetes and spot instances before they take a machine away."""
GRACE_S, USR1_GRACE_S = "MEDTUNE_GRACE_S", "MEDTUNE_USR1_GRACE_S"
"""Environment variables: seconds from such a signal until the machine is gone; the second is for SIGUSR1 alone, which
Slurm sends earlier than the SIGTERM that all processes of a job get."""
USUAL_GRACE_S = 30.0
"""Of Kubernetes (terminationGracePeriodSeconds) and Slurm (KillWait)."""
CLOSING_S = 14.0
"""The part of these seconds that the driver keeps for its own end: Ray takes some seconds."""

STOP_SIGNAL = signal.SIGUSR2
"""What interrupts the driver: Ray Tune takes SIGUSR1 for itself, and SIGINT is ignored in a process that a shell put
into the background."""


class Preempted(KeyboardInterrupt):
    """The machine is about to be taken away: everything is written, and can be continued."""


def saving_s(number: int) -> float:
    """Return the seconds that trials have to save their work after a signal of TAKEN_AWAY.

    Raises SpecError when the variable is no number of seconds.
    """
    name = USR1_GRACE_S if number == signal.SIGUSR1 and os.environ.get(USR1_GRACE_S) else GRACE_S
    given = os.environ.get(name)
    try:
        grace_s = USUAL_GRACE_S if not given else float(given)
    except ValueError:
        grace_s = -1.0
    if not 0 <= grace_s < float("inf"):
        raise SpecError([f"{name}={given}: seconds are needed, such as 120"])
    return max(0.0, grace_s - CLOSING_S)


@contextmanager
def taken_away_while_ray_starts() -> Iterator[None]:
    """Within the block, which starts or joins Ray, SIGTERM raises Preempted: Ray has its own handler, which exits with 15."""
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise Preempted(signal.SIGTERM) from None
        raise


def exit_code_at_start(error: KeyboardInterrupt) -> int:
    """Return the exit code of a command that was interrupted before its trials began."""
    if not isinstance(error, Preempted):
        return INTERRUPTED
    return STARTING if error.args == (signal.SIGTERM,) else PREEMPTED


@contextmanager
def stopping_on_request(files: StudyFiles) -> Iterator[None]:
    """Within the block, a request to stop the study interrupts the main thread as Ctrl-C would.

    Wherever that is: preparing volumes, waiting for resources, training. A request that is there at the start is void:
    the session it was meant for is over. Outside the main thread, where Python takes no signals, requests
    to stop the study wait.
    """
    for number in TAKEN_AWAY:
        saving_s(number)  # an error must be raised now
    files.stop_request.unlink(missing_ok=True)
    files.hurry.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    before = {number: signal.signal(number, _interrupt) for number in (STOP_SIGNAL, *TAKEN_AWAY)}
    watcher = threading.Thread(
        target=_watch, args=(files.stop_request, ended), name="stop-request", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        files.stop_request.unlink(missing_ok=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Preempted(number) if number in TAKEN_AWAY else KeyboardInterrupt


def _watch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        if path.exists():
            log.warning("%s: asked to stop", path)
            path.unlink(missing_ok=True)
            if not ended.is_set():
                os.kill(os.getpid(), STOP_SIGNAL)
            return
