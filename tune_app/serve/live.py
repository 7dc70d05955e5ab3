"""News of a study as server-sent events: read once, encoded once, sent to all its viewers.

While anybody looks at a study one task follows its epochs.jsonl and decisions.jsonl by the bytes that were added. An
event's id is the number of bytes of epochs.jsonl that its reader has then seen: a browser that lost its connection sends it
back, and continues from there. Events: `rows` ([trial, epoch, raw, averaged, class weights on?]), `decisions`, `trials`
(lines of the table that changed) and `study` (its overview).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from tune_app.serve.folder import Reading, StudyFolder, UnknownError, UnreadableError
from tune_app.serve.views import to_json, trials_table
from tune_app.study.files import StudyFiles
from tune_app.study.rows import json_lines

EVERY_S = 0.5
"""Seconds between two looks at the files."""

HEARTBEAT_S = 15.0
"""Seconds of silence after which a comment keeps proxies from closing the connection."""

MOST_WAITING = 256
"""Events that may wait for one viewer; one that is slower is disconnected, and comes back from where it was."""

MOST_VIEWERS = 500
"""Of all studies together."""

KEPT_FOR_TOKEN = 100
"""Viewers of those that only clients with the token may be: others must not be able to keep them out."""

CHUNK = 1 << 20
"""Bytes of rows sent in one event at most."""


LARGEST_SCORE = 1e9


class TooManyViewersError(RuntimeError):
    """Another viewer would be one too many."""


class Feeds:
    """One feed per study that has viewers."""

    def __init__(
        self, folder: StudyFolder, describe: Callable[[str, Reading], dict[str, Any]]
    ) -> None:
        self._folder, self._describe = folder, describe
        self._feeds: dict[str, _Feed] = {}
        self.viewers = 0

    async def events(self, study: str, seen: int, *, trusted: bool = True) -> AsyncIterator[bytes]:
        """Yield events of the study to one viewer that has seen `seen` bytes of its epochs.jsonl, without end.

        `trusted`: the viewer has the token. Raises UnknownError and TooManyViewersError.
        """
        path = await run_in_threadpool(self._folder.path, study)
        most = MOST_VIEWERS if trusted else MOST_VIEWERS - KEPT_FOR_TOKEN
        if self.viewers >= most:
            further = "" if trusted else ", or log in"
            raise TooManyViewersError(f"{most} viewers are connected: close some of them{further}")
        feed = self._feeds.get(study)
        if feed is None:
            feed = self._feeds[study] = _Feed(study, path, self._folder, self._describe)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MOST_WAITING)
        self.viewers += 1
        feed.viewers.add(queue)
        # no await between this and the line above: everything later is in the queue
        upto = feed.start()
        try:
            yield b"retry: 2000\n\n"
            while seen < upto:
                event, seen = await run_in_threadpool(_backlog, feed.files.epochs, seen, upto)
                yield event
            while True:
                try:
                    news = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if news is None:
                    return
                yield news
        finally:
            self.viewers -= 1
            feed.viewers.discard(queue)
            if not feed.viewers:
                feed.stop()
                if self._feeds.get(study) is feed:
                    del self._feeds[study]

    def close(self) -> None:
        """End every stream: the service is shutting down."""
        for feed in list(self._feeds.values()):
            for queue in feed.viewers:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(None)


class _Feed:
    """What one study's viewers share."""

    def __init__(
        self,
        study: str,
        path: Path,
        folder: StudyFolder,
        describe: Callable[[str, Reading], dict[str, Any]],
    ) -> None:
        self.study, self.files, self.viewers = (
            study,
            StudyFiles(path),
            set[asyncio.Queue[bytes | None]](),
        )
        self._folder, self._describe = folder, describe
        self._task: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._offset = _whole_size(self.files.epochs)
        self._decided = _whole_size(self.files.decisions)
        self._lines: dict[str, bytes] = {}
        self._told = b""

    def start(self) -> int:
        """Follow the study unless a task does already; returns how many bytes of epochs.jsonl have been followed."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())
        return self._offset

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    async def _follow(self) -> None:
        while True:
            with suppress(
                OSError
            ):  # a file removed, or a disk gone for the moment: the next look may show which
                self._send_rows()
            # reading a large study takes seconds: rows continue meanwhile
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._send_overview())
            await asyncio.sleep(EVERY_S)

    def _send_rows(self) -> None:
        size = _whole_size(self.files.epochs)
        if size < self._offset:  # another study was put here
            self._offset = 0
        while self._offset < size:
            event, self._offset = _backlog(self.files.epochs, self._offset, size)
            self._send(event)
        decided = _whole_size(self.files.decisions)
        if decided > self._decided:
            rows, self._decided = _rows(self.files.decisions, self._decided, decided)
            self._send(
                _event("decisions", [row for row in rows if row.get("reason") != "between_rungs"])
            )

    async def _send_overview(self) -> None:
        try:
            reading = await run_in_threadpool(self._folder.reading, self.study)
            if reading is None:
                return
            lines, told = await run_in_threadpool(self._changes, reading)
        except (UnknownError, UnreadableError, OSError):
            return  # removed while it was looked at, or damaged: its page reports it when asked
        if lines:
            self._send(_event("trials", lines))
        if told != self._told:
            self._told = told
            self._send(b"event: study\ndata: " + told + b"\n\n")

    def _changes(self, reading: Reading) -> tuple[list[Any], bytes]:
        """Lines of the table that differ from those sent last, and the overview. The first time nothing is news."""
        table = self._folder.memo(reading, "trials", trials_table)
        lines = {row["trial"]: to_json(row) for row in table["rows"]}
        columns = to_json(table["columns"])
        changed = [
            row for row in table["rows"] if self._lines.get(row["trial"]) != lines[row["trial"]]
        ]
        same_columns = self._lines.get("") == columns
        first = not self._lines
        self._lines = lines | {"": columns}
        if first:
            changed = []
        elif not same_columns:  # a column came or went: every line is another one
            changed = [{"columns": table["columns"]}, *table["rows"]]
        return changed, to_json(self._describe(self.study, reading))

    def _send(self, event: bytes) -> None:
        for queue in list(self.viewers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)


def _whole_size(path: Path) -> int:
    """Bytes of a JSONL file up to its last line end; 0 where its last CHUNK bytes have none, as no row is that long."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, 2)
        least = size - CHUNK
        while size > max(0, least):
            start = max(0, size - 65536)
            file.seek(start)
            end = file.read(size - start).rfind(b"\n")
            if end >= 0:
                return start + end + 1
            size = start
    return 0


def _rows(path: Path, start: int, upto: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of whole lines from about byte `start` to `upto`, at most CHUNK bytes, and where they end.

    A start in the middle of a line goes back to the line's beginning: a row twice does no harm, half a row does.
    """
    with path.open("rb") as file:
        if start:
            back = max(0, start - 65536)
            file.seek(back)
            start = back + file.read(start - back).rfind(b"\n") + 1
        file.seek(start)
        content = file.read(min(upto - start, CHUNK))
    end = content.rfind(b"\n") + 1
    if not end:  # one line longer than a chunk is no row of ours
        return [], min(upto, start + CHUNK)
    # The study's notes report damaged lines.
    return [row for _, row in json_lines(path, content[:end], damage=[])], start + end


def _backlog(path: Path, start: int, upto: int) -> tuple[bytes, int]:
    """The `rows` event of the bytes from `start` on, and the byte it goes up to."""
    rows, end = _rows(path, start, upto)
    end = max(end, start + 1)  # never stand still
    news = [
        [row["trial"], row["epoch"], _score(row.get("val_auc_raw")), _score(row.get("val_auc_ema")), row.get("drw_active") is True]
        for row in rows
        if isinstance(row.get("trial"), str) and isinstance(row.get("epoch"), int)
    ]  # fmt: skip
    return _event("rows", {"rows": news, "sent": time.time()}, number=end), end


def _score(value: Any) -> float | None:
    if not isinstance(value, int | float) or not abs(value) <= LARGEST_SCORE:
        return None  # NaN, and values that JSON cannot hold or that are no metric
    return round(float(value), 4)


def _event(name: str, value: Any, number: int | None = None) -> bytes:
    head = b"" if number is None else f"id: {number}\n".encode()
    return head + f"event: {name}\ndata: ".encode() + to_json(value) + b"\n\n"
