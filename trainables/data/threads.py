"""Work over many files in threads, with progress."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from trainables.machine.this_machine import usable_cpus

Progress = Callable[[int, int], None]
"""Called with (done, total) as volumes get done; always from the caller's own thread."""


def in_threads(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Any]:
    """Return `function` of each item, in order, run by `workers` threads: one a core, at most 8.

    Threads, because decompression, hashing and matrix products release the interpreter, and nothing has to be copied.
    After an error, or Ctrl-C, calls that have not started are dropped.
    """
    with ThreadPoolExecutor(workers or min(8, usable_cpus())) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
