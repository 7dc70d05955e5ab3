"""Classes by name: words as labels with a mapping, and names that a table brings along."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainables.checkpoints import TrialFiles, write_json
from trainables.config import ConfigError, FineTuneConfig, build_config
from trainables.data.manifest import listed_volumes, numbered_words, read_manifest
from trainables.data.manifest_check import CheckReport
from trainables.data.table_file import ManifestError
from tune_app.driver.cohorts import choose_classes
from tune_app.driver.single_run import with_what_the_table_gives
from tune_app.study.spec import build_spec


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "scan.nii").touch()

    def write(rows: list[str], header: str = "path,label,subject") -> Path:
        lines = [header]
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.nii").touch()
            lines.append(f"{number}.nii,{row},s{number}".replace("|", ","))
        path = tmp_path / "table.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_words_become_the_numbers_of_the_mapping(table: Callable[..., Path]) -> None:
    path = table(["benign", "malignant", "likely", "1", "0"])
    rows = read_manifest(path, classes="benign=0,likely=1,malignant=1").rows
    assert list(rows["label"]) == [0, 1, 1, 1, 0]


def test_a_word_without_a_class_is_named_with_those_that_have_one(
    table: Callable[..., Path],
) -> None:
    path = table(["benign", "malignant", "bening"])
    with pytest.raises(
        ManifestError, match=r"'bening': .*one of benign, malignant, is needed"
    ) as caught:
        read_manifest(path, classes="benign=0,malignant=1")
    assert len(caught.value.problems) == 1


def test_words_without_a_mapping_are_refused_with_the_mapping_to_write(
    table: Callable[..., Path],
) -> None:
    path = table(["benign"] * 5 + ["malignant"] * 4)
    with pytest.raises(ManifestError, match=r"classes: \{benign: 0, malignant: 1\}"):
        read_manifest(path)


def test_the_mapping_sets_the_number_of_classes_and_names_them() -> None:
    config = build_config({"classes": {"a": 0, "b": 2, "c": 1, "d": 2}})
    assert config.num_classes == 3
    assert config.class_names == ("a", "c", "b/d")
    assert build_config({"classes": config.classes}) == config, "as an override it is text"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": {"a": 0, "b": 2}}, "from 0, without gaps"),
        ({"classes": {"a": 0}}, "two or more"),
        ({"classes": "a:0,b:1"}, "LABEL=NUMBER"),
        ({"classes": {"a,b": 0, "c": 1}}, "comma"),
        ({"classes": {"a": 0, "b": 1}, "num_classes": 3}, "leave num_classes out"),
    ],
)
def test_a_mapping_that_is_none_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config(given)


def test_runs_of_versions_without_the_field_have_the_same_hash() -> None:
    """The hash of the default configuration as the version before wrote it into checkpoints."""
    fields = FineTuneConfig().model_dump(mode="json")
    assert fields["classes"] is None
    assert FineTuneConfig().hash() == "ca871ae86cf9b6d9"
    assert build_config({"classes": "a=0,b=1"}).hash() != FineTuneConfig().hash()


def test_a_study_file_may_hold_the_mapping_next_to_its_data() -> None:
    spec = build_spec({"data": "/t.csv", "classes": {"benign": 0, "malignant": 1}})
    assert build_config(spec.shared).class_names == ("benign", "malignant")
    again = build_spec(spec.model_dump(mode="json"))
    assert again == spec


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (["0|round", "1|flat", "0|round"], ("round", "flat")),
        (["0|round", "1|flat", "0|oval"], ()),
        (["0|round", "1|", "0|round"], ()),
        (["0|a=b", "1|flat"], ()),
    ],
)
def test_a_table_names_its_classes_where_each_has_one_name(
    table: Callable[..., Path], rows: list[str], names: tuple[str, ...]
) -> None:
    path = table(rows, header="path,label,class,subject")
    assert read_manifest(path).class_names == names


def test_a_new_study_takes_the_names_of_its_table_and_keeps_those_that_it_has(
    table: Callable[..., Path],
) -> None:
    path = table(["0|round", "1|flat", "0|round"], header="path,label,class,subject")
    manifest = read_manifest(path)
    assert choose_classes(build_spec({"data": str(path)}), manifest) == {
        "classes": "round=0,flat=1"
    }
    named = build_spec({"data": str(path), "classes": {"a": 0, "b": 1}})
    assert choose_classes(named, manifest) == {}


def test_a_single_run_takes_the_names_of_its_table_and_continues_with_those_that_it_has(
    table: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = read_manifest(
        table(["0|round", "1|flat", "0|round"], header="path,label,class,subject")
    )
    notes, files = Console(quiet=True), TrialFiles(tmp_path / "run")
    plain = build_config({"spacing_mm": 1})

    def taken(config: FineTuneConfig) -> FineTuneConfig:
        return with_what_the_table_gives(config, manifest, files, notes)

    assert taken(plain).class_names == ("round", "flat")
    own = build_config({"classes": {"a": 0, "b": 1}, "spacing_mm": 1})
    assert taken(own) == own
    files.folder.mkdir()
    began = build_config({"spacing_mm": 2})  # by a version that took no names
    write_json(files.config, began.model_dump(mode="json"))
    assert taken(build_config({})).hash() == began.hash()


def test_words_are_numbered_as_a_new_table_has_them(table: Callable[..., Path]) -> None:
    assert numbered_words(table(["b", "a", "b", "Control"])) == {"Control": 0, "a": 1, "b": 2}


@pytest.mark.parametrize("rows", [["0", "1"], ["b", "1"], ["b", "b"], ["a=1", "b"], ["b", ""]])
def test_other_labels_are_numbered_by_nothing(table: Callable[..., Path], rows: list[str]) -> None:
    assert numbered_words(table(rows)) == {}


def test_the_files_of_a_table_are_listed_whatever_its_labels_are(
    table: Callable[..., Path], tmp_path: Path
) -> None:
    path = table(["benign", "2", ""])
    assert listed_volumes(path) == [str(tmp_path / f"{number}.nii") for number in range(3)]
    (tmp_path / "1.nii").unlink()
    with pytest.raises(ManifestError, match=r"row 2 \(scan 1.nii\)"):
        listed_volumes(path)
    path.write_text("path,label,subject\n,0,a\n")
    with pytest.raises(ManifestError, match="row 1"):
        listed_volumes(path)


def test_a_check_counts_classes_by_name(table: Callable[..., Path]) -> None:
    manifest = read_manifest(table(["0", "1", "0"]))
    (line,) = CheckReport(manifest, [], [], ("round", "flat\x1b")).lines()
    assert line.endswith("class 0 (round): 2, class 1 (flat\\x1b): 1")
