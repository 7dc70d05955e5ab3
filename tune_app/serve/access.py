"""Access control of the page of `medtune serve`, applied before any of its code runs.

- A request must name a host the service goes by: a page elsewhere that points its own name at this machine (DNS
  rebinding) does not get past it.
- Changing anything takes the token, and so does reading unless the service is bound to this machine alone. A program
  sends it as `Authorization: Bearer`; a browser exchanges it once for a cookie that scripts cannot read and that no other
  site's request carries.
- A browser's change must come from the page itself: its Origin has to be ours, and it has to repeat a value that only the
  page was given (CSRF).
- Wrong tokens are slowed down, per address and in all; the right one is let in whatever else was tried.
- Every answer forbids scripts and styles other than the page's own files, framing, and guessing of content types.
"""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from trainables.checkpoints import write_json
from trainables.data.json_files import read_json

SESSION_S = 12 * 3600
"""Seconds a browser stays logged in."""

TRIES, GLOBAL_TRIES, WINDOW_S = 5, 50, 60.0
"""Wrong tokens from one address, and from all, within WINDOW_S seconds before the next one is not looked at."""

LEAST_TOKEN = 16
"""Characters of a token that a user chose: the limit slows guesses down, but a right guess is always let in."""

MOST_ADDRESSES = 1000
"""Addresses whose wrong tokens are remembered."""

MOST_BYTES = 256 * 1024
"""Of the body of a request: the largest one is a study file."""

SAFE = ("GET", "HEAD", "OPTIONS")

HOST = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[^:\[\]/@\s]*))(?::[0-9]{1,5})?")
"""A Host header: a name or an address, IPv6 in brackets, and perhaps a port. Nothing may follow."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Refused(HTTPException):
    """A request that is answered with `status_code` and the reason.

    An HTTPException, because FastAPI answers any other error of reading a body with 400.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        more = {"www-authenticate": "Bearer"} if status == 401 else {}
        super().__init__(status, detail, {**more, **(headers or {})})


def is_loopback(host: str) -> bool:
    """Whether a service bound to `host` is reachable from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Throttle:
    """Counts wrong tokens and decides when the next one may be tried."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()

    def check(self, address: str) -> None:
        """Raise Refused (429) while there have been too many wrong tokens."""
        for times, limit in (
            (self._by_address.get(address, deque()), TRIES),
            (self._all, GLOBAL_TRIES),
        ):
            while times and times[0] <= self._now() - WINDOW_S:
                times.popleft()
            if len(times) >= limit:
                wait = int(times[0] + WINDOW_S - self._now()) + 1
                raise Refused(
                    429, f"too many wrong tokens: try again in {wait} s", {"retry-after": str(wait)}
                )

    def wrong(self, address: str) -> None:
        """Count a wrong token from `address`."""
        times = self._by_address.setdefault(address, deque())
        self._by_address.move_to_end(address)
        while len(self._by_address) > MOST_ADDRESSES:
            self._by_address.popitem(last=False)
        times.append(self._now())
        self._all.append(self._now())


class Access:
    """The rules for one service, bound to `host` and `port`, with its `token`.

    `names` are further host names it goes by, such as that of a reverse proxy; `private`: reading takes the token, too.
    `ended` is the file that keeps which sessions were logged out before they expired; None: they are kept in memory.
    """

    def __init__(
        self,
        token: str,
        *,
        host: str = "127.0.0.1",
        port: int = 8321,
        names: Iterable[str] = (),
        private: bool = False,
        ended: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._token, self._now = token, now
        self._ended_file, self._ended = ended, _read_ended(ended)
        self.cookie = f"medtune_{port}"
        self.open_to_read = is_loopback(host) and not private
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        if not is_loopback(host):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.throttle = Throttle()

    # The token and its sessions ----------------------------------------------------------------------------------------

    def is_token(self, given: str, address: str) -> bool:
        """Whether `given` is the token; raises Refused for a wrong one when there have been too many."""
        if hmac.compare_digest(given.encode(), self._token.encode()):
            return True  # before the limit is asked, or anybody's guesses would keep out the token's owner
        self.throttle.check(address)
        self.throttle.wrong(address)
        return False

    def new_session(self) -> str:
        """Return the cookie's value for a browser that gave the token; it survives a restart of the service."""
        content = f"{int(self._now()) + SESSION_S}.{secrets.token_urlsafe(12)}"
        return f"{content}.{self._sign('session', content)}"

    def is_session(self, value: str) -> bool:
        """Whether `value` is a cookie of ours that has not expired and has not been logged out."""
        content, _, signature = value.rpartition(".")
        if not content or not hmac.compare_digest(
            signature.encode(), self._sign("session", content).encode()
        ):
            return False
        return int(content.split(".")[0]) > self._now() and self._name(value) not in self._ended

    def end_session(self, value: str) -> None:
        """Log a session out: from now on its cookie is worth nothing, wherever a copy of it is."""
        if self.is_session(value):
            now = self._now()
            self._ended = {name: until for name, until in self._ended.items() if until > now}
            self._ended[self._name(value)] = int(value.split(".")[0])
            if self._ended_file is not None:
                write_json(self._ended_file, self._ended)

    def _name(self, session: str) -> str:
        """The name of a session in a file: it cannot be used to log in."""
        return hashlib.sha256(session.encode()).hexdigest()

    def csrf(self, session: str) -> str:
        """Return the value that the page of that session has to send with each change."""
        return self._sign("csrf", session)

    def _sign(self, purpose: str, content: str) -> str:
        return hmac.new(
            self._token.encode(), f"{purpose}:{content}".encode(), hashlib.sha256
        ).hexdigest()

    # One request -------------------------------------------------------------------------------------------------------

    def check(self, scope: Scope) -> None:
        """Raise Refused unless the request may proceed; leaves `scope["session"]` (or "") and `scope["trusted"]`."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that goes by the other of the two would take the rest for another client's request.
            raise Refused(
                400,
                "Content-Length and Transfer-Encoding: send one of them",
                {"connection": "close"},
            )
        self._check_host(headers.get("host", ""))
        address = (scope.get("client") or ("?",))[0]
        session = self._session(headers.get("cookie", ""))
        scheme, _, given = headers.get("authorization", "").partition(" ")
        bearer = scheme.lower() == "bearer" and self.is_token(given.strip(), address)
        scope["session"], scope["trusted"] = session, bearer or bool(session)
        changes, path = scope["method"] not in SAFE, scope["path"]
        if changes:
            self._check_origin(headers, scope.get("scheme", "http"))
        if path == "/api/session" or not path.startswith("/api/"):
            return  # the page's own files hold nothing of any study
        if not scope["trusted"] and (changes or not self.open_to_read):
            what = (
                "this changes something"
                if changes
                else "the service can be reached from other machines"
            )
            raise Refused(
                401, f"{what}: send the token that `medtune serve` printed, or log in on the page"
            )
        if changes and not bearer:
            self._check_csrf(headers.get("x-medtune-csrf", ""), session)

    def _check_csrf(self, given: str, session: str) -> None:
        if not hmac.compare_digest(given.encode("latin-1"), self.csrf(session).encode()):
            raise Refused(
                403, "X-Medtune-CSRF is missing or not this session's: load the page again"
            )

    def _check_host(self, host: str) -> None:
        found = HOST.fullmatch(host.lower())
        name = (found["six"] or found["name"]) if found else ""
        try:
            ipaddress.ip_address(
                name
            )  # rebinding needs a name; to an address the browser really connected
        except ValueError:
            if name.rstrip(".") not in self.names:
                raise Refused(
                    421, f"host {host[:100]!r} is not this service: use one of {', '.join(sorted(self.names))}, "
                    "or start it with --allow-host"
                ) from None  # fmt: skip

    def _check_origin(self, headers: dict[str, str], scheme: str) -> None:
        origin = headers.get("origin")
        # Behind a proxy that ends TLS the page is https and we are http: host and port have to agree, the scheme not.
        allowed = {
            f"{kind}://{headers.get('host', '')}".lower() for kind in (scheme, "http", "https")
        }
        if origin is not None and origin.lower() not in allowed:
            raise Refused(403, f"origin {origin[:100]!r} is not this service's page")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refused(403, "the request comes from another site")

    def _session(self, cookies: str) -> str:
        # Other services of the host set cookies, too, and not all of them in the form of the standard.
        for part in cookies.split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie and self.is_session(value):
                return value
        return ""


def is_secure(scope: Scope) -> bool:
    """Whether the browser reached the service by HTTPS, through a proxy that ends TLS or without one.

    A proxy's own word is enough: all that hangs on it is whether the browser sends the cookie without TLS.
    """
    headers = {name.lower(): value for name, value in scope["headers"]}
    return (
        scope.get("scheme") == "https"
        or headers.get(b"x-forwarded-proto", b"").strip().lower() == b"https"
        or headers.get(b"origin", b"").lower().startswith(b"https://")
    )


def _read_ended(file: Path | None) -> dict[str, int]:
    if file is None or not file.is_file():
        return {}
    try:
        value = read_json(file)
        return {str(name): int(until) for name, until in value.items()}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{file}: damaged, remove it; every session can then be used again"
        ) from None


class Guard:
    """ASGI middleware: `access` decides, every answer gets HEADERS, and bodies end at MOST_BYTES."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower() for name, _ in message["headers"]}
                extra = {**HEADERS, "cache-control": "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (k.encode(), v.encode())
                        for k, v in extra.items()
                        if k.encode() not in named
                    ),
                ]
            await send(message)

        taken = 0

        async def limited() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:
                raise Refused(413, f"the body is larger than {MOST_BYTES} bytes")
            return message

        try:
            self.access.check(scope)
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if not length.isdigit() or int(length) > MOST_BYTES:
                raise Refused(413, f"the body is larger than {MOST_BYTES} bytes")
            await self.app(scope, limited, guarded)
        except Refused as refused:
            body = json.dumps({"detail": [refused.detail]}).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                **(refused.headers or {}),
            }
            await guarded(
                {
                    "type": "http.response.start",
                    "status": refused.status_code,
                    "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
                }
            )
            await send({"type": "http.response.body", "body": body})
