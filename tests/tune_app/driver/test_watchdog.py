"""Stalled trials are named, with the reason, and ended in time; those that are only slow, or not to blame, are not."""

import functools
import itertools
import logging
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from trainables.checkpoints import TrialFiles
from trainables.ray_trainable import SignOfLife
from tune_app.driver import watchdog
from tune_app.driver.watchdog import (
    START_S,
    Seen,
    StalledError,
    Watchdog,
    moved,
    own_ray_watched,
    placing,
    reason_of,
    watch_tune,
)


class Scene:
    """A watchdog, the clock it goes by, and what came of it."""

    def __init__(self, *, deadline_s: float = 1000.0, quiet_s: float = 100.0) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.ended: list[str] = []
        self.dog = Watchdog(
            say=self.said.append,
            why=lambda seen: "because",
            end=self.ended.append,
            deadline_s=deadline_s,
            quiet_s=quiet_s,
            clock=lambda: self.now,
        )

    def live(self, seconds: float, *trials: Seen) -> None:
        """Let time pass with trials that show the same all along."""
        for _ in range(int(seconds / 5)):
            self.now += 5
            self.dog.look(trials)


def test_a_trial_that_moves_is_left_alone_however_slow() -> None:
    scene = Scene()
    for step in range(50):
        scene.live(95, Seen("00001", "running", mark=step))
    assert not scene.said
    assert not scene.ended


def test_a_trial_that_stands_still_is_named_ever_less_often_and_ended_at_the_deadline() -> None:
    scene = Scene()
    scene.live(10, Seen("00001", "running", mark=0))
    scene.live(990, Seen("00001", "running", mark=1))
    assert [text.split(": because")[0] for text in scene.said] == [
        "trial 00001: nothing done for 100 s",
        "trial 00001: nothing done for 3 min",
        "trial 00001: nothing done for 7 min",
        "trial 00001: nothing done for 13 min",
    ]
    assert not scene.ended
    scene.live(20, Seen("00001", "running", mark=1))
    assert scene.ended == ["00001"]
    assert "its process is ended, and it starts again from its checkpoint" in scene.said[-1]


def test_a_process_on_its_way_up_is_given_minutes_whatever_the_deadline() -> None:
    scene = Scene(deadline_s=20)
    scene.live(START_S - 10, Seen("00001", "running", mark=0))
    assert not scene.ended
    scene.live(20, Seen("00001", "running", mark=0))
    assert scene.ended == ["00001"]
    again = Scene(deadline_s=20)
    again.live(10, Seen("00001", "running", mark=0, process="a"))
    again.live(10, Seen("00001", "running", mark=1, process="a"))
    again.live(100, Seen("00001", "running", mark=1, process="b"))
    assert not again.ended, "it has been started again meanwhile"
    again.live(10, Seen("00001", "running", mark=2, process="b"))
    again.live(30, Seen("00001", "running", mark=2, process="b"))
    assert again.ended == ["00001"]


def test_trials_are_not_to_blame_for_a_driver_that_stood_still() -> None:
    scene = Scene()
    scene.live(50, Seen("00001", "running", mark=1))
    scene.now += 100_000  # suspended, or waiting for room on the disk
    scene.live(40, Seen("00001", "running", mark=1))
    assert not scene.said
    assert not scene.ended


def test_a_study_in_which_nothing_finds_its_place_ends() -> None:
    scene = Scene()
    waiting = Seen("00002", "waiting", mark=0)
    for step in range(300):
        scene.live(10, Seen("00001", "running", mark=step), waiting)
    assert scene.said[0].startswith("trial 00002: has waited for its place for 100 s: because")
    with pytest.raises(StalledError, match="no trial has started for 17 min: because"):
        scene.live(2000, Seen("00003", "waiting", mark=0))


def test_the_reason_is_found_in_log_and_disk(tmp_path: Path) -> None:
    files = TrialFiles(tmp_path)
    assert reason_of(files) == "no step ended, its log is empty"
    files.log.write_text("epoch 1\nwaiting for GPU memory: 1.0 of 80.0 GiB free\n")
    assert reason_of(files) == "waiting for GPU memory: 1.0 of 80.0 GiB free"
    files.log.write_text("epoch 1 of 9" + "x" * 9000)
    assert reason_of(files).startswith("no step ended, its log ends with: x")
    assert len(reason_of(files)) < 300
    bundles: list[dict[str, Any]] = [{"CPU": 2.0, "GPU": 1.0}] * 2
    said = placing(bundles, lambda: {"CPU": 3.0, "memory": 1e9})
    assert said.startswith("it takes 4 CPU and 2 GPU in 2 bundle(s), 3 CPU and 0 GPU are free")


def test_a_sign_of_life_is_what_moves_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TrialFiles(tmp_path)
    assert moved(files, 3) == ("running", (3, None))
    alive = SignOfLife(files.alive)
    before = moved(files, 3)
    alive.step(1, 1)
    assert moved(files, 3) == before, "at most once a second"
    alive.last -= 2
    alive.step(1, 2)
    assert moved(files, 3) != before
    alive.waits_for_room()
    assert moved(files, 3) == ("no room", (3, None))
    alive.last -= 2
    alive()
    assert moved(files, 3)[0] == "running"
    files.alive.unlink()
    alive.last -= 2
    alive()
    assert files.alive.exists()


def test_a_full_disk_is_told_at_once_and_ends_nothing() -> None:
    scene = Scene()
    scene.live(10, Seen("00001", "running", mark=1))
    scene.live(5, Seen("00001", "no room", mark=1))
    assert scene.said == ["trial 00001: the disk is full; make room, and the trial continues"]
    scene.live(5000, Seen("00001", "no room", mark=1))
    assert scene.said[1].startswith(
        "trial 00001: has waited for room on its disk for 100 s: because"
    )
    assert not scene.ended


def test_a_trial_whose_process_ends_another_is_told_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that it waits for CPUs or a GPU, which its process has: the disk of the trial before is to blame."""
    times = itertools.count(0.0, 2.5)
    monkeypatch.setattr(
        watchdog, "Watchdog", functools.partial(Watchdog, clock=lambda: next(times))
    )
    actor = SimpleNamespace(_actor_id="a")
    said: list[str] = []
    look = watch_tune(
        lambda name: TrialFiles(tmp_path / name),
        lambda name: 0,
        [],
        say=said.append,
        deadline_s=1000.0,
        local=False,
    )

    def trial(name: str, status: str) -> SimpleNamespace:
        return SimpleNamespace(
            config={"trial": name}, status=status, temporary_state=SimpleNamespace(ray_actor=actor)
        )

    def follow() -> None:
        for _ in range(1000):
            look([trial("00000", "TERMINATED"), trial("00001", "PENDING")])

    for _ in range(3):
        look([trial("00000", "RUNNING")])
    with pytest.raises(
        StalledError, match="no trial has started for 17 min: its process has not ended trial 00000"
    ):
        follow()
    assert said[0] == (
        "trial 00001: has waited for the trial before it in its process for 5 min: its process has not ended trial "
        f"00000, whose last files may still be on their way to {tmp_path / '00000'}"
    )


def test_no_actor_is_held_once_its_trial_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle that outlived `ray.shutdown` kept a connection open: one a study, for as long as the process ran."""
    monkeypatch.setattr(watchdog, "LOOK_S", 0.0)
    actor = type("Actor", (), {"_actor_id": "a"})()
    held = weakref.ref(actor)
    trial = SimpleNamespace(
        config={"trial": "00000"},
        status="RUNNING",
        temporary_state=SimpleNamespace(ray_actor=actor),
    )
    del actor
    said: list[str] = []
    look = watch_tune(
        lambda name: TrialFiles(tmp_path),
        lambda name: 1,
        [],
        say=said.append,
        deadline_s=9.0,
        local=True,
    )
    look([trial])
    assert held() is not None
    trial.temporary_state.ray_actor, trial.status = None, "TERMINATED"
    assert held() is None


def test_a_ray_whose_files_were_removed_ends_the_study_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_S", 0.0)
    socket = tmp_path / "raylet"
    socket.touch()
    node = SimpleNamespace(raylet_socket_name=str(socket), all_processes={})
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    looks = [
        watch_tune(
            lambda name: TrialFiles(tmp_path),
            lambda name: 1,
            [],
            say=lambda text: None,
            deadline_s=9.0,
            local=local,
        )
        for local in (True, False)
    ]
    for look in looks:
        look([])
    socket.unlink()
    with pytest.raises(StalledError, match=r"Ray's files were removed .* `medtune resume`"):
        looks[0]([])
    looks[1]([])


def test_the_end_of_rays_control_process_is_told_at_once_with_the_command_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's library ends the driver a minute later, in its own words."""
    monkeypatch.setattr(watchdog, "LOOK_S", 0.0)
    monkeypatch.setattr(logging.getLogger("medtune.study"), "propagate", True)
    server = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "raylet").touch()
    node = SimpleNamespace(
        raylet_socket_name=str(tmp_path / "raylet"),
        all_processes={"gcs_server": [SimpleNamespace(process=server)]},
    )
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    look = watch_tune(
        lambda name: TrialFiles(tmp_path),
        lambda name: 1,
        [],
        say=lambda text: None,
        deadline_s=9.0,
        local=True,
    )
    with own_ray_watched("studies/first"):
        look([])
        assert not caplog.records
        server.kill()
        deadline = time.monotonic() + 60
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "`medtune resume studies/first` continues" in caplog.records[0].getMessage()
    with pytest.raises(StalledError, match="has lost its control process: `medtune resume`"):
        look([])
