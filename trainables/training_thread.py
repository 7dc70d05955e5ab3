"""One thread of a process in which all its trials train, one after the other.

Ray Tune runs each trial in a new thread. What torch finds out about a GPU's convolutions (the fastest algorithm for
each shape, by trying) it keeps for each thread, since cuDNN's execution plans are not safe to share: in a process that
is used again, each trial would try all forward algorithms again. The backward pass has no such problem, as its thread
belongs to the device and stays.
"""

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

NAME = "medtune-training"

P = ParamSpec("P")
T = TypeVar("T")


class KeptThread:
    """A thread that serves one call after the other, from the first until its process ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have `function(*args, **kwargs)` called after all that was asked before."""
        with self._starting:
            if self._thread is None:
                # A daemon, as Ray's own are: a process ends although a trial in it still waits for the signal to continue
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()
        future: Future[T] = Future()
        self._calls.put((functools.partial(function, *args, **kwargs), future))
        return future

    def is_current(self) -> bool:
        """Whether the caller is in this thread."""
        return threading.current_thread() is self._thread

    def _work(self) -> None:
        while True:
            _answer(*self._calls.get())


_trials = KeptThread(NAME)


def in_training_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, called in this process's training thread after all that was asked of it before.

    Its exceptions are raised here, SystemExit included, by which Ray Tune ends a trial. Waits without a limit; raises
    RuntimeError in the training thread itself, which would wait for ever.
    """
    if _trials.is_current():
        raise RuntimeError(
            f"{NAME} cannot wait for itself: call the function without in_training_thread"
        )
    future = _trials.submit(function, *args, **kwargs)
    try:
        return future.result()
    finally:
        del future  # with an exception it holds the frames of the call, and they a GPU's memory


def _answer(call: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - handled where it is raised again
        future.set_exception(error)
        del future  # the exception's traceback holds this frame
