"""The Optuna database of a study."""

import contextlib
import functools
import logging
import re
import secrets
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainables.checkpoints import when_there_is_room
from trainables.data.storage import absolute

log = logging.getLogger("medtune.study")

STUDY_NAME = "medtune"
"""Name of every study that an earlier version wrote, in its own file or a shared storage."""

BEING_REWRITTEN = " (being rewritten)"
"""End of the name of a copy that is to take a study's place."""

SEARCH = "search"
"""Study attribute of this program: the settings that the values of its trials depend on."""


def own_study_name(place: str) -> str:
    """Return the name of the study in the folder or at the URL `place` for a file of its own: the folder's."""
    return place.rstrip("/").rpartition("/")[2] or STUDY_NAME


def shared_study_name(place: str) -> str:
    """Return a new name for the study in the folder or at the URL `place`, for a storage that holds other studies too."""
    stem = re.sub(r"[^0-9A-Za-z]+", "-", place.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return "-".join(part for part in (STUDY_NAME, stem, secrets.token_hex(4)) if part)


LOCK_TIMEOUT_S = 120.0
"""How long a write waits for another reader or writer of the SQLite file, such as optuna-dashboard."""


REASON = "reason"  # trial attribute: why it was stopped or failed


class SearchError(ValueError):
    """A study that cannot be opened or continued as asked; the message names the remedy."""


def sqlite_url(path: Path) -> str:
    """Return the storage URL of a SQLite file; a path may hold any character, such as `#`, `?`, `%` or braces."""
    return sqlalchemy.URL.create("sqlite", database=absolute(path)).render_as_string(
        hide_password=False
    )


def _sqlite_path(url: str) -> Path | None:
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise SearchError(
            f"storage {url!r} is no database URL: write sqlite:///FILE, or leave it out"
        ) from None
    in_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (
        None,
        "",
        ":memory:",
    )
    return Path(str(parsed.database)).resolve() if in_file else None


def source_of(url: str, study_name: str) -> str:
    """Return a study's unique name, as recorded with the trials that are taken over from it."""
    shown = shown_url(url)
    return shown if study_name == STUDY_NAME else f"{shown}#{study_name}"


def shown_url(url: str) -> str:
    """A database by the name users know it by, without its password."""
    return str(_sqlite_path(url) or sqlalchemy.make_url(url).render_as_string(hide_password=True))


def _with_room(method: Callable[..., None]) -> Callable[..., None]:
    """A transaction that a full disk undid is made again when there is room."""

    @functools.wraps(method)
    def patient(self: "Database", *arguments: Any) -> None:
        errors = (StorageInternalError, OSError)
        when_there_is_room(lambda: method(self, *arguments), Path(self.name), errors=errors)

    return patient


class Database:
    """The study in its database, written through Optuna's `RDBStorage`: a trial, or a value of it, is one transaction.

    SQLite gets a write-ahead log: a commit then survives a killed process without waiting for the disk, and readers
    never block the search. A power cut may cost the last trials, never the file.
    """

    def __init__(self, url: str, name: str | None = STUDY_NAME, *, own: bool = True) -> None:
        """Open the study `name`, made if it is new; with `own` off, one that has to be there and is only read.

        Without a name it is the only one of this program in the storage.
        """
        self.name = shown_url(url)
        self._path = _sqlite_path(url)
        self._own = own
        if not own and self._path is not None and not self._path.is_file():
            raise SearchError(f"no earlier study here: {self._path} is missing")
        self._storage = self._open(url)
        self.study_name = name if name is not None else self._only_study()
        self._copy_name = self.study_name + BEING_REWRITTEN
        if own:
            self._take_copy()
        elif self._id_of(self._copy_name) is not None:
            raise SearchError(
                f"{self.name}: study {self.study_name!r} is being rewritten: resume it first"
            )
        found = self._id_of(self.study_name)
        if found is None and not own:
            raise SearchError(f"{self.name} holds no study {self.study_name!r}")
        self._study = self._new(self.study_name) if found is None else found
        self.source = source_of(url, self.study_name)
        self.attrs: dict[str, Any] = self._storage.get_study_user_attrs(self._study)
        """The study's user attributes."""
        self.found: list[FrozenTrial] = self._storage.get_all_trials(self._study)
        """All trials it held when it was opened, by number."""
        self._ids: dict[int, int] = {}

    def _only_study(self) -> str:
        names = sorted(
            {
                study.study_name.removesuffix(BEING_REWRITTEN)
                for study in self._storage.get_all_studies()
                if study.study_name.partition("-")[0] == STUDY_NAME or SEARCH in study.user_attrs
            }
        )
        if len(names) != 1:
            held = ", ".join(names) or "none"
            raise SearchError(
                f"{self.name} holds {len(names)} studies of this program ({held}): name the folder of one"
            )
        return str(names[0])

    @_with_room
    def describe(self, study: str | None, objective: str) -> None:
        """Write what optuna-dashboard shows: the objective's name for the values, and the study's folder."""
        with quiet_optuna():
            shown = optuna.load_study(study_name=self.study_name, storage=self._storage)
            shown.set_metric_names([objective])
        if study is not None:
            shown.set_user_attr("study", study)

    @_with_room
    def set_attr(self, key: str, value: Any) -> None:
        """Write a user attribute of the study."""
        self._storage.set_study_user_attr(self._study, key, value)
        self.attrs[key] = value

    @_with_room
    def create(self, trial: FrozenTrial, number: int) -> None:
        """Write a trial with all it has. Raises SearchError if the study has this number already."""
        refused = SearchError(
            f"{self.name}: another process adds trials to this study (it has a trial {number}, the next one here); "
            "end one of the two, and resume"
        )
        with contextlib.suppress(KeyError):
            self._storage.get_trial_id_from_study_id_trial_number(self._study, number)
            raise refused
        written = self._storage.create_new_trial(self._study, trial)
        if self._storage.get_trial_number_from_id(written) != number:
            raise refused  # both looked before either wrote: a resumed study runs this trial by its later number
        self._ids[number] = written

    @_with_room
    def report(self, number: int, step: int, value: float) -> None:
        """Write an intermediate value."""
        self._storage.set_trial_intermediate_value(self._trial(number), step, value)

    @_with_room
    def finish(
        self, number: int, state: TrialState, value: float | None, reason: str | None
    ) -> None:
        """Write how a running trial ended; its `reason` first, as nothing is written to one that has ended.

        A driver killed in between leaves a running trial with a reason, which its next end replaces.
        """
        trial = self._trial(number)
        if reason is not None:
            self._storage.set_trial_user_attr(trial, REASON, reason)
        self._storage.set_trial_state_values(trial, state, None if value is None else [value])

    @_with_room
    def rewrite(self) -> None:
        """Write the study again, with the trials of `found` as they are now: Optuna reopens none that has ended.

        Wherever the driver is killed, the study is whole under its own name or under that of its copy.
        """
        self._take_copy()
        copy = self._new(self._copy_name)
        for trial in self.found:
            self._storage.create_new_trial(copy, trial)
        for key, value in self._storage.get_study_system_attrs(self._study).items():
            self._storage.set_study_system_attr(copy, key, value)
        attrs = self._storage.get_study_user_attrs(self._study)
        for key in sorted(attrs, key=SEARCH.__eq__):  # SEARCH last: the copy is whole
            self._storage.set_study_user_attr(copy, key, attrs[key])
        self._take_copy()
        self._study = self._storage.get_study_id_from_name(self.study_name)
        self._ids.clear()

    @_with_room
    def _take_copy(self) -> None:
        """Put the copy, where there is one, in the place of the study if it is whole."""
        copy = self._id_of(self._copy_name)
        if copy is None:
            return
        if SEARCH in self._storage.get_study_user_attrs(copy):
            if (replaced := self._id_of(self.study_name)) is not None:
                self._storage.delete_study(replaced)
            with quiet_optuna():
                optuna.copy_study(
                    from_study_name=self._copy_name,
                    from_storage=self._storage,
                    to_storage=self._storage,
                    to_study_name=self.study_name,
                )
        self._storage.delete_study(copy)

    def _new(self, name: str) -> int:
        with quiet_optuna():
            return int(self._storage.create_new_study([StudyDirection.MAXIMIZE], name))

    def _id_of(self, name: str) -> int | None:
        try:
            return int(self._storage.get_study_id_from_name(name))
        except KeyError:
            return None

    def _trial(self, number: int) -> int:
        if number not in self._ids:
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(
                self._study, number
            )
        return self._ids[number]

    def close(self) -> None:
        self._storage.remove_session()
        self._engine.dispose()
        if self._path is not None and self._own and self._path.is_file():
            # Another reader keeps the file in WAL mode, which every reader understands.
            with (
                contextlib.suppress(sqlite3.OperationalError),
                contextlib.closing(sqlite3.connect(self._path, 0.1)) as db,
            ):
                db.execute("PRAGMA journal_mode=DELETE")

    def _open(self, url: str) -> RDBStorage:
        """Return Optuna's storage, on connections that `close` can end."""
        try:
            if self._path is None:
                # Optuna sets this argument for MySQL, which refuses it next to a pool
                storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
                self._engine = storage.engine
                return storage
            if self._own:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _choose_journal(self._path)
            self._engine = sqlalchemy.create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S})
            sqlalchemy.event.listen(self._engine, "connect", _without_waiting_for_the_disk)
            return RDBStorage(url, engine_kwargs={"pool": self._engine.pool})
        except (
            OSError, ImportError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError, StorageInternalError,
            RuntimeError,  # written by another version of Optuna
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())
            raise SearchError(
                f"{self.name} cannot be opened as an Optuna study: {reason}{_advice(error)}"
            ) from error


def _choose_journal(path: Path) -> None:
    """Give the file a write-ahead log, or a rollback journal where the file system cannot share memory between processes."""
    try:
        with contextlib.closing(sqlite3.connect(path, LOCK_TIMEOUT_S)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("BEGIN IMMEDIATE")  # only now is the memory needed that its readers share
            db.rollback()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL")):
            raise
        with contextlib.closing(sqlite3.connect(path, LOCK_TIMEOUT_S)) as db:
            db.execute(
                "PRAGMA locking_mode=EXCLUSIVE"
            )  # reads a write-ahead log without shared memory
            db.execute("PRAGMA journal_mode=DELETE")
            db.execute("BEGIN IMMEDIATE")  # the cause may be another one
            db.rollback()
        log.warning(
            "%s: its file system cannot share memory between processes: written with a rollback journal, which is slower",
            path,
        )


def _advice(error: Exception) -> str:
    """What to do about a file system that does not do what SQLite needs."""
    own = getattr(error, "orig", error)  # SQLAlchemy wraps it
    if str(getattr(own, "sqlite_errorname", "")).startswith("SQLITE_IOERR"):
        return (
            ": its file system lacks what SQLite needs (locks, shared memory): put the study's folder on a local disk, or "
            "name a database server with `storage` in the study file"
        )
    return ""


def _without_waiting_for_the_disk(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna announces each new study on stderr, and warns of its newer functions."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
