"""Trials that run without progress, and why: reported in time, and ended when this has lasted too long.

A trial touches the file `alive` in its folder as its steps are done (`trainables.ray_trainable`), from any node that sees
the study's folder. What moves is left alone, however slow it is. What does not is named after `QUIET_S`, with the reason
as far as it shows, and its process is ended after `deadline_s`: Tune then starts it again from its checkpoint.
"""

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainables.checkpoints import TrialFiles

log = logging.getLogger("medtune.study")

QUIET_S = 300.0
"""Seconds without a step or a row after which a trial is named; again each time as much has passed as before."""
LOOK_S = 5.0
"""Seconds between two looks."""
START_S = 300.0
"""Seconds a trial may take at the least to find its place, and to its first step: imports, the GPU, its ranks."""
LITTLE_ROOM = 64 * 2**20
"""Bytes; a disk with less is as good as full."""


class StalledError(RuntimeError):
    """A study in which no trial can continue; the message names the remedy, and `medtune resume` continues from here."""


State = Literal["waiting", "taking over", "running", "no room"]
"""waiting: for its place in the cluster; taking over: its process is there, and still ends the trial before; no room: on
its disk, where it waits to write."""

BEFORE_RUNNING: tuple[State, ...] = ("waiting", "taking over")
WAITS: dict[State, str] = {
    "waiting": "has waited for its place for",
    "taking over": "has waited for the trial before it in its process for",
    "no room": "has waited for room on its disk for",
}


@dataclass(frozen=True)
class Seen:
    """One trial that has not ended, as it is now."""

    name: str
    state: State
    mark: object
    """Anything that differs whenever the trial has got on."""
    process: object = None
    """Anything that differs when it has been started again."""


@dataclass
class _Quiet:
    seen: Seen
    since: float
    said: float
    moved: bool = False
    """Whether it has got on since its process is there."""


class Watchdog:
    """Compares what trials show from look to look.

    `say` gets each line for the user, `why` returns the reason a trial does not move, `end` ends its process. Raises
    StalledError from `look` when for `deadline_s` trials have been waiting to begin and none was running. A deadline
    counts from the first step on; until then it is `START_S` at the least.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        why: Callable[[Seen], str],
        end: Callable[[str], None],
        deadline_s: float,
        quiet_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._why, self._end, self._clock = say, why, end, clock
        self._deadline_s = deadline_s
        self._start_s = max(deadline_s, START_S)
        self._quiet_s = min(quiet_s, deadline_s / 2)
        self._quiet: dict[str, _Quiet] = {}
        self._last = clock()

    def due(self) -> bool:
        """Whether it is time to look again."""
        return self._clock() - self._last >= LOOK_S

    def look(self, trials: Iterable[Seen]) -> None:
        """Take in what all trials that have not ended show now."""
        now = self._clock()
        missed = now - self._last - 2 * LOOK_S
        # this process itself stood still: suspended, or waiting for room; trials are not to blame
        if missed > 0:
            for quiet in self._quiet.values():
                quiet.since, quiet.said = quiet.since + missed, quiet.said + missed
        self._last = now
        current = list(trials)
        self._quiet = {seen.name: self._updated(seen, now) for seen in current}
        for quiet in self._quiet.values():
            self._judge(quiet, now)
        if current and all(seen.state in BEFORE_RUNNING for seen in current):
            waited = now - max(quiet.since for quiet in self._quiet.values())
            if waited >= self._start_s:
                reason = self._why(current[0])
                raise StalledError(f"no trial has started for {_time(waited)}: {reason}")

    def _updated(self, seen: Seen, now: float) -> _Quiet:
        before = self._quiet.get(seen.name)
        if before is None or (before.seen.state, before.seen.process) != (seen.state, seen.process):
            if seen.state == "no room":
                self._say(
                    f"trial {seen.name}: the disk is full; make room, and the trial continues"
                )
            return _Quiet(seen, now, now)
        return before if before.seen.mark == seen.mark else _Quiet(seen, now, now, moved=True)

    def _judge(self, quiet: _Quiet, now: float) -> None:
        silent = now - quiet.since
        limit = self._deadline_s if quiet.moved else self._start_s
        if quiet.seen.state == "running" and silent >= limit:
            self._say(
                f"trial {quiet.seen.name}: nothing done for {_time(silent)} ({self._why(quiet.seen)}); its process is "
                "ended, and it starts again from its checkpoint"
            )
            self._end(quiet.seen.name)
            quiet.since = quiet.said = now
            quiet.moved = False
        elif silent >= self._quiet_s and now - quiet.said >= max(
            self._quiet_s, (quiet.said - quiet.since)
        ):
            told = WAITS.get(quiet.seen.state, "nothing done for")
            self._say(f"trial {quiet.seen.name}: {told} {_time(silent)}: {self._why(quiet.seen)}")
            quiet.said = now


def moved(files: TrialFiles, rows: int) -> tuple[State, tuple[int, int | None]]:
    """Return whether a running trial waits for room, and what differs whenever it has got on: rows, a touch of `alive`."""
    try:
        found = files.alive.stat()
    except OSError:
        return "running", (rows, None)
    return (
        ("no room", (rows, None))
        if found.st_atime_ns == 0
        else ("running", (rows, found.st_mtime_ns))
    )


def reason_of(files: TrialFiles) -> str:
    """Return why a running trial does not move, from its log and its disk."""
    with suppress(OSError):
        free = shutil.disk_usage(files.folder).free
        if free < LITTLE_ROOM:
            return f"its disk has {free / 2**20:.0f} MiB left: make room"
    last = _last_line(files.log)
    if "waiting" in last:
        return last
    return (
        f"no step ended, its log ends with: {last}" if last else "no step ended, its log is empty"
    )


def placing(bundles: list[dict[str, float]], resources: Callable[[], dict[str, float]]) -> str:
    """Return the resources that a waiting trial takes, and those that are free."""
    need = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    free = resources()
    told = [
        " and ".join(f"{each.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
        for each in (need, free)
    ]
    return f"it takes {told[0]} in {len(bundles)} bundle(s), {told[1]} are free: add a node, or end what holds them"


def ending(before: str | None, files: Callable[[str], TrialFiles]) -> str:
    """Return why a trial whose process exists has not started; `before`: the trial that the process served last, if known."""
    which, where = (
        ("the trial before", "their disk")
        if before is None
        else (f"trial {before}", files(before).folder)
    )
    return (
        f"its process has not ended {which}, whose last files may still be on their way to {where}"
    )


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    text = lines[-1] if lines else ""
    return text if len(text) <= 200 else text[:197] + "..."


def _require_own_ray(*, waiting: bool) -> None:
    """Raise StalledError where this process' own Ray has lost what it needs to start a trial. `waiting`: one is to start."""
    import ray

    node = ray._private.worker._global_node
    if node is not None and not Path(node.raylet_socket_name).exists():
        raise StalledError(
            f"{node.raylet_socket_name}: Ray's files were removed while the study ran, so no trial can start: `medtune "
            "resume` continues every trial from its last checkpoint; TMPDIR names a place that nothing clears"
        )
    if any(server.poll() is not None for server in _control_processes()):
        raise StalledError(
            "Ray has lost its control process: `medtune resume` continues with a new one"
        )
    if waiting and not ray.cluster_resources().get("CPU"):
        raise StalledError(
            "Ray has lost its node on this machine: `medtune resume` continues with a new one"
        )


def _control_processes() -> "list[subprocess.Popen[bytes]]":
    """Of the Ray that this process has started; none where it has joined one."""
    import ray

    node = ray._private.worker._global_node
    return (
        [] if node is None else [each.process for each in node.all_processes.get("gcs_server", [])]
    )


@contextmanager
def own_ray_watched(study: str) -> Iterator[None]:
    """Within the block, report at once the end of the control process of this process' own Ray, with the command that resumes.

    Calls of Ray then wait for a minute in its library, which ends this process without a word about the study.
    """
    servers, ended = _control_processes(), threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            if any(server.poll() is not None for server in servers):
                log.error(
                    "Ray's control process (gcs_server) has ended, and the study ends with it, within a minute: `medtune resume "
                    "%s` continues every trial from its last checkpoint",
                    study,
                )
                return

    watcher = threading.Thread(target=watch, name="own-ray", daemon=True)
    if servers:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if servers:
            watcher.join()


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def watch_tune(
    files: Callable[[str], TrialFiles],
    rows: Callable[[str], int],
    bundles: list[dict[str, float]],
    *,
    say: Callable[[str], None],
    deadline_s: float,
    local: bool,
) -> Callable[[list[Any]], None]:
    """Return a function for Tune's loop that looks at its trials every few seconds.

    `local`: no node will be added to this Ray. When it has lost its own, or the files that new processes of it need,
    StalledError is raised at once.
    """
    import ray

    # Of one look only: a handle that outlives Ray's end keeps a connection of Ray's open.
    actors: dict[str, Any] = {}
    served: dict[object, str] = {}  # the last trial of each process

    def end(name: str) -> None:
        if actors.get(name) is not None:
            ray.kill(
                actors[name]
            )  # reaches a frozen process too: its node's raylet ends it within seconds

    def why(seen: Seen) -> str:
        if seen.state == "waiting":
            return placing(bundles, ray.available_resources)
        if seen.state == "taking over":
            return ending(served.get(seen.process), files)
        return reason_of(files(seen.name))

    watchdog = Watchdog(say=say, why=why, end=end, deadline_s=deadline_s)

    def look(trials: list[Any]) -> None:
        if not watchdog.due():
            return
        seen = []
        for trial in trials:
            if trial.status not in ("PENDING", "RUNNING"):
                continue
            name = str(trial.config["trial"])
            actors[name] = trial.temporary_state.ray_actor
            process = actors[name] and actors[name]._actor_id
            state, mark = moved(files(name), rows(name))
            if trial.status == "RUNNING":
                served[process] = name
            else:
                state = "waiting" if process is None else "taking over"
            seen.append(Seen(name, state, mark, process))
        try:
            if local:
                _require_own_ray(waiting=any(each.state in BEFORE_RUNNING for each in seen))
            watchdog.look(seen)
        finally:
            actors.clear()

    return look
