"""Names from outside hold any bytes: they are written out where they cannot be shown, and cost no output."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from trainables.config import FineTuneConfig
from trainables.data.visible import visible
from tune_app.cli.common import VisibleConsole
from tune_app.models.card import model_card
from tune_app.models.folder import ModelFiles, ModelInfo
from tune_app.models.model import Prediction, Source
from tune_app.models.predict import row
from tune_app.report.page import write_report
from tune_app.results.loading import load_studies, load_study
from tune_app.serve.answers import JSONResponse
from tune_app.serve.folder import ID_LENGTH, StudyFolder
from tune_app.study.errors import SpecError
from tune_app.study.files import job_name, refuse_other_bytes

LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("scan 01.nii.gz", "scan 01.nii.gz"),
        ("Müller 患者\u00a0x", "Müller 患者\u00a0x"),
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        (LATIN, r"caf\udce9"),
        ("a\u202eb\u200bc\nd", r"a\u202eb\u200bc\nd"),
    ],
)
def test_what_is_not_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    shown.encode()


def test_the_console_writes_out_what_a_name_would_do_to_a_terminal() -> None:
    file = io.StringIO()
    console = VisibleConsole(file=file, force_terminal=True, width=80, highlight=False)
    console.print(f"error: scan \x1b]0;title\x07{LATIN}", style="red", markup=False)
    printed = file.getvalue()
    assert r"\x1b]0;title\x07caf\udce9" in printed
    assert printed.count("\x1b") == 2, "the console's own colour, and its end"


def test_a_row_of_a_prediction_can_be_written_whatever_the_files_name(
    exported_model: Path,
) -> None:
    info = ModelInfo.model_validate_json(ModelFiles(exported_model).info.read_text())
    name = f"{LATIN}\x1b[2J.nii.gz"
    cells = row(Prediction(Source(name), problem=f"scan {name}: no"), info)
    stream = io.StringIO()
    csv.DictWriter(stream, list(cells)).writerow(cells)
    stream.getvalue().encode()
    assert cells["path"] == r"caf\udce9\x1b[2J.nii.gz"
    assert "\x1b" not in cells["problem"]
    assert "cannot be shown" in cells["note"]
    assert row(Prediction(Source("ä.nii")), info)["note"] == ""


def test_a_study_folder_of_such_a_name_is_listed_with_the_others(
    write_any_study: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("plain", LATIN):
        write_any_study(name)
    found = StudyFolder(tmp_path).paths()
    assert sorted(found) == [r"caf\udce9", "plain"]
    assert found[r"caf\udce9"] == tmp_path / LATIN
    answer = JSONResponse({"name": LATIN, "ids": sorted(found)})
    assert json.loads(bytes(answer.body))["name"] == LATIN


@pytest.fixture
def write_any_study(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text("{}")
        return tmp_path / name

    return write


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_commands_end_well_in_a_folder_of_such_a_name_whatever_the_terminal(
    write_scan: Callable[..., Path], tmp_path: Path, locale: str
) -> None:
    lines = ["path,label,subject"]
    for number in range(4):
        write_scan(f"{LATIN}/{number}.nii.gz", seed=number)
        lines.append(f"{number}.nii.gz,{number % 2},s{number}")
    table = tmp_path / LATIN / "table.csv"
    table.write_text("\n".join(lines))
    encoding = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": locale}
    settings = ["--set", "volume_shape=8", "--set", "num_folds=2"]
    for words in (
        ["data", "check", str(table), *settings],
        ["data", "prepare", str(table), *settings, "--cache", str(tmp_path / LATIN / "cache")],
        ["data", "check", str(tmp_path / LATIN / "none.csv")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tune_app.cli", *words],
            capture_output=True,
            check=False,
            env={**os.environ, **encoding},
        )
        said = (done.stdout + done.stderr).decode("ascii")
        assert "Traceback" not in said
        assert done.returncode == (1 if "none.csv" in words[-1] else 0), said
    assert r"caf\udce9" in said


@pytest.fixture
def texts_of_pandas() -> Iterator[None]:
    """What pandas holds text in is a setting of the process."""
    yield
    pd.reset_option("mode.string_storage")


@pytest.mark.usefixtures("texts_of_pandas")
def test_a_study_in_a_folder_of_such_a_name_is_read_and_written(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    plain = write_study("plain", trials=4, epochs=4)
    folder = tmp_path / f"{LATIN}\x1b[31m\u202e"
    folder.mkdir()
    root = plain.rename(folder / LATIN)
    study = load_study(root)
    assert study.trials_full["best_checkpoint"].dropna().str.startswith(str(root)).all()
    assert len(study.to_csv(folder / "csv")) == 3
    _, epochs, _ = study.to_parquet(folder / "parquet")
    with epochs.open("rb") as file:
        assert len(pd.read_parquet(file)) == len(study.epochs)
    page = write_report(study, folder / "report.html").read_bytes().decode("utf-8")
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert r"caf\udce9\x1b[31m\u202e" in page
    with pytest.raises(SpecError, match="the same study twice"):
        load_studies([root, root])
    done = subprocess.run(
        [sys.executable, "-m", "tune_app.cli", "results", str(root)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert done.stdout.decode("ascii")


def test_a_new_study_is_refused_where_ray_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not UTF-8, which Ray cannot take"):
        refuse_other_bytes(["/plain", str(tmp_path / LATIN)])
    refuse_other_bytes(["/plain", "/患者 ä"])
    assert job_name(str(tmp_path / LATIN)).startswith("medtune-caf-")


def test_folders_whose_names_are_written_alike_or_too_long_have_ids_of_their_own(
    write_any_study: Callable[[str], Path], tmp_path: Path
) -> None:
    long = os.fsdecode(b"\xe9" * 100)
    made = {write_any_study(name) for name in (LATIN, r"caf\udce9", long, f"{long}x")}
    folder = StudyFolder(tmp_path)
    found = folder.paths()
    assert set(found.values()) == made
    assert all(len(name) <= ID_LENGTH and visible(name) == name for name in found)
    assert all(folder.path(name) == path for name, path in found.items())
    alone = StudyFolder(tmp_path / LATIN)
    assert list(alone.paths()) == [r"caf\udce9"], "the folder that is served is a study itself"


def test_a_model_card_shows_names_written_out(exported_model: Path) -> None:
    info = ModelInfo.model_validate_json(ModelFiles(exported_model).info.read_text())
    choice = info.choice.model_copy(update={"study": f"{LATIN}\x1b[31m\u202e"})
    card = model_card(info.model_copy(update={"choice": choice}), [FineTuneConfig()])
    card.encode()
    assert r"caf\udce9\x1b[31m\u202e" in card
    assert "\x1b" not in card
