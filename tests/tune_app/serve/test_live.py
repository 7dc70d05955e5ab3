"""The stream of new rows, and who may follow it."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import DEADLINE_S

from tune_app.serve import live
from tune_app.serve.folder import StudyFolder
from tune_app.serve.live import Feeds, TooManyViewersError
from tune_app.study.files import StudyFiles, append_line


async def first_events(
    feeds: Feeds, study: str, seen: int, count: int, meanwhile: Callable[[], None]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def read() -> None:
        async for event in feeds.events(study, seen):
            fields = dict(
                line.split(": ", 1)
                for line in event.decode().strip().splitlines()
                if not line.startswith(":")
            )
            if "data" in fields:
                found.append(fields | {"data": json.loads(fields["data"])})
            if len([each for each in found if each["event"] == "rows"]) >= count:
                return

    task = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    meanwhile()
    await asyncio.wait_for(task, DEADLINE_S)
    return found


def test_a_viewer_gets_what_came_while_it_was_away_and_then_what_comes(
    tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    root = write_study("live", trials=3, epochs=6, unfinished=1)
    files, folder = StudyFiles(root), StudyFolder(tmp_path)
    content = files.epochs.read_bytes()
    lines = content.splitlines(keepends=True)
    away = len(b"".join(lines[:-2]))
    new = {
        "trial": "00002",
        "epoch": 90,
        "time": time.time(),
        "val_auc": None,
        "val_auc_raw": 0.75,
        "val_auc_ema": None,
        "drw_active": True,
    }

    def add() -> None:
        append_line(files.epochs, new)

    feeds = Feeds(folder, lambda study, reading: {"id": study})
    events = asyncio.run(first_events(feeds, "live", away, 2, add))
    rows = [event for event in events if event["event"] == "rows"]
    missed = [json.loads(line) for line in lines[-2:]]
    assert [row[:2] for row in rows[0]["data"]["rows"]] == [
        [row["trial"], row["epoch"]] for row in missed
    ]
    assert rows[0]["id"] == str(len(content))
    assert rows[1]["data"]["rows"] == [["00002", 90, 0.75, None, True]]
    assert rows[1]["id"] == str(files.epochs.stat().st_size)
    assert feeds.viewers == 0, "a client that left is not kept"

    middle = away - 5
    events = asyncio.run(first_events(feeds, "live", middle, 1, lambda: None))
    assert [row[:2] for row in events[0]["data"]["rows"]][-3:] == [
        *([r["trial"], r["epoch"]] for r in missed),
        ["00002", 90],
    ]
    assert len(events[0]["data"]["rows"]) == 4, "half a row is sent whole"


def test_viewers_without_the_token_do_not_keep_others_out(
    tmp_path: Path, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 3)
    monkeypatch.setattr(live, "KEPT_FOR_TOKEN", 1)
    write_study("live", trials=2, epochs=6)
    feeds = Feeds(StudyFolder(tmp_path), lambda study, reading: {"id": study})

    async def watch() -> None:
        streams = [feeds.events("live", 0, trusted=False) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(TooManyViewersError, match=r"2 viewers .* or log in"):
            await anext(feeds.events("live", 0, trusted=False))
        streams.append(feeds.events("live", 0, trusted=True))
        await anext(streams[-1])
        with pytest.raises(TooManyViewersError, match="3 viewers"):
            await anext(feeds.events("live", 0, trusted=True))
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(watch())
    assert feeds.viewers == 0
