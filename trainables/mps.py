"""CUDA MPS for processes that share a GPU: their kernels run at the same time instead of taking turns.

There is one daemon per user and GPU, in a private folder of that user. The first process that asks for it starts it;
a keeper, a small separate process, ends it when the last process that uses it has ended, however that one ended: each
holds a lock on a file, which the kernel releases. No setting of the GPU is changed, and a daemon of someone else is used
and never stopped. The daemon serves one GPU, which it knows by its UUID: a process that was given another GPU, or a user
with one of several, is not affected by it.

`nvidia-cuda-mps-control` answers where the daemon runs, and exits with 1 where it does not. Without a daemon in the
folder that CUDA_MPS_PIPE_DIRECTORY names, CUDA works as it does without MPS (its manual page), so a process that must
not share names a folder that does not exist.

Standard library alone: it runs before CUDA is initialised, and the keeper runs it as a program.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

CONTROL = "nvidia-cuda-mps-control"
"""NVIDIA's program: the daemon, and the command that talks to it."""
PIPES, LOGS, VISIBLE = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"
DEFAULT_PIPES = "/tmp/nvidia-mps"
"""Where CUDA looks for a daemon when CUDA_MPS_PIPE_DIRECTORY is not set."""
LEAST_DRIVER = 470
"""First driver whose daemon reports the state of a server."""
LEAST_CAPABILITY = 7.0
"""Volta: earlier GPUs let one process of a server write into the memory of another."""
LONGEST_FOLDER = 70
"""Characters of the folder's path; with the names of the sockets in it, the system allows 107."""
ANSWER_S = 20.0
"""Seconds that the daemon may take to answer."""
START_S = 30.0
"""Seconds until the daemon and its server must run, and that a process waits for another one to start them."""
END_S = 10.0
"""Seconds that a study waits at its end until its daemons have ended."""
FAULT_S = 60.0
"""Seconds to wait for a server that recovers from the fault of a client."""

Mode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi reports it."""

    index: str
    uuid: str
    name: str
    driver: str
    compute_mode: str
    """Default, Exclusive_Process or Prohibited."""
    mig: str
    """Enabled, Disabled or [N/A]."""
    capability: str


@dataclass(frozen=True)
class Standing:
    """How this process uses its GPU."""

    kind: Literal["own", "existing", "turns"]
    """own: under a daemon of medtune's; existing: under one that was there; turns: without MPS."""
    reason: str
    """Which daemon, or why there is none."""

    @property
    def text(self) -> str:
        if self.kind == "turns":
            return f"in turns on the GPU, without CUDA MPS ({self.reason})"
        return f"side by side under CUDA MPS ({self.reason})"


class MpsError(ValueError):
    """MPS was required, and is not possible."""


# Functions for a process -----------------------------------------------------------------------------------------------


_joined: tuple[Standing, IO[str] | None] | None = None
"""What `join` settled for this process, and the lock that shows it to the keeper."""


def join(mode: Mode = "auto") -> Standing:
    """Let this process share its GPU under MPS where that is possible; call it before CUDA is initialised.

    The GPU is the first of CUDA_VISIBLE_DEVICES. Sets CUDA's variables in this process's environment. It holds for the
    life of the process: later calls return the first one's result. Raises MpsError with `mode="on"` where MPS is not
    possible.
    """
    global _joined
    if _joined is None:
        standing, variables, lock = _settle(mode)
        require(mode, standing)
        os.environ.update(variables)
        _joined = standing, lock
    return _joined[0]


def keep_apart() -> Standing:
    """Let this process use its GPU without MPS, also where a daemon is there; call it before CUDA is initialised.

    For a run whose last attempt ended in a fault of the GPU: under MPS another one would take its neighbours along.
    """
    global _joined
    if _joined is None:
        os.environ[PIPES] = str(_folder_of_user() / "none")
        _joined = Standing("turns", "the attempt before ended in a fault of the GPU"), None
    return _joined[0]


def joined() -> Standing | None:
    """Return what `join` or `keep_apart` settled for this process; None before."""
    return _joined[0] if _joined else None


@contextlib.contextmanager
def held(mode: Mode = "auto") -> Iterator[Standing]:
    """Keep the daemons of all visible GPUs running while the block runs, without using them; gives their standing.

    For the driver of a study: processes of its trials come and go. Changes no environment. At the end it waits until
    daemons that no other process uses have ended. Raises as `join` does.
    """
    with contextlib.ExitStack() as ending, contextlib.ExitStack() as locks:
        standing = Standing("turns", "no GPU was found")
        for gpu in visible_gpus():
            standing, _, lock = _settle(mode, gpu)
            if lock is not None:
                ending.callback(_await_end, Path(lock.name).parent)
                locks.enter_context(lock)
            if standing.kind == "turns":
                break
        require(mode, standing)
        yield standing


def look(gpu: Gpu) -> Standing:
    """Return how trials would share `gpu`, starting nothing."""
    there = _existing() or _obstacle(gpu)
    if there is not None:
        return there
    folder = _folder_of_user() / _short(gpu)
    if _answers(_newest(folder) / "pipe"):
        return Standing("own", f"a daemon of this user runs in {folder}")
    return Standing("own", "a daemon of this user's own would be started")


def leftovers() -> list[str]:
    """Return what there is of daemons of this user's own: processes and folders. Nothing, where no process uses one."""
    folders = sorted(path for path in _folder_of_user().glob("*") if path.is_dir())
    running = [f"process {number}" for folder in folders for number in _processes_of(folder)]
    return running + [str(folder) for folder in folders]


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves to this process; none where nvidia-smi does not answer."""
    fields = "index,uuid,name,driver_version,compute_mode,mig.mode.current,compute_cap"
    lines = _ask_smi(f"--query-gpu={fields}", "--format=csv,noheader")
    gpus = [Gpu(*parts) for line in lines if len(parts := line.split(", ")) == 7]
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return gpus
    found = []
    for name in filter(None, map(str.strip, visible.split(","))):
        match = [gpu for gpu in gpus if name == gpu.index or gpu.uuid.startswith(name)]
        if len(match) != 1:
            break  # as CUDA does: what follows an unknown name is not seen
        found += match
    return found


# Settling --------------------------------------------------------------------------------------------------------------


def require(mode: Mode, standing: Standing) -> None:
    """Raise MpsError where MPS was required, and `standing` is without."""
    if mode == "on" and standing.kind == "turns":
        raise MpsError(f"mps=on: {standing.reason}; set mps=auto to let trials take turns instead")


def _settle(mode: Mode, gpu: Gpu | None = None) -> tuple[Standing, dict[str, str], IO[str] | None]:
    """The standing of this process on `gpu` (None: its first), the variables to set, and the lock to hold."""
    if mode == "off":
        return Standing("turns", "mps=off"), {PIPES: str(_folder_of_user() / "none")}, None
    if (there := _existing()) is not None:
        return there, {}, None
    if gpu is None:
        gpu = next(iter(visible_gpus()), None)
    if gpu is None:
        return Standing("turns", "nvidia-smi reports no GPU"), {}, None
    if (obstacle := _obstacle(gpu)) is not None:
        return obstacle, {}, None
    try:
        pipes, lock = _enter(_folder_of_user() / _short(gpu), gpu)
    except (_NotPossibleError, OSError) as error:
        return Standing("turns", str(error)), {}, None
    variables = {PIPES: str(pipes), LOGS: str(pipes.parent / "log"), VISIBLE: gpu.uuid}
    return Standing("own", f"a daemon of this user's own, for {gpu.name}"), variables, lock


class _NotPossibleError(RuntimeError):
    """Why there is no daemon of this user's own."""


def _existing() -> Standing | None:
    """The standing under a daemon that someone else has started, None where there is none."""
    named = os.environ.get(PIPES)
    folder = named or DEFAULT_PIPES
    if named is not None and Path(named).is_relative_to(_folder_of_user()):
        return None  # inherited from a process of ours, whose daemon may have ended since
    if shutil.which(CONTROL) is None:
        if named is not None and (Path(named) / "control").exists():  # in a container without tools
            return Standing("existing", f"the daemon in {folder}")
        return None
    if _answers(Path(folder)):
        return Standing("existing", f"the daemon in {folder}")
    return None


def _obstacle(gpu: Gpu) -> Standing | None:
    """Why no daemon can be started for `gpu`, None where it can."""
    if shutil.which(CONTROL) is None:
        return Standing("turns", f"{CONTROL} is not installed, or not in this container")
    major = gpu.driver.partition(".")[0]
    if major.isdigit() and int(major) < LEAST_DRIVER:
        return Standing("turns", f"driver {gpu.driver} is older than {LEAST_DRIVER}")
    with contextlib.suppress(ValueError):
        if float(gpu.capability) < LEAST_CAPABILITY:
            return Standing("turns", f"{gpu.name} is older than Volta")
    if gpu.mig == "Enabled":
        return Standing("turns", f"MIG is enabled on {gpu.name}")
    if gpu.compute_mode == "Prohibited":
        return Standing("turns", f"{gpu.name} is in compute mode Prohibited")
    if gpu.compute_mode == "Exclusive_Process" and _others(gpu):
        return Standing(
            "turns", f"{gpu.name} is in exclusive mode, and another process uses it already"
        )
    return None


def _others(gpu: Gpu) -> bool:
    """Whether a process computes on `gpu` that is not one of our daemon's."""
    names = _ask_smi(
        "--query-compute-apps=process_name", "--format=csv,noheader", f"--id={gpu.uuid}"
    )
    ours = _answers(_newest(_folder_of_user() / _short(gpu)) / "pipe")
    return any("nvidia-cuda-mps" not in name for name in names) and not ours


def _ask_smi(*options: str) -> list[str]:
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    try:
        told = subprocess.run(
            [tool, *options], capture_output=True, text=True, timeout=ANSWER_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]


def _short(gpu: Gpu) -> str:
    return gpu.uuid.rpartition("-")[2]


def _folder_of_user() -> Path:
    return Path(tempfile.gettempdir()) / f"medtune-mps-{os.getuid()}"


# The daemon ------------------------------------------------------------------------------------------------------------


def _enter(folder: Path, gpu: Gpu) -> tuple[Path, IO[str]]:
    """Return the pipe folder of a daemon that runs for `gpu`, started if need be, and a lock that keeps it running."""
    if len(str(folder)) > LONGEST_FOLDER:
        raise _NotPossibleError(f"the path {folder} is too long for a socket: set TMPDIR")
    _private(folder.parent)
    with _locked(folder):
        users = (folder / "users").open("a")
        try:
            alone = _try_lock(users, fcntl.LOCK_EX)
            generation = _newest(folder)
            if not _answers(generation / "pipe"):
                generation = _start(folder, generation, gpu, alone=alone)
            _await_recovery(generation / "pipe")
            # Before the keeper starts, which ends what no one uses
            fcntl.flock(users, fcntl.LOCK_SH)
            _start_keeper(folder)
        except BaseException:
            users.close()
            raise
    return generation / "pipe", users


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise _NotPossibleError(f"{folder} is not a private folder of this user's own: remove it")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; makes the folder. Raises _NotPossibleError when another process holds it for too long."""
    deadline = time.monotonic() + 2 * START_S
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), (folder / "lock").open("a") as lock:
            # A folder that its keeper has just removed takes its lock with it.
            if _try_lock(lock, fcntl.LOCK_EX) and _is_still(lock, folder / "lock"):
                yield
                return
        if time.monotonic() > deadline:
            raise _NotPossibleError(f"another process has held {folder}/lock for too long")
        time.sleep(0.05)


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _generations(folder: Path) -> list[Path]:
    return sorted(folder.glob("g*"), key=lambda path: int(path.name[1:]))


def _newest(folder: Path) -> Path:
    """The folder of the daemon started last: one that was killed may have left clients, whose pipes must stay."""
    return (_generations(folder) or [folder / "g0"])[-1]


def _start(folder: Path, last: Path, gpu: Gpu, *, alone: bool) -> Path:
    """Start a daemon with its server; returns its folder. `alone`: no process uses an earlier one."""
    if alone:
        _end_daemons(folder)
        generation = folder / "g0"
    else:
        generation = folder / f"g{int(last.name[1:]) + 1}"
    pipes, logs = generation / "pipe", generation / "log"
    for path in (generation, pipes, logs):
        path.mkdir(mode=0o700, exist_ok=True)
    tool = shutil.which(CONTROL)
    assert tool is not None, "looked for before"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    kept |= {PIPES: str(pipes), LOGS: str(logs), VISIBLE: gpu.uuid}
    with (logs / "start.log").open("ab") as log:
        # A file, not a pipe: the daemon keeps it open.
        subprocess.run(
            [tool, "-d"], env=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            timeout=START_S, check=False,
        )  # fmt: skip
    deadline = time.monotonic() + START_S
    while not _answers(pipes):
        if time.monotonic() > deadline:
            raise _not_started(folder, logs, "the MPS daemon does not start")
        time.sleep(0.05)
    _control(pipes, f"start_server -uid {os.getuid()}")
    while not servers(pipes):
        if time.monotonic() > deadline:
            raise _not_started(folder, logs, "the MPS server does not start")
        time.sleep(0.05)
    return generation


def _not_started(folder: Path, logs: Path, what: str) -> _NotPossibleError:
    last = ""
    for name in ("server.log", "control.log", "start.log"):
        with contextlib.suppress(OSError):
            lines = (logs / name).read_text(errors="replace").split("\n")
            last = last or next((line.strip() for line in reversed(lines) if line.strip()), "")
    _end_daemons(folder)
    return _NotPossibleError(f"{what}{': ' + last if last else ''}")


def _control(pipes: Path, command: str, *, timeout_s: float = ANSWER_S) -> str | None:
    """The daemon's answer to `command`, None where none answers."""
    tool = shutil.which(CONTROL)
    if tool is None or not pipes.exists():
        return None
    try:
        done = subprocess.run(
            [tool], input=command + "\n", env=os.environ | {PIPES: str(pipes)},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _answers(pipes: Path) -> bool:
    return _control(pipes, "get_server_list") is not None


def servers(pipes: Path) -> list[int]:
    """Return the process ids of the servers of the daemon in the folder `pipes`."""
    return [
        int(word) for word in (_control(pipes, "get_server_list") or "").split() if word.isdigit()
    ]


def _await_recovery(pipes: Path) -> None:
    """Wait while the server is in a fault: it takes new clients once those that saw the fault have ended."""
    deadline = time.monotonic() + FAULT_S
    while any(
        (_control(pipes, f"get_server_status {server}") or "").strip() == "FAULT"
        for server in servers(pipes)
    ):
        if time.monotonic() > deadline:
            raise _NotPossibleError("the MPS server does not recover from the fault of a client")
        time.sleep(0.2)


def _end_daemons(folder: Path) -> None:
    """End all daemons below `folder` with their servers, and remove their folders."""
    for generation in _generations(folder):
        # Without waiting for clients: none is left that anyone waits for.
        _control(generation / "pipe", "quit", timeout_s=5.0)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 3.0
        while (left := list(_processes_of(folder))) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
            time.sleep(0.05)
    for generation in _generations(folder):
        shutil.rmtree(generation, ignore_errors=True)


def _processes_of(folder: Path) -> Iterator[int]:
    """Daemons and servers that were started for a folder below `folder`, also one that was removed since."""
    mark = os.fsencode(f"{PIPES}={folder}/")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            words = (entry / "cmdline").read_bytes().split(b"\0")
            named = any(
                Path(os.fsdecode(word)).name.startswith("nvidia-cuda-mps") for word in words
            )
            variables = (entry / "environ").read_bytes().split(b"\0") if named else []
            if any(variable.startswith(mark) for variable in variables):
                yield int(entry.name)


def _await_end(folder: Path) -> None:
    """Wait until the keeper has removed `folder`, unless another process uses it."""
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        try:
            with (folder / "users").open("r") as users:
                free = _try_lock(users, fcntl.LOCK_EX)  # the keeper is about to take it
                if not free and _try_lock(users, fcntl.LOCK_SH):
                    return  # shared with others: the keeper would not share it
        except FileNotFoundError:
            return
        time.sleep(0.05)


# The keeper ------------------------------------------------------------------------------------------------------------


def _start_keeper(folder: Path) -> None:
    """Start a keeper unless there is one."""
    with (folder / "keeper").open("a") as mark:
        if not _try_lock(mark, fcntl.LOCK_EX):
            return
        # The keeper inherits the lock, so that there is never a moment without one.
        subprocess.run(
            [sys.executable, "-S", "-E", "-P", __file__, str(folder), str(mark.fileno())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(mark.fileno(),), timeout=START_S, check=True,
        )  # fmt: skip


def _keep(folder: Path) -> None:
    """Wait until no process holds the folder's `users`, then end its daemons and remove it."""
    while True:
        with contextlib.ExitStack() as files:
            try:
                users = files.enter_context((folder / "users").open("a"))
            except FileNotFoundError:
                _end_daemons(folder)
                return
            fcntl.flock(users, fcntl.LOCK_EX)
            if not _is_still(users, folder / "users"):
                if not folder.exists():  # someone has cleaned up temporary files
                    _end_daemons(folder)
                return  # else there is a new keeper, which ends all of the folder's daemons
            with (folder / "lock").open("a") as lock:
                # The lock's holder is about to join, and waits for `users`.
                if _try_lock(lock, fcntl.LOCK_EX):
                    _end_daemons(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        folder.parent.rmdir()  # the last of this user's
                    return
        time.sleep(0.05)


def _main(arguments: Mapping[int, str]) -> None:
    """The keeper's process: apart from the one that started it, which may be ended with its children."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    _keep(Path(arguments[1]))


if __name__ == "__main__":
    _main(dict(enumerate(sys.argv)))
