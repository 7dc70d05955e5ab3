"""The service: a live page over the studies of one folder or URL, and the REST interface behind it.

It reads through `tune_app.results.study` and starts, stops and queues through `tune_app.serve.queue`; nothing here decides
anything about a study. It may be ended and started again at any time: drivers are processes of their own, and everything
shown is read from the studies' folders.
"""

import logging
import re
import secrets
import shlex
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import yaml
from fastapi import Body, FastAPI, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from search_spaces.space import NOT_SEARCHED
from search_spaces.spaces import SPACES
from trainables import medtune_version
from trainables.checkpoints import replacing
from trainables.config import FineTuneConfig, problem_lines
from trainables.data.storage import SCHEMES, StorageError, bucket_of, is_url, url_of
from tune_app.report import figures
from tune_app.results.query import QueryError
from tune_app.results.text import format_value, printable
from tune_app.serve.access import LEAST_TOKEN, SESSION_S, Access, Guard, Refused
from tune_app.serve.folder import Reading, StudyFolder, UnknownError, UnreadableError
from tune_app.serve.live import Feeds, TooManyViewersError
from tune_app.serve.queue import QueueError, StudyQueue
from tune_app.serve.replica import Replica
from tune_app.serve.views import (
    comparison,
    curves,
    failed_trials,
    figure,
    glance,
    log_tail,
    overview,
    state_of,
    to_json,
    trial_page,
    trials_table,
)
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.objective import OBJECTIVES
from tune_app.study.requests import ask_to_stop_trial
from tune_app.study.spec import StudySpec, absolute_paths, build_spec

log = logging.getLogger("medtune.serve")

STATIC = Path(__file__).parent / "static"
REPORT = Path(__file__).parents[1] / "report"
ASSETS = {
    "serve.js": "text/javascript",
    "parts.js": "text/javascript",
    "study.js": "text/javascript",
    "charts.js": "text/javascript",
    "serve.css": "text/css",
    "report.css": "text/css",
}
"""The files that serve.html loads, by name; `report.css` is shared with the report."""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#00609c"/>'
    '<path d="M2 12C5 12 5 4 8 4s3 4 6 4" stroke="#fff" stroke-width="2" fill="none"/></svg>'
)

LIMIT = 400
"""Characters of an id."""


class Problem(BaseModel):
    """Why something was refused, a line a reason."""

    detail: list[str]


class Token(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=400)


class Session(BaseModel):
    """Whether the caller may change things, and what its page has to send along."""

    logged_in: bool
    csrf: str | None
    reading: Literal["open", "token"]


class Asked(BaseModel):
    """What became of a request to start or stop something."""

    study: str
    became: str


class NewStudy(BaseModel):
    """A study to start: a name for its folder, and the fields of a study file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$")
    spec: dict[str, Any]
    """As in the study file that `medtune init` writes; paths are absolute or start where the service was started."""


StudyId = Annotated[str, InPath(max_length=LIMIT, description="Id of the study, from the list.")]
TrialId = Annotated[
    str, InPath(max_length=64, pattern="^[0-9A-Za-z_-]+$", description="Id of the trial.")
]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "Not understood",
        401: "The token is missing",
        403: "From another site, or a wrong token",
        404: "No such study, trial or figure",
        405: "Another method",
        409: "Not possible as things stand",
        413: "Too large",
        421: "Another service's host name",
        422: "A value that is not allowed",
        429: "Too many wrong tokens",
        503: "Too many viewers, or the storage does not answer",
    }.items()
}

STATUS: dict[type[Exception], int] = {
    UnknownError: 404,
    UnreadableError: 409,
    QueueError: 409,
    SpecError: 422,
    QueryError: 400,
    TooManyViewersError: 503,
    StorageError: 503,
}


def build_app(
    root: Path, access: Access, *, address: str | None = None, replica: Replica | None = None
) -> FastAPI:
    """Return the service over the studies below `root`; `address` is the Ray cluster that its drivers use.

    `replica`: keeps `root` as a copy of what is in object storage, and has begun.
    """
    folder = StudyFolder(root, replica)
    here = replica.driven_here if replica else lambda: list(folder.paths().values())
    queue = StudyQueue(
        folder.root / ".medtune" / "queue.json", here, address=address, place=folder.place
    )

    def told(study: str, reading: Reading) -> dict[str, Any]:
        path = folder.path(study)
        about: dict[str, Any] = dict(folder.memo(reading, "overview", overview))
        about["stop_requests"] = [
            p.stem for p in StudyFiles(path).requests.glob("*.json") if p.stem != "study"
        ]
        about["trouble"] = replica.trouble if replica else None
        return {"id": study, **about, **_standing(path, reading, queue)}

    def requested() -> None:
        if replica is not None:
            replica.look(now=True)

    def answering() -> None:
        if replica is not None and replica.trouble is not None:
            raise StorageError(replica.trouble)

    feeds = Feeds(folder, told)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ended = threading.Event()
        works = [queue.run, lambda: _read_all(folder, ended), *([replica.run] if replica else [])]
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in threads:
            thread.start()
        yield
        ended.set()
        queue.close()
        feeds.close()
        if replica is not None:
            replica.close()

    app = FastAPI(
        title="medtune",
        version=medtune_version(),
        description="Studies of one folder or URL: what they found, live, and starting and stopping them.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from the network
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=PROBLEMS,
    )
    app.state.feeds, app.state.queue, app.state.folder = feeds, queue, folder
    app.add_middleware(Guard, access=access)
    for kind, status in STATUS.items():
        app.add_exception_handler(kind, _answer(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _in_lines)

    # The page ----------------------------------------------------------------------------------------------------------

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response(_asset("serve.html"), media_type="text/html; charset=utf-8")

    @app.get("/icon.svg", include_in_schema=False)
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @app.get("/{name}", include_in_schema=False)
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise UnknownError("no such file")
        return Response(_asset(name), media_type=f"{ASSETS[name]}; charset=utf-8")

    # The session -------------------------------------------------------------------------------------------------------

    def session_of(request: Request) -> Session:
        session = request.scope["session"]
        return Session(
            logged_in=request.scope["trusted"],
            csrf=access.csrf(session) if session else None,
            reading="open" if access.open_to_read else "token",
        )

    @app.get("/api/session")
    def session(request: Request) -> Session:
        """Say whether the caller may change things."""
        return session_of(request)

    @app.post("/api/session")
    def log_in(request: Request, given: Token, response: Response) -> Session:
        """Exchange the token for a cookie. Wrong ones are slowed down."""
        if not access.is_token(given.token, (request.client.host if request.client else "?")):
            raise Refused(403, "this is not the token that `medtune serve` printed")
        value = access.new_session()
        response.set_cookie(
            access.cookie, value, max_age=SESSION_S, httponly=True, samesite="strict", path="/"
        )
        return Session(
            logged_in=True,
            csrf=access.csrf(value),
            reading="open" if access.open_to_read else "token",
        )

    @app.delete("/api/session")
    def log_out(response: Response) -> Session:
        """Take the cookie back."""
        response.delete_cookie(access.cookie, path="/")
        return Session(
            logged_in=False, csrf=None, reading="open" if access.open_to_read else "token"
        )

    # Reading -----------------------------------------------------------------------------------------------------------

    def sent(study: str, key: Any, make: Any) -> Response:
        reading = folder.reading(study)
        assert reading is not None
        body = folder.memo(reading, ("json", key), lambda found: to_json(make(found)))
        return Response(body, media_type="application/json")

    @app.get("/api/studies")
    def studies() -> JSONResponse:
        """List the studies: state, trials by state, best AUC; and what the queue holds."""
        if replica is not None:
            replica.look()
        rows = [_line(study, path, folder, queue) for study, path in folder.paths().items()]
        return JSONResponse(
            {
                "folder": folder.place(folder.root),
                "trouble": replica.trouble if replica else None,
                "studies": rows,
                "viewers": feeds.viewers,
            }
        )

    @app.get("/api/studies/{study}")
    def one_study(study: StudyId) -> Response:
        """Tell what a study asked, what it found, what to distrust, how far it is and when it will end."""
        path = folder.path(study)
        if not StudyFiles(path).spec.is_file():
            return JSONResponse(
                {
                    "id": study,
                    "name": path.name,
                    "path": folder.place(path),
                    **_standing(path, None, queue),
                }
            )
        reading = folder.reading(study)
        assert reading is not None
        return Response(to_json(told(study, reading)), media_type="application/json")

    @app.get("/api/studies/{study}/trials")
    def trials(study: StudyId, where: Annotated[str, Query(max_length=2000)] = "") -> Response:
        """List the trials; `where` holds a condition as in `medtune results --where`."""
        if where.strip():
            reading = folder.reading(study)
            assert reading is not None
            return Response(
                to_json(trials_table(reading.study, where)), media_type="application/json"
            )
        return sent(study, "trials", lambda found: trials_table(found))

    @app.get("/api/studies/{study}/curves")
    def study_curves(study: StudyId) -> Response:
        """Return AUC by epoch of every trial; `seen` is where the live events go on from."""
        reading = folder.reading(study)
        assert reading is not None
        size = reading.size
        return sent(study, ("curves", size), lambda found: {**curves(found), "seen": size})

    @app.get("/api/studies/{study}/trials/{trial}")
    def one_trial(study: StudyId, trial: TrialId) -> Response:
        """Tell everything of one trial: diagnosis, settings, curves, decisions."""
        return sent(study, ("trial", trial), lambda found: trial_page(found, trial))

    @app.get("/api/studies/{study}/compare")
    def compare(
        study: StudyId,
        first: Annotated[str, Query(max_length=64, pattern="^[0-9A-Za-z_-]+$")],
        second: Annotated[str, Query(max_length=64, pattern="^[0-9A-Za-z_-]+$")],
    ) -> Response:
        """Set two trials of a study side by side."""
        return sent(
            study, ("compare", first, second), lambda found: comparison(found, first, second)
        )

    @app.get("/api/studies/{study}/figures/{name}")
    def one_figure(study: StudyId, name: Annotated[str, InPath(max_length=100)]) -> Response:
        """Return a figure in Plotly's form, with its caption; the overview lists their names."""
        try:
            return sent(study, ("figure", name), lambda found: figure(found, name))
        except ValueError as error:
            if isinstance(error, UnreadableError | SpecError):
                raise
            raise UnknownError(printable(str(error).split(": ", 1)[-1])) from None

    @app.get("/api/studies/{study}/log")
    def study_log(
        study: StudyId,
        which: Literal["study", "console", "trial"] = "study",
        trial: Annotated[str | None, Query(max_length=64, pattern="^[0-9A-Za-z_-]+$")] = None,
        lines: Annotated[int, Query(ge=1, le=1000)] = 200,
    ) -> JSONResponse:
        """Return the end of a log: the study's, the driver's console, or a trial's."""
        path = folder.path(study)
        if replica is not None and which == "trial" and trial is not None:
            replica.fetch(StudyFiles(path).trial(trial).log)
        return JSONResponse(log_tail(path, which, trial, lines))

    @app.get("/api/studies/{study}/report", response_class=FileResponse)
    def report(study: StudyId) -> FileResponse:
        """Download the study as one self-contained HTML page."""
        from tune_app.report.page import write_report

        reading = folder.reading(study)
        assert reading is not None
        with tempfile.NamedTemporaryFile(suffix=".html", delete=False) as file:
            path = Path(file.name)
        write_report(reading.study, path)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{study}-report.html")
        return FileResponse(
            path,
            filename=name,
            media_type="text/html",
            background=BackgroundTask(lambda: path.unlink(missing_ok=True)),
        )

    @app.get("/api/studies/{study}/events", response_class=StreamingResponse)
    async def events(
        study: StudyId,
        seen: Annotated[int, Query(ge=0, le=2**53)] = 0,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Stream what happens (text/event-stream): rows, decisions, lines of the table and the overview that changed."""
        if last_event_id and last_event_id.isascii() and last_event_id.isdigit():
            seen = int(last_event_id[:16])
        stream = feeds.events(study, seen)
        first = await anext(stream)  # what is refused is refused before the answer begins

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

    @app.get("/api/form")
    def form() -> Response:
        """Return what the form offers: spaces with their ranges, fields of a study, hyperparameters with meaning."""
        return Response(_form(), media_type="application/json")

    # Changing ----------------------------------------------------------------------------------------------------------

    @app.post("/api/check")
    def check(fields: Annotated[dict[str, Any], Body()]) -> JSONResponse:
        """Check the fields of a study file without starting anything; says what the study would be."""
        spec = build_spec(_with_paths(fields))
        space = spec.resolved_space() if spec.kind == "search" else None
        rows = [row._asdict() for row in space.describe()] if space else []
        return JSONResponse({"trials": spec.num_trials, "epochs": spec.epochs, "space": rows})

    @app.post("/api/studies", status_code=201)
    def begin(asked: NewStudy) -> Asked:
        """Write the study file into a new folder and let the study wait for the machine."""
        fields = _with_paths(asked.spec)
        build_spec(fields)
        path = folder.root / asked.name
        if path.exists():
            raise QueueError(f"{asked.name}: there is such a folder already; choose another name")
        path.mkdir(parents=True)
        with replacing(StudyFiles(path).asked) as temporary:
            temporary.write_text(
                yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        queue.add(path)
        return Asked(study=asked.name, became="queued")

    @app.post("/api/studies/{study}/start")
    def start(study: StudyId, retry_failed: bool = False) -> Asked:
        """Let a study wait for the machine: begun when it never was, resumed otherwise.

        `retry_failed`: trials that have failed go on, too.
        """
        path = folder.path(study)
        if StudyFiles(path).spec.is_file():
            reading = folder.reading(study)
            if reading is not None:
                failed = failed_trials(reading.study)
                if retry_failed and not failed:
                    raise QueueError(f"{path.name}: no trial has failed")
                if not retry_failed and state_of(path, reading.study, queue) == "ended":
                    raise QueueError(
                        f"{path.name} has ended, {failed} of its trials failed: retry_failed=true lets those go on"
                        if failed
                        else f"{path.name} has ended: every trial ran to its end or was stopped"
                    )
        elif retry_failed:
            raise QueueError(f"{path.name} has not begun: no trial has failed")
        queue.add(path, retry_failed=retry_failed)
        return Asked(study=study, became="queued")

    @app.post("/api/studies/{study}/stop")
    def stop(study: StudyId) -> Asked:
        """Take a waiting study from the queue, or ask a running one to stop; it can be resumed."""
        path = folder.path(study)
        if queue.place(path) is None:
            answering()
        became = queue.stop(path)
        requested()
        return Asked(study=study, became=became)

    @app.post("/api/studies/{study}/trials/{trial}/stop")
    def stop_trial(study: StudyId, trial: TrialId) -> Asked:
        """Ask the driver to stop one trial after the epoch it is in."""
        answering()
        path = folder.path(study)
        reading = folder.reading(study)
        assert reading is not None
        page = trial_page(reading.study, trial)
        if not page["stoppable"]:
            raise QueueError(f"trial {trial} has ended: {page['state']}")
        ask_to_stop_trial(StudyFiles(path), trial)
        requested()
        return Asked(study=study, became="asked")

    return app


def _standing(path: Path, reading: Reading | None, queue: StudyQueue) -> dict[str, Any]:
    """Where a study stands by now, and what can be done with it."""
    state = state_of(path, reading.study if reading else None, queue)
    entry = queue.last if queue.last is not None and queue.last.path == str(path) else None
    console = log_tail(path, "console", None, 12)["lines"] if state == "unstarted" else []
    return {
        "state": state,
        "place": queue.place(path),
        "stopping": bool(
            entry
            and entry.stopping
            and entry.exit_code is None
            and state in ("running", "starting")
        ),
        "exit_code": entry.exit_code if entry else None,
        "can_start": state in ("new", "unstarted", "interrupted"),
        "can_retry": reading is not None
        and state in ("ended", "interrupted")
        and failed_trials(reading.study) > 0,
        "can_stop": state in ("running", "starting", "queued"),
        "said": [line for line in console if line][-6:],
    }


def _line(study: str, path: Path, folder: StudyFolder, queue: StudyQueue) -> dict[str, Any]:
    below = "." if path == folder.root else str(path.parent.relative_to(folder.root))
    row: dict[str, Any] = {"id": study, "name": path.name, "folder": below}
    if not StudyFiles(path).spec.is_file():
        return row | _standing(path, None, queue)
    try:
        reading = folder.reading(study, wait=False)
    except UnreadableError as error:
        return row | {
            "state": "unreadable",
            "error": printable(str(error)),
            "can_start": False,
            "can_retry": False,
            "can_stop": False,
        }
    if reading is None:
        return row | _standing(path, None, queue)
    shown: dict[str, Any] = folder.memo(reading, "glance", glance)
    return row | shown | _standing(path, reading, queue)


def _read_all(folder: StudyFolder, ended: threading.Event) -> None:
    """Read every study once, so that the list need not wait for the slowest; and whatever appears later."""
    done: set[str] = set()
    while not ended.wait(2.0 if done else 0.1):
        for study in list(folder.paths()):
            try:
                if study not in done and StudyFiles(folder.path(study)).spec.is_file():
                    done.add(study)
                    folder.reading(study)
            except (
                UnknownError,
                UnreadableError,
                OSError,
            ) as error:  # damaged, or removed meanwhile
                log.warning("%s", error)


def _with_paths(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with every path absolute, relative ones from where the service is, and data that are there."""
    fields = absolute_paths(fields)
    problems = []
    data = fields.get("data")
    if isinstance(data, str) and is_url(data):
        bucket, name = bucket_of(data)
        if bucket.stamp(name) is None:
            problems.append(f"data: no object {data}")
    elif isinstance(data, str) and not Path(data).is_file():
        problems.append(f"data: no file {data}")
    if problems:
        raise SpecError(problems)
    return fields


@cache
def _asset(name: str) -> bytes:
    folder = REPORT if name == "report.css" else STATIC
    return (folder / name).read_bytes()


@cache
def _form() -> bytes:
    spaces = []
    for space in SPACES.values():
        written = space.to_mapping()
        rows = {row.name: row for row in space.describe()}
        parameters = [
            {
                "name": name,
                "role": role,
                **ranges,
                "before": rows[name].before,
                "default": rows[name].default,
            }
            for role in ("search", "retune")
            for name, ranges in written[role].items()
        ]
        spaces.append(
            {
                "name": space.name,
                "title": space.title,
                "parameters": parameters,
                "fixed": written["fixed"],
            }
        )
    hyperparameters = [
        {
            "name": name,
            "default": format_value(name, info.default),
            "meaning": info.description or "",
        }
        if not isinstance(info.default, tuple)
        else {
            "name": name,
            "default": "x".join(map(str, info.default)),
            "meaning": info.description or "",
        }
        for name, info in FineTuneConfig.model_fields.items()
    ]
    fields = {
        name: StudySpec.model_fields[name].description
        for name in (
            "data",
            "space",
            "trials",
            "objective",
            "sampler",
            "seed",
            "gpus_per_trial",
            "max_concurrent",
        )
    }
    return to_json(
        {
            "spaces": spaces,
            "hyperparameters": hyperparameters,
            "fields": fields,
            "objectives": [
                {"name": each.name, "title": each.title} for each in OBJECTIVES.values()
            ],
            "samplers": ["tpe", "random", "qmc", "gp"],
            "not_searched": NOT_SEARCHED,
            "palette": figures.PALETTE,
        }
    )


def _answer(status: int) -> Any:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        lines = getattr(error, "problems", None) or [str(error)]
        return JSONResponse({"detail": [printable(str(line)) for line in lines]}, status)

    return handler


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    lines = problem_lines(error.errors(), below=1)
    return JSONResponse({"detail": [printable(line) for line in lines]}, 422)


async def _in_lines(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": [str(error.detail)]}, error.status_code, headers=error.headers)


# Running it ------------------------------------------------------------------------------------------------------------


def serve(
    root: Path,
    *,
    host: str,
    port: int,
    token: str | None = None,
    names: Iterable[str] = (),
    private: bool = False,
    address: str | None = None,
    say: Any = print,
) -> None:
    """Serve the studies below `root`, a folder or a URL, until interrupted.

    Raises QueueError when another service on this machine serves the same, SpecError for a token that is easy to guess
    and a URL of another kind, and StorageError for storage that cannot be read.
    """
    import uvicorn
    from filelock import FileLock, Timeout

    if token is not None and len(token) < LEAST_TOKEN:
        raise SpecError(
            f"MEDTUNE_TOKEN has {len(token)} characters: choose at least {LEAST_TOKEN}, or leave it out"
        )
    url = url_of(root)
    if url is None and re.match(r"[A-Za-z][A-Za-z0-9+-]+:/", str(root)):
        raise SpecError(
            f"{root}: name a folder, or a bucket in object storage: {', '.join(SCHEMES)}://bucket/..."
        )
    replica = Replica(url) if url else None
    root = replica.root if replica else root
    own = root / ".medtune"
    if replica is None and not root.exists():
        say(f"{root} was not there: an empty folder, which has no studies yet")
    own.mkdir(parents=True, exist_ok=True)
    token = token or secrets.token_urlsafe(24)
    access = Access(token, host=host, port=port, names=names, private=private)
    try:
        with FileLock(own / "serve.lock", timeout=0):
            shown = f"[{host}]" if ":" in host else "127.0.0.1" if host in ("0.0.0.0", "") else host
            if replica is not None:
                replica.begin()
            say(f"studies of {shlex.quote(url or str(root))}: http://{shown}:{port}/#token={token}")
            say(
                "reading is open to this machine; starting and stopping takes the token above"
                if access.open_to_read
                else "everything takes the token above; put TLS before it where the network is not yours"
            )
            app = build_app(root, access, address=address, replica=replica)
            config = uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=3,
                timeout_keep_alive=30,
            )
            server = uvicorn.Server(config)
            ask_to_exit = server.handle_exit

            def exit_with_streams(number: int, frame: FrameType | None) -> None:
                # They have no end of their own, and uvicorn waits for them before it lets the app close.
                app.state.feeds.close()
                ask_to_exit(number, frame)

            server.handle_exit = exit_with_streams  # type: ignore[assignment, method-assign]
            server.run()
    except Timeout:
        raise QueueError(
            f"{url or root}: another `medtune serve` serves this here; two would start studies twice"
        ) from None
