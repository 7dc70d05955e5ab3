"""Ray as a study uses it: a cluster that is there, or a local one that strangers are kept out of; and its chatter."""

import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import psutil
import ray
import ray.util.debug

from trainables.checkpoints import LogFile
from trainables.machine.file_locks import acquire_lock
from trainables.machine.ray_workers import OwnSearchPath
from trainables.machine.safe_path import safe_search
from trainables.machine.this_machine import place_of_sessions, usable_cpus
from trainables.machine.variables import SetWithin
from trainables.own_folder import MARKER, mark_own, remove_own
from tune_app.driver.ray_access import cluster_address, join
from tune_app.driver.stopping import taken_away_while_ray_starts
from tune_app.driver.tune_repairs import agent_on_a_free_port
from tune_app.driver.watchdog import StalledError
from tune_app.study.rows import is_held

log = logging.getLogger("medtune.study")

START_TRIES = 3
"""Times a local Ray is started before the machine counts as too busy."""
SHUTDOWN_S = 30.0
"""Seconds Ray may take to end."""
LEAVING_S = 5.0
"""Seconds that workers may take to notice that their Ray has ended."""
PREFIX = "medtune-"
"""Of the names of folders of local Rays."""
MARK = "Ray of process "
"""Start of the content of their markers."""
IN_USE = ".in-use"
"""Name of the lock in such a folder, which the system releases when the process is killed. A folder that is kept has none."""
YOUNG_S = 60.0
"""Age up to which a lock may have been made and not yet taken."""
SESSION = "MEDTUNE_RAY_SESSION"
"""Environment variable of everything that a local Ray starts."""


def keep_strangers_out() -> None:
    """Give the local Ray that this process starts next a separate token, which is written nowhere.

    A local Ray listens on all interfaces, and every client that reaches it can run code. Ray asks for a token by default
    (2.60 and later), but saves the one it makes where others on the machine can read it. Nothing is changed where the user has set
    how Ray authenticates (RAY_AUTH_MODE and its neighbours).
    """
    if not _of_authentication():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _of_authentication() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}


def _forget_token(before: Mapping[str, str]) -> None:
    """Remove the variables of Ray's authentication that were not set `before` a local Ray was started."""
    for name in set(_of_authentication()) - set(before):
        del os.environ[name]
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def would_start_ray(address: str | None) -> bool:
    """Whether a study here starts its own Ray on this machine: none is connected, named, or in RAY_ADDRESS."""
    return not ray.is_initialized() and cluster_address(address) is None


@dataclass
class OwnRay:
    """A Ray that this process has started for itself."""

    folder: Path
    """All its files. Another Ray of this machine has other ones."""
    mark: str
    """Content of the folder's marker: unique to this process and this Ray."""
    keep: bool = False
    """Whether its logs are left when it has ended."""


@contextmanager
def ray_to_work_with(address: str | None) -> Iterator[OwnRay | None]:
    """A Ray to work with: the cluster at `address`, one that is already connected, or a local one for this study alone.

    Gives the local one, else None.
    """
    if ray.is_initialized():
        yield None
        return
    cluster = cluster_address(address)
    ends = signal.getsignal(signal.SIGTERM)
    if cluster is None:
        with own_ray(log_to_driver=False, logging_level=logging.ERROR) as local:
            _give_back(signal.SIGTERM, ends)
            yield local
        return
    with taken_away_while_ray_starts():
        join(cluster, log_to_driver=False, logging_level=logging.ERROR)
    _give_back(signal.SIGTERM, ends)
    try:
        yield None
    finally:
        _shut_down_ray()
        _forget_what_ray_keeps()


def _give_back(number: int, handler: Any) -> None:
    """Take a signal back from Ray, whose handler of SIGTERM ends the process without a word to the study."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


@contextmanager
def own_ray(**options: Any) -> Iterator[OwnRay]:
    """A local Ray for the block alone, whatever else runs on this machine: it never joins another one.

    `options` of `ray.init`. Its folder is removed at the end unless the block fails or sets `keep`: Ray itself keeps the
    logs of every session for ever. So are the folders of processes that were killed before they could do that.
    """
    remove_abandoned(Path(place_of_sessions()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place_of_sessions()))
    session = secrets.token_hex(8)
    local = OwnRay(folder, f"{MARK}{os.getpid()}, session {session}")
    mark_own(folder, local.mark)
    with acquire_lock(folder / IN_USE):
        os.environ[SESSION] = session
        access = _of_authentication()
        try:
            _start_ray(folder, options)
            yield local
        except Exception:
            local.keep = True
            raise
        finally:
            _shut_down_ray()
            end_workers(os.environ.pop(SESSION, session))
            _forget_what_ray_keeps()
            _forget_token(access)
            if local.keep:
                (folder / IN_USE).unlink(missing_ok=True)
                log.warning("Ray's own logs are kept in %s", folder)
            else:
                remove_own(folder, local.mark)


def remove_abandoned(place: Path) -> None:
    """Remove the folders of local Rays of this user below `place` whose process was killed before it could remove them."""
    for lock in place.glob(f"{PREFIX}*/{IN_USE}"):
        folder = lock.parent
        try:
            young = time.time() - lock.stat().st_mtime < YOUNG_S
            if young or folder.lstat().st_uid != os.getuid() or is_held(lock):
                continue
            mark = (folder / MARKER).read_text(encoding="utf-8")
            if mark.startswith(MARK) and remove_own(folder, mark):
                log.info("%s: removed; the process that had made it was killed", folder)
        except (OSError, UnicodeDecodeError):  # removed by another process meanwhile
            continue


def cpus_of_ray() -> dict[str, int]:
    """Options for a Ray that has the CPUs which this process may use, of a machine that may have more.

    Ray itself does not know affinities and quotas. Where Slurm does not bind processes to CPUs, only its variables show
    how many a job has. CUDA_VISIBLE_DEVICES lists the GPUs.
    """
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    of_slurm = "SLURM_JOB_ID" in os.environ and given.isdecimal()
    return {"num_cpus": int(given) if of_slurm else usable_cpus()}


def _of_ray() -> dict[str, str]:
    telemetry = "RAY_enable_open_telemetry"  # its exporter's thread outlives each `ray.shutdown`
    reports = "RAY_USAGE_STATS_ENABLED"  # to Ray's makers
    return {telemetry: os.environ.get(telemetry, "0"), reports: "0"}


_for_ray = SetWithin(_of_ray)


def _start_ray(folder: Path, options: dict[str, Any]) -> None:
    """Start a local Ray. By default Ray gives up after 30 s, and a start on a busy machine may take that long."""
    keep_strangers_out()
    options = cpus_of_ray() | options
    for left in reversed(range(START_TRIES)):
        try:
            with agent_on_a_free_port(), safe_search(), _for_ray(), taken_away_while_ray_starts():
                # Without "local" Ray joins a cluster that has a node on this machine.
                ray.init(
                    "local",
                    include_dashboard=False,
                    _temp_dir=str(folder),
                    job_config=OwnSearchPath(),
                    **options,
                )
            return
        except Exception as error:  # Ray raises no narrower one
            if "timed out during startup" not in str(error):
                raise
            if not left:
                raise StalledError(
                    f"Ray did not start in {START_TRIES} tries of 30 s: this machine is too busy, or too short of memory; "
                    "try again when it is not"
                ) from error
            log.warning("Ray did not start within its 30 s: trying again")
            ray.shutdown()


def _shut_down_ray() -> None:
    """End our part of Ray. A process of it that no longer answers would keep `ray.shutdown` waiting for ever."""
    node = ray._private.worker._global_node
    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(SHUTDOWN_S)
    if ending.is_alive() and node is not None:
        log.warning("Ray did not end within %.0f s: its processes are killed", SHUTDOWN_S)
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        ending.join(SHUTDOWN_S)


def _forget_what_ray_keeps() -> None:
    """Let go of what Ray keeps of each session for as long as the process lives: trainables and their texts, as keys."""
    ray.util.debug.reset_log_once()
    cached = getattr(
        ray._raylet, "has_async_methods", None
    )  # its cache holds the last 1,024 classes of actors
    if cached is not None:
        cached.cache_clear()


def end_workers(session: str, *, patience_s: float = LEAVING_S) -> None:
    """Kill the workers that a local Ray has left behind and that have not ended on their own in `patience_s`.

    A worker normally ends when its raylet has, but not while it is frozen, or stuck in a driver of its GPU, whose memory
    it would keep.
    """
    deadline = time.monotonic() + patience_s
    left = [process for process in psutil.process_iter() if _works_for(process, session)]
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [process for process in left if _works_for(process, session)]
    for process in left:
        with suppress(psutil.Error):
            log.warning(
                "%s (process %d) outlived its Ray and is killed", process.name(), process.pid
            )
            process.kill()


def _works_for(process: psutil.Process, session: str) -> bool:
    """Whether this is a worker of the session. A zombie, which has no command line and may stay where there is no init, is none."""
    try:
        worker = (process.cmdline() or [""])[0].startswith("ray::")
        return bool(worker and process.environ().get(SESSION) == session)
    except psutil.Error:
        return False


class _Told(logging.Handler):
    """Our own warnings, for the user to see as well."""

    def __init__(self, notes: Any) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.print(f"note: {record.getMessage()}", soft_wrap=True, markup=False)


class _WithoutRaylets:
    """Standard output without the lines that Ray prints about raylets, whatever `log_to_driver` is: these go to the log.

    Ray prints a page of guesses at why a worker died; the study itself reports the trial, and whether that continues.
    """

    notice = re.compile(
        r"(?:\x1b\[\d+m)?\(raylet(?:, ip=[^)]*)?\)(?:\x1b\[\d+m)?\s*(.*)", re.DOTALL
    )

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.local()

    def write(self, text: str) -> int:
        ended, self._thread.inside = getattr(self._thread, "inside", False) and text == "\n", False
        if found := self.notice.match(text):
            logging.getLogger("ray.raylet").error(
                "%s", found[1]
            )  # the level that Ray leaves its loggers
            self._thread.inside = True  # `print` writes the line's end separately
        elif not ended:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_for_tune = SetWithin(
    lambda: {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ray's own handler swallows the first Ctrl-C and delays the clean-up
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nothing is read back from it
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that reports its end without memory has no score
    }
)


@contextmanager
def ray_to_file(path: Path, notes: Any) -> Iterator[None]:
    """Send what Ray, Optuna and we log to the study's log; of it only our own warnings go to `notes`, too."""
    handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "optuna", "medtune")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        if logger.name == "medtune":
            logger.addHandler(_Told(notes))
        logger.setLevel(logging.INFO if logger.name == "medtune" else logging.WARNING)
    told = cast(TextIO, _WithoutRaylets(sys.stdout)) if sys.stdout is not None else None
    with _for_tune(), warnings.catch_warnings(), redirect_stdout(told):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
            handler.close()
