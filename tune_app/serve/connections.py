"""Limits on the connections of `medtune serve`: how many there may be, and how long each may take.

Opening a connection needs no token, so nothing here may depend on one. Without limits, clients that open connections and
send nothing use up the process's file descriptors, and every viewer is locked out for as long as they stay.

- A connection that waits for a request, or whose request is incomplete, is closed after REQUEST_S.
- A client that does not read its answer is disconnected after WRITE_S.
- Where an address has too many connections that wait for a request, its oldest one is closed. Where an address has too
  many in all, or there are too many in all, the oldest waiting one makes room; without one, the one whose answer has
  lasted longest does. That is a stream, and a page takes its stream up again where it ended.
"""

import asyncio
import ipaddress
import logging
import resource
import time
from collections import OrderedDict
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("medtune.serve")

REQUEST_S = 20.0
"""Seconds for a whole request to arrive, headers and body, and for an idle connection to send its next one."""

WRITE_S = 60.0
"""Seconds for which a client may leave an answer unread."""

MOST_CONNECTIONS = 1000
MOST_OF_ADDRESS = 600
"""Connections of one address; more than there may be viewers at all, because a proxy is one address."""
MOST_WAITING_OF_ADDRESS = 64
"""Connections of one address without a complete request."""

RESERVED_FILES = 200
"""File descriptors that are kept for studies, drivers and reports."""

ACCEPTED_AT_ONCE = 32
"""Connections that asyncio accepts in one turn, before this module sees the first of them: several turns have to fit
into RESERVED_FILES."""
LISTEN_BACKLOG = 1024
"""Connections that the system keeps until they are accepted."""


def most_connections() -> int:
    """Raise the process's limit of open files where it is low, and return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(16, min(MOST_CONNECTIONS, soft - RESERVED_FILES))


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found, 64), strict=False))


class Connections:
    """Every open connection by address, and which of them wait for a request."""

    def __init__(
        self,
        most: int = MOST_CONNECTIONS,
        most_of_address: int = MOST_OF_ADDRESS,
        most_waiting_of_address: int = MOST_WAITING_OF_ADDRESS,
    ) -> None:
        self.most, self.most_of_address = most, most_of_address
        self.most_waiting_of_address = most_waiting_of_address
        self._open: dict[Any, str] = {}
        self._waiting: dict[str, OrderedDict[Any, None]] = {}
        self._working: dict[str, OrderedDict[Any, None]] = {}
        """Both in the order in which the connections began to wait or to work."""

    @property
    def total(self) -> int:
        return len(self._open)

    def opened(self, address: str, connection: Any) -> Any | None:
        """Count a new connection; returns the connection that has to be closed for it.

        That one is no longer counted: asyncio closes it a turn later, and others may be opened before.
        """
        waiting = len(self._waiting.get(address, ()))
        working = len(self._working.get(address, ()))
        crowded = None
        if waiting >= self.most_waiting_of_address or waiting + working >= self.most_of_address:
            crowded = address
        elif self.total >= self.most:
            by_address = self._waiting or self._working
            crowded = max(by_address, key=lambda each: len(by_address[each]))
        surplus = None
        if crowded is not None:
            surplus = next(iter(self._waiting.get(crowded) or self._working[crowded]))
            self.closed(surplus)
        self._open[connection] = address
        self.waits(connection)
        return surplus

    def waits(self, connection: Any) -> None:
        """Note that a connection has no complete request."""
        self._move(connection, self._working, self._waiting)

    def works(self, connection: Any) -> None:
        """Note that the connection's request is complete and its answer is not."""
        self._move(connection, self._waiting, self._working)

    def closed(self, connection: Any) -> None:
        """Forget a connection."""
        self._move(connection, self._waiting, None)
        self._move(connection, self._working, None)
        self._open.pop(connection, None)

    def _move(
        self,
        connection: Any,
        origin: dict[str, OrderedDict[Any, None]],
        into: dict[str, OrderedDict[Any, None]] | None,
    ) -> None:
        if connection not in self._open:
            return
        address = self._open[connection]
        if address in origin:
            origin[address].pop(connection, None)
            if not origin[address]:
                del origin[address]
        if into is not None:
            into.setdefault(address, OrderedDict())[connection] = None


def limited_protocol(connections: Connections) -> type[H11Protocol]:  # noqa: C901  # sum over the methods
    """Return uvicorn's HTTP protocol with these limits."""

    class LimitedProtocol(H11Protocol):
        _waits: bool | None = None
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            address = network_of(self.client[0] if self.client else "?")
            surplus = connections.opened(address, self)
            self._waits = True
            self._begin_timer()
            if surplus is not None:
                log.warning("%s: too many connections, the oldest is closed", address)
                surplus.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            connections.closed(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                self._begin_timer()  # the first bytes of a request
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            self._note()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._note()

        def _note(self) -> None:
            cycle = self.cycle
            waits = cycle is None or cycle.response_complete or cycle.more_body
            if waits == self._waits or self.transport.is_closing():
                return
            self._waits = waits
            if waits:
                connections.waits(self)
                self._begin_timer()
            else:
                connections.works(self)
                if self._timer is not None:
                    self._timer.cancel()

        def _begin_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(REQUEST_S, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

        def resume_writing(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
            super().resume_writing()

    return LimitedProtocol


class LogLimit(logging.Filter):
    """Lets through BURST messages at once and one per EVERY_S after that, each cut at LENGTH characters.

    Clients without a token can cause messages; without a limit they could fill the disk that the log is on.
    """

    BURST, EVERY_S, LENGTH = 30, 10.0, 2000

    def __init__(self, now: Any = time.monotonic) -> None:
        super().__init__()
        self._now, self._left, self._at, self._dropped = now, float(self.BURST), now(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._now()
        self._left = min(float(self.BURST), self._left + (now - self._at) / self.EVERY_S)
        self._at = now
        if self._left < 1:
            self._dropped += 1
            return False
        self._left -= 1
        text = record.getMessage()[: self.LENGTH]
        if self._dropped:
            text += f" ({self._dropped} messages before this one were left out)"
            self._dropped = 0
        record.msg, record.args = text, ()
        return True
