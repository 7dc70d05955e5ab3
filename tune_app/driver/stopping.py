"""A driver that ends when it is asked to."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tune_app.study.files import StudyFiles
from tune_app.study.requests import EVERY_S, log

STOP_SIGNAL = signal.SIGUSR2
"""What interrupts the driver: Ray Tune takes SIGUSR1 for itself, and SIGINT is ignored in a process that a shell put
into the background."""


@contextmanager
def stopping_on_request(files: StudyFiles) -> Iterator[None]:
    """Within the block, a request to stop the study interrupts the main thread as Ctrl-C would.

    Wherever that is: preparing volumes, waiting for resources, training. A request that is there at the start is void:
    the session it was meant for is over. Outside the main thread, where Python takes no signals, requests
    to stop the study wait.
    """
    files.stop_request.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    before = signal.signal(STOP_SIGNAL, _interrupt)
    watcher = threading.Thread(
        target=_watch, args=(files.stop_request, ended), name="stop-request", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        signal.signal(STOP_SIGNAL, before)
        files.stop_request.unlink(missing_ok=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        if path.exists():
            log.warning("%s: asked to stop", path)
            path.unlink(missing_ok=True)
            if not ended.is_set():
                os.kill(os.getpid(), STOP_SIGNAL)
            return
