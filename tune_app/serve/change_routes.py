"""The routes that change something: check, queue, start and stop studies, and stop trials."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import yaml
from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Field

from trainables.checkpoints import replacing
from trainables.data.storage import bucket_of, is_below, is_url
from trainables.data.table_file import ManifestError, read_records
from trainables.data.visible import visible
from tune_app.results.study import Study
from tune_app.results.text import printable
from tune_app.serve.answers import JSONResponse
from tune_app.serve.estimate import estimate
from tune_app.serve.folder import ID_LENGTH, UnknownError, UnreadableError
from tune_app.serve.keeping import Note, Notes, archive, delete, hide, rename, write_note
from tune_app.serve.queue import QueueError
from tune_app.serve.service import Service, StudyId, TheService, TrialId
from tune_app.serve.views import failed_trials, state_of, trial_page
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.requests import ask_to_stop_trial
from tune_app.study.spec import StudySpec, absolute_paths, build_spec, paths_in

router = APIRouter(prefix="/api")


STUDY_NAME = r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$"
"""Names that the page may give to a study's folder."""


class Asked(BaseModel):
    """The outcome of a request to start or stop something."""

    study: str
    became: str


class NewStudy(BaseModel):
    """A study to start: a name for its folder, and the fields of a study file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=STUDY_NAME)
    spec: dict[str, Any]
    """As in the study file that `medtune init` writes; relative paths start at the service's working directory."""


@router.post("/check")
def check(fields: Annotated[dict[str, Any], Body()], service: TheService) -> JSONResponse:
    """Check the fields of a study file without starting anything; returns the size of the study."""
    spec = build_spec(with_paths(fields, service))
    space = spec.resolved_space() if spec.kind == "search" else None
    rows = [row._asdict() for row in space.describe()] if space else []
    return JSONResponse(
        {
            "trials": spec.num_trials,
            "epochs": spec.epochs,
            "space": rows,
            **expected_time(spec, service),
        }
    )


class Times(TypedDict):
    """How long a study may take."""

    estimate: dict[str, Any] | None
    """By the epochs of an earlier study; None where none trained its network."""
    measured: dict[str, Any] | None
    """By a measurement on this machine; None where there is none."""


def expected_time(spec: StudySpec, service: Service) -> Times:
    """Return how long the study may take, by the studies here and by the measurements of this machine."""
    found = estimate(spec, _rows(spec.data), _read_studies(service))
    measured = None if service.on_cluster else service.measurements.forecast(spec)
    return {
        "estimate": None if found is None else found._asdict(),
        "measured": None if measured is None else measured._asdict(),
    }


def _read_studies(service: Service) -> list[Study]:
    studies = []
    for name in service.folder.paths():
        with suppress(UnknownError, UnreadableError):
            if (reading := service.folder.reading(name, wait=False)) is not None:
                studies.append(reading.study)
    return studies


def _rows(data: str) -> int | None:
    try:
        return len(read_records(Path(data))[1])
    except (ManifestError, OSError):  # its own check reports it, where it is a fault
        return None


@router.post("/studies", status_code=201)
def begin(asked: NewStudy, service: TheService) -> Asked:
    """Write the study file into a new folder and queue the study."""
    fields = with_paths(asked.spec, service)
    build_spec(fields)
    path = service.folder.root / asked.name
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise QueueError(f"{asked.name}: this folder exists already; choose another name") from None
    with replacing(StudyFiles(path).asked) as temporary:
        temporary.write_text(
            yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    service.queue.add(path)
    return Asked(study=asked.name, became="queued")


@router.post("/studies/{study}/start")
def start(study: StudyId, service: TheService, retry_failed: bool = False) -> Asked:
    """Queue a study: it is started when it never was, and resumed otherwise.

    `retry_failed`: failed trials are continued as well.
    """
    path, queue = service.folder.path(study), service.queue
    if StudyFiles(path).spec.is_file():
        found = service.read(study).study
        failed = failed_trials(found)
        if retry_failed and not failed:
            raise QueueError(f"{path.name}: no trial has failed")
        if not retry_failed and state_of(path, found, queue) == "ended":
            raise QueueError(
                f"{path.name} has ended, {failed} of its trials failed: retry_failed=true continues them"
                if failed
                else f"{path.name} has ended: every trial ran to its end or was stopped"
            )
    elif retry_failed:
        raise QueueError(f"{path.name} has not started: no trial has failed")
    queue.add(path, retry_failed=retry_failed)
    return Asked(study=study, became="queued")


@router.post("/studies/{study}/stop")
def stop(study: StudyId, service: TheService) -> Asked:
    """Remove a waiting study from the queue, or ask a running one to stop; it can be resumed."""
    path = service.folder.path(study)
    if service.queue.place(path) is None:
        service.require_storage()
    became = service.queue.stop(path)
    service.send_requests()
    return Asked(study=study, became=became)


@router.post("/studies/{study}/trials/{trial}/stop")
def stop_trial(study: StudyId, trial: TrialId, service: TheService) -> Asked:
    """Ask the driver to stop one trial after its current epoch."""
    service.require_storage()
    path = service.folder.path(study)
    page = trial_page(service.read(study).study, trial)
    if not page["stoppable"]:
        raise QueueError(f"trial {trial} has ended: {page['state']}")
    ask_to_stop_trial(StudyFiles(path), trial)
    service.send_requests()
    return Asked(study=study, became="asked")


class NewName(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=STUDY_NAME)


class Confirmed(BaseModel):
    """The name of the study to delete, typed by the user."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=ID_LENGTH)


@router.put("/studies/{study}/notes")
def set_note(study: StudyId, note: Note, service: TheService) -> Notes:
    """Set the note and tags of a study."""
    return write_note(own_folder(study, service), None, note)


@router.put("/studies/{study}/trials/{trial}/notes")
def set_trial_note(study: StudyId, trial: TrialId, note: Note, service: TheService) -> Notes:
    """Set the note and tags of a trial."""
    path = own_folder(study, service)
    if not StudyFiles(path).trial(trial).record.is_file():
        raise UnknownError(f"{path.name} has no trial {trial!r}")
    return write_note(path, trial, note)


@router.post("/studies/{study}/rename")
def rename_study(study: StudyId, asked: NewName, service: TheService) -> Asked:
    """Give the folder of a study that does not run another name."""
    with _still(study, service) as path:
        moved = rename(path, asked.name)
    return Asked(study=service.folder.name(moved), became="renamed")


@router.post("/studies/{study}/archive")
def archive_study(study: StudyId, service: TheService) -> Asked:
    """Move the folder of a study that does not run to `.medtune/archive`, where the page does not look."""
    with _still(study, service) as path:
        moved = archive(path, service.folder.root / ".medtune" / "archive")
    return Asked(study=study, became=f"moved to {moved}")


@router.delete("/studies/{study}")
def delete_study(study: StudyId, asked: Confirmed, service: TheService) -> Asked:
    """Remove the folder of a study that does not run; `name` repeats its name."""
    with _still(study, service) as path:
        if asked.name != visible(path.name):  # as the page shows it
            raise QueueError(
                f"{visible(path.name)} is deleted only when its name is given, not {asked.name!r}"
            )
        hidden = hide(path)
    delete(hidden)
    return Asked(study=study, became="deleted")


def own_folder(study: str, service: Service) -> Path:
    """Return the study's folder if it is not a copy. Raises UnknownError and QueueError."""
    path = service.folder.path(study)
    if service.replica is not None:
        raise QueueError("the studies are in object storage, of which this service has a copy only")
    if not path.is_dir():
        raise UnknownError(f"{path.name} is no longer there")
    return path


@contextmanager
def _still(study: str, service: Service) -> Iterator[Path]:
    """Yield the study's folder, which no driver runs in and none can start in. Raises UnknownError and QueueError."""
    path = own_folder(study, service)
    if path == service.folder.root:
        raise QueueError(f"{path.name} is the folder that is served")
    inside = [each for each in service.folder.paths().values() if path in each.parents]
    with service.queue.hold_still(path, inside):
        yield path


def with_paths(fields: dict[str, Any], service: Service) -> dict[str, Any]:
    """Return the fields with absolute paths. Raises SpecError for a missing table and for paths that may not be read."""
    _require_text(fields)
    fields = absolute_paths(fields)
    problems = _outside(fields, service)
    data, config = fields.get("data"), fields.get("config")
    if not problems and isinstance(data, str):
        problems = _missing_table(data)
    if not problems and isinstance(config, dict) and not service.on_cluster:
        problems = _missing_checkpoint(config.get("pretrained_path"))
    if problems:
        raise SpecError(problems)
    return fields


def _require_text(value: Any) -> None:
    """Raise SpecError for text that no file can hold: JSON allows NUL and halves of characters."""
    if isinstance(value, dict):
        for name, item in value.items():
            _require_text(name)
            _require_text(item)
    elif isinstance(value, list):
        for item in value:
            _require_text(item)
    elif isinstance(value, str) and NO_TEXT.search(value):
        raise SpecError(f"{printable(value)[:100]!r}: holds a character that is no text")


NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _missing_table(data: str) -> list[str]:
    if is_url(data):
        bucket, name = bucket_of(data)
        return [] if bucket.stamp(name) is not None else [f"data: no object {data}"]
    try:
        found = Path(data).is_file()
    except OSError as error:  # such as a name that is too long
        return [f"data: {printable(data)[:100]}: {error.strerror}"]
    return [] if found else [f"data: no file {data}"]


def _missing_checkpoint(path: Any) -> list[str]:
    if not isinstance(path, str) or is_url(path) or Path(path).is_file():
        return []
    return [f"config: pretrained_path: no file {printable(path)[:300]}"]


def _outside(fields: dict[str, Any], service: Service) -> list[str]:
    """The paths that a study would read or write outside the folders that the service was given, one line each."""
    if not service.data_roots:
        return []
    roots = service.allowed_roots()
    given = [(name, path) for name, path in paths_in(fields) if not is_below(path, roots)]
    if fields.get("storage") is not None:
        given.append(("storage", "a separate database"))
    allowed = ", ".join(service.data_roots)
    return [f"{name}: {path} is outside what --data-root allows: {allowed}" for name, path in given]
