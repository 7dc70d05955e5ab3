"""A study as its user meets it: run, killed, resumed, interrupted; with a real Ray and real NIfTI files."""

import functools
import io
import json
import math
import os
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
from ray import tune
from rich.console import Console
from study_runs import SMALL, TINY, check_whole, finished, medtune, rows_of, wait_for_rows

from trainables.checkpoints import load_state
from trainables.config import build_config
from trainables.diagnosis import VERDICTS
from trainables.network.model import configured_network
from trainables.network.weights import save_medicalnet
from tune_app.driver import watchdog
from tune_app.driver.display import Display
from tune_app.driver.loggers import study_loggers
from tune_app.driver.optuna_database import sqlite_url
from tune_app.driver.recorder import Recorder
from tune_app.driver.resources import Plan, busy_text, plan_resources
from tune_app.driver.run import run_study
from tune_app.driver.session import Interrupt, StudySession, failure_line
from tune_app.driver.stopping import GRACE_S, TAKEN_AWAY, USR1_GRACE_S, Preempted, saving_s
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line, mend_last_line
from tune_app.study.policy_spec import watching_only
from tune_app.study.rows import StudyDamageError, read_record, read_rows
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

WHOLE = {
    "trial": "00000",
    "state": "running",
    "overrides": {},
    "failures": 0,
    "objective": None,
    "reason": None,
}
"""A trial's record as it is read again."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=14, side=(14, 18))


@pytest.mark.slow
def test_a_checkpoint_that_no_trial_could_start_from_is_told_before_any_does(
    table: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "resnet_10.pth"
    config = {"depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 2}
    save_medicalnet(configured_network(build_config(config)).backbone, weights)
    quiet = Console(file=io.StringIO())

    def run(**fields: Any) -> None:
        spec = build_spec({"data": str(table), "cache": str(tmp_path / "cache"), **fields})
        run_study(spec, tmp_path / "study", console=quiet, notes=quiet)

    with pytest.raises(SpecError, match=r"gone\.pth: no such file"):
        run(config=config | {"pretrained_path": str(tmp_path / "gone.pth")})
    planned = [
        {"variant": name, "overrides": {"width": width}}
        for name, width in (("a", 0.125), ("b", 0.25))
    ]
    with pytest.raises(SpecError, match=r"resnet_10\.pth: .*width"):
        run(kind="ablation", planned=planned, config=config | {"pretrained_path": str(weights)})
    assert not ray.is_initialized()
    assert not (tmp_path / "study" / "study.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_killed_midway_is_resumed_to_its_end(table: Path, tmp_path: Path) -> None:
    root, cache = tmp_path / "study", tmp_path / "cache"
    asked = [
        "run",
        "--data",
        table,
        "--trials",
        4,
        "--epochs",
        4,
        "--out",
        root,
        "--cache",
        cache,
        *TINY,
    ]
    process = medtune(*asked, "--max-concurrent", 2)
    wait_for_rows(process, root, 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.communicate()
    before = rows_of(root)
    assert 0 < len(before) < 16

    refused = medtune(*asked)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "holds a study already" in err
    assert "Traceback" not in err

    out = finished(medtune("resume", root))
    check_whole(root, trials=4, epochs=4)
    assert rows_of(root)[: len(before)] == before, "a row was rewritten"
    assert "best: trial" in out
    told = StudyFiles(root).log.read_text()
    assert "00000 started" in told, "the page shows this log of a study that a terminal started"
    assert "00003 completed" in told or "00003 stopped" in told
    assert "spacing_mm: " in told, "notes are in it as well"


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_trial_may_write_for_longer_than_ray_waits_for_it(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next trial of its process starts when the file is there, instead of failing on a process that is not free.

    Meanwhile a line states the reason for the wait.
    """

    def trial_with_a_slow_disk(trial: dict[str, Any], setting: Any) -> None:
        import time

        from trainables import saved_run
        from trainables.ray_trainable import run_trial

        patched: Any = saved_run
        whole = getattr(patched.save_state, "whole", patched.save_state)

        def slow(path: Path, state: dict[str, Any], within: Path | None = None) -> None:
            time.sleep(4.0 if path.name == "best.pt" and state["epoch"] == 3 else 0.0)
            whole(path, state, within)

        slow.whole = whole  # type: ignore[attr-defined]
        patched.save_state = slow
        saved_run.SAVING_PAUSE = (
            10**9
        )  # no checkpoint at the third epoch, which would wait for best.pt
        run_trial(trial, setting)

    monkeypatch.setattr("tune_app.driver.run.run_trial", trial_with_a_slow_disk)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.5)
    monkeypatch.setattr(watchdog, "Watchdog", functools.partial(watchdog.Watchdog, quiet_s=1.0))
    text = io.StringIO()
    notes = Console(file=text, width=1000)
    given = {
        "data": str(table), "trials": 3, "cache": str(tmp_path / "cache"), "max_concurrent": 1, "sampler": "random",
        "config": SMALL | {"epochs": 500}, "policy": {"max_epochs": 3},
        "objective": "last",  # every trial writes best.pt at its third epoch, whatever its values are
    }  # fmt: skip
    outcome = run_study(
        build_spec(given), tmp_path / "study", console=Console(quiet=True), notes=notes
    )
    assert outcome.states == {"stopped": 3}
    told = text.getvalue()
    assert "trial 00001: has waited for the trial before it in its process for" in told
    assert (
        f"its process has not ended trial 00000, whose last files may still be on their way to {tmp_path}"
        in told
    )
    trials = load_study(tmp_path / "study").trials_full
    assert list(trials["failures"]) == [0, 0, 0]
    for name in ("00000", "00001"):
        assert load_state(StudyFiles(tmp_path / "study").trial(name).best)["epoch"] == 3


@pytest.mark.ray
@pytest.mark.slow
def test_failed_trials_go_on_when_they_are_asked_to(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From their checkpoints, under their names, with no row written twice; the others are left as they are."""
    mended, saved = tmp_path / "mended", tmp_path / "saved"

    def trial_on_a_lost_share(trial: dict[str, Any], setting: Any) -> None:
        import errno

        from trainables import saved_run
        from trainables.ray_trainable import run_trial

        patched: Any = saved_run
        whole = patched.save_state

        def lost(path: Path, state: dict[str, Any], within: Path | None = None) -> None:
            if state["epoch"] == 3 and trial["trial"] != "00001" and not mended.exists():
                raise OSError(errno.ESTALE, "Stale file handle")
            whole(path, state, within)
            if path.name == "checkpoint.pt" and trial["trial"] == "00000":
                with saved.open("a") as file:
                    print(state["epoch"], file=file)

        saved_run.SAVING_PAUSE = 0  # every epoch, however short
        patched.save_state = lost
        try:
            run_trial(trial, setting)
        finally:
            patched.save_state = whole

    monkeypatch.setattr("tune_app.driver.run.run_trial", trial_on_a_lost_share)
    given = {
        "data": str(table), "trials": 3, "cache": str(tmp_path / "cache"), "max_failures": 0, "sampler": "random",
        "config": SMALL | {"epochs": 4},
        "policy": {"halving": False, "actions": dict.fromkeys(VERDICTS, "ignore")},
    }  # fmt: skip
    root, files = tmp_path / "study", StudyFiles(tmp_path / "study")
    spec, quiet = build_spec(given), Console(quiet=True)
    outcome = run_study(spec, root, console=quiet, notes=quiet)
    assert (outcome.exit_code, outcome.states) == (3, {"failed": 2, "completed": 1})
    assert "Stale file handle" in read_record(files.trial("00000").record)["reason"]
    before, whole_one = rows_of(root), files.trial("00001").record.read_bytes()
    spec = files.read_spec()  # with the spacing that the study has chosen
    again = run_study(spec, root, console=quiet, notes=quiet, resume=True)
    assert again.states == outcome.states, "not without being asked to"
    assert rows_of(root) == before

    mended.touch()
    text = io.StringIO()
    told = Console(file=text, width=1000)
    done = run_study(spec, root, console=told, notes=quiet, resume=True, retry_failed=True)
    assert (done.exit_code, done.states) == (0, {"completed": 3})
    assert "failed before, to continue from their checkpoints: 00000, 00002" in text.getvalue()
    check_whole(root, trials=3, epochs=4)
    assert rows_of(root)[: len(before)] == before
    assert files.trial("00001").record.read_bytes() == whole_one
    record = read_record(files.trial("00000").record)
    assert (record["state"], record["reason"], record["error"], record["failures"]) == (
        "completed",
        None,
        None,
        0,
    )
    study = optuna.load_study(study_name=None, storage=sqlite_url(files.database))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert saved.read_text().split() == ["1", "2", "3", "4"], "no epoch is trained again"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_an_interrupted_study_says_how_to_go_on_and_does(
    table: Path, tmp_path: Path, blow: int, code: int
) -> None:
    root = tmp_path / "study"
    asked = ["--trials", 1, "--epochs", 25, "--out", root, "--cache", tmp_path / "cache"]
    process = medtune("run", "--data", table, *asked, *TINY)
    wait_for_rows(process, root, 2)
    process.send_signal(blow)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert f"medtune resume {root}" in err
    assert "Traceback" not in err
    assert len(rows_of(root)) < 25
    files = StudyFiles(root)
    assert not files.hurry.exists()
    if blow in TAKEN_AWAY:
        saved = load_state(files.trial("00000").checkpoint)["epoch"]
        assert saved >= rows_of(root)[-1]["epoch"], "an epoch that was reported is not repeated"
    if blow == signal.SIGINT:
        finished(medtune("resume", root))
        check_whole(root, trials=1, epochs=25)


@pytest.mark.ray
@pytest.mark.slow
def test_the_documents_own_command_line_runs(table: Path, tmp_path: Path) -> None:
    line = """--fold 0 --lr 1e-4 --classifier-lr 1e-3 --batch_size 6 --epochs 60 --optimizer adam --loss LDAM
        --scheduler cosine --max-m 0.2 --s 15 --drw-start-epoch 25 --grad-clip 1.0 --ema-decay 0.995 --dropout 0.4
        --gradient_accumulation_steps 2 --multi_gpu --gpu --amp --freeze-backbone-epochs 0"""
    words = line.replace("--epochs 60", "--epochs 2").split()
    out = finished(
        medtune(
            "train",
            *words,
            "--data",
            table,
            "--out",
            tmp_path / "run",
            "--cache",
            tmp_path / "c",
            *TINY,
        )
    )
    assert "1/2" in out
    assert "2/2" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["backbone_lr"], config["classifier_lr"], config["loss"]) == (1e-4, 1e-3, "ldam")
    again = finished(
        medtune(
            "train",
            *words,
            "--data",
            table,
            "--out",
            tmp_path / "run",
            "--cache",
            tmp_path / "c",
            *TINY,
        )
    )
    assert again == out, "the finished run is shown again from its checkpoint"


@pytest.mark.ray
@pytest.mark.slow
def test_real_scans_from_the_archive_to_a_logged_and_tabulated_study(
    adrenal_archive: Path, tmp_path: Path
) -> None:
    """AdrenalMNIST3D, cut down to seconds: import, check, search, results as JSON, rows in TensorBoard's files."""
    finished(medtune("data", "import", adrenal_archive, tmp_path / "adrenal", "--limit", 40))
    table = tmp_path / "adrenal" / "table.csv"
    assert "120 volumes" in finished(medtune("data", "check", table, "--set", "volume_shape=28"))
    small = [
        "--set",
        "depth=10",
        "--set",
        "width=0.125",
        "--set",
        "volume_shape=28",
        "--set",
        "train_auc_volumes=0",
    ]
    asked = ["--trials", 2, "--epochs", 2, "--log", "tensorboard", "--cache", tmp_path / "cache"]
    finished(medtune("run", "--data", table, "--out", tmp_path / "study", *asked, *small))
    check_whole(tmp_path / "study", trials=2, epochs=2)
    shown = json.loads(finished(medtune("results", tmp_path / "study", "--format", "json")))
    assert len(shown) == 2
    assert all(0 <= row["best_val_auc"] <= 1 for row in shown)
    logged = (tmp_path / "study" / "tensorboard").rglob("events.out.tfevents.*")
    assert sorted(file.parent.name for file in logged) == ["00000", "00001"]


@pytest.mark.ray
@pytest.mark.slow
def test_why_a_trial_failed_stands_in_its_record_and_in_the_optuna_study(tmp_path: Path) -> None:
    def trial(config: dict[str, Any]) -> None:
        row = {
            "val_auc": 0.7,
            "val_auc_raw": 0.7,
            "train_loss": 1.0,
            "drw_active": False,
            "epoch_s": 0.0,
        }
        tune.report({"epoch": 1, **row})
        if config["trial"] == "00000":
            raise ValueError("no such thing\nnot at all")
        if config["trial"] == "00001":
            os._exit(1)
        again = tmp_path / "again"
        if config["trial"] == "00002" and not again.exists():
            again.touch()
            raise ValueError("once only")
        tune.report({"epoch": 2, **row})

    fields = {
        "data": "t.csv",
        "space": "documented",
        "trials": 3,
        "warm_start": (),
        "config": {"epochs": 2},
    }
    spec, files = build_spec(fields | {"max_failures": 1}), StudyFiles(tmp_path / "study")
    files.write({"spec": spec.model_dump(mode="json")})
    recorder = Recorder(spec, files)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        session = StudySession(
            spec, "none", recorder, Display(Console(quiet=True), num_trials=3, epochs=2)
        )
        session.begin()
        assert not session.run(trial, Plan(1, 1, 0.0, 2, [{"CPU": 1.0}]))
    finally:
        ray.shutdown()

    records = [recorder.records[f"0000{number}"] for number in range(3)]
    assert [record["state"] for record in records] == ["failed", "failed", "completed"]
    assert [record["failures"] for record in records] == [1, 1, 1]
    reasons = [record["reason"] for record in records]
    died = f"its process on node {records[1]['node']} died: The actor is dead because its worker process has died"
    assert reasons == ["not at all", died, None]
    assert "ValueError: no such thing" in records[0]["error"]
    study = optuna.load_study(study_name=None, storage=sqlite_url(files.database))
    assert [trial.user_attrs.get("reason") for trial in study.trials] == reasons


# Without Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "resources", "ranks", "per_rank", "concurrent"),
    [
        ({}, {"CPU": 2}, 1, 0, 2),
        ({}, {"CPU": 16, "GPU": 4}, 1, 1, 4),
        ({"gpus_per_trial": 2}, {"CPU": 16, "GPU": 4}, 2, 1, 2),
        ({"gpus_per_trial": 0.25}, {"CPU": 16, "GPU": 1}, 1, 0.25, 4),
        ({"gpus_per_trial": 0.25}, {"CPU": 3, "GPU": 1}, 1, 0.25, 3),
        ({"ranks": 2}, {"CPU": 5}, 2, 0, 2),
        ({"max_concurrent": 1}, {"CPU": 8}, 1, 0, 1),
        ({"trials": 3}, {"CPU": 8}, 1, 0, 3),
    ],
)
def test_resources_of_a_trial(
    fields: dict[str, Any],
    resources: dict[str, float],
    ranks: int,
    per_rank: float,
    concurrent: int,
) -> None:
    plan = plan_resources(build_spec({"data": "t.csv", **fields}), resources)
    assert (plan.ranks, plan.gpus_per_rank, plan.concurrent) == (ranks, per_rank, concurrent)
    assert len(plan.bundles) == ranks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus_per_trial": 8}, "takes 8 CPU and 8 GPU, all of Ray has 16 CPU and 2 GPU"),
        ({"cpus_per_rank": 32}, "takes 32 CPU"),
        ({"ranks": 2, "gpus_per_trial": 0.5}, "each rank needs its own GPU"),
        ({"ranks": 3, "gpus_per_trial": 2}, "as many of both"),
        ({"accelerator_type": "A100"}, r"accelerator_type='A100': Ray has H200: choose one"),
    ],
)
def test_a_trial_that_can_never_be_scheduled_is_refused_at_once(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        plan_resources(
            build_spec({"data": "t.csv", **fields}),
            {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H200": 1.0},
        )


def test_a_kind_of_gpu_is_part_of_every_ranks_bundle() -> None:
    spec = build_spec({"data": "t.csv", "gpus_per_trial": 2, "accelerator_type": "H200"})
    plan = plan_resources(
        spec, {"CPU": 16.0, "GPU": 4.0, "accelerator_type:H200": 1.0, "accelerator_type:T4": 1.0}
    )
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001}] * 2


def test_all_violations_of_a_study_are_told_together() -> None:
    with pytest.raises(SpecError) as caught:
        build_spec(
            {
                "data": "t.csv",
                "trails": 5,
                "space": "documentd",
                "gpus_per_trial": 1.5,
                "sampler": "magic",
            }
        )
    text = str(caught.value)
    for part in ("'trails'; did you mean 'trials'", "1.5 GPUs a trial", "sampler"):
        assert part in text
    with pytest.raises(SpecError, match=r"unknown space 'documentd'.*did you mean 'documented'"):
        build_spec({"data": "t.csv", "space": "documentd"})


@pytest.mark.parametrize("gpus", [-1.0, 1.5, math.inf, math.nan, "9" * 400])
def test_gpus_that_no_trial_can_have_are_refused(gpus: float | str) -> None:
    with pytest.raises(SpecError, match="GPUs a trial: a whole number, or a fraction of one GPU"):
        build_spec({"data": "t.csv", "gpus_per_trial": gpus})


def test_a_line_cut_by_a_killed_writer_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, {"epoch": 1, "val_auc": float("nan")})
    append_line(path, {"epoch": 2, "val_auc": 0.5})
    whole = path.read_bytes()
    assert mend_last_line(path) is None
    path.write_bytes(whole + b'{"epoch": 3, "val')
    assert mend_last_line(path) == '{"epoch": 3, "val'
    assert path.read_bytes() == whole
    assert json.loads(whole.splitlines()[0])["val_auc"] is None


def test_a_logger_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match="log=mlflow: mlflow is not installed"):
        study_loggers(build_spec({"data": "t.csv", "log": ["mlflow"]}), StudyFiles(tmp_path))


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As much of MLflow as a logger asks at its start: where it was sent, and the error it raises if one is set."""
    seen: dict[str, Any] = {}
    mlflow, errors, tracking = map(ModuleType, ("mlflow", "mlflow.exceptions", "mlflow.tracking"))
    mlflow.__spec__ = ModuleSpec("mlflow", None)
    errors.MlflowException = type("MlflowException", (Exception,), {})  # type: ignore[attr-defined]

    class MlflowClient:
        def __init__(self, tracking_uri: str) -> None:
            seen.update(uri=tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            if "error" in seen:
                raise errors.MlflowException(seen["error"])
            return SimpleNamespace(name=name, experiment_id="1")

    tracking.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    for module in (mlflow, errors, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_mlflow_writes_to_a_database_in_the_study_or_to_the_server_named(
    fake_mlflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow 3.17 refuses a folder of files, which is where it was sent before."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    spec = build_spec({"data": "t.csv", "log": ["mlflow"]})
    study_loggers(spec, StudyFiles(tmp_path))
    assert fake_mlflow["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@server")
    study_loggers(spec, StudyFiles(tmp_path))
    assert fake_mlflow["uri"] == "https://me:secret@server"
    fake_mlflow["error"] = "no answer\nafter 7 tries"
    with pytest.raises(SpecError, match=r"^log=mlflow: MLFLOW_TRACKING_URI: no answer$"):
        study_loggers(spec, StudyFiles(tmp_path))


def test_a_study_that_cannot_log_has_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise the corrected command would be refused because the folder holds a study already."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spec = build_spec({"data": str(tmp_path / "t.csv"), "log": ["mlflow"]})
    with pytest.raises(SpecError, match="pip install mlflow"):
        run_study(spec, tmp_path / "study", console=Console(), notes=Console())
    assert not StudyFiles(tmp_path / "study").spec.exists()


@pytest.mark.ray
def test_a_study_whose_search_cannot_begin_leaves_its_folder_free(
    table: Path, tmp_path: Path
) -> None:
    root = tmp_path / "study"
    asked = [
        "run",
        "--data",
        table,
        "--trials",
        1,
        "--epochs",
        1,
        "--out",
        root,
        "--cache",
        tmp_path / "cache",
        *TINY,
    ]
    refused = medtune(*asked, "--warm-start-from", tmp_path / "gone")
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "gone/study.db is missing" in " ".join(err.split())
    assert sorted(path.name for path in root.glob("[!.]*")) == ["study.log"]
    finished(medtune(*asked))
    check_whole(root, trials=1, epochs=1)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model.json", "a model"),
        ("checkpoint.pt", "a run of `medtune train`"),
        ("table.csv", "the data"),
    ],
)
def test_a_study_does_not_move_into_a_folder_of_something_else(
    tmp_path: Path, file: str, what: str
) -> None:
    (tmp_path / file).touch()
    data = tmp_path / ("table.csv" if file == "table.csv" else "elsewhere/table.csv")
    with pytest.raises(
        SpecError, match=f"holds {what}; a study needs a separate folder: name another with --out"
    ):
        run_study(build_spec({"data": str(data)}), tmp_path, console=Console(), notes=Console())
    assert not StudyFiles(tmp_path).spec.exists()


def test_an_interrupt_waits_for_a_safe_moment_and_a_second_one_does_not(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(StudyFiles(tmp_path)) as interrupt:
        interrupt.take()
        signal.raise_signal(
            signal.SIGINT
        )  # does not raise here, where a destructor could swallow it
        with pytest.raises(KeyboardInterrupt):
            interrupt.take()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("blow", TAKEN_AWAY)
def test_a_machine_that_is_taken_away_leaves_trials_their_time(
    tmp_path: Path, blow: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRACE_S, "3600")
    files = StudyFiles(tmp_path)
    with Interrupt(files) as interrupt:
        interrupt.leave_if_preempted()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as Tune does when it begins
        interrupt.take()
        signal.raise_signal(blow)
        signal.raise_signal(blow)  # Slurm may send it to the job and to its step
        interrupt.take(lambda: False)
        assert files.hurry.exists()
        with pytest.raises(Preempted):
            interrupt.leave_if_preempted()
        with pytest.raises(Preempted):
            interrupt.take(lambda: True)
    assert not files.hurry.exists()
    monkeypatch.setenv(GRACE_S, "0")
    with Interrupt(files) as interrupt:
        signal.raise_signal(blow)
        with pytest.raises(Preempted):
            interrupt.take(lambda: False)


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_a_grace_that_is_no_time_is_told(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE_S, given)
    with pytest.raises(SpecError, match=f"{GRACE_S}={given}: seconds are needed"):
        saving_s(signal.SIGTERM)


def test_the_earlier_signal_has_a_time_of_its_own_and_the_later_one_shortens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(GRACE_S, raising=False)
    assert saving_s(signal.SIGUSR1) == saving_s(signal.SIGTERM) == 16
    monkeypatch.setenv(USR1_GRACE_S, "3600")
    assert (saving_s(signal.SIGUSR1), saving_s(signal.SIGTERM)) == (3586, 16)
    with Interrupt(StudyFiles(tmp_path)) as interrupt:
        deadlines = []
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
            assert interrupt.deadline is not None
            deadlines.append(interrupt.deadline)
    assert deadlines[1] < deadlines[0] - 3000
    assert deadlines[2] == deadlines[1]


def test_variants_are_compared_on_whole_runs() -> None:
    policy = watching_only(build_spec({"data": "t.csv"}).policy)
    assert not policy.halving
    assert "stop" not in policy.actions.values()


def test_a_record_survives_the_recorder(tmp_path: Path) -> None:
    spec = build_spec({"data": "t.csv", "config": {"epochs": 3}})
    recorder = Recorder(spec, StudyFiles(tmp_path))
    recorder.began("00000", {"s": 10.0}, None, node="here")
    recorder.row({"trial": "00000", "time": 1.0, "epoch": 1, "val_auc": 0.6})
    recorder.failed_once("00000")
    again = Recorder(spec, StudyFiles(tmp_path))
    assert again.records["00000"]["failures"] == 1
    assert [row["epoch"] for row in again.rows["00000"]] == [1]
    assert again.states() == {"running": 1}
    assert again.ended("00000", "stopped", "halving: rank 2 of 2")["objective"] is not None
    assert not again.rows, "rows of an ended trial stay on disk alone"
    assert [row["epoch"] for row in read_rows(StudyFiles(tmp_path).epochs)] == [1]
    again.close()


def test_a_closed_recorder_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    recorder = Recorder(build_spec({"data": "t.csv"}), StudyFiles(tmp_path))
    recorder.began("00000", {}, None)
    assert set(threading.enumerate()) - before
    recorder.close()
    assert not set(threading.enumerate()) - before
    assert read_record(StudyFiles(tmp_path).trial("00000").record)["state"] == "running"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "trials/00000/trial.json",
            {"state": "running", "overrides": {}},
            "has no failures, objective, reason, trial",
        ),
        ("trials/abc/trial.json", WHOLE | {"trial": "abc"}, "trial 'abc' has no number for a name"),
        (
            "epochs.jsonl",
            {"trial": "00000", "epoch": 1, "val_auc": 0.5},
            "has rows of trial 00000, but .*trial.json is not there",
        ),
        ("epochs.jsonl", {"trial": "../../x", "epoch": 1}, "must be the id of a trial"),
        (
            "decisions.jsonl",
            {"trial": "00000", "epoch": 1},
            "jsonl:1: has no action, reason, summary",
        ),
    ],
)
def test_what_no_driver_wrote_is_named_before_a_study_goes_on(
    tmp_path: Path, name: str, content: dict[str, Any], says: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    append_line(tmp_path / name, content)
    with pytest.raises(StudyDamageError, match=says):
        Recorder(build_spec({"data": "t.csv"}), StudyFiles(tmp_path))


@pytest.mark.parametrize(
    ("free", "told"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, None),
        ({"CPU": 4.0}, "0 GPU of 2;"),
        ({"CPU": 1.0, "GPU": 1.5}, "1 CPU of 4, 1.5 GPU of 2;"),
        ({}, "0 CPU of 4, 0 GPU of 2;"),
    ],
)
def test_a_study_that_waits_for_what_others_use_says_so(
    free: dict[str, float], told: str | None
) -> None:
    plan = Plan(ranks=2, cpus_per_rank=2, gpus_per_rank=1.0, concurrent=1, bundles=[])
    text = busy_text(plan, free)
    assert (text is None) == (told is None)
    if text is not None and told is not None:
        assert told in text


def test_a_lost_process_is_named_by_rank_and_node() -> None:
    """Ray's own texts: the first when a raylet is gone, the second when an actor's process is."""
    gone = str(ray.exceptions.ActorUnavailableError("Socket closed rpc_code: 14", b"a" * 16))
    on_node = "on node 10.0.0.7 does not answer: it or its node was lost"
    assert failure_line(gone, ranks=2, node="10.0.0.7") == f"rank 0 {on_node}"
    named = f"ray.exceptions.ActorUnavailableError: {gone}"
    assert failure_line(named, ranks=1, node="10.0.0.7") == f"its process {on_node}"
    died = "The actor died unexpectedly.\n\tip: 10.0.0.8\nThe actor is dead because x. Perhaps y."
    assert failure_line(died, ranks=1, node="10.0.0.7") == (
        "its process on node 10.0.0.8 died: The actor is dead because x"
    )
    assert failure_line("Traceback\nValueError: bad", ranks=1, node=None) == "ValueError: bad"
