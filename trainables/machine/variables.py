"""Environment variables that are set for a while: what a user's own process finds afterwards is what it had before."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock


class SetWithin:
    """Variables that are set while a block is open: `with SetWithin(find)():`.

    Blocks of several threads may overlap: the last one to end restores what was set before the first one began.
    """

    def __init__(self, find: Callable[[], Mapping[str, str]]) -> None:
        """`find` returns the variables, and is called when a block begins."""
        self._find = find
        self._lock = Lock()
        self._open = 0
        self._before: dict[str, str | None] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Set them for a block."""
        with self._lock:
            found = self._find()
            self._before = {name: os.environ.get(name) for name in found} | self._before
            self._open += 1
            os.environ.update(found)
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._restore()

    def _restore(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}
