"""The Python interface: the same study as the commands give, in two calls, and nothing loaded too early."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tune_app
from trainables.errors import ProblemsError
from tune_app.demo import SMALL
from tune_app.synthetic import write_cohort


def test_importing_it_loads_neither_torch_nor_ray_nor_pandas() -> None:
    code = "import tune_app, sys; print(sorted({'torch', 'ray', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", tune_app.__all__)
def test_every_function_is_documented_and_no_submodule_hides_it(name: str) -> None:
    function = getattr(tune_app, name)
    assert inspect.isfunction(function)
    assert inspect.getdoc(function)
    __import__("tune_app.report.page"), __import__("tune_app.models.export")
    assert getattr(tune_app, name) is function


def test_a_field_that_does_not_exist_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="trails"):
        tune_app.search(tmp_path / "t.csv", tmp_path / "study", trails=3)
    assert not (tmp_path / "study").exists()


def test_a_table_in_object_storage_is_named_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tune_app.api, "_run", lambda spec, *_, **__: asked.append(spec.data))
    for data in ("s3://bucket/table.csv", "table.csv"):
        tune_app.search(data, "s3://bucket/study")
    assert asked == ["s3://bucket/table.csv", str(Path("table.csv").absolute())]


SET_BY_OTHERS = {"PYTHONBREAKPOINT", "RAY_CLIENT_MODE", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}
"""What Ray, and the libraries of torch and scikit-learn, leave behind of their own."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_a_table_to_predictions(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=18)
    seen, variables = [], dict(os.environ)
    study = tune_app.search(
        table,
        tmp_path / "study",
        trials=2,
        config=SMALL | {"epochs": 2},
        gpus_per_trial=0,
        cache=str(tmp_path / "cache"),
        on_epoch=lambda trial, row: seen.append((trial, row["epoch"])),
        quiet=True,
    )
    changed = {name for name, _ in os.environ.items() ^ variables.items()}
    assert changed <= SET_BY_OTHERS, "the user's own Ray, after this, is not told what a study's is"
    assert sorted(seen) == sorted(zip(study.epochs["trial"], study.epochs["epoch"], strict=True))
    assert len(study.trials_full) == 2
    table = (tmp_path / "cohort").rename(tmp_path / "moved") / table.name
    head, *rows = table.read_text().splitlines()
    (table.parent / "other.csv").write_text("\n".join([head, *reversed(rows)]))
    with pytest.raises(ProblemsError, match="not the data that the study began with"):
        tune_app.resume(study, data=table.parent / "other.csv", quiet=True)
    again = tune_app.resume(study, data=table, quiet=True)
    assert again.spec.data == str(table)
    assert len(again.epochs) == len(study.epochs), "nothing was left to do"
    assert tune_app.write_report(study).read_text().startswith("<!doctype html>")
    info = tune_app.export(study, tmp_path / "model", device="cpu")
    best = study.best()
    assert [member.trial for member in info.members] == [best["trial"]]
    scores = tune_app.predict(tmp_path / "model", table, device="cpu")
    assert len(scores) == len(table.read_text().splitlines()) - 1
