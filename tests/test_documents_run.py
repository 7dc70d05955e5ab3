"""The blocks of README and documents, run in order as a reader would, on a small cohort and with small trials."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import tune_app
from tune_app.cli.app import app
from tune_app.synthetic import write_cohort

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "num_folds": 2,
    "train_auc_volumes": 0,
}
NOT_RUN = {
    "medtune run": "trains for longer than a test may: the Python blocks search instead",
    "medtune confirm": "as long, and the Python blocks confirm instead",
    "medtune serve": "runs until it is stopped",
    "medtune submit": "needs a cluster",
    "medtune doctor": "its exit code is that of the machine",
    "medtune retrain": "needs a confirmed winner",
}
"""First words of a line of a shell block -> why it is left out."""


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"{name} has no block of {language}"
    return found


def commands(name: str) -> list[list[str]]:
    """The words of each `medtune` line of a document's shell blocks, comments removed."""
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line[:1] == ["medtune"] and " ".join(line[:2]) not in NOT_RUN]


def run_commands(lines: list[list[str]]) -> None:
    for line in lines:
        result = CliRunner().invoke(app, line[1:], env={"COLUMNS": "80"})
        assert result.exit_code == 0, f"{shlex.join(line)}: {result.output}"


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scans, a label sheet and new scans, where Python's searches are small."""
    table = write_cohort(tmp_path / "cohort", subjects=16, side=(14, 18))
    rows = pd.read_csv(table)
    shutil.copytree(table.parent / "volumes", tmp_path / "scans")
    (tmp_path / "new_scans").mkdir()
    names = [Path(path).name for path in rows["path"]]
    for name in names[:2]:
        shutil.copy(tmp_path / "scans" / name, tmp_path / "new_scans")
    sheet = pd.DataFrame(
        {
            "scan": names,
            "patient": rows["subject"],
            "finding": rows["label"].map({0: "benign", 1: "malignant"}),
        }
    )
    sheet.to_excel(tmp_path / "labels.xlsx", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    search, confirm = tune_app.search, tune_app.confirm

    def small_search(table: Any, out: Any, **options: Any) -> Any:
        config = {**options.pop("config", {}), **TINY}
        return search(table, out, **{**options, "trials": 4, "config": config, "quiet": True})

    monkeypatch.setattr(tune_app, "search", small_search)
    monkeypatch.setattr(tune_app, "confirm", lambda study, **o: confirm(study, **{**o, "seeds": 1}))
    return tmp_path


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_blocks_run_in_order(at_home: Path) -> None:
    lines = commands("README.md")
    making = [line for line in lines if line[1] in ("data", "init")]
    assert len(making) == 4
    run_commands(making)
    for source in blocks("README.md", "python"):
        exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
    using = [line for line in lines if line not in making]
    assert [line[1] for line in using] == ["results", "report", "export", "predict"]
    run_commands(using)
    assert (at_home / "studies" / "first" / "report.html").is_file()
    assert (at_home / "model" / "model.json").is_file()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_blocks_on_python_and_on_results_run_in_order(at_home: Path) -> None:
    shutil.copy(at_home / "cohort" / "table.csv", at_home / "table.csv")
    shutil.move(at_home / "cohort" / "volumes", at_home / "volumes")
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in blocks("docs/python.md", "python"):
        exec(compile(source, "docs/python.md", "exec"), names)
    assert len(names["scores"]) == 2
    looking = [line for line in commands("docs/models.md") if line[1] in ("results", "report")]
    run_commands([line for line in looking if "--watch" not in line])


def test_a_line_that_fails_is_noticed() -> None:
    with pytest.raises(AssertionError, match="medtune results nowhere"):
        run_commands([["medtune", "results", "nowhere"]])
