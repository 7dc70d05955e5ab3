"""The demo and the sample cohort: the files written, and that the commands printed for them are commands."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command

from trainables.data.manifest import read_manifest
from tune_app import demo
from tune_app.cli.app import app
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.spec import build_spec, read_study_file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SUBJECTS", 20)
    monkeypatch.setattr(demo, "CONFIRMED_ON", (1,))


def test_the_sample_is_a_cohort_and_a_study_file_with_the_default_policy(
    small: None, tmp_path: Path
) -> None:
    path = demo.write_sample(tmp_path / "a sample")
    spec = build_spec(read_study_file(path))
    assert spec.policy == PolicySpec()
    assert spec.trials == demo.TRIALS
    rows = read_manifest(tmp_path / "a sample" / "cohort" / "table.csv").rows
    assert rows["subject"].nunique() == 20
    with pytest.raises(SpecError, match="not empty"):
        demo.write_sample(tmp_path / "a sample")


def test_what_is_printed_next_are_commands_with_options_that_exist(tmp_path: Path) -> None:
    commands = demo.next_commands(tmp_path / "a sample")
    assert [shlex.split(line)[:2] for line in commands] == [
        ["medtune", "run"],
        ["medtune", "confirm"],
        ["medtune", "report"],
    ]
    for line in commands:
        _, name, *arguments = shlex.split(line)
        group: Any = get_command(app)
        context = group.commands[name].make_context(name, arguments)
        assert any(str(tmp_path / "a sample") in str(value) for value in context.params.values())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_searches_confirms_and_reports(small: None, tmp_path: Path) -> None:
    results = Console(width=100, record=True, quiet=False)
    code = demo.run_demo(
        tmp_path / "d", trials=2, epochs=3, console=Console(quiet=True), results=results
    )
    assert code == 0
    root = tmp_path / "d" / "study"
    assert len(load_study(root).trials) == 2
    confirmed = load_study(root / "confirmation")
    assert set(confirmed.trials["state"]) == {"completed"}
    assert set(confirmed.trials["fold"]) == set(demo.CONFIRMED_ON)
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert f"report written: {root}/report.html" in results.export_text()
