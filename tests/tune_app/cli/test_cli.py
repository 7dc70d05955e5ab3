"""The command line: its arguments, what goes to which stream, and exit codes."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from search_spaces.spaces import SPACES
from trainables.config import ConfigError, FineTuneConfig
from tune_app.cli import app as cli
from tune_app.cli import studies
from tune_app.cli.common import parse_settings
from tune_app.study.spec import StudySpec
from tune_app.synthetic import write_cohort

DOCUMENT_LINE = """--fold 1 --pretrained-path pretrained/medicalnet_resnet50_3d.pth --lr 1e-4 --classifier-lr 1e-3
    --batch_size 6 --epochs 60 --optimizer adam --loss LDAM --scheduler cosine --max-m 0.2 --s 15 --drw-start-epoch 25
    --grad-clip 1.0 --ema-decay 0.995 --dropout 0.4 --gradient_accumulation_steps 2 --multi_gpu --gpu --amp"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `medtune train` would have trained, without training."""
    seen: dict[str, Any] = {}

    def train_once(
        config: FineTuneConfig, table: Path, folder: Path, cache: Path, **options: Any
    ) -> int:
        seen.update(config=config, table=table, folder=folder, **options)
        return 0

    monkeypatch.setattr("tune_app.driver.single_run.train_once", train_once)
    return seen


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[StudySpec]:
    """The studies that would have been run."""
    specs: list[StudySpec] = []
    monkeypatch.setattr(studies, "_run_and_tell", lambda spec, root, *_: specs.append(spec))
    return specs


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_version_is_printed_without_a_command() -> None:
    asked = invoke("--version")
    assert asked.exit_code == 0
    assert asked.stdout.strip() == metadata.version("medtune")


def run_main(*arguments: object, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """The installed command's own entry point, in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "tune_app.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": str(columns)},
    )


# Settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("s=15", 15),
        ("backbone_lr=1e-4", 1e-4),
        ("backbone_lr=1E-4", 1e-4),
        ("max_m=.3", 0.3),
        ("head=linear", "linear"),
        ("ema_warmup=false", False),
        ("spacing_mm=null", None),
        ("spacing_mm=[1, 1, 2]", [1, 1, 2]),
        ("volume_shape=64,64,32", "64,64,32"),
        ("flip_axes=", ""),
        ("pretrained_path=/a=b.pth", "/a=b.pth"),
        ("pretrained_path=/[odd", "/[odd"),
        ("pretrained_path=here.pth", str(Path("here.pth").resolve())),
        ("pretrained_path=null", None),
        (" s =3", 3),
    ],
)
def test_settings_are_read_as_people_write_them(written: str, value: object) -> None:
    (read,) = parse_settings([written]).values()
    assert (read, type(read)) == (value, type(value))


def test_settings_without_a_value_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(["s", "=3", "max_m=0.1"])
    assert caught.value.problems == ["--set 's': write NAME=VALUE", "--set '=3': write NAME=VALUE"]


# medtune train ----------------------------------------------------------------------------------------------------------


def test_the_documents_command_line_becomes_its_configuration(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    result = invoke("train", *DOCUMENT_LINE.split(), "--data", tmp_path / "t.csv")
    assert result.exit_code == 0, result.output
    config = trained["config"]
    assert (config.fold, config.pretrained_path) == (
        1,
        str(Path("pretrained/medicalnet_resnet50_3d.pth").resolve()),
    )
    assert (config.backbone_lr, config.classifier_lr, config.batch_size, config.epochs) == (
        1e-4,
        1e-3,
        6,
        60,
    )
    assert (config.optimizer, config.loss, config.scheduler) == ("adam", "ldam", "cosine")
    assert (config.max_m, config.s, config.drw_start_epoch, config.grad_clip) == (
        0.2,
        15.0,
        25,
        1.0,
    )
    assert (config.ema_decay, config.dropout, config.gradient_accumulation_steps) == (0.995, 0.4, 2)
    assert (config.amp, trained["gpu"], trained["multi_gpu"]) == ("fp16", True, True)


def test_a_backbone_rate_alone_takes_the_head_along_at_ten_times_it(
    trained: dict[str, Any],
) -> None:
    """The document: `--classifier-lr`: separate LR for classifier (default: 10x backbone LR)."""
    invoke("train", "--data", "t.csv", "--lr", "2e-4")
    assert trained["config"].classifier_lr == pytest.approx(2e-3)
    invoke("train", "--data", "t.csv", "--classifier-lr", "5e-4")
    assert (trained["config"].backbone_lr, trained["config"].classifier_lr) == (1e-4, 5e-4)


def test_settings_go_before_flags(trained: dict[str, Any]) -> None:
    invoke("train", "--data", "t.csv", "--s", "20", "--set", "s=5", "--no-amp")
    assert (trained["config"].s, trained["config"].amp) == (5.0, "off")


# medtune run ------------------------------------------------------------------------------------------------------------


def test_options_go_before_the_study_file_and_paths_become_absolute(
    asked: list[StudySpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text(
        "data: table.csv\ntrials: 7\nspace: narrow\nconfig: {epochs: 9, s: 12}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "study.yaml", "--trials", 3, "--set", "s=11").exit_code == 0
    (spec,) = asked
    assert (spec.trials, spec.space, spec.epochs, spec.config["s"]) == (3, "narrow", 9, 11)
    assert spec.data == str(tmp_path / "table.csv")
    invoke(
        "run", "study.yaml", "--data", "other.csv", "--space", "wide", "--pretrained-path", "w.pth"
    )
    assert (asked[1].data, asked[1].space) == (str(tmp_path / "other.csv"), "wide")
    assert asked[1].config["pretrained_path"] == str(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("given", "expected"), [("2", 2.0), ("0.25", 0.25), ("0", 0.0), ("auto", "auto")]
)
def test_gpus_a_trial_are_a_number_or_auto(
    asked: list[StudySpec], given: str, expected: object
) -> None:
    assert invoke("run", "--data", "t.csv", "--gpus-per-trial", given).exit_code == 0
    assert asked[0].gpus_per_trial == expected


def test_usage_errors_say_what_is_missing() -> None:
    result = invoke("run")
    assert result.exit_code == 2
    assert "name the table of volumes: --data TABLE" in " ".join(
        result.output.replace("│", " ").split()
    )
    assert invoke("run", "--data", "t.csv", "--gpus-per-trial", "some").exit_code == 2
    assert invoke("run", "--data", "t.csv", "--retry-failed").exit_code == 2, (
        "a new study has no failed trials"
    )
    assert invoke("train").exit_code == 2
    assert invoke("nonsense").exit_code == 2


# As a process -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("run", "--data", "t.csv", "--set", "backbon_lr=1"),
            "unknown hyperparameter 'backbon_lr'; did you mean",
        ),
        (("run", "--data", "missing.csv", "--out", "study"), "missing.csv"),
        (("train", "--data", "missing.csv"), "missing.csv"),
        (("results", "nowhere"), "no study here (no study.json)"),
        (("resume", "nowhere"), "no study here (no study.json)"),
        (("report", "nowhere"), "no study here (no study.json)"),
        (("weights", "check", "nowhere.pth"), "no such file"),
        (("spaces", "documentd"), "did you mean 'documented'"),
        (("data", "check", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_exit_code_1(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    )
    ended = run_main(*arguments)
    assert ended.returncode == 1, ended.stderr
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_page_of_two_studies_cannot_be_watched(tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        cli.app, ["report", str(tmp_path), "--compare", str(tmp_path), "--watch"]
    )
    assert ended.exit_code == 2
    assert "leave out --compare, or" in ended.output


def test_debug_shows_where_an_error_came_from() -> None:
    ended = run_main("--debug", "results", "nowhere")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "no study here" in ended.stderr


def test_data_and_config_go_to_stdout_so_that_pipes_work(tmp_path: Path) -> None:
    told = run_main("config", "--format", "json", "--set", "s=7")
    assert json.loads(told.stdout)["s"] == 7
    assert told.stderr == ""
    table = write_cohort(tmp_path / "c", subjects=12, side=(14, 18))
    prepared = run_main(
        "data", "prepare", table, "--cache", tmp_path / "cache", "--set", "volume_shape=16"
    )
    assert prepared.returncode == 0, prepared.stderr
    volumes, folder = prepared.stdout.splitlines()
    assert "volumes of 16x16x16 voxels" in volumes
    assert (Path(folder) / "volumes.npy").is_file()


@pytest.mark.parametrize(
    "arguments", [("config",), ("fixes",), ("spaces",), *(("spaces", name) for name in SPACES)]
)
def test_tables_keep_within_80_columns(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "out", Console(highlight=False, width=80))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert len(result.output.splitlines()) > 5


def test_every_command_explains_itself() -> None:
    for command in (
        [],
        ["train"],
        ["run"],
        ["data"],
        ["weights"],
        ["bench"],
        ["confirm"],
        ["export"],
        ["predict"],
    ):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_the_help_lists_every_command_by_its_task() -> None:
    listed = [name for names in cli.PANELS.values() for name in names]
    assert sorted(listed) == sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]
    shown = run_main("--help").stdout
    places = [shown.index(f"─ {panel} ─") for panel in cli.PANELS]
    assert places == sorted(places)
    assert shown.index("│ demo ") < shown.index("│ run ") < shown.index("│ bench ")
