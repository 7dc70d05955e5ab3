"""From a table to a self-made MedicalNet file, and the table of the remaining subjects to fine-tune on."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from trainables.checkpoints import load_state
from trainables.config import ConfigError, build_config
from trainables.data.manifest import read_manifest
from trainables.network.model import configured_network
from trainables.network.pretext import PretextError
from trainables.network.weights import load_pretrained
from tune_app.models.pretrain import accuracy_text, pretext_config, pretrain
from tune_app.synthetic import write_cohort

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "batch_size": 10,
    "gradient_accumulation_steps": 1,
    "train_auc_volumes": 0,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 subjects: six for the test and four for validation."""
    path = write_cohort(tmp_path_factory.mktemp("pretrain") / "cohort", subjects=36, side=(14, 18))
    rows = pd.read_csv(path)
    subjects = rows.groupby("subject")["label"].first()
    held = {0: list(subjects.index[subjects == 0]), 1: list(subjects.index[subjects == 1])}
    test, val = held[0][:4] + held[1][:2], held[0][4:6] + held[1][2:4]
    splits = dict.fromkeys(test, "test") | dict.fromkeys(val, "val")
    rows["split"] = rows["subject"].map(splits).fillna("train")
    rows.to_csv(path, index=False)
    return path


def run(table: Path, folder: Path, **changes: Any) -> tuple[Path, str]:
    said = io.StringIO()
    console = Console(file=said, width=80)
    options = {"pretext": "rotation", "share": 0.5, "settings": TINY, **changes}
    weights = pretrain(
        table,
        folder,
        table.parent.parent / "cache",
        gpu=False,
        console=console,
        notes=console,
        **options,
    )
    return weights, said.getvalue()


@pytest.fixture(scope="module")
def pretrained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(table, tmp_path_factory.mktemp("out") / "pretrained")


def test_the_file_fills_the_network_it_was_made_for_with_the_averaged_weights(
    pretrained: tuple[Path, str],
) -> None:
    weights, _ = pretrained
    network = configured_network(build_config({**TINY, "num_classes": 2}))
    report = load_pretrained(network, weights)
    assert "balance" not in report.lines()
    averaged = load_state(weights.parent / "run" / "checkpoint.pt")["average"]["network"]
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, averaged[f"backbone.{name}"]), name


def test_what_is_left_has_none_of_the_subjects_and_all_of_val_and_test(
    table: Path, pretrained: tuple[Path, str]
) -> None:
    folder = pretrained[0].parent
    all_rows = read_manifest(table).rows
    left = read_manifest(folder / "finetune.csv").rows
    used = json.loads((folder / "pretraining.json").read_text())["subjects"]
    trained = all_rows[all_rows["split"] == "train"]["subject"]
    assert set(used) < set(trained)
    assert len(used) == pytest.approx(trained.nunique() / 2, abs=1)
    assert not set(left["subject"]) & set(used)
    assert set(left["path"]) == set(all_rows[~all_rows["subject"].isin(used)]["path"])
    assert set(left["split"]) == {"train", "val", "test"}


def test_it_says_how_well_the_pretext_was_learned_and_where_everything_is(
    pretrained: tuple[Path, str],
) -> None:
    weights, said = pretrained
    record = json.loads((weights.parent / "pretraining.json").read_text())
    assert record["chance"] == 0.1
    assert (
        f"pretext accuracy {record['accuracy']:.3f} on {record['held_out']} volumes"
        in said.replace("\n", " ")
    )
    assert "weights:" in said
    assert record["config"]["num_classes"] == 10
    assert not (weights.parent / "pretext").exists()


def test_the_same_command_again_trains_nothing_and_another_is_refused(
    table: Path, pretrained: tuple[Path, str]
) -> None:
    weights, _ = pretrained
    before = load_state(weights)["state_dict"]
    again, said = run(table, weights.parent)
    assert "continuing from the checkpoint" in said
    after = load_state(again)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(PretextError, match=r"holds a run of share 0\.5: choose another folder"):
        run(table, weights.parent, share=0.6)
    assert json.loads((weights.parent / "pretraining.json").read_text())["share"] == 0.5


def test_a_pretext_that_can_be_learned_is_learned(tmp_path: Path) -> None:
    """Balls of all sizes: how much they fill is plain to see."""
    table = write_cohort(tmp_path / "cohort", subjects=60, side=(14, 18), noise=0.2)
    settings = TINY | {"epochs": 12, "volume_shape": 16, "spacing_mm": 1}
    weights, said = run(table, tmp_path / "out", pretext="size", share=1.0, settings=settings)
    record = json.loads((weights.parent / "pretraining.json").read_text())
    assert record["accuracy"] > 2 * record["chance"]
    assert "not above chance" not in said
    assert not (weights.parent / "finetune.csv").exists()


def test_accuracy_is_told_from_chance() -> None:
    assert "not above chance" in accuracy_text(0.13, 10, 60)
    assert "not above chance" not in accuracy_text(0.30, 10, 60)


@pytest.mark.parametrize(
    ("pretext", "settings", "message"),
    [
        ("rotation", {"loss": "ldam"}, "loss is decided by the pretext"),
        (
            "rotation",
            {"flip_axes": "x"},
            "flip_axes would change the labels of the pretext rotation",
        ),
        (
            "size",
            {"augmentation_strength": 1},
            "augmentation_strength would change the labels of the pretext size",
        ),
        ("size", {"epoch": 3}, "epochs"),
    ],
)
def test_settings_that_the_pretext_decides_are_refused(
    pretext: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretext_config(pretext, settings)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.1])
def test_a_share_is_a_number_of_tenths(table: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(PretextError, match=r"0\.1 to 1 of the training subjects"):
        run(table, tmp_path / "out", share=share)
    assert not (tmp_path / "out").exists()


def test_too_few_subjects_are_told_with_what_would_do(table: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PretextError, match=r"share of 0\.2 is \d of 26 training subjects, and 10 are needed: raise"
    ):
        run(table, tmp_path / "out", share=0.2)
    assert not (tmp_path / "out").exists()
