"""The routes of the page itself and of its session."""

from functools import cache
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tune_app.serve.access import SESSION_S, Refused, is_secure
from tune_app.serve.folder import UnknownError
from tune_app.serve.service import Service, TheService

STATIC = Path(__file__).parent / "static"
REPORT = Path(__file__).parents[1] / "report"
ASSETS = {
    "serve.js": "text/javascript",
    "parts.js": "text/javascript",
    "study.js": "text/javascript",
    "charts.js": "text/javascript",
    "across.js": "text/javascript",
    "curves.js": "text/javascript",
    "follow.js": "text/javascript",
    "table.js": "text/javascript",
    "serve.css": "text/css",
    "report.css": "text/css",
}
"""The files that serve.html loads, by name; the report shares `report.css`."""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#00609c"/>'
    '<path d="M2 12C5 12 5 4 8 4s3 4 6 4" stroke="#fff" stroke-width="2" fill="none"/></svg>'
)

router = APIRouter()


class Token(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=400)


class Session(BaseModel):
    """Whether the caller may change things, and the value that its page has to send with each change."""

    logged_in: bool
    csrf: str | None
    reading: Literal["open", "token"]


@router.get("/", include_in_schema=False)
def page() -> Response:
    return Response(_asset("serve.html"), media_type="text/html; charset=utf-8")


@router.get("/icon.svg", include_in_schema=False)
def icon() -> Response:
    return Response(ICON, media_type="image/svg+xml")


@router.get("/{name}", include_in_schema=False)
def asset(name: str) -> Response:
    if name not in ASSETS:
        raise UnknownError("no such file")
    return Response(_asset(name), media_type=f"{ASSETS[name]}; charset=utf-8")


@cache
def _asset(name: str) -> bytes:
    folder = REPORT if name == "report.css" else STATIC
    return (folder / name).read_bytes()


@router.get("/api/session")
def session(request: Request, service: TheService) -> Session:
    """Return whether the caller may change things."""
    return _session(service, request.scope["session"], logged_in=request.scope["trusted"])


@router.post("/api/session")
def log_in(request: Request, given: Token, response: Response, service: TheService) -> Session:
    """Exchange the token for a cookie. Wrong tokens are slowed down."""
    access = service.access
    if not access.is_token(given.token, request.client.host if request.client else "?"):
        raise Refused(403, "this is not the token that `medtune serve` printed")
    value = access.new_session()
    response.set_cookie(
        access.cookie,
        value,
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=is_secure(request.scope),
        path="/",
    )
    return _session(service, value, logged_in=True)


@router.delete("/api/session")
def log_out(request: Request, response: Response, service: TheService) -> Session:
    """End the session, on the server as well, and remove the cookie."""
    service.access.end_session(request.scope["session"])
    response.delete_cookie(service.access.cookie, path="/")
    return _session(service, "", logged_in=False)


def _session(service: Service, value: str, *, logged_in: bool) -> Session:
    return Session(
        logged_in=logged_in,
        csrf=service.access.csrf(value) if value else None,
        reading="open" if service.access.open_to_read else "token",
    )
