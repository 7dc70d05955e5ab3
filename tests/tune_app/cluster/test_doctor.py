"""What facts of nodes mean: pure judgements, and this machine itself."""

from pathlib import Path
from typing import Any

import pytest

from tune_app.cluster.doctor import (
    diagnose_machine,
    judge_clock,
    judge_node,
    judge_together,
    node_facts,
)
from tune_app.synthetic import write_cohort

WELL: dict[str, Any] = {
    "python": "3.12.3",
    "executable": "/usr/bin/python3",
    "versions": {"optuna": "5.0.0", "monai": "1.6.1", "numpy": "2.3.0", "nibabel": "5.3.2"}
    | {"medtune": "0.1.0", "torch": "2.11.0+cu130", "ray": "2.60.0"},
    "nccl": "2.28.9",
    "gpus": ["NVIDIA H200, 143771 MiB, 580.95"],
    "mps": ["side by side under CUDA MPS (a daemon of this user's own would be started)"],
    "shm_gib": 8.0,
    "disk_gib": 200.0,
    "cache": "/cache",
    "files": 65536,
    "data": {"digest": "9f2c", "volumes": "98"},
    "study": {},
    "meets": None,
}


def test_a_healthy_node_has_nothing_to_mend() -> None:
    found = judge_node(WELL, node="n1", gpus=1.0)
    assert {finding.state for finding in found} == {"good"}
    assert not any(finding.remedy for finding in found)
    assert len({finding.what for finding in found}) == len(found) == 10


@pytest.mark.parametrize(
    ("changed", "what", "state", "told"),
    [
        (
            {"versions": WELL["versions"] | {"ray": "2.59.1"}},
            "versions",
            "bad",
            ">=2.60",
        ),
        ({"versions": WELL["versions"] | {"torch": None}}, "versions", "bad", "install torch>="),
        ({"versions": WELL["versions"] | {"monai": "1.4.0"}}, "versions", "bad", "monai>=1.5"),
        ({"gpus": []}, "GPUs", "bad", "Ray counts 1, nvidia-smi shows 0"),
        ({"nccl": None}, "GPUs", "bad", "torch is built for CPUs only"),
        ({"shm_gib": 0.0625}, "shared memory", "bad", "--shm-size=8g"),
        ({"shm_gib": None}, "shared memory", "bad", "there is no /dev/shm"),
        ({"disk_gib": 1.0}, "disk", "look", "1 GiB free at /cache"),
        ({"files": 1024}, "open files", "look", "ulimit -n 65536"),
        (
            {"data": {"error": "/d/t.csv: no such file"}},
            "data",
            "bad",
            "at the same path on every node",
        ),
        (
            {"study": {"error": "is a folder of this node alone"}},
            "storage",
            "bad",
            "same shared folder",
        ),
        ({"meets": "10.0.0.1:4711: timed out"}, "ports", "bad", "on all ports"),
    ],
)
def test_each_fault_is_found_and_has_a_remedy(
    changed: dict[str, Any], what: str, state: str, told: str
) -> None:
    wrong = [
        finding
        for finding in judge_node(WELL | changed, node="n1", gpus=1.0)
        if finding.state != "good"
    ]
    assert [(finding.what, finding.state) for finding in wrong] == [(what, state)]
    assert told in f"{wrong[0].said}: {wrong[0].remedy}"
    assert wrong[0].remedy


def test_clocks_are_judged_by_what_the_asking_allows() -> None:
    assert judge_clock("n1", 0.4, 0.1).state == "good"
    assert judge_clock("n1", -9.0, 0.1).state == "look"
    assert judge_clock("n1", 3.0, 4.0).state == "good", "asking took longer than the difference"


def test_nodes_that_differ_are_named() -> None:
    other = WELL | {"python": "3.11.2", "data": {"digest": "ffff", "volumes": "98"}}
    found = {one.what: one for one in judge_together({"n1": WELL, "n2": WELL, "n3": other})}
    assert set(found) == {"same Python", "same data"}
    assert all(one.said == "n3 differ from the others" for one in found.values())
    assert [one.state for one in judge_together({"n1": WELL, "n2": WELL})] == ["good"]


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "c", subjects=4, side=(10, 12))
    facts = node_facts(str(table), str(tmp_path / "study"), str(tmp_path / "cache"), None)
    assert facts["versions"]["torch"]
    assert "error" not in facts["data"]
    assert facts["study"] == {}
    next(table.parent.rglob("*.nii.gz")).unlink()
    found = {
        one.what: one for one in diagnose_machine(str(table), "/proc/no/study", tmp_path / "cache")
    }
    assert found["data"].state == "bad"
    assert found["storage"].said.startswith("cannot be written")
