"""CUDA MPS, with programs that replace NVIDIA's."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_gpu import H200, SECOND, environment, write_programs

from trainables import mps

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0

CLIENT = """
import sys, time
from trainables import mps
print(mps.join(sys.argv[1] if len(sys.argv) > 1 else "auto").kind, mps.joined().reason, flush=True)
import os
print(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder for temporary files: sockets have short names."""
    with tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True) as name:
        yield Path(name)
        for process in ours(Path(name)):
            process.kill()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return write_programs(tmp_path / "bin")


def ours(place: Path) -> list[psutil.Process]:
    """Daemons, servers and keepers of `place` that run."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            named = any(
                Path(word).name.startswith("nvidia-cuda-mps") or word == mps.__file__
                for word in words
            )
            if named and process.environ().get("TMPDIR") == str(place):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Client:
    """A process that shares its GPU until it is asked to end."""

    def __init__(self, variables: dict[str, str], *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *words],
            env=variables | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def standing(self) -> tuple[str, str]:
        assert self.process.stdout is not None
        kind, _, reason = self.process.stdout.readline().strip().partition(" ")
        return kind, reason

    def variables(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def end(self) -> None:
        self.process.communicate("\n", timeout=DEADLINE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def folder_of(place: Path) -> Path:
    return place / f"medtune-mps-{os.getuid()}"


def nothing_left(place: Path) -> bool:
    return not ours(place) and not folder_of(place).exists()


def test_the_first_process_starts_a_daemon_and_the_last_one_ends_it(
    programs: Path, place: Path
) -> None:
    variables = environment(programs, place)
    clients = [Client(variables) for _ in range(3)]
    assert [client.standing()[0] for client in clients] == ["own"] * 3
    pipes = {client.variables()[0] for client in clients}
    assert len(pipes) == 1
    generation = Path(pipes.pop()).parent
    assert generation.is_relative_to(folder_of(place))
    assert (generation / "starts").read_text() == "started\n"
    assert (generation / "log" / "visible").read_text() == H200.split(", ")[1]
    assert folder_of(place).stat().st_mode & 0o777 == 0o700
    clients[0].end()
    clients[1].kill()
    assert (generation / "pipe" / "control").exists()
    clients[2].kill()  # with SIGKILL: it cannot clean up
    until(lambda: nothing_left(place))


def test_each_gpu_has_its_own_daemon(programs: Path, place: Path) -> None:
    variables = environment(programs, place, FAKE_GPUS=f"{H200}\n{SECOND}")
    one = Client(variables | {"CUDA_VISIBLE_DEVICES": "0"})
    two = Client(variables | {"CUDA_VISIBLE_DEVICES": "1"})
    assert one.standing()[0] == two.standing()[0] == "own"
    (pipes_1, visible_1), (pipes_2, visible_2) = one.variables(), two.variables()
    assert pipes_1 != pipes_2
    assert (visible_1, visible_2) == (H200.split(", ")[1], SECOND.split(", ")[1])
    one.kill()
    until(lambda: not Path(pipes_1).exists())
    assert Path(pipes_2).exists()
    two.kill()
    until(lambda: nothing_left(place))


@pytest.mark.parametrize(
    ("gpu", "more", "reason"),
    [
        (H200.replace("580.", "450."), {}, "driver 450.159.03 is older than 470"),
        (H200.replace("9.0", "6.1"), {}, "NVIDIA H200 is older than Volta"),
        (H200.replace("Disabled", "Enabled"), {}, "MIG is enabled on NVIDIA H200"),
        (H200.replace("Default", "Prohibited"), {}, "in compute mode Prohibited"),
        (
            H200.replace("Default", "Exclusive_Process"),
            {"FAKE_APPS": "python"},
            "in exclusive mode, and another process uses it already",
        ),
        ("", {}, "nvidia-smi reports no GPU"),
        (H200, {"FAKE_DAEMON": "fails"}, "the MPS daemon does not start"),
        (H200, {"FAKE_SERVER": "fails"}, "the MPS server does not start: no shared memory"),
    ],
)
def test_where_there_can_be_no_daemon_trials_take_turns_and_the_reason_is_told(
    programs: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: str,
    more: dict[str, str],
    reason: str,
) -> None:
    for name, value in environment(programs, place, FAKE_GPUS=gpu, **more).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(mps, "START_S", 0.5)
    before = dict(os.environ)
    standing, variables, lock = mps._settle("auto")
    assert standing.kind == "turns"
    assert reason in standing.reason
    assert "\n" not in standing.text
    assert (variables, lock) == ({}, None)
    assert dict(os.environ) == before
    with pytest.raises(mps.MpsError, match="mps=on: "):
        mps.require("on", standing)
    assert not ours(place)


def test_an_exclusive_gpu_that_no_one_uses_is_shared(programs: Path, place: Path) -> None:
    gpu = H200.replace("Default", "Exclusive_Process")
    client = Client(environment(programs, place, FAKE_GPUS=gpu))
    assert client.standing()[0] == "own"
    second = Client(
        environment(programs, place, FAKE_GPUS=gpu, FAKE_APPS="nvidia-cuda-mps-server\npython")
    )
    assert second.standing()[0] == "own"
    client.kill()
    second.kill()
    until(lambda: nothing_left(place))


def test_without_the_program_trials_take_turns(tmp_path: Path, place: Path) -> None:
    variables = environment(write_programs(tmp_path / "smi", mps=False), place)
    client = Client(variables)
    kind, reason = client.standing()
    assert kind == "turns"
    assert "nvidia-cuda-mps-control is not installed" in reason
    client.end()
    required = Client(variables, "on")
    _, errors = required.process.communicate(timeout=DEADLINE_S)
    assert "MpsError: mps=on: nvidia-cuda-mps-control is not installed" in errors


def test_mps_off_leaves_a_daemon_that_is_there_alone(programs: Path, place: Path) -> None:
    client = Client(environment(programs, place), "off")
    assert client.standing() == ("turns", "mps=off")
    assert not Path(client.variables()[0]).exists()
    client.end()
    assert nothing_left(place)


def test_a_daemon_that_is_there_is_used_and_left_running(programs: Path, place: Path) -> None:
    pipes = place / "pipes"
    pipes.mkdir()
    variables = environment(programs, place) | {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "CUDA_MPS_LOG_DIRECTORY": str(pipes),
    }
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=variables, check=True)
    until(lambda: (pipes / "control").exists())
    client = Client(variables)
    assert client.standing() == ("existing", f"the daemon in {pipes}")
    assert client.variables() == [str(pipes), "None"]
    client.end()
    assert [process.name() for process in ours(place)]
    assert not folder_of(place).exists()


def test_a_daemon_whose_folder_is_named_and_that_does_not_run_is_none(
    programs: Path, place: Path
) -> None:
    variables = environment(programs, place) | {"CUDA_MPS_PIPE_DIRECTORY": str(place / "gone")}
    client = Client(variables)
    assert client.standing()[0] == "own"
    client.end()
    until(lambda: nothing_left(place))


def test_a_folder_of_another_user_is_not_trusted(programs: Path, place: Path) -> None:
    folder_of(place).mkdir(mode=0o777)
    folder_of(place).chmod(0o777)
    client = Client(environment(programs, place))
    kind, reason = client.standing()
    assert kind == "turns"
    assert "not a private folder" in reason
    client.end()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_was_killed_is_replaced_and_its_clients_keep_their_pipes(
    programs: Path, place: Path, fault: signal.Signals
) -> None:
    variables = environment(programs, place)
    first = Client(variables)
    assert first.standing()[0] == "own"
    pipes = Path(first.variables()[0])
    os.kill(int((pipes / "nvidia-cuda-mps-control.pid").read_text()), fault)
    second = Client(variables)
    assert second.standing()[0] == "own"
    fresh = Path(second.variables()[0])
    assert fresh != pipes
    assert pipes.exists()
    first.kill()
    assert fresh.exists()
    second.kill()
    until(lambda: nothing_left(place))  # the orphaned server of the first daemon, too


def test_a_keeper_that_was_killed_is_replaced(programs: Path, place: Path) -> None:
    variables = environment(programs, place)
    first = Client(variables)
    first.standing()
    [keeper] = [process for process in ours(place) if mps.__file__ in process.cmdline()]
    keeper.kill()
    until(lambda: keeper not in ours(place))
    second = Client(variables)
    assert second.standing()[0] == "own"
    assert second.variables() == first.variables()
    first.kill()
    second.kill()
    until(lambda: nothing_left(place))


def test_a_new_client_waits_until_a_server_has_recovered_from_a_fault(
    programs: Path, place: Path
) -> None:
    variables = environment(programs, place)
    first = Client(variables)
    first.standing()
    status = Path(first.variables()[0]) / "status"
    status.write_text("FAULT\n")
    second = Client(variables)
    asked = folder_of(place)
    until(lambda: any(asked.glob("*/users")))
    assert second.process.poll() is None
    status.write_text("ACTIVE\n")
    assert second.standing()[0] == "own"
    first.kill()
    second.kill()
    until(lambda: nothing_left(place))


def test_what_is_settled_for_a_process_holds_for_its_life(
    programs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "_joined", None)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment(programs, place).items():
        monkeypatch.setenv(name, value)
    assert mps.keep_apart().kind == "turns"
    assert mps.join() == mps.keep_apart() == mps.joined()
    assert not Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_a_study_keeps_the_daemons_of_all_its_gpus(
    programs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for name, value in environment(programs, place, FAKE_GPUS=f"{H200}\n{SECOND}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    before = dict(os.environ)
    with mps.held() as standing:
        assert standing.kind == "own"
        assert len(list(folder_of(place).glob("*/g0/pipe/control"))) == 2
        assert dict(os.environ) == before
    until(lambda: nothing_left(place))


def test_looking_starts_nothing(
    programs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for name, value in environment(programs, place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    [gpu] = mps.visible_gpus()
    assert "would be started" in mps.look(gpu).reason
    with mps.held():
        assert "runs in" in mps.look(gpu).reason
    until(lambda: nothing_left(place))


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "01"), ("0", "0"), ("1,0", "10"), ("GPU-11111111-2222-3333-4444-666", "1"), ("", "")],
)
def test_the_gpus_that_a_process_was_given(
    programs: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    names: str,
) -> None:
    for name, value in environment(programs, place, FAKE_GPUS=f"{H200}\n{SECOND}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.index for gpu in mps.visible_gpus()) == names
