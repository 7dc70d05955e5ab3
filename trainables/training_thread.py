"""One thread of a process in which all its trials train, one after the other.

Ray Tune runs each trial in a thread of its own. What torch finds out about a GPU's convolutions (the fastest algorithm for
each shape, by trying) it keeps for each thread, since cuDNN's execution plans are not safe to share: in a process that
is used again, each trial would try all forward algorithms anew. The backward pass has no such problem, as its thread
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

_calls: "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]" = queue.SimpleQueue()
_starting = threading.Lock()


def in_training_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, called in this process's training thread after all that was asked of it before.

    What it raises is raised here, SystemExit included, by which Ray Tune ends a trial. Waits without a limit; raises
    RuntimeError in the training thread itself, which would wait for ever.
    """
    if threading.current_thread().name == NAME:
        raise RuntimeError(f"{NAME} cannot wait for itself: call the function without in_training_thread")
    with _starting:
        if not any(thread.name == NAME for thread in threading.enumerate()):
            # A daemon, as Ray's own are: a process ends although a trial in it still waits to be told to go on
            threading.Thread(target=_work, name=NAME, daemon=True).start()
    future: Future[T] = Future()
    _calls.put((functools.partial(function, *args, **kwargs), future))
    try:
        return future.result()
    finally:
        del future  # with an exception it holds the frames of the call, and they a GPU's memory


def _work() -> None:
    while True:
        _answer(*_calls.get())


def _answer(call: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - what it means is decided where it is raised again
        future.set_exception(error)
        del future  # the exception's traceback holds this frame
