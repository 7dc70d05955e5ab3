"""Processes that share a GPU, measured on a CPU with programs that replace NVIDIA's."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gpu import environment, write_programs
from rich.console import Console

from trainables import mps
from tune_app.bench import faults
from tune_app.bench.faults import bench_faults, faults_table
from tune_app.bench.share import VALIDATION, bench_share, share_table
from tune_app.bench.train import BenchError

SMALL = {"volumes": 24, "batch": (4, 1), "epochs": 1, "device": "cpu", "depth": 10, "width": 0.125}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True) as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        for variable in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)
        programs = write_programs(tmp_path / "bin")
        for variable, value in environment(programs, Path(name)).items():
            monkeypatch.setenv(variable, value)
        yield


def text_of(table: object) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.slow
def test_processes_are_measured_in_turns_and_under_mps(gpu: None) -> None:
    result = bench_share(sizes=[16], at_once=[2, 1], **SMALL)  # type: ignore[arg-type]
    rows = {(row["mode"], row["at_once"]): row for row in result["rows"]}
    assert list(rows) == [("turns", 1), ("turns", 2), ("mps", 1), ("mps", 2)]
    assert "without CUDA MPS (mps=off)" in rows["turns", 2]["standing"]
    assert "side by side under CUDA MPS" in rows["mps", 2]["standing"]
    for (_, number), row in rows.items():
        assert row["volumes_per_s"] > 0
        # All of them train for as long as one of them at least
        assert row["volumes_per_s"] <= number * SMALL["volumes"] / row["epoch_s"] * 1.001
    table = text_of(share_table(result))
    assert "x turns" in table
    assert f"{rows['mps', 2]['volumes_per_s']:.0f}" in table
    assert round((1188 + 98) / 5) == VALIDATION
    assert not mps.leftovers()


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"modes": ["fast"]}, "there are turns, mps"), ({"at_once": [0]}, "numbers from 1")],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, object], told: str) -> None:
    with pytest.raises(BenchError, match=told):
        bench_share(sizes=[16], device="cpu", **asked)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_a_fault_does_to_neighbours_is_recorded(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "SETTLED_S", 0.2)
    result = bench_faults(faults=["killed", "daemon killed"], neighbours=1, device="cpu")
    killed, daemon = result["rows"]
    assert (killed["victim"]["state"], daemon["victim"]["state"]) == ("ended", "continues")
    for row in result["rows"]:
        assert [one["state"] for one in row["neighbours"]] == ["continues"]
        assert row["new"].startswith("works after")
        assert row["left"] == []
    assert "a new process" in text_of(faults_table(result))
    with pytest.raises(BenchError, match="there are killed, out of memory"):
        bench_faults(faults=["flood"])


def test_faults_without_mps_are_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(BenchError, match="MPS is not possible: nvidia-smi reports no GPU"):
        bench_faults(faults=["killed"], neighbours=1, device="cpu")
