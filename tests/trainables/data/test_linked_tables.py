"""A table that is a link (DataLad, git-annex): every command starts its relative paths at the folder of the link."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainables.data.manifest import read_manifest
from trainables.data.storage import absolute
from trainables.data.table_file import ManifestError
from tune_app.cli import studies
from tune_app.cli.app import app
from tune_app.compare.ablation import ablation_spec
from tune_app.models.predict import find_scans
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, resumed_spec
from tune_app.study.spec import build_spec, read_study_file

Write = Callable[..., Path]


@pytest.fixture
def linked(write_scan: Write, tmp_path: Path) -> Path:
    """A data set whose table is a link into an annex that holds scans of the same names."""
    for folder in ("set", "annex/objects/x1"):
        for row in range(8):
            write_scan(f"{folder}/scans/{row}.nii.gz", seed=row + 100 * (folder == "set"))
    content = tmp_path / "annex" / "objects" / "x1" / "MD5-s1.csv"
    rows = [f"scans/{row}.nii.gz,{row % 2},s{row}" for row in range(8)]
    content.write_text("\n".join(["path,label,subject", *rows]))
    table = tmp_path / "set" / "table.csv"
    table.symlink_to(content)
    return table


def run_spec(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The spec that `medtune ...` would run."""
    caught: list[Any] = []
    monkeypatch.setattr(studies, "_run_and_tell", lambda spec, root, *_: caught.append(spec))
    done = CliRunner().invoke(app, [*arguments, "--set", "volume_shape=16", "--set", "num_folds=2"])
    assert done.exit_code == 0, done.output
    return caught[0]


def test_every_command_reads_the_scans_next_to_the_link(
    linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "set" / "study.yaml"
    study.write_text("data: table.csv\n")
    other = tmp_path / "annex" / "study.yaml"
    other.write_text("data: ../set/table.csv\n")
    tables = {
        "manifest": read_manifest(linked).table,
        "run --data": run_spec(monkeypatch, "run", "--data", str(linked)).data,
        "study file": run_spec(monkeypatch, "run", str(study)).data,
        "study file elsewhere": run_spec(monkeypatch, "run", str(other)).data,
        "ablate": run_spec(monkeypatch, "ablate", "--data", str(linked), "--seeds", "1").data,
        "ablation": ablation_spec(
            linked, {"a": {}}, seeds=1, folds="0", config={"num_folds": 2}
        ).data,
    }
    assert tables == dict.fromkeys(tables, str(linked))
    scans = [str(linked.parent / "scans" / f"{row}.nii.gz") for row in range(8)]
    assert read_manifest(Path(tables["run --data"])).rows["path"].tolist() == scans
    assert [one.path for one in find_scans([linked], 2)] == scans


def test_a_scan_that_is_missing_next_to_the_link_is_told_with_both_folders(linked: Path) -> None:
    (linked.parent / "scans" / "3.nii.gz").unlink()
    with pytest.raises(ManifestError) as refusal:
        read_manifest(linked)
    missing, link = refusal.value.problems
    assert missing == f"row 4 (scan scans/3.nii.gz): no such file below {linked.parent}"
    assert link == (
        f"table {linked}: a link to {linked.resolve()}; relative paths start at the folder of the link, "
        f"{linked.parent}"
    )


def test_many_rows_with_one_problem_name_a_path(linked: Path) -> None:
    for scan in (linked.parent / "scans").iterdir():
        scan.unlink()
    with pytest.raises(ManifestError) as refusal:
        read_manifest(linked)
    assert refusal.value.problems[0] == (
        f"rows 1-8 (8, first scan scans/0.nii.gz): no such file below {linked.parent}"
    )


def test_a_study_that_recorded_the_file_behind_the_link_goes_on(
    linked: Path, tmp_path: Path
) -> None:
    """Earlier versions followed links before they wrote study.json."""
    files = StudyFiles(tmp_path / "study")
    files.root.mkdir()
    before = build_spec({"data": str(linked.resolve())})
    files.write({"spec": before.model_dump(mode="json")})
    assert resumed_spec(files, build_spec({"data": str(linked)})).data == before.data
    with pytest.raises(SpecError, match="holds another study: data is"):
        resumed_spec(files, build_spec({"data": str(tmp_path / "other.csv")}))


def test_a_place_becomes_absolute_without_following_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    monkeypatch.chdir(tmp_path)
    assert absolute("link/t.csv") == f"{tmp_path}/link/t.csv"
    assert absolute("real/../t.csv") == f"{tmp_path}/t.csv"
    # one folder up from where the link leads, as the system reads it, not from where the link is
    assert absolute("link/../t.csv") == f"{tmp_path}/link/../t.csv"
    assert absolute("s3:/bucket/t.csv") == "s3://bucket/t.csv"
    assert read_study_file_paths(tmp_path) == f"{tmp_path}/real/t.csv"


def read_study_file_paths(folder: Path) -> str:
    (folder / "real" / "study.yaml").write_text("data: ./deep/../t.csv\n")
    return str(read_study_file(folder / "real" / "study.yaml")["data"])
