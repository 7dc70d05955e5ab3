"""Configurations that would end in their first step are refused before anything begins."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from search_spaces.written import space_from
from trainables.config import STEM_CHANNELS, ConfigError, build_config, cannot_run
from trainables.data.manifest import read_manifest
from trainables.losses import sample_losses
from trainables.network.model import PLANES, configured_network
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import ablation_spec
from tune_app.driver.cohorts import check_folds
from tune_app.driver.run import run_study
from tune_app.driver.single_run import train_once
from tune_app.study.errors import SpecError
from tune_app.study.spec import build_spec, refuse_what_cannot_run
from tune_app.synthetic import write_cohort

QUIET = Console(quiet=True)


def step_on_meta(config: Any) -> str | None:
    """torch's error for one training step of `config` on the meta device; None where the step succeeds."""
    try:
        with torch.device("meta"):
            network = configured_network(config)
            network.train()
            volumes = torch.empty(config.batch_size, config.in_channels, *config.volume_shape)
            labels = torch.zeros(config.batch_size, dtype=torch.long)
            losses = sample_losses(
                network(volumes),
                labels,
                loss="cross_entropy",
                margins=None,
                s=1.0,
                focal_gamma=2.0,
            )
            losses.sum().backward()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
@pytest.mark.parametrize("shape", [8, 16, 28, 32, 33, (33, 8, 8), (8, 9, 8)])
def test_the_rule_says_what_a_step_on_the_meta_device_does(geometry: str, shape: Any) -> None:
    for batch, width in itertools.product((1, 2), (1 / 64, 1 / 65)):
        settings = {"batch_size": batch, "width": width, "depth": 10}
        config = build_config(settings | {"volume_shape": shape, "geometry": geometry})
        told, problems = step_on_meta(config), cannot_run(config)
        assert bool(problems) == (told is not None), (config, told, problems)
    assert PLANES[0] == STEM_CHANNELS


ALONE = {"batch_size": 1, "volume_shape": 28}
"""One value per channel in the last layer."""


@pytest.mark.parametrize(
    ("settings", "ranks", "gpu", "wrong"),
    [
        (ALONE, None, True, "batch_size=1 at volume_shape=28x28x28"),
        (ALONE | {"freeze_backbone_epochs": 60}, 1, False, None),
        (ALONE | {"freeze_backbone_epochs": 59}, 1, False, "batch_size=1"),
        (ALONE | {"sync_batchnorm": True}, 2, True, None),
        (ALONE | {"sync_batchnorm": True}, None, True, None),
        (ALONE | {"sync_batchnorm": True}, 1, True, "batch_size=1"),
        ({"sync_batchnorm": True}, 2, False, "sync_batchnorm=True over 2 ranks on the CPU"),
        ({"sync_batchnorm": True}, 1, False, None),
        ({"width": 0.01}, None, True, "width=0.01 leaves the stem no channel"),
        ({}, None, True, None),
    ],
)
def test_what_is_refused_and_what_is_not(
    settings: dict[str, Any], ranks: int | None, gpu: bool, wrong: str | None
) -> None:
    problems = cannot_run(build_config(settings), ranks=ranks, gpu=gpu)
    if wrong is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert wrong in problems[0]


def test_a_space_is_judged_by_its_corners() -> None:
    search: dict[str, Any] = {
        "search": {
            "geometry": ["dilated", "strided"],
            "batch_size": {"low": 1, "high": 8},
            "volume_shape": ["96x96x96", "28x28x28"],
            "freeze_backbone_epochs": [0, 60],
        }
    }
    (problem,) = space_from(search).cannot_run()
    assert "batch_size=1 at volume_shape=28x28x28, geometry=strided" in problem
    search["search"]["batch_size"]["low"] = 2
    assert space_from(search).cannot_run() == []
    spec = build_spec({"data": "t.csv", "space": {"search": {"batch_size": [1, 2]}}, "config": {"volume_shape": 28}})  # fmt: skip
    with pytest.raises(SpecError, match="a trial of this search may have batch_size=1"):
        refuse_what_cannot_run(spec)


def test_nothing_begins_that_cannot_run(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=8, side=(14, 18))
    settings = {"volume_shape": 16, "batch_size": 1, "depth": 10, "width": 0.125, "num_folds": 2}
    search = build_spec({"data": str(table), "config": settings, "cache": str(tmp_path / "cache")})
    variants: dict[str, Any] = {"one": {"batch_size": 1}, "two": {"batch_size": 2}}
    ablation = ablation_spec(
        table,
        variants,
        seeds=2,
        folds="all",
        config={k: v for k, v in settings.items() if k != "batch_size"},
    )
    for spec, who in ((search, "a trial of this search"), (ablation, "variant one")):
        with pytest.raises(
            SpecError, match=f"{who}.*batch_size=1 at .*set batch_size to 2"
        ) as error:
            run_study(spec, tmp_path / "study", console=QUIET, notes=QUIET)
        assert len(error.value.problems) == 1, "once for all folds and seeds"
        assert not (tmp_path / "study" / "study.json").exists()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="BatchNorm needs two"):
        train_once(
            build_config(settings),
            table,
            tmp_path / "run",
            tmp_path / "cache",
            gpu=False,
            multi_gpu=False,
            console=QUIET,
            notes=QUIET,
        )
    assert not (tmp_path / "run").exists()


def test_a_fold_that_the_table_does_not_have_is_refused_before_an_ablation(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=8, side=(14, 18))
    config = {"num_folds": 8, "batch_size": 2}
    spec = build_spec(
        {
            "data": str(table),
            "kind": "ablation",
            "config": config,
            "objective": next(iter(OBJECTIVES)),
            "planned": [{"variant": "mine", "overrides": {"fold": 7}}],
        }
    )
    with pytest.raises(SpecError, match=r"variant mine: num_folds=8: class \d has . subject"):
        check_folds(spec, read_manifest(table))
