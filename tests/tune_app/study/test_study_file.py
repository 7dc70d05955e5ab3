"""The study file: `medtune init` writes every field with its meaning, and the values are the defaults."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trainables.config import FineTuneConfig, build_config
from tune_app.cli.app import app
from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.prior import Prior, prior_text
from tune_app.study.spec import (
    StudySpec,
    absolute_paths,
    build_spec,
    paths_in,
    read_study_file,
    recorded_spec,
)
from tune_app.study.template import study_file, write_study_file


def test_the_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    write_study_file(path, data="table.csv", space="documented")
    assert build_spec(read_study_file(path)) == StudySpec(data=str(tmp_path / "table.csv"))


def test_every_field_stands_in_it_below_its_meaning() -> None:
    text = study_file()
    fields = yaml.safe_load(text)
    assert set(fields) == set(StudySpec.model_fields)
    assert set(fields["policy"]) == set(PolicySpec.model_fields)
    said = " ".join(text.replace("#", " ").split())
    for model in (StudySpec, PolicySpec, FineTuneConfig):
        for name, info in model.model_fields.items():
            assert info.description
            meaning = re.sub(r"\bNone\b", "null", info.description)
            assert " ".join(meaning.replace("#", " ").split()) in said, name
    assert max(map(len, text.splitlines())) <= 80


def test_every_hyperparameter_can_be_set_by_removing_its_sign() -> None:
    text = re.sub(r"^  #(?=\w+:)", "  ", study_file(), flags=re.MULTILINE)
    config = yaml.safe_load(text)["config"]
    assert set(config) == set(FineTuneConfig.model_fields)
    assert build_config(config) == build_config({})


def test_a_study_keeps_the_prior_that_its_file_names(tmp_path: Path) -> None:
    """Wherever it continues: the file may be gone, or changed, by then."""
    own = Prior((-10.0, -8.0), (-0.5, 0.5), {"learned_from": ["ours"]})
    (tmp_path / "own.json").write_text(prior_text(own))
    (tmp_path / "study.yaml").write_text("data: t.csv\nprior: own.json\nconfig: {optimizer: sgd}\n")
    fields = read_study_file(tmp_path / "study.yaml")
    assert ("prior", str(tmp_path / "own.json")) in paths_in(fields)
    spec = build_spec(fields)
    (tmp_path / "own.json").unlink()
    kept = recorded_spec(json.loads(spec.model_dump_json()))
    assert kept == spec
    assert kept.used_prior == own  # of the user's own choice: for any optimiser
    assert kept.model_copy(update={"sampler": "tpe"}).used_prior is None
    assert [name for name, _ in paths_in(spec.model_dump())] == ["data"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\x89PNG", "holds no prior ('utf-8' codec"),
        (b"{", "holds no prior (Invalid JSON"),
        (b'{"log_rate": [-8, -9], "lift": [0, 1], "provenance": {}}', "not in ascending order"),
        (b'{"log_rate": [-9, -8], "lift": [0], "provenance": {}}', "2 rates and 1 lifts"),
        (b'{"log_rate": [], "lift": [], "provenance": {}}', "0 rates and 0 lifts"),
        (b'{"log_rate": [-9, 1e999], "lift": [0, 1], "provenance": {}}', "finite"),
        (b'{"lift": [0], "provenance": {}}', "log_rate: Field required"),
    ],
)
def test_a_file_that_holds_no_prior_is_named(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError) as refused:
        build_spec({"data": "t.csv", "prior": str(path)})
    (problem,) = refused.value.problems
    assert problem.startswith(f"prior: {path} ")
    assert told in problem
    assert problem.endswith("`medtune bench prior TABLE... --out FILE` writes one")


def test_what_is_set_in_the_file_is_what_the_study_has_and_paths_start_at_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "deep" / "study.yaml"
    path.parent.mkdir()
    text = study_file(data="../table.csv", space="narrow").replace("trials: 20", "trials: 7")
    text = text.replace("  #epochs: 60", "  epochs: 9").replace(
        "  #pretrained_path: null", "  pretrained_path: r50.pth"
    )
    path.write_text(text)
    spec = build_spec(read_study_file(path))
    assert spec.data == str(tmp_path / "table.csv")
    assert (spec.space, spec.trials, spec.epochs) == ("narrow", 7, 9)
    assert spec.config["pretrained_path"] == str(path.parent / "r50.pth")


def test_every_path_of_a_study_becomes_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "data": "~/scans/table.csv",
        "cache": "../cache",
        "confirms": "/studies/search",
        "warm_start_from": ["first", "~/second"],
        "config": {"pretrained_path": "~nobody-of-that-name.pth", "s": 9},
        "space": "wide",
    }
    before = copy.deepcopy(given)
    assert absolute_paths(given, Path("/projects/adrenal")) == {
        "data": "/home/me/scans/table.csv",
        "cache": "/projects/cache",
        "confirms": "/studies/search",
        "warm_start_from": ["/projects/adrenal/first", "/home/me/second"],
        "config": {"pretrained_path": "/projects/adrenal/~nobody-of-that-name.pth", "s": 9},
        "space": "wide",
    }
    assert given == before
    left = {
        "data": "s3://bucket/table.csv",
        "cache": None,
        "confirms": "",
        "config": {"pretrained_path": None},
    }
    assert absolute_paths(left, Path("/projects")) == left


def test_the_space_in_the_comment_is_a_space() -> None:
    lines = study_file().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#   space:"))
    block = [line.removeprefix("#   ") for line in lines[start:] if line.startswith("#   ")]
    written = yaml.safe_load(
        "\n".join(block[: next(i for i, line in enumerate(block) if "dropout" in line) + 1])
    )
    space = build_spec({"data": "t.csv", **written}).resolved_space()
    assert {"s", "head", "one_minus_ema_decay", "backbone_lr"} <= set(space.parameters)


def test_a_file_that_is_there_is_kept_and_an_unknown_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("mine")
    with pytest.raises(SpecError, match="there already; --force writes over it"):
        write_study_file(path, data="t.csv", space="documented")
    assert path.read_text() == "mine"
    with pytest.raises(SpecError, match="did you mean 'documented'"):
        write_study_file(path, data="t.csv", space="document", force=True)
    write_study_file(path, data="t.csv", space="documented", force=True)
    assert "medtune run study.yaml" in path.read_text()


def test_init_writes_it_and_says_what_to_do_next(tmp_path: Path) -> None:
    path = tmp_path / "my study.yaml"
    result = CliRunner().invoke(
        app, ["init", str(path), "--data", "volumes.csv", "--space", "wide"]
    )
    assert result.exit_code == 0, result.output
    assert f"medtune run '{path}'" in result.stdout
    fields = yaml.safe_load(path.read_text())
    assert (fields["data"], fields["space"]) == ("volumes.csv", "wide")


def test_init_writes_the_classes_of_a_table_whose_labels_are_words(tmp_path: Path) -> None:
    lines = [f"{number}.nii,{label},s{number}" for number, label in enumerate(["flat", *"rr"])]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,subject", *lines]) + "\n")
    result = CliRunner().invoke(app, ["init", str(tmp_path / "study.yaml"), "--data", "t.csv"])
    assert result.exit_code == 0, result.output
    assert "classes: 0 = flat, 1 = r; change the numbers where" in result.stderr
    config = build_spec(read_study_file(tmp_path / "study.yaml")).shared
    assert build_config(config).class_names == ("flat", "r")


@pytest.mark.parametrize(
    "command", [["fixes"], ["spaces"], ["spaces", "wide"], ["spaces", "documented"]]
)
def test_what_there_is_to_search_fits_80_columns(command: list[str]) -> None:
    result = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
