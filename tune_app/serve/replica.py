"""A copy on this machine of the studies below a URL, which `medtune serve` shows as it shows a folder.

One thread lists the objects at a bounded pace, whatever the number of viewers and studies, and fetches changed objects: a
study's tables and records, never weights, and nothing that is not a study's. The copy is used like a folder:

- `.driver.lock` of a study is held here while its driver shows signs of life there, so that a study is seen to run;
- a file put into `requests/` is sent, and removed here when the driver has answered it there.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, Timeout

from trainables.data.json_files import parse_json
from trainables.data.storage import Listed, Remote, StorageError
from tune_app.study.copies import FRESH_S, LEASE, REQUEST, copy_objects, folder_of
from tune_app.study.files import StudyFiles
from tune_app.study.mirror import PAUSE
from tune_app.study.rows import driver_lock

log = logging.getLogger("medtune.serve")

EVERY_S = 2.0
"""Seconds between two listings while the page has viewers; more where listing and fetching take long."""
IDLE_S = 20.0
"""The same while it has none."""
LOOKED_S = 60.0
"""Seconds for which a request counts as a viewer."""

FOLDER = r"((?:[^/.][^/]*/){0,3})"
OF_A_STUDY = re.compile(
    FOLDER
    + r"(study\.json|epochs\.jsonl|decisions\.jsonl|study\.log|test\.json|trials/[0-9A-Za-z_-]{1,64}/(?:trial|config)\.json)"
)
"""Names of the objects that are copied: the study's folder, and what in it."""
REQUEST_THERE = re.compile(FOLDER + REQUEST.pattern)


class Replica:
    """The copy, and the thread that keeps it. `root` is its folder; `.medtune` in it belongs to the service."""

    def __init__(self, url: str) -> None:
        self.url, self.remote = url, Remote(url)
        self.root = folder_of(url, "served")
        self.trouble: str | None = f"{url} is being read for the first time"
        """Why the page may be out of date; None while the storage answers."""
        self._have: dict[str, tuple[datetime, int]] = {}
        self._again: set[str] = set()
        self._asked: set[str] = set()
        """Requests that are in the storage and here."""
        self._leases: dict[str, tuple[datetime, float]] = {}
        """Study -> when its driver last gave a sign of life, by the storage's clock and by ours."""
        self._locks: dict[str, BaseFileLock] = {}
        self._hosts: dict[str, str] = {}
        self._looked = -math.inf
        self._wake, self._ended = threading.Event(), threading.Event()

    def begin(self) -> None:
        """Remove an earlier service's copies, but no files of studies started on its page. Raises StorageError if unreadable."""
        self.remote.require()
        kept = {"study.yaml", "console.log", ".medtune"}
        for folder, folders, names in os.walk(self.root, topdown=True):
            folders[:] = [name for name in folders if name not in kept]
            for name in set(names) - kept:
                (Path(folder) / name).unlink(missing_ok=True)
        shutil.rmtree(self.root / ".medtune" / "incoming", ignore_errors=True)

    def place(self, path: Path) -> str:
        """Return the URL of the original of a folder of the copy."""
        below = path.relative_to(self.root).as_posix()
        return self.url if below == "." else f"{self.url}/{below}"

    def driven_here(self) -> list[Path]:
        """Return the studies that a driver on this machine is at work on."""
        here = socket.gethostname()
        return [self.root / study for study, host in list(self._hosts.items()) if host == here]

    def fetch(self, path: Path) -> None:
        """Copy one more object, such as a trial's log, now. Raises StorageError."""
        self.remote.get(path.relative_to(self.root).as_posix(), path)

    # The thread --------------------------------------------------------------------------------------------------------

    def look(self, *, now: bool = False) -> None:
        """Note that the page has a viewer; `now`: something was put into `requests/`."""
        idle = time.monotonic() - self._looked > LOOKED_S
        self._looked = time.monotonic()
        if idle or now:
            self._wake.set()

    def run(self) -> None:
        """Follow the storage until `close`; runs in a separate thread."""
        while not self._ended.is_set():
            began = time.monotonic()
            rest = EVERY_S
            try:
                self.pull()
                rest = max(EVERY_S, PAUSE * (time.monotonic() - began))
                if began - self._looked > LOOKED_S:
                    rest = max(rest, IDLE_S)
                self.trouble = None
            except OSError as error:
                if self.trouble is None or not isinstance(error, StorageError):
                    log.warning("%s", error)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                what = (
                    "the storage does not answer"
                    if isinstance(error, StorageError)
                    else "the copy cannot be kept"
                )
                if self.trouble is None or not self.trouble.startswith(what):
                    self.trouble = (
                        f"{what} since {since}, the page shows the state at that time: {error}"
                    )
            self._wake.wait(rest)
            self._wake.clear()
            self._ended.wait(0.5)  # however often requests come
        for study in list(self._locks):
            self._let_go(study)

    def close(self) -> None:
        """End `run`."""
        self._ended.set()
        self._wake.set()

    def pull(self) -> None:
        """List once, and bring the copy up to that. Raises StorageError, and OSError for this machine's disk."""
        listed = self.remote.listing()
        studies = {
            one.name.removesuffix("study.json")
            for one in listed
            if one.name.rpartition("/")[2] == "study.json"
        }
        wanted = {
            one.name: (one.written, one.size)
            for one in listed
            if (found := OF_A_STUDY.fullmatch(one.name)) and found[1] in studies
        }
        self._copy(
            {name for name, stamp in wanted.items() if self._have.get(name) != stamp}, wanted
        )
        for name in set(self._have) - set(wanted):
            (self.root / name).unlink(missing_ok=True)
            del self._have[name]
        self._follow_drivers(
            {one.name.removesuffix(LEASE): one.written for one in listed if _is_lease(one)}, studies
        )
        self._exchange_requests(
            {one.name for one in listed if REQUEST_THERE.fullmatch(one.name)}, studies
        )

    def _copy(self, changed: set[str], wanted: dict[str, tuple[datetime, int]]) -> None:
        # A record may be written twice within one second, the resolution of listings: once more, the next time.
        names = sorted(changed | {name for name in self._again if name in wanted})
        self._again = {name for name in changed if name.endswith(".json")}
        # Fetched records before rows and put in place the other way round: never the end of a trial without its rows.
        records = [name for name in names if name.endswith("/trial.json")]
        rest = [name for name in names if not name.endswith("/trial.json")]
        incoming = self.root / ".medtune" / "incoming"
        copy_objects(self.remote, records, incoming)
        copy_objects(self.remote, rest, incoming)
        for name in [*rest, *records]:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (incoming / name).replace(self.root / name)
                self._have[name] = wanted[name]

    def _follow_drivers(self, leases: dict[str, datetime], studies: set[str]) -> None:
        now = time.monotonic()
        for study in studies & set(leases):
            written, seen = leases[study], now
            if study not in self._leases:  # the first time only, another machine's clock is trusted
                seen = now - max(0.0, (datetime.now(UTC) - written).total_seconds())
            elif self._leases[study][0] == written:
                seen = self._leases[study][1]
            self._leases[study] = written, seen
        alive = {
            s
            for s, (_, seen) in self._leases.items()
            if s in leases and s in studies and now - seen < FRESH_S
        }
        for study in set(self._locks) - alive:
            self._let_go(study)
        for study in alive - set(self._locks):
            with contextlib.suppress(Timeout, ValueError):
                driver = parse_json(self.remote.read(study + LEASE) or b"{}").get("driver", "")
                # A second: asking whether it is held takes it for microseconds.
                held = driver_lock(StudyFiles(self.root / study).lock, timeout=1)
                self._locks[study] = held.lock
                self._hosts[study] = str(driver).split(" ")[0]

    def _let_go(self, study: str) -> None:
        self._locks.pop(study).release()
        self._hosts.pop(study, None)

    def _exchange_requests(self, there: set[str], studies: Iterable[str]) -> None:
        here = {
            path.relative_to(self.root).as_posix()
            for study in studies
            for path in (self.root / study / "requests").glob("*.json")
        }
        for name in self._asked - there:  # answered
            (self.root / name).unlink(missing_ok=True)
            here.discard(name)
        self._asked &= there
        for name in here - there:
            self.remote.put(name, self.root / name)
            self._asked.add(name)
        for name in there - here:
            found = REQUEST_THERE.fullmatch(name)
            if found and found[1] in studies and self.remote.get(name, self.root / name):
                self._asked.add(name)
        self._asked |= there & here


def _is_lease(one: Listed) -> bool:
    return one.name.rpartition("/")[2] == LEASE
