"""Limits on connections and on the log: a client without a token must not be able to lock others out."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from browsing import DEADLINE_S, wait_for

from tune_app.serve import connections
from tune_app.serve.connections import Connections, LogLimit, limited_protocol, network_of


def test_an_ipv6_network_is_one_client() -> None:
    assert network_of("10.0.0.7") == "10.0.0.7"
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    assert network_of("2001:db8:1:3::9") != network_of("2001:db8:1:2::9")
    assert network_of("testclient") == "testclient"


def test_the_oldest_waiting_connection_makes_room_and_working_ones_stay() -> None:
    held = Connections(most=6, most_of_address=4, most_waiting_of_address=3)
    for name in "abc":
        assert held.opened("one", name) is None
    assert held.opened("one", "d") == "a", "a fourth that waits"
    held.closed("a")
    held.works("b")
    held.works("c")
    assert held.opened("one", "e") is None
    assert held.opened("one", "f") == "d", "a fifth of the address"
    held.closed("d")
    assert held.total == 4
    for name in "gh":
        assert held.opened("two", name) is None
    held.works("e")
    assert held.opened("three", "i") == "g", "a seventh, and of this address most are waiting"
    for name in "bcefhi":
        held.closed(name)
    assert held.total == 0


def test_the_answer_that_lasts_longest_makes_room_where_no_connection_waits() -> None:
    """Or a client without a token could take an address's connections by streams, for as long as it likes."""
    held = Connections(most=4, most_of_address=3, most_waiting_of_address=3)
    for name in "abc":
        assert held.opened("one", name) is None
    for name in "bac":
        held.works(name)
    assert held.opened("one", "d") == "b"
    held.works("d")
    held.waits("a")  # answered, and may send its next request
    held.works("a")
    assert held.opened("two", "e") is None
    held.works("e")
    assert held.opened("two", "f") == "c", "of the address with the most"
    assert held.opened("two", "g") == "f", "one that waits goes first"
    assert held.total == 4


class Transport:
    """The methods of an open socket that a protocol needs, and whether it was cut off."""

    def __init__(self) -> None:
        self.written, self.aborted = b"", False

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("10.0.0.7", 5000) if name in ("peername", "sockname") else default

    def write(self, content: bytes) -> None:
        self.written += content

    def is_closing(self) -> bool:
        return self.aborted

    def close(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time is set."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0

    def time(self) -> float:
        return self.offset

    async def pass_time(self, seconds: float) -> None:
        self.offset += seconds
        for _ in range(5):
            await asyncio.sleep(0)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


WHOLE = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "cut"),
    [
        ([], True),
        ([b"GET / HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n", b"c: d\r\n"], True),
        ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n", b"x", b"y"], True),
        ([WHOLE, WHOLE, WHOLE], False),
    ],
    ids=["silent", "headers in drips", "body in drips", "requests"],
)
def test_a_request_has_to_arrive_in_time(sent: list[bytes], cut: bool) -> None:
    clock = Clock()

    async def run() -> None:
        config = uvicorn.Config(answer, ws="none", log_config=None, timeout_keep_alive=20)
        config.load()
        state = uvicorn.server.ServerState()
        protocol = limited_protocol(Connections())(config, state, {})
        transport = Transport()
        protocol.connection_made(transport)  # type: ignore[arg-type]
        for content in sent:
            await clock.pass_time(0.3 * connections.REQUEST_S)
            protocol.data_received(content)
            await clock.pass_time(0)
        assert not transport.aborted
        first = 0.3 if sent else 0.0  # a request has its own time from its first bytes on
        left = first + 1.01 - 0.3 * len(sent)
        await clock.pass_time(left * connections.REQUEST_S if cut else 1)
        assert transport.aborted == cut
        assert transport.written.count(b"200 OK") == (0 if cut else len(sent))

    clock.run_until_complete(run())
    clock.close()


def test_who_does_not_read_is_disconnected() -> None:
    clock = Clock()

    async def run() -> None:
        config = uvicorn.Config(answer, ws="none", log_config=None)
        config.load()
        protocol = limited_protocol(Connections())(config, uvicorn.server.ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)  # type: ignore[arg-type]
        protocol.data_received(WHOLE)
        protocol.pause_writing()
        await clock.pass_time(connections.WRITE_S * 0.9)
        assert not transport.aborted
        protocol.resume_writing()
        protocol.pause_writing()
        await clock.pass_time(connections.WRITE_S * 1.01)
        assert transport.aborted

    clock.run_until_complete(run())
    clock.close()


def test_the_log_is_limited_in_rate_and_in_the_length_of_a_message() -> None:
    now = 0.0
    limit = LogLimit(lambda: now)

    def passes(text: str = "accept: %s") -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, text, ("no files",), None)
        return record.getMessage() if limit.filter(record) else None

    shown = [passes() for _ in range(1000)]
    assert sum(text is not None for text in shown) == LogLimit.BURST
    now = LogLimit.EVERY_S
    assert passes() == "accept: no files (970 messages before this one were left out)"
    assert passes() is None
    now += LogLimit.EVERY_S
    assert len(passes("%s" + "x" * 100_000) or "") < LogLimit.LENGTH + 100


@contextmanager
def limited_service(folder: Path, files: int) -> Iterator[tuple[int, Callable[[], str]]]:
    """`medtune serve` with few open files; yields its port and what ends it and returns its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); "
        f"sys.argv = ['medtune', 'serve', {str(folder)!r}, '--port', '{port}']; "
        "from tune_app.cli import main; main()"
    )
    environment = os.environ | {"MEDTUNE_TOKEN": "token-of-the-test", "MEDTUNE_CACHE": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment
    )
    said: list[str] = []

    def end() -> str:
        process.terminate()
        said.append(process.communicate(timeout=DEADLINE_S)[1])
        return said[0]

    try:
        yield port, end
    finally:
        if not said:
            end()


def test_half_open_requests_do_not_lock_viewers_out(tmp_path: Path) -> None:
    def answers(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/session", timeout=20) as got:
                return bool(got.status == 200)
        except OSError:
            return False

    with limited_service(tmp_path, files=400) as (port, end), ExitStack() as open_ones:
        wait_for(lambda: answers(port))
        for _ in range(500):  # more than it may have files
            one = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        for _ in range(3):
            assert answers(port)
        said = end()
    assert "Too many open files" not in said
    assert "Traceback" not in said
    assert len(said) < 20_000
