"""The run as a whole: against a plain loop, against itself resumed, and in the collapse it exists to prevent."""

import copy
import gc
import io
import json
import math
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainables import step as step_module
from trainables.augment import augment_batch
from trainables.checkpoints import TrialFiles
from trainables.config import FineTuneConfig, build_config
from trainables.data.folds import Split
from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort
from trainables.diagnosis import diagnose
from trainables.finetune import (
    EpochResult,
    ResumeError,
    Run,
    finetune,
)
from trainables.losses import class_weights, ldam_margins
from trainables.metrics import score_metrics
from trainables.network.model import build_network
from trainables.saved_run import saved_run
from trainables.schedule import learning_rate_factor, rank_micro_batches, step_ends
from trainables.step import choose_precision

SIDE = 16
TIMES = {"epoch_s", "train_s", "validation_s", "volumes_per_s", "peak_memory_gib"}
TINY = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": SIDE,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.0,
    "epochs": 2,
    "drw_start_epoch": 2,
}


def ball_cohort(
    count: int, *, positive: int, side: int = SIDE, noise: float = 1.0, seed: int = 0
) -> Cohort:
    """Round balls (class 0) and flattened ones (class 1) in noise."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(count, dtype=np.int64)
    labels[rng.permutation(count)[:positive]] = 1
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
    volumes = rng.normal(0, noise, size=(count, 1, side, side, side))
    for row, label in enumerate(labels):
        stretch = np.array([1.0, 1.0, 2.2 if label else 1.0])[:, None, None, None]
        centre = rng.uniform(-0.15, 0.15, size=(3, 1, 1, 1))
        volumes[row, 0] += 2.0 * (np.sqrt((((grid - centre) * stretch) ** 2).sum(0)) < 0.6)
    recipe = Recipe.from_config(build_config({"volume_shape": side}))
    text = np.array([str(row) for row in range(count)])
    spacings = np.ones((count, 3))
    return Cohort(Path(), volumes.astype(np.float16), labels, text, tuple(text), spacings, recipe)  # type: ignore[arg-type]


def split_of(cohort: Cohort, *, every: int = 3) -> Split:
    rows = np.arange(len(cohort.labels))
    by_class = np.concatenate([rows[cohort.labels == label] for label in np.unique(cohort.labels)])
    val = np.sort(by_class[::every])
    return Split(np.setdiff1d(rows, val), val, rows[:0])


def measured(result: EpochResult) -> dict[str, Any]:
    """The row without what depends on the clock; NaN as text, so that rows compare."""
    kept = {key: value for key, value in result.metrics.items() if key not in TIMES}
    return {
        key: "nan" if isinstance(value, float) and math.isnan(value) else value
        for key, value in kept.items()
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_epoch_equals_the_plain_loop(optimizer: str) -> None:
    """Oracle: the textbook loop, unfused, with one backward a micro-batch and torch's own clipping and optimisers."""
    cohort = ball_cohort(
        21, positive=7
    )  # 14 train: 8 + 6, so the second step has a full and a partial micro-batch
    split = split_of(cohort)
    config = build_config(
        TINY
        | {
            "optimizer": optimizer,
            "augmentation_strength": 0,
            "flip_axes": "",
            "epochs": 1,
            "drw_start_epoch": 1,
            "loss": "ldam",
            "head": "cosine",
            "weight_decay": 1e-2,
        }
    )
    assert len(split.train) % 8 not in (0, 4)
    run = Run(config, cohort, split, torch.device("cpu"))
    reference = build_network(
        depth=10,
        width=0.125,
        geometry="strided",
        head="cosine",
        num_classes=2,
        in_channels=1,
        dropout=0.0,
    )
    reference.load_state_dict(run.network.state_dict())
    run.train_one_epoch(None)

    kinds = {
        "sgd": lambda groups: torch.optim.SGD(
            groups, momentum=0.9, nesterov=True, weight_decay=1e-2
        ),
        "adam": lambda groups: torch.optim.Adam(groups, weight_decay=1e-2),
        "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=1e-2),
    }
    head = list(reference.head.parameters())
    plain = kinds[optimizer](
        [
            {"params": list(reference.backbone.parameters()), "lr": 1e-4},
            {"params": head, "lr": 1e-3},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        plain, lambda step: 0.5 * (1 + math.cos(math.pi * step / 2))
    )
    counts = np.bincount(cohort.labels[split.train])
    margins, weights = ldam_margins(counts, 0.2), class_weights(counts, 0.9999)
    order = split.train[np.random.default_rng((0, 1)).permutation(len(split.train))]
    reference.train()
    for start in (0, 8):
        step = order[start : start + 8]
        plain.zero_grad()
        for begin in (0, 4):
            rows = step[begin : begin + 4]
            logits = reference(torch.from_numpy(cohort.volumes[rows].astype(np.float32)))
            labels = torch.from_numpy(cohort.labels[rows])
            shifted = 15 * (
                logits - margins[labels][:, None] * torch.nn.functional.one_hot(labels, 2)
            )
            losses = torch.nn.functional.cross_entropy(shifted, labels, reduction="none")
            ((weights[labels] * losses).sum() / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        schedule.step()
    ours = dict(run.network.named_parameters())
    for name, value in reference.named_parameters():
        torch.testing.assert_close(
            ours[name],
            value,
            rtol=2e-3,
            atol=3e-6,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


def test_the_clip_threshold_is_in_true_units_whatever_the_loss_scale() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    config = build_config(TINY | {"epochs": 1, "optimizer": "sgd", "grad_clip": 0.5})
    weights = []
    for scale in (1.0, 1024.0):  # a power of two: scaling is exact
        run = Run(config, cohort, split, torch.device("cpu"))
        run.step.loss_scale.fill_(scale)
        row = run.train_one_epoch(None)
        assert row["clipped_share"] > 0, "nothing was clipped, so the test shows nothing"
        weights.append(torch.cat([p.detach().flatten() for p in run.network.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    cohort.volumes[split.train[0]] = np.nan
    config = build_config(
        TINY | {"epochs": 1, "batch_size": len(split.train), "gradient_accumulation_steps": 1}
    )
    run = Run(config, cohort, split, torch.device("cpu"))
    before = {
        key: value.clone()
        for key, value in run.network.state_dict().items()
        if value.is_floating_point()
    }
    row = run.train_one_epoch(None)
    assert (row["skipped_updates"], row["updates"]) == (1, 0)
    assert math.isnan(row["train_loss"])
    for key, value in before.items():
        assert torch.equal(run.network.state_dict()[key], value), key
        assert torch.equal(run.average.network.state_dict()[key], value), key


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit() -> None:
    cohort = ball_cohort(24, positive=8)
    split = split_of(cohort)
    config = build_config(
        TINY | {"epochs": 4, "dropout": 0.4, "drw_start_epoch": 3, "freeze_backbone_epochs": 1}
    )
    whole = list(finetune(config, cohort, split))
    first = finetune(config, cohort, split)
    next(first)
    saved = io.BytesIO()
    torch.save(next(first).state(), saved)
    assert isinstance(first, Generator)
    first.close()
    torch.manual_seed(999)  # whatever the process did in between
    torch.rand(7)
    saved.seek(0)
    rest = list(finetune(config, cohort, split, resume=torch.load(saved, weights_only=True)))
    assert [result.epoch for result in rest] == [3, 4]
    assert [measured(result) for result in rest] == [measured(result) for result in whole[2:]]
    for part in ("network", "average"):
        ours, theirs = rest[-1].state()[part], whole[-1].state()[part]
        ours, theirs = ours.get("network", ours), theirs.get("network", theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row["epoch"] for row in rest[-1].state()["rows"]] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    runs = [
        [
            measured(result)
            for result in finetune(build_config(TINY | {"seed": seed}), cohort, split)
        ]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_checkpoint_of_another_run_is_refused() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    state = next(finetune(build_config(TINY), cohort, split)).state()
    with pytest.raises(ResumeError, match=r"another configuration \(max_m: 0.2 -> 0.3\)"):
        next(finetune(build_config(TINY | {"max_m": 0.3}), cohort, split, resume=state))
    other = Split(split.train[1:], split.val, split.test)
    with pytest.raises(ResumeError, match="other rows"):
        next(finetune(build_config(TINY), cohort, other, resume=state))
    with pytest.raises(ResumeError, match="format 99"):
        next(finetune(build_config(TINY), cohort, split, resume=state | {"format": 99}))


def test_a_folder_of_another_run_is_refused_before_anything_is_told_or_written(
    tmp_path: Path,
) -> None:
    """`medtune train` into an old folder printed that run's epochs, and left the new config.json next to its checkpoint."""
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    files = TrialFiles(tmp_path)

    def rows_of(config: FineTuneConfig) -> list[dict[str, Any]]:
        return list(
            saved_run(config, files, lambda resume: finetune(config, cohort, split, resume=resume))
        )

    config = build_config(TINY | {"epochs": 1})
    assert len(rows_of(config)) == 1
    with pytest.raises(ResumeError, match="another configuration"):
        next(saved_run(build_config(TINY | {"max_m": 0.3}), files, lambda resume: iter(())))
    assert json.loads(files.config.read_text()) == config.model_dump(mode="json")
    assert len(rows_of(config)) == 1


def test_frozen_stages_keep_weights_and_statistics_and_thaw_in_order() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    config = build_config(
        TINY | {"epochs": 4, "freeze_backbone_epochs": 1, "unfreeze_stage_epochs": 1}
    )
    run = Run(config, cohort, split, torch.device("cpu"))

    def backbone() -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in run.network.backbone.state_dict().items()}

    start = backbone()
    assert run.train_one_epoch(None)["frozen_stages"] == 5
    assert all(torch.equal(start[key], value) for key, value in backbone().items())
    assert run.train_one_epoch(None)["frozen_stages"] == 4
    moved = {
        key.split(".")[0] for key, value in backbone().items() if not torch.equal(start[key], value)
    }
    assert moved == {"layer4"}
    run.train_one_epoch(None)
    moved = {
        key.split(".")[0] for key, value in backbone().items() if not torch.equal(start[key], value)
    }
    assert moved == {"layer3", "layer4"}


def test_eight_volumes_are_overfitted() -> None:
    cohort = ball_cohort(8, positive=3, noise=1.5)
    rows = np.arange(8)
    config = build_config(
        TINY
        | {
            "epochs": 25,
            "backbone_lr": 3e-3,
            "classifier_lr": 3e-3,
            "augmentation_strength": 0,
            "flip_axes": "",
        }
        | {"drw_start_epoch": 99, "width": 0.25}
    )
    *_, last = finetune(config, cohort, Split(rows, rows, rows[:0]))
    assert last.metrics["train_auc"] == 1.0
    assert last.metrics["val_auc_raw"] == 1.0


@pytest.mark.slow
def test_shuffled_labels_score_chance() -> None:
    cohort = ball_cohort(150, positive=60)
    np.random.default_rng(7).shuffle(cohort.labels)
    split = split_of(cohort, every=2)
    config = build_config(TINY | {"epochs": 4, "backbone_lr": 1e-3, "batch_size": 8})
    *_, last = finetune(config, cohort, split)
    for weights in ("raw", "ema"):
        low, high = last.metrics[f"val_auc_{weights}_low"], last.metrics[f"val_auc_{weights}_high"]
        assert low < 0.5 < high


def test_the_scale_of_the_loss_stays_when_the_class_weights_begin() -> None:
    """Divided by samples, weights that sum to the number of classes shrink it: to .36 at 180 and 20 samples."""
    cohort = ball_cohort(40, positive=6)
    split = split_of(cohort)
    config = build_config(TINY | {"epochs": 2, "drw_start_epoch": 2, "backbone_lr": 1e-6})
    counts = np.bincount(cohort.labels[split.train])
    factors = {}
    for rules in (1, 2):
        rows = [result.metrics for result in finetune(config, cohort, split, rules=rules)]
        assert rows[0]["drw_loss_factor"] == pytest.approx(1)
        factors[rules] = rows[1]["drw_loss_factor"]
    weights = class_weights(counts, config.drw_beta, mean_over="classes").numpy()
    shrunk = np.average(weights, weights=counts)
    assert shrunk < 0.7
    assert factors[1] == pytest.approx(factors[2] * shrunk, rel=1e-3)


def test_augmentation_knows_the_spacing_of_the_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """At (1, 1, 3) mm a rotation in voxels of 15 degrees tilts the content by 39."""
    seen = []

    def spy(volumes: Any, *, spacing: Any, **given: Any) -> Any:
        seen.append(tuple(spacing))
        return augment_batch(volumes, spacing=spacing, **given)

    monkeypatch.setattr(step_module, "augment_batch", spy)
    cohort = ball_cohort(16, positive=6)
    for spacing, rules in [((1.0, 1.0, 3.0), 2), (None, 2), ((1.0, 1.0, 3.0), 1)]:
        config = build_config(TINY | {"epochs": 1, "spacing_mm": spacing})
        list(finetune(config, cohort, split_of(cohort), rules=rules))
    cubes = (1.0, 1.0, 1.0)
    assert list(dict.fromkeys(seen)) == [(1.0, 1.0, 3.0), cubes]
    assert seen[-1] == cubes


def test_a_run_of_earlier_rules_goes_on_by_them() -> None:
    cohort = ball_cohort(24, positive=6)
    split = split_of(cohort)
    config = build_config(TINY | {"epochs": 3, "drw_start_epoch": 2})
    *_, whole = finetune(config, cohort, split, rules=1)
    begun = finetune(config, cohort, split, rules=1)
    state = next(begun).state()
    assert state["format"] == 1
    *_, resumed = finetune(config, cohort, split, resume=state)
    assert resumed.state()["format"] == 1
    for name, value in whole.state()["network"].items():
        assert torch.equal(resumed.state()["network"][name], value), name


def test_a_row_tells_what_the_document_says_to_watch() -> None:
    cohort = ball_cohort(16, positive=6)
    results = list(finetune(build_config(TINY), cohort, split_of(cohort)))
    assert [result.metrics["drw_active"] for result in results] == [False, True]
    for result in results:
        row = result.metrics
        assert row["lr_classifier"] == pytest.approx(10 * row["lr_backbone"])
        assert row["val_auc"] == row["val_auc_ema"]
        assert row["val_auc_low"] <= row["val_auc"] <= row["val_auc_high"]
        assert all(isinstance(value, (bool, int, float, str)) for value in row.values())


def test_validation_scores_are_those_of_the_saved_average() -> None:
    cohort = ball_cohort(16, positive=6)
    split = split_of(cohort)
    config = build_config(TINY)
    *_, last = finetune(config, cohort, split)
    network = build_network(
        depth=10,
        width=0.125,
        geometry="strided",
        head="cosine",
        num_classes=2,
        in_channels=1,
        dropout=0.0,
    ).eval()
    network.load_state_dict(last.state()["average"]["network"])
    with torch.no_grad():
        logits = network(torch.from_numpy(cohort.volumes[split.val].astype(np.float32)))
    expected = score_metrics(logits, cohort.labels[split.val], scale=15.0)
    assert last.metrics["val_auc"] == pytest.approx(expected["auc"], abs=1e-12)
    assert last.metrics["val_brier_ema"] == pytest.approx(expected["brier"], abs=1e-5)


@pytest.mark.parametrize(("count", "world"), [(12, 1), (13, 2), (5, 3), (6, 4), (24, 2), (9, 2)])
def test_micro_batches_of_all_ranks_are_those_of_one(count: int, world: int) -> None:
    rows = np.arange(count)
    alone = rank_micro_batches(rows, 4, 0, 1)
    ranks = [rank_micro_batches(rows, 4, rank, world) for rank in range(world)]
    assert len({len(chunks) for chunks in ranks}) == 1, (
        "a rank with fewer micro-batches would leave the others waiting"
    )
    interleaved = [chunk for turn in zip(*ranks, strict=True) for chunk in turn]
    assert [list(chunk) for chunk in interleaved if len(chunk)] == [list(chunk) for chunk in alone]
    assert [row for chunk in alone for row in chunk] == list(rows)
    assert min(len(chunk) for chunk in alone) > 1


@pytest.mark.parametrize("count", range(2, 40))
def test_no_step_and_no_micro_batch_is_a_single_volume(count: int) -> None:
    """BatchNorm raises on one value per channel: a 32-voxel volume leaves just one in layer 4."""
    ends = step_ends(count, 12, 6)
    assert ends[-1] == count
    sizes = np.diff(ends, prepend=0)
    assert min(sizes) > 1
    assert max(sizes) <= 13
    assert step_ends(25, 2, 1)[-1] == 25


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [
        learning_rate_factor(step, total=100, warmup=10, scheduler="cosine") for step in range(101)
    ]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert learning_rate_factor(70, total=100, warmup=10, scheduler="constant") == 1.0
    # the document's figures: rate left when DRW begins at epoch 15 and at 25 of 60
    assert learning_rate_factor(15, total=60, warmup=0, scheduler="cosine") == pytest.approx(
        0.85, abs=0.01
    )
    assert learning_rate_factor(25, total=60, warmup=0, scheduler="cosine") == pytest.approx(
        0.63, abs=0.01
    )


@pytest.mark.parametrize(
    ("amp", "device", "dtype"),
    [
        ("off", "cuda", torch.float32),
        ("fp16", "cpu", torch.float32),
        ("fp16", "cuda", torch.float16),
        ("bf16", "cuda", torch.bfloat16),
    ],
)
def test_the_precision_is_chosen_once_with_a_reason(
    amp: str, device: str, dtype: torch.dtype
) -> None:
    chosen = choose_precision(amp, torch.device(device))
    assert chosen.dtype is dtype
    assert chosen.reason


BEFORE = {
    "depth": 10,
    "width": 0.5,
    "volume_shape": 20,
    "head": "linear",
    "max_m": 0.3,
    "s": 20.0,
    "grad_clip": 0.5,
    "backbone_lr": 2e-3,
    "classifier_lr": 2e-3,
    "batch_size": 6,
    "gradient_accumulation_steps": 1,
    "epochs": 8,
    "drw_start_epoch": 99,
    "dropout": 0.0,
    "scheduler": "constant",
    "augmentation_strength": 0.5,
}


def collapse_run(**averaging: object) -> tuple[FineTuneConfig, list[dict[str, Any]]]:
    cohort = ball_cohort(120, positive=36, side=20)
    config = build_config(BEFORE | averaging)
    return config, [
        result.metrics for result in finetune(config, cohort, split_of(cohort, every=4))
    ]


@pytest.mark.slow
def test_the_collapse_sits_in_the_averaged_weights_and_is_named() -> None:
    """facts, section 1: decay .999 without warm-up on copied BatchNorm statistics, while the raw network is fine."""
    config, rows = collapse_run(ema_decay=0.999, ema_warmup=False, ema_buffers="copied")
    assert all(row["val_auc_raw"] > 0.85 for row in rows[1:])
    assert all(not row["val_auc_ema"] > 0.7 for row in rows[-4:])
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "ema_lag"
    assert "ema_warmup" in diagnosis.advice


@pytest.mark.slow
def test_the_default_average_does_not_collapse() -> None:
    config, rows = collapse_run()
    assert all(row["val_auc_ema"] > 0.8 for row in rows[2:])
    assert diagnose(rows, config).verdict not in ("ema_lag", "collapsed", "non_finite")


GPU_RUN = {
    "depth": 10,
    "width": 0.25,
    "volume_shape": 64,  # at 32, BatchNorm of layer 4 sees one value a volume, and rounding grows without bound
    "backbone_lr": 1e-5,
    "classifier_lr": 1e-4,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "epochs": 4,
    "drw_start_epoch": 3,
    "freeze_backbone_epochs": 1,
    "dropout": 0.4,
}


def gpu_trajectory(
    settings: dict[str, Any], *, graphs: bool, at_once: int | None = None
) -> tuple[np.ndarray, Run]:
    """Losses of all steps: 6 full ones and a partial one an epoch; stages thaw in epoch 2, DRW begins in epoch 3."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cohort = ball_cohort(81, positive=30, side=64)
    split = split_of(cohort)
    run = Run(build_config(GPU_RUN | settings), cohort, split, torch.device("cuda"), graphs=graphs)
    if at_once is not None:
        run.step.at_once = at_once
    losses = []
    for _ in range(4):
        run.epoch += 1
        losses.append(run.train_part().losses_S)
    return np.concatenate(losses), run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 2e-3), ("fp16", 3e-2)])
def test_captured_steps_equal_eager_ones_through_thawing_reweighting_and_partial_steps(
    optimizer: str, amp: str, tolerance: float
) -> None:
    """Same draws, so the same losses; rounding differs by the order of atomic sums and grows with the steps."""
    settings: dict[str, Any] = {"optimizer": optimizer, "amp": amp}
    eager, _ = gpu_trajectory(settings, graphs=False)
    captured, run = gpu_trajectory(settings, graphs=True)
    assert run.step.graph is not None
    np.testing.assert_allclose(captured, eager, rtol=tolerance)
    skipped = len(captured) - int(run.average.updates)
    assert skipped <= (3 if amp == "fp16" else 0), (
        "the loss scale starts high and halves until it fits"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_micro_batches_together_equal_one_after_the_other_on_a_gpu() -> None:
    settings: dict[str, Any] = {
        "amp": "off",
        "dropout": 0.0,
        "augmentation_strength": 0,
        "flip_axes": "",
    }
    apart, _ = gpu_trajectory(settings, graphs=False, at_once=1)
    together, run = gpu_trajectory(settings, graphs=True, at_once=2)
    assert max(part.groups for parts in run.step.passes.values() for part in parts) == 2
    np.testing.assert_allclose(together, apart, rtol=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_that_follow_each_other_hold_no_more_memory_than_the_first() -> None:
    cohort = ball_cohort(81, positive=30, side=64)
    config = build_config(GPU_RUN | {"volume_shape": 64})
    reserved, allocated = [], []
    for _ in range(3):
        deque(finetune(config, cohort, split_of(cohort), device="cuda"), maxlen=0)
        gc.collect()
        reserved.append(torch.cuda.memory_reserved())
        allocated.append(torch.cuda.memory_allocated())
    assert max(reserved) <= 1.1 * reserved[0]
    assert allocated[0] == allocated[1] == allocated[2], (
        "such as cuBLAS's workspace for another stream"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_deterministic_run_on_a_gpu_repeats_itself_and_goes_on_bit_for_bit(amp: str) -> None:
    cohort = ball_cohort(81, positive=30, side=64)
    config = build_config(GPU_RUN | {"amp": amp, "deterministic": True, "volume_shape": 64})
    split = split_of(cohort)
    try:
        first = list(finetune(config, cohort, split, device="cuda"))
        states = [
            (result, copy.deepcopy(result.state()))
            for result in finetune(config, cohort, split, device="cuda")
        ]
        went_on = list(finetune(config, cohort, split, device="cuda", resume=states[1][1]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [measured(result) for result in first] == [measured(result) for result, _ in states]
    assert [measured(result) for result in went_on] == [
        measured(result) for result, _ in states[2:]
    ]
    last, again = states[-1][1], went_on[-1].state()
    for mine, other in (
        (last["network"], again["network"]),
        (last["average"]["network"], again["average"]["network"]),
    ):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
