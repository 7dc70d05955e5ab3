"""Studies of earlier versions load, are reported, and are continued."""

import io
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import prepare_cohort
from tune_app.driver.run import DONE, run_study
from tune_app.report.page import write_report
from tune_app.results import load_study
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

WRITTEN = Path(__file__).parent / "written_by_0_1"
"""A search of four trials over `write_cohort(subjects=20, side=(12, 16), noise=0.3)`, interrupted after three. Version 0.1.0
wrote it, before the packages were divided into rooms: no checkpoints, the database as SQL, DATA in place of the table."""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    table = write_cohort(tmp_path / "cohort", subjects=20, side=(12, 16), noise=0.3)
    root = Path(shutil.copytree(WRITTEN, tmp_path / "a study"))
    files, dump = StudyFiles(root), root / "study.sql"
    info = json.loads(files.spec.read_text(encoding="utf-8"))
    info["spec"] |= {"data": str(table), "cache": str(tmp_path / "cache")}
    # A cohort's name ends in where its volumes are; the part before it is as the earlier version wrote it.
    config = build_spec(info["spec"]).config_of({})
    manifest = read_manifest(table, num_classes=config.num_classes)
    cohort = prepare_cohort(manifest, Recipe.from_config(config), tmp_path / "cache").name
    info["cohort"] = str(info["cohort"]).replace("COHORT", cohort.partition("-")[2])
    assert info["cohort"] == cohort
    files.spec.write_text(json.dumps(info), encoding="utf-8")
    with sqlite3.connect(files.database) as database:
        text = dump.read_text(encoding="utf-8")
        database.executescript(text.replace("COHORT", cohort.partition("-")[2]))
    database.close()
    dump.unlink()
    return root


def test_a_study_of_the_version_before_is_loaded_and_reported(
    written: Path, tmp_path: Path
) -> None:
    study = load_study(written)
    assert study.notes == ()
    assert list(study.trials_full["state"]) == ["completed"] * 3
    assert list(study.trials_full["objective"].round(4)) == [0.6714, 0.6286, 0.6857]
    assert (len(study.epochs), len(study.decisions)) == (9, 9)
    assert study.best()["trial"] == "00002"
    records = [json.loads(path.read_text()) for path in sorted(written.glob("trials/*/trial.json"))]
    assert {record["verdict"] for record in records} == {"healthy"}
    assert (study.trials_full["best_val_auc_low"] < 0.5).all()
    assert set(study.trials_full["verdict"]) == {"no_fault"}, "none is above chance"
    assert set(study.decisions["verdict"]) == {"no_fault"}
    assert study.spec.policy.actions["no_fault"] == "ignore"
    page = tmp_path / "report.html"
    write_report(study, page)
    assert "00002" in page.read_text(encoding="utf-8")


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_of_the_version_before_is_continued(written: Path) -> None:
    before = load_study(written)
    quiet = Console(file=io.StringIO())
    spec = StudyFiles(written).read_spec()
    assert run_study(spec, written, console=quiet, notes=quiet, resume=True).exit_code == DONE
    after = load_study(written)
    assert list(after.trials_full["state"]) == ["completed"] * 4
    kept = ["trial", "objective", "verdict", "backbone_lr", "started", "ended"]
    assert after.trials_full[kept].head(3).equals(before.trials_full[kept])
    assert len(after.epochs) == 12
