"""Seconds per epoch measured before a study is queued: the process that the live page starts."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainables import mps
from trainables.config import build_config
from trainables.data.storage import DATA_ROOTS
from trainables.machine.safe_path import python
from trainables.machine.this_machine import usable_cpus
from tune_app.driver import forecast
from tune_app.driver.forecast import Pass, epoch_seconds, split_in
from tune_app.study.errors import SpecError
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

SMALL = {"depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 2, "epochs": 3}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), subjects=12, side=(8, 9))


def process(seconds: int, fields: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        python("-m", "tune_app.driver.forecast", str(seconds)),
        input=json.dumps(fields),
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_the_process_measures_the_split_of_the_table_on_cpus(table: Path) -> None:
    spec = build_spec({"data": str(table), "gpus_per_trial": 0, "config": SMALL})
    ended = process(200, spec.model_dump(mode="json"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    split = split_in(spec, build_config(spec.shared))
    assert (found["train"], found["val"]) == (len(split.train), len(split.val))
    assert (found["device"], found["threads"]) == ("CPU", spec.cpus_per_rank)
    assert found["at_once"] == max(1, usable_cpus() // spec.cpus_per_rank)
    assert found["epoch_s"] > 0
    assert 0 < found["trial_gib"] < 16


def test_a_table_outside_the_given_folders_is_not_measured(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOTS, str(tmp_path))
    ended = process(200, {"data": str(table), "gpus_per_trial": 0, "config": SMALL})
    assert ended.returncode == 1
    problems = json.loads(ended.stdout)["problems"]
    assert "outside" in problems[0]


def test_the_process_ends_at_its_deadline_though_no_one_waits_for_it(table: Path) -> None:
    large = {**SMALL, "depth": 50, "width": 1.0, "volume_shape": 128}
    ended = process(1, {"data": str(table), "gpus_per_trial": 0, "config": large})
    assert ended.returncode == -signal.SIGALRM


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ranks": 2}, "trials of one process"),
        ({"gpus_per_trial": 2}, "trials of one process"),
        ({"gpus_per_trial": 0.5}, "no GPU"),
        ({"gpus_per_trial": "auto"}, "no GPU"),
    ],
)
def test_trials_that_this_machine_cannot_measure_are_refused(
    table: Path, fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "visible_gpus", list)
    with pytest.raises(SpecError, match=words):
        forecast.measure(build_spec({"data": str(table), "config": SMALL, **fields}))


def test_on_gpus_short_epochs_are_measured_and_each_gpu_holds_a_trial(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 s per volume in training, .5 s in scoring; raw and averaged weights are validated."""
    asked: list[str] = []

    def epochs(config: Any, split: Any, device: str) -> Pass:
        asked.append(device)
        return Pass(2.0, 0.5, 0.0, 0.0)

    gpu = mps.Gpu("0", "GPU-x", "A GPU", "1", "Default", "[N/A]", "9.0")
    monkeypatch.setattr(mps, "visible_gpus", lambda: [gpu, gpu])
    monkeypatch.setattr(forecast, "keep_kernels", lambda cache: None)
    monkeypatch.setattr(forecast, "measure_epochs", epochs)
    spec = build_spec({"data": str(table), "config": {**SMALL, "train_auc_volumes": 3}})
    found = forecast.measure(spec)
    assert asked == ["cuda"]
    assert found["epoch_s"] == 2 * found["train"] + 0.5 * (2 * found["val"] + 3)
    assert (found["at_once"], found["device"], found["trial_gib"]) == (2, "A GPU", None)


def test_the_fastest_of_the_short_epochs_counts_per_volume(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [(9.0, 8.0), (4.0, 3.0), (5.0, 2.0)]
    seen: list[Any] = []

    def finetune(config: Any, cohort: Any, split: Any, *, device: str) -> Iterator[Any]:
        seen.append((config, cohort, split))
        for train_s, validation_s in times:
            yield SimpleNamespace(metrics={"train_s": train_s, "validation_s": validation_s})

    spec = build_spec({"data": str(table), "config": SMALL})
    config = build_config(spec.shared)
    split = split_in(spec, config)
    monkeypatch.setattr("trainables.finetune.finetune", finetune)
    found = forecast.measure_epochs(config, split, "cpu")
    assert found.train_s == 4.0 / len(split.train)
    assert found.score_s == 2.0 / (2 * len(split.val))
    short, cohort, part = seen[0]
    assert short.epochs == len(times)
    assert (len(part.train), len(part.val)) == (len(split.train), len(split.val))
    assert set(cohort.labels[part.train]) == set(cohort.labels[part.val]) == {0, 1}


def test_short_epochs_train_the_network_that_was_asked_for(table: Path) -> None:
    """On the CPU here; each epoch of the smallest network takes a moment."""
    spec = build_spec({"data": str(table), "config": {**SMALL, "amp": False}})
    config = build_config(spec.shared)
    split = split_in(spec, config)
    found = forecast.measure_epochs(config, split, "cpu")
    assert found.train_s > 0
    assert found.score_s > 0
    assert epoch_seconds(config, split, found) > 0
