"""The service: a live page over the studies of one folder or URL, and the REST interface behind it.

It reads through `tune_app.results.study` and starts, stops and queues through `tune_app.serve.queue`; no decision about a
study is taken here. It may be stopped and started again at any time: drivers are processes of their own, and everything
that is shown is read from the studies' folders.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from trainables import medtune_version
from trainables.config import ConfigError, problem_lines
from trainables.data.storage import StorageError
from trainables.data.table_file import ManifestError
from tune_app.results.query import QueryError
from tune_app.results.text import printable
from tune_app.serve import change_routes, follow_routes, form_routes, page_routes, read_routes
from tune_app.serve.access import Access, Guard
from tune_app.serve.answers import JSONResponse
from tune_app.serve.folder import UnknownError, UnreadableError
from tune_app.serve.live import TooManyViewersError
from tune_app.serve.queue import QueueError
from tune_app.serve.replica import Replica
from tune_app.serve.service import Service
from tune_app.study.errors import SpecError


class Problem(BaseModel):
    """Why a request was refused, one line per reason."""

    detail: list[str]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "Not understood",
        401: "The token is missing",
        403: "From another site, or a wrong token",
        404: "No such study, trial or figure",
        405: "Another method",
        409: "Not possible in the current state",
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
    ManifestError: 422,
    ConfigError: 422,
    QueryError: 400,
    TooManyViewersError: 503,
    StorageError: 503,
}


def build_app(
    root: Path,
    access: Access,
    *,
    address: str | None = None,
    replica: Replica | None = None,
    data_roots: Sequence[str] = (),
) -> FastAPI:
    """Return the service over the studies below `root`; `address` is the Ray cluster that its drivers use.

    `replica`: keeps `root` as a copy of the studies in object storage, and has started. `data_roots`: the folders and URLs
    that a study started from the page may read; empty: all that the service's user may read.
    """
    service = Service(root, access, address=address, replica=replica, data_roots=data_roots)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="medtune",
        version=medtune_version(),
        description="The studies of one folder or URL: their results, live, and starting and stopping them.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from the network
        redoc_url=None,
        openapi_url="/api/openapi.json",
        responses=PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(Guard, access=access)
    for kind, status in STATUS.items():
        app.add_exception_handler(kind, _answer(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _in_lines)
    for routes in (page_routes, follow_routes, read_routes, change_routes, form_routes):
        app.include_router(routes.router)
    return app


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
