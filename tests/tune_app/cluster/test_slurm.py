"""The batch script against golden files, and on a real Slurm."""

import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_runs import wait_for
from slurm_runs import Slurm, slurm_cluster
from study_runs import SMALL, check_whole, rows_of

from trainables.checkpoints import load_state
from tune_app.cluster.doctor import judge_allocation
from tune_app.cluster.slurm import Allocation, lead_of, seconds_of, slurm_script
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

GOLDEN = Path(__file__).parent / "golden"
SPEC = build_spec({"data": "/shared/table.csv", "config": {"epochs": 30}, "trials": 8})
FORMS: dict[str, tuple[str, Allocation]] = {
    "one_node": ("/shared/studies/first", Allocation()),
    "in_a_container": (
        "s3://bucket/a study",
        Allocation(image="/shared/medtune.sif", mount="/shared", gpus=2, cpus=16, memory_gib=64),
    ),
    "several_nodes": (
        "/shared/studies/it's mine",
        Allocation(
            nodes=4,
            gpus=4,
            time="2-00:00:00",
            partition="gpu",
            account="lab",
            setup="source /shared/venv/bin/activate",
        ),
    ),
    "whole_nodes": ("/shared/studies/first", Allocation(nodes=2, exclusive=True, symmetric=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_script_is_the_golden_one_and_a_shell_reads_it(form: str, tmp_path: Path) -> None:
    made = slurm_script(SPEC, *FORMS[form])
    golden = GOLDEN / f"{form}.sbatch"
    assert made == golden.read_text(encoding="utf-8"), f"{golden}: write it again if this is meant"
    checked = subprocess.run(["bash", "-n"], input=made, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_there_is_no_golden_file_too_many() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(FORMS)


@pytest.mark.parametrize(
    ("time", "seconds", "lead"),
    [
        ("30", 1800, 300),
        ("30:10", 1810, 300),
        ("1:00:00", 3600, 300),
        ("2-00", 172800, 300),
        ("1-02:03", 93780, 300),
        ("1-02:03:04", 93784, 300),
        ("4", 240, 60),
    ],
)
def test_the_signal_comes_in_the_last_quarter_of_the_time(
    time: str, seconds: int, lead: int
) -> None:
    assert seconds_of(time) == seconds
    assert lead_of(Allocation(time=time)) == lead


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"time": "soon"}, "--time soon: write minutes"),
        ({"time": "0:30"}, "a minute at least"),
        ({"time": "1h"}, "--time 1h"),
        ({"partition": "gpu\n#SBATCH --x"}, "--partition"),
        ({"account": ""}, "--account"),
    ],
)
def test_what_slurm_would_not_take_is_told(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)):
        slurm_script(SPEC, "/shared/studies/first", Allocation(**fields))
    with pytest.raises(SpecError, match="needs a place that every node sees"):
        slurm_script(SPEC, "studies/first", Allocation())


@pytest.mark.parametrize(
    ("job", "state", "said"),
    [
        ({"Requeue": "1", "Restarts": "2", "TimeLimit": "20:00"}, "good", "yes, 2 times so far"),
        ({"Requeue": "0"}, "look", "no: preempted, job 12 ends for good"),
        (None, "look", "scontrol does not answer"),
    ],
)
def test_the_doctor_says_whether_a_job_comes_back(
    job: dict[str, str] | None, state: str, said: str
) -> None:
    env = {"SLURM_JOB_ID": "12", "SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,3"}
    given, requeue = judge_allocation(env, job)
    assert given.said == "job 12, 1 nodes, 4 CPUs and 2 GPUs on this one"
    assert (requeue.what, requeue.state) == ("requeue", state)
    assert requeue.said.startswith(said)


# On a real Slurm -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    try:
        with slurm_cluster(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def batch(slurm: Slurm, name: str, *options: object, trials: int = 1, epochs: int = 60) -> Path:
    """Write a study, its table and the batch script that runs it in the folder `name`; returns the script."""
    table = slurm.folder / "cohort" / "table.csv"
    if not table.exists():
        table = write_cohort(slurm.folder / "cohort", subjects=10, side=(14, 18))
    config = SMALL | {"epochs": epochs, "batch_size": 4}
    study = {"data": str(table), "trials": trials, "config": config}
    asked = slurm.folder / f"{name}.yaml"
    asked.write_text(yaml.safe_dump(study), encoding="utf-8")
    script = slurm.folder / f"{name}.sbatch"
    given = ["--gpus", 0, "--cpus", 1, "--memory", 1, "--time", 20, "--slurm", script, *options]
    where = ["--out", slurm.folder / name, "--cache", slurm.folder / "cache"]
    slurm.medtune("submit", *given, "--", "run", asked, *where)
    return script


def new_place(slurm: Slurm) -> Path:
    """A folder for a study, another one for each try of a test."""
    return slurm.folder / uuid.uuid4().hex[:6]


def folders() -> set[Path]:
    """Temporary folders of jobs on this machine."""
    return set(Path("/tmp").glob("medtune-[0-9]*-*"))


def has_rows(root: Path, number: int) -> bool:
    return len(rows_of(root)) >= number


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_is_told_preempted_and_finishes(slurm: Slurm) -> None:
    """First Slurm signals that its time is over, then a more urgent job takes its node; it repeats no reported epoch."""
    root, before_it = new_place(slurm), folders()
    job = slurm.submit(batch(slurm, root.name, epochs=150))
    wait_for(lambda: has_rows(root, 3), "three epochs")
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # as --signal does before the limit
    slurm.wait(job, "PENDING")
    log = slurm.folder / f"{slurm.job(job)['JobName']}-{job}.log"
    assert f"the study continues when job {job} runs again" in log.read_text()
    before = rows_of(root)
    saved = load_state(StudyFiles(root).trial("00000").checkpoint)["epoch"]
    assert saved >= before[-1]["epoch"]

    wait_for(lambda: has_rows(root, len(before) + 3), "epochs of the second start")
    urgent = slurm.submit("true", "--partition=urgent", "--nodes=2", "--exclusive")
    slurm.wait(urgent, "COMPLETED")
    slurm.wait(job, "COMPLETED")
    shown = slurm.job(job)
    assert (shown["Restarts"], shown["ExitCode"]) == ("2", "0:0")
    check_whole(root, trials=1, epochs=150)
    assert rows_of(root)[: len(before)] == before
    assert folders() <= before_it, "its temporary folders are gone"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_work_on_one_study_and_leave_nothing(slurm: Slurm) -> None:
    root, before_it = new_place(slurm), folders()
    job = slurm.submit(batch(slurm, root.name, "--nodes", 2, trials=2, epochs=5))
    slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = (slurm.folder / f"{slurm.job(job)['JobName']}-{job}.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", log
    check_whole(root, trials=2, epochs=5)
    assert "2 trials at a time, each with 1 CPU" in log
    assert folders() <= before_it
    assert not list(slurm.folder.glob("*.token"))


@pytest.mark.slow
def test_the_doctor_looks_at_the_allocation(slurm: Slurm) -> None:
    told = " ".join(slurm.run("srun", "--cpus-per-task=1", "medtune", "doctor").split())
    assert re.search(r"ok Slurm job [0-9]+, 1 nodes, 1 CPUs and 0 GPUs on this one", told)
    assert re.search("ok requeue yes, 0 times so far; time limit UNLIMITED", told)
