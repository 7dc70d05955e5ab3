"""The Optuna database of a study."""

import contextlib
import functools
import json
import logging
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.study.study import _SYSTEM_ATTR_METRIC_NAMES
from optuna.trial import FrozenTrial, TrialState

from trainables.checkpoints import when_there_is_room
from trainables.data.storage import absolute

log = logging.getLogger("medtune.study")

STUDY_NAME = "medtune"
"""Name of every study that an earlier version wrote, in its own file or a shared storage."""

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
        errors = (sqlalchemy.exc.OperationalError, OSError)
        when_there_is_room(lambda: method(self, *arguments), Path(self.name), errors=errors)

    return patient


class Database:
    """The study in its database, each change one transaction.

    Reads, and the schema with its checks, are Optuna's. Trials are written through Optuna's own table models, because
    its storage takes some thirty statements for a trial of seven parameters where five do.

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
        try:
            self._study = int(self._storage.get_study_id_from_name(self.study_name))
        except KeyError:
            if not own:
                raise SearchError(f"{self.name} holds no study {self.study_name!r}") from None
            with quiet_optuna():
                self._study = int(
                    self._storage.create_new_study([StudyDirection.MAXIMIZE], self.study_name)
                )
        self.source = source_of(url, self.study_name)
        self.attrs: dict[str, Any] = self._storage.get_study_user_attrs(self._study)
        """The study's user attributes."""
        self.found: list[FrozenTrial] = self._storage.get_all_trials(self._study)
        """All trials it held when it was opened, by number."""
        self._ids = {trial.number: trial._trial_id for trial in self.found}
        trials = models.TrialModel.__table__
        self._last = sqlalchemy.select(sqlalchemy.func.max(trials.c.number)).where(
            trials.c.study_id == self._study
        )

    def _only_study(self) -> str:
        names = sorted(
            study.study_name
            for study in self._storage.get_all_studies()
            if study.study_name.partition("-")[0] == STUDY_NAME or SEARCH in study.user_attrs
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
        self._storage.set_study_system_attr(self._study, _SYSTEM_ATTR_METRIC_NAMES, [objective])
        if study is not None:
            self._storage.set_study_user_attr(self._study, "study", study)

    @_with_room
    def set_attr(self, key: str, value: Any) -> None:
        """Write a user attribute of the study."""
        self._storage.set_study_user_attr(self._study, key, value)
        self.attrs[key] = value

    @_with_room
    def create(self, trial: FrozenTrial, number: int) -> None:
        """Write a trial with all it has. Raises SearchError if the study does not end at the number before."""
        row = models.TrialModel(
            study_id=self._study,
            number=number,
            state=trial.state,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
        )
        with self._storage.engine.begin() as db:
            if (found := db.scalar(self._last)) != (number - 1 if number else None):
                raise SearchError(
                    f"{self.name}: another process adds trials to this study (the last is {found}, this one was to be "
                    f"{number}); end one of the two, and resume"
                )
            trial_id = db.execute(
                _insertion(models.TrialModel), _columns(row)
            ).inserted_primary_key[0]
            parameters = [
                {
                    "param_name": name,
                    "param_value": trial.distributions[name].to_internal_repr(value),
                    "distribution_json": optuna.distributions.distribution_to_json(
                        trial.distributions[name]
                    ),
                }
                for name, value in trial.params.items()
            ]
            _insert(db, models.TrialParamModel, trial_id, parameters)
            _insert(db, models.TrialUserAttributeModel, trial_id, _attributes(trial.user_attrs))
            _insert(db, models.TrialSystemAttributeModel, trial_id, _attributes(trial.system_attrs))
            _insert(
                db, models.TrialIntermediateValueModel, trial_id, _steps(trial.intermediate_values)
            )
            _insert(db, models.TrialValueModel, trial_id, _values(trial.value))
        self._ids[number] = trial_id

    @_with_room
    def report(self, number: int, step: int, value: float) -> None:
        """Write an intermediate value; a finite one, of a step that has none."""
        with self._storage.engine.begin() as db:
            _insert(
                db, models.TrialIntermediateValueModel, self._ids[number], _steps({step: value})
            )

    @_with_room
    def finish(
        self, number: int, state: TrialState, value: float | None, reason: str | None
    ) -> None:
        """Write how a running trial ended."""
        trial_id = self._ids[number]
        row = models.TrialModel(state=state, datetime_complete=datetime.now())
        with self._storage.engine.begin() as db:
            trials = models.TrialModel.__table__
            db.execute(
                sqlalchemy.update(trials).where(trials.c.trial_id == trial_id).values(_columns(row))
            )
            _insert(db, models.TrialValueModel, trial_id, _values(value))
            _insert(
                db,
                models.TrialUserAttributeModel,
                trial_id,
                _attributes({REASON: reason} if reason else {}),
            )

    @_with_room
    def reopen(self, number: int, last_epoch: int | None = None) -> None:
        """Have a trial that has ended run again, which Optuna itself refuses; of its curve, keep up to `last_epoch`."""
        trial_id = self._ids[number]
        values, steps = (
            models.TrialValueModel.__table__,
            models.TrialIntermediateValueModel.__table__,
        )
        trials, attributes = models.TrialModel.__table__, models.TrialUserAttributeModel.__table__
        running = {"state": TrialState.RUNNING, "datetime_complete": None}
        with self._storage.engine.begin() as db:
            db.execute(
                sqlalchemy.update(trials).where(trials.c.trial_id == trial_id).values(running)
            )
            reason = (attributes.c.trial_id == trial_id) & (attributes.c.key == REASON)
            db.execute(sqlalchemy.delete(attributes).where(reason))
            db.execute(sqlalchemy.delete(values).where(values.c.trial_id == trial_id))
            if last_epoch is not None:
                later = (steps.c.trial_id == trial_id) & (steps.c.step > last_epoch)
                db.execute(sqlalchemy.delete(steps).where(later))

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()
        if self._path is not None and self._own and self._path.is_file():
            # Another reader keeps the file in WAL mode, which every reader understands.
            with (
                contextlib.suppress(sqlite3.OperationalError),
                contextlib.closing(sqlite3.connect(self._path, 0.1)) as db,
            ):
                db.execute("PRAGMA journal_mode=DELETE")

    def _open(self, url: str) -> RDBStorage:
        if self._path is None:
            try:
                return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
            except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
                raise SearchError(
                    f"storage {self.name} cannot be opened: {_one_line(error)}"
                ) from error
        try:
            if self._own:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _choose_journal(self._path)
            storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})
        except (OSError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError) as error:
            raise SearchError(
                f"{self._path} cannot be opened as an Optuna study: {_one_line(error)}{_advice(error)}"
            ) from error
        storage.engine.dispose()  # the next connection is the first that the listener sees
        sqlalchemy.event.listen(storage.engine, "connect", _without_waiting_for_the_disk)
        return storage


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


def _columns(row: Any) -> dict[str, Any]:
    """What Optuna's own model would write, by column: times are not stored as they are given."""
    mapper: Any = sqlalchemy.inspect(type(row))
    values = {
        attribute.columns[0].name: getattr(row, attribute.key) for attribute in mapper.column_attrs
    }
    return {name: value for name, value in values.items() if value is not None}


def _insert(
    db: sqlalchemy.Connection, model: Any, trial_id: int, rows: list[dict[str, Any]]
) -> None:
    if rows:
        db.execute(_insertion(model), [{"trial_id": trial_id, **row} for row in rows])


@functools.cache
def _insertion(model: Any) -> sqlalchemy.Insert:
    """Made once: that costs as much as to execute it."""
    return sqlalchemy.insert(model.__table__)


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]


def _steps(values: Mapping[int, float]) -> list[dict[str, Any]]:
    finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    return [
        {"step": step, "intermediate_value": value, "intermediate_value_type": finite}
        for step, value in values.items()
    ]


def _values(value: float | None) -> list[dict[str, Any]]:
    finite = models.TrialValueModel.TrialValueType.FINITE
    return [] if value is None else [{"objective": 0, "value": value, "value_type": finite}]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_waiting_for_the_disk(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna announces each new study on stderr."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
