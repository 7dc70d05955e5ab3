"""The objects that the routes of `medtune serve` share: the studies, the queue, the live feeds and the access rules."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi import Path as InPath

from trainables.data.storage import StorageError
from trainables.data.visible import visible
from tune_app.results.study import Study
from tune_app.results.text import printable
from tune_app.serve.access import Access
from tune_app.serve.exporting import Exports
from tune_app.serve.folder import ID_LENGTH, Reading, StudyFolder, UnknownError, UnreadableError
from tune_app.serve.keeping import read_notes
from tune_app.serve.live import Feeds
from tune_app.serve.measuring import Measurements
from tune_app.serve.queue import QueueError, StudyQueue
from tune_app.serve.replica import Replica
from tune_app.serve.views import (
    failed_trials,
    glance,
    overview,
    state_of,
    to_json,
)
from tune_app.study.files import StudyFiles, default_cache

log = logging.getLogger("medtune.serve")

ALONE_S = 10.0
"""Seconds that a reader waits while something is computed for another one."""


class Service:
    """The studies below `root` and everything that the routes need to show and change them.

    `address` is the Ray cluster that the drivers use. `replica` keeps `root` as a copy of the studies in object storage.
    `data_roots`: folders and URLs; where there are any, a study started from the page reads nothing outside them.
    """

    def __init__(
        self,
        root: Path,
        access: Access,
        *,
        address: str | None = None,
        replica: Replica | None = None,
        data_roots: Sequence[str] = (),
    ) -> None:
        self.access, self.replica, self.data_roots = access, replica, tuple(data_roots)
        self.folder = StudyFolder(root, replica)
        driven = replica.driven_here if replica else lambda: list(self.folder.paths().values())
        self.queue = StudyQueue(
            self.folder.root / ".medtune" / "queue.json",
            driven,
            address=address,
            place=self.folder.place,
            data_roots=self.allowed_roots(),
        )
        self.on_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
        """Whether drivers run trials on other machines, whose files this one does not see."""
        self.exports = Exports(self.folder.root / ".medtune" / "models")
        self.measurements = Measurements(
            default_cache() / "pace.json", self.queue.hold_machine, self.queue.environment
        )
        self.feeds = Feeds(self.folder, self.about)
        self._alone = threading.Lock()
        self._closed = threading.Event()

    def allowed_roots(self) -> list[str]:
        """Return the folders and URLs that a study started from the page may read; empty: everything."""
        return [*self.data_roots, str(self.folder.root)] if self.data_roots else []

    def start(self) -> None:
        """Start the threads that run the queue, read the studies and follow the storage."""
        works = [self.queue.run, self._read_all, *([self.replica.run] if self.replica else [])]
        for work in works:
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """End the threads and the streams. Drivers continue."""
        self._closed.set()
        self.queue.close()
        self.measurements.close()
        self.feeds.close()
        if self.replica is not None:
            self.replica.close()

    def _read_all(self) -> None:
        """Read every study once, so that the list need not wait for the slowest; and each that appears later."""
        done: set[str] = set()
        while not self._closed.wait(2.0 if done else 0.1):
            for study in list(self.folder.paths()):
                try:
                    if study not in done and StudyFiles(self.folder.path(study)).spec.is_file():
                        done.add(study)
                        self.folder.reading(study)
                except (UnknownError, UnreadableError, OSError) as error:
                    log.warning("%s", error)  # damaged, or removed meanwhile

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold back others while something is computed for one reader alone. Raises QueueError after ALONE_S."""
        if not self._alone.acquire(timeout=ALONE_S):
            raise QueueError("the service computes this for other readers: try again in a moment")
        try:
            yield
        finally:
            self._alone.release()

    # Reading -----------------------------------------------------------------------------------------------------------

    def read(self, study: str) -> Reading:
        """Return the study as last read, waiting for the first time. Raises UnknownError and UnreadableError."""
        reading = self.folder.reading(study)
        assert reading is not None
        return reading

    def computed(self, study: str, key: Any, make: Callable[[Study], Any]) -> Response:
        """Return `make(study)` as JSON, computed and encoded once per reading."""
        body = self.folder.memo(self.read(study), ("json", key), lambda found: to_json(make(found)))
        return Response(body, media_type="application/json")

    def about(self, study: str, reading: Reading) -> dict[str, Any]:
        """Return the overview of a study and its current state."""
        path = self.folder.path(study)
        about: dict[str, Any] = dict(self.folder.memo(reading, "overview", overview))
        about["stop_requests"] = [
            p.stem for p in StudyFiles(path).requests.glob("*.json") if p.stem != "study"
        ]
        about["trouble"] = self.trouble
        return {"id": study, **about, **self.standing(path, reading)}

    def line(self, study: str, path: Path) -> dict[str, Any]:
        """Return a study's row in the list; studies that have not been read yet are not waited for."""
        root = self.folder.root
        below = "." if path == root else str(path.parent.relative_to(root))
        row: dict[str, Any] = {"id": study, "name": visible(path.name), "folder": visible(below)}
        row["tags"] = read_notes(path).study.tags
        if not StudyFiles(path).spec.is_file():
            return row | self.standing(path, None)
        try:
            reading = self.folder.reading(study, wait=False)
        except UnreadableError as error:
            return row | {
                "state": "unreadable",
                "error": printable(str(error)),
                "can_start": False,
                "can_retry": False,
                "can_stop": False,
            }
        if reading is None:
            return row | self.standing(path, None)
        shown: dict[str, Any] = self.folder.memo(reading, "glance", glance)
        return row | shown | self.standing(path, reading)

    def standing(self, path: Path, reading: Reading | None) -> dict[str, Any]:
        """Return the current state of a study, and which actions it allows."""
        queue = self.queue
        state = state_of(path, reading.study if reading else None, queue)
        entry = queue.last if queue.last is not None and queue.last.path == str(path) else None
        stopping = entry is not None and entry.stopping and entry.exit_code is None
        return {
            "state": state,
            "place": queue.place(path),
            "stopping": stopping and state in ("running", "starting"),
            "exit_code": entry.exit_code if entry else None,
            "can_start": state in ("new", "unstarted", "interrupted"),
            "can_retry": reading is not None
            and state in ("ended", "interrupted")
            and failed_trials(reading.study) > 0,
            "can_stop": state in ("running", "starting", "queued"),
        }

    # Object storage ----------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why the data shown may be old; None where the studies are in a folder or the storage answers."""
        return self.replica.trouble if self.replica else None

    def require_storage(self) -> None:
        """Raise StorageError while the storage does not answer: a request to a driver would not reach it."""
        if self.trouble is not None:
            raise StorageError(self.trouble)

    def send_requests(self) -> None:
        """Send requests to drivers now where they travel through object storage."""
        if self.replica is not None:
            self.replica.look(now=True)


def service_of(request: Request) -> Service:
    """Return the service that answers the request."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]
StudyId = Annotated[
    str, InPath(max_length=ID_LENGTH, description="Id of the study, from the list.")
]
TrialId = Annotated[
    str, InPath(max_length=64, pattern="^[0-9A-Za-z_-]+$", description="Id of the trial.")
]
