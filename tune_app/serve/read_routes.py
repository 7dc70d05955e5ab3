"""The routes that read: the list of studies, a study, its trials, curves, figures, logs, report and live events."""

import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse
from starlette.background import BackgroundTask

from trainables.data.visible import visible
from tune_app.results.text import printable
from tune_app.serve.access import Refused
from tune_app.serve.across import across
from tune_app.serve.answers import JSONResponse
from tune_app.serve.folder import ID_LENGTH, UnknownError, UnreadableError
from tune_app.serve.keeping import Notes, contents, read_notes
from tune_app.serve.service import StudyId, TheService, TrialId
from tune_app.serve.views import (
    SHOWN_FIRST,
    CurveAxis,
    comparison,
    curves,
    figure,
    importance_among,
    log_tail,
    to_json,
    trial_page,
    trials_table,
)
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles

router = APIRouter(prefix="/api/studies")

Metric = Annotated[str, Query(max_length=64, pattern="^[0-9A-Za-z_]+$")]
OtherStudy = Annotated[str, Query(max_length=ID_LENGTH)]
TrialQuery = Annotated[str, Query(max_length=64, pattern="^[0-9A-Za-z_-]+$")]


@router.get("")
def studies(service: TheService) -> JSONResponse:
    """List the studies: state, trials by state, best AUC; and the queue."""
    if service.replica is not None:
        service.replica.look()
    return JSONResponse(
        {
            "folder": service.folder.place(service.folder.root),
            "trouble": service.trouble,
            "studies": [
                service.line(study, path) for study, path in service.folder.paths().items()
            ],
            "viewers": service.feeds.viewers,
        }
    )


@router.get("/{study}/notes")
def notes(study: StudyId, service: TheService) -> Notes:
    """Return the notes and tags of a study and of its trials."""
    return read_notes(service.folder.path(study))


@router.get("/{study}/contents")
def study_contents(study: StudyId, service: TheService) -> JSONResponse:
    """Return the content of the study's folder, all of which deleting it would lose."""
    return JSONResponse(contents(service.folder.path(study)))


@router.get("/{study}/across")
def several(
    study: StudyId,
    service: TheService,
    other: Annotated[list[OtherStudy], Query(min_length=1, max_length=5)],
) -> Response:
    """Return a study and one to five others in one view."""
    names = list(dict.fromkeys([study, *other]))
    found = [(name, service.read(name).study) for name in names]
    return Response(to_json(across(found)), media_type="application/json")


@router.get("/{study}")
def one_study(study: StudyId, service: TheService) -> Response:
    """Return the question of a study, its findings, its cautions, its progress and its estimated end."""
    path = service.folder.path(study)
    if not StudyFiles(path).spec.is_file():
        place = {"name": visible(path.name), "path": visible(service.folder.place(path))}
        return JSONResponse({"id": study, **place, **service.standing(path, None)})
    about = service.about(study, service.read(study))
    return Response(to_json(about), media_type="application/json")


@router.get("/{study}/trials")
def trials(
    study: StudyId, service: TheService, where: Annotated[str, Query(max_length=2000)] = ""
) -> Response:
    """List the trials; `where` holds a condition as in `medtune results --where`."""
    if where.strip():
        table = trials_table(service.read(study).study, where)
        return Response(to_json(table), media_type="application/json")
    return service.computed(study, "trials", trials_table)


@router.get("/{study}/curves")
def study_curves(
    study: StudyId,
    service: TheService,
    metrics: Annotated[list[Metric] | None, Query(max_length=4)] = None,
    axis: CurveAxis = "epoch",
) -> Response:
    """Return metrics of every trial by epoch, updates or time; the live events continue from `seen`.

    Without `metrics`, the AUC of the averaged and of the raw weights.
    """
    size, names = service.read(study).size, tuple(metrics or SHOWN_FIRST)
    return service.computed(
        study,
        ("curves", size, names, axis),
        lambda found: {**curves(found, names, axis), "seen": size},
    )


@router.get("/{study}/trials/{trial}")
def one_trial(study: StudyId, trial: TrialId, service: TheService) -> Response:
    """Return a trial's diagnosis, settings, curves and decisions."""
    return service.computed(study, ("trial", trial), lambda found: trial_page(found, trial))


@router.get("/{study}/compare")
def compare(study: StudyId, first: TrialQuery, second: TrialQuery, service: TheService) -> Response:
    """Return two trials of a study side by side."""
    return service.computed(
        study, ("compare", first, second), lambda found: comparison(found, first, second)
    )


@router.get("/{study}/figures/{name}")
def one_figure(
    study: StudyId,
    name: Annotated[str, InPath(max_length=100)],
    service: TheService,
    trials: Annotated[str, Query(max_length=50_000, pattern="^[0-9A-Za-z_,-]*$")] = "",
) -> Response:
    """Return a figure in Plotly's form, with its caption; the overview lists their names.

    `trials`: ids separated by commas, over which alone importance is computed.
    """
    try:
        if trials and name == "importance":
            with service.alone():  # a second of work that no other reader shares
                found = importance_among(service.read(study).study, trials.split(","))
            return Response(to_json(found), media_type="application/json")
        return service.computed(study, ("figure", name), lambda found: figure(found, name))
    except ValueError as error:
        if isinstance(error, UnreadableError | SpecError):
            raise
        raise UnknownError(printable(str(error).split(": ", 1)[-1])) from None


@router.get("/{study}/log")
def study_log(
    study: StudyId,
    service: TheService,
    request: Request,
    which: Literal["study", "console", "trial"] = "study",
    trial: TrialQuery | None = None,
    lines: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> JSONResponse:
    """Return the end of a log: the study's, the driver's console, or a trial's.

    It takes the token: a driver's output may come from any file that a study names.
    """
    if not request.scope["trusted"]:
        raise Refused(401, "logs take the token: log in on the page, or send it")
    path = service.folder.path(study)
    if service.replica is not None and which == "trial" and trial is not None:
        service.replica.fetch(StudyFiles(path).trial(trial).log)
    return JSONResponse(log_tail(path, which, trial, lines))


@router.get("/{study}/report", response_class=FileResponse)
def report(study: StudyId, service: TheService) -> FileResponse:
    """Download the study as one self-contained HTML page."""
    from tune_app.report.page import write_report

    reading = service.read(study)
    with tempfile.NamedTemporaryFile(suffix=".html", delete=False) as file:
        path = Path(file.name)
    write_report(reading.study, path)
    return FileResponse(
        path,
        filename=re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{study}-report.html"),
        media_type="text/html",
        background=BackgroundTask(lambda: path.unlink(missing_ok=True)),
    )


@router.get("/{study}/events", response_class=StreamingResponse)
async def events(
    study: StudyId,
    service: TheService,
    request: Request,
    seen: Annotated[int, Query(ge=0, le=2**53)] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Stream changes (text/event-stream): rows, decisions, changed rows of the table, and the overview."""
    if last_event_id and last_event_id.isascii() and last_event_id.isdigit():
        seen = int(last_event_id[:16])
    stream = service.feeds.events(study, seen, trusted=request.scope["trusted"])
    first = await anext(stream)  # a refusal has to come before the answer begins

    async def whole() -> AsyncIterator[bytes]:
        try:
            yield first
            async for event in stream:
                yield event
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(
        whole(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
