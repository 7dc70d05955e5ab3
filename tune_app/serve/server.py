"""Running the service: its token, its lock, its address and the web server."""

import re
import secrets
import shlex
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from filelock import Timeout

from trainables.data.storage import SCHEMES, is_url, url_of
from trainables.machine.file_locks import acquire_lock
from tune_app.serve.access import LEAST_TOKEN, Access
from tune_app.serve.app import build_app
from tune_app.serve.connections import (
    ACCEPTED_AT_ONCE,
    LISTEN_BACKLOG,
    REQUEST_S,
    Connections,
    limited_protocol,
    most_connections,
)
from tune_app.serve.queue import QueueError
from tune_app.serve.replica import Replica
from tune_app.serve.service import Service
from tune_app.study.errors import SpecError


def serve(
    root: Path,
    *,
    host: str,
    port: int,
    token: str | None = None,
    names: Iterable[str] = (),
    private: bool = False,
    address: str | None = None,
    data_roots: Sequence[str] = (),
    say: Callable[[str], object] = print,
) -> None:
    """Serve the studies below `root`, a folder or a URL, until interrupted.

    Raises QueueError when another service on this machine serves the same, SpecError for a token that is easy to guess
    and a URL of another kind, and StorageError for storage that cannot be read.
    """
    if token is not None and len(token) < LEAST_TOKEN:
        raise SpecError(
            f"MEDTUNE_TOKEN has {len(token)} characters: choose at least {LEAST_TOKEN}, or omit it"
        )
    allowed = _allowed(data_roots)
    url = _url_to_serve(root)
    replica = Replica(url) if url else None
    root = replica.root if replica else root
    own = root / ".medtune"
    if replica is None and not root.exists():
        say(f"{root} was not there: an empty folder, which has no studies yet")
    own.mkdir(parents=True, exist_ok=True)
    token = token or secrets.token_urlsafe(24)
    access = Access(
        token,
        host=host,
        port=port,
        names=names,
        private=private,
        ended=own / "ended_sessions.json",
    )
    try:
        with acquire_lock(own / "serve.lock"):
            if replica is not None:
                replica.begin()
            place = shlex.quote(url or str(root))
            say(f"studies of {place}: http://{_shown(host)}:{port}/#token={token}")
            say(
                "reading is open to this machine; starting and stopping takes the token above"
                if access.open_to_read
                else "everything takes the token above; put TLS before it where the network is not yours"
            )
            app = build_app(root, access, address=address, replica=replica, data_roots=allowed)
            _run(app, host, port)
    except Timeout:
        raise QueueError(
            f"{url or root}: another `medtune serve` serves this here; two would start studies twice"
        ) from None


def _allowed(data_roots: Sequence[str]) -> list[str]:
    """Return the roots of data as URLs and absolute folders. Raises SpecError where a folder is not there."""
    allowed = [each if is_url(each) else str(Path(each).resolve()) for each in data_roots]
    missing = [each for each in allowed if not is_url(each) and not Path(each).is_dir()]
    if missing:
        raise SpecError([f"--data-root {each}: no such folder" for each in missing])
    return allowed


def _url_to_serve(root: Path) -> str | None:
    url = url_of(root)
    if url is None and re.match(r"[A-Za-z][A-Za-z0-9+-]+:/", str(root)):
        schemes = ", ".join(SCHEMES)
        raise SpecError(
            f"{root}: name a folder, or a bucket in object storage: {schemes}://bucket/..."
        )
    return url


def _shown(host: str) -> str:
    """The host as an address of a page has it."""
    if ":" in host:
        return f"[{host}]"
    return "127.0.0.1" if host in ("0.0.0.0", "") else host


def _run(app: FastAPI, host: str, port: int) -> None:
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=limited_protocol(Connections(most_connections())),
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=int(REQUEST_S),
    )
    with _listening(host, port) as listening:
        _Server(config, app.state.service).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise SpecError(
            [f"{host} port {port}: {reason}; choose another with --host or --port"]
        ) from None


class _Server(uvicorn.Server):
    """A server that ends its streams when it is interrupted, and whose connections wait in the system's queue."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(LISTEN_BACKLOG)  # asyncio has one number for this and for accepting

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Streams have no end of their own, and uvicorn waits for them before it lets the app close.
        self._service.feeds.close()
        super().handle_exit(sig, frame)
