"""Whether the study's folder is still the one in which the driver began."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from ray.tune import TuneError

from trainables.data.storage import absolute


class StudyMovedError(RuntimeError):
    """The folder of a running study is not there any more, or its database is not."""


WITHOUT_DATABASE = (
    "rows and checkpoints are there, and `results`, `report`, `export` and `confirm` work, but the search cannot be "
    "resumed without it: put it back from a copy, or start a new study in another folder"
)


class StudyPlace:
    """The folder in which a driver began, known by its inode: one that was moved away must not be written again."""

    def __init__(self, root: Path) -> None:
        self.root = Path(absolute(root))
        self._identity = _identity(self.root)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Raise StudyMovedError where the block fails because the folder was moved or removed meanwhile."""
        try:
            yield
        except (OSError, StorageInternalError, TuneError):
            self.check()
            raise

    def check(self, database: Path | None = None) -> None:
        """Raise StudyMovedError where the folder was moved, removed or replaced, or `database` is not there."""
        if self._identity is None:  # it had not been made
            self._identity = _identity(self.root)
        elif _identity(self.root) != self._identity:
            raise StudyMovedError(
                f"{self.root}: the study's folder was moved or removed while it ran, so the study has stopped; "
                "every trial continues from its last checkpoint with `medtune resume FOLDER`, where the folder is now"
            )
        if database is not None and not database.is_file():
            raise StudyMovedError(
                f"{database}: was removed while the study ran: {WITHOUT_DATABASE}"
            )


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(root)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
