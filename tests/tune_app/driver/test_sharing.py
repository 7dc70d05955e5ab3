"""Trials that share a GPU, with programs that replace NVIDIA's."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from chaos import TINY
from fake_gpu import environment, write_programs

from trainables import mps
from tune_app.driver.sharing import GpuSharing
from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles
from tune_app.synthetic import write_cohort

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder for temporary files: sockets have short names."""
    with tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def gpu(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(write_programs(tmp_path / "bin"), place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")


def test_nothing_is_started_where_no_gpu_is_shared(gpu: None, place: Path) -> None:
    with GpuSharing("on", local=True) as sharing:
        assert sharing.standing(0.0) is None
        assert sharing.standing(1.0) is None
        assert not list(place.iterdir())


def test_a_driver_holds_the_daemon_of_its_own_machine(gpu: None, place: Path) -> None:
    with GpuSharing("auto", local=True) as sharing:
        standing = sharing.standing(0.25)
        assert standing is not None
        assert standing.text == (
            "side by side under CUDA MPS (a daemon of this user's own, for NVIDIA H200)"
        )
        assert list(place.glob("*/*/g0/pipe/control"))


def test_mps_that_is_required_and_not_possible_is_an_error(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with (
        GpuSharing("on", local=True) as sharing,
        pytest.raises(mps.MpsError, match="set mps=auto to let trials take turns"),
    ):
        sharing.standing(0.25)


@pytest.mark.ray
def test_on_a_cluster_a_node_is_asked(gpu: None) -> None:
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        with GpuSharing("auto", local=False) as sharing:
            standing = sharing.standing(0.5)
        assert standing is not None
        assert standing.kind == "own"
        with GpuSharing("off", local=False) as sharing:
            standing = sharing.standing(0.5)
        assert standing is not None
        assert standing.text == "in turns on the GPU, without CUDA MPS (mps=off)"
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_fault_of_the_gpu_costs_each_trial_one_attempt(tmp_path: Path, place: Path) -> None:
    """Two trials share a server and meet a fault: each continues from its checkpoint without MPS, later ones are under it."""
    table = write_cohort(tmp_path / "cohort", subjects=14, side=(14, 18))
    faults, root = tmp_path / "faults", tmp_path / "study"
    faults.mkdir()
    for name in ("00000", "00001"):
        (faults / name).touch()
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "fake_gpu_study.py", "tune_app.cli", "run"),
            *("--data", table, "--trials", "4", "--out", root, "--cache", tmp_path / "cache"),
            *("--gpus-per-trial", "0.5", "--sampler", "random", *settings),
        ],
        env={
            **{name: os.environ[name] for name in ("HOME", "RAY_AUTH_MODE") if name in os.environ},
            **environment(write_programs(tmp_path / "bin"), place),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "RAY_TMPDIR": "/tmp",
            "FAKE_FAULT": str(faults),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "side by side under CUDA MPS" in done.stderr
    study, files = load_study(root), StudyFiles(root)
    assert list(study.trials_full.sort_values("trial")["failures"]) == [1, 1, 0, 0]
    assert not list(faults.iterdir())
    shared = {name: files.trial(name).log.read_text() for name in study.trials_full["trial"]}
    for name in ("00000", "00001"):
        assert "the GPU failed under CUDA MPS" in shared[name]
        first, second = shared[name].split("the GPU failed under CUDA MPS", 1)
        assert "GPU shared: side by side" in first
        assert "GPU shared: in turns" in second
        epochs = list(study.epochs.loc[study.epochs["trial"] == name, "epoch"])
        assert epochs == list(range(1, len(epochs) + 1))
    for name in ("00002", "00003"):
        assert "GPU shared: side by side" in shared[name]
        assert "GPU shared: in turns" not in shared[name]
    assert not list(place.glob("medtune-mps-*")), "the driver leaves no daemon behind"
