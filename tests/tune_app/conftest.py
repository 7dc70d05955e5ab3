"""A study directory as a driver leaves it, in milliseconds: synthetic curves, real policy, real files."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Browser, chromium
from optuna.distributions import CategoricalDistribution, IntDistribution

from search_spaces.fixes import all_fixes, baseline
from trainables.checkpoints import write_json
from trainables.config import build_config
from trainables.diagnosis import expected_error
from tune_app.driver.recorder import Recorder
from tune_app.study.columns import METRICS
from tune_app.study.files import StudyFiles
from tune_app.study.policy import Policy, stop_reason
from tune_app.study.policy_spec import FORMER_DEFAULTS, watching_only
from tune_app.study.spec import build_spec

POSITIVE, NEGATIVE = 28, 70
CREATED = 1_780_000_000.0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with a fresh profile."""
    with chromium(tmp_path_factory.mktemp("chromium")) as window:
        yield window


@pytest.fixture(scope="session")
def a_search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose trials completed, were stopped both ways, and failed. Only to be read."""
    return make_study(
        tmp_path_factory.mktemp("studies") / "a search", trials=20, epochs=20, failed=(5,)
    )


@pytest.fixture(scope="session")
def an_ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document's five variants over three folds and two seeds; reduced LDAM matters, and so do all fixes together."""
    chosen: dict[str, dict[str, Any]] = {
        "baseline": {},
        "only-reduced-ldam": {},
        "only-delayed-drw": {},
        "combined": {},
    }
    root = tmp_path_factory.mktemp("studies") / "an ablation"
    effect = {"only-reduced-ldam": 0.03, "combined": 0.06}
    return make_study(
        root, kind="ablation", planned=plan(chosen, seeds=2, folds=3), epochs=6, effect=effect
    )


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a study and returns its folder; see `make_study`."""

    def write(name: str = "adrenal, fold 0 & more", variants: Any = None, **options: Any) -> Path:
        if variants is not None:
            options |= {"planned": plan(variants, options.pop("seeds", 1), options.pop("folds", 1))}
            options.setdefault("kind", "ablation")
        return make_study(tmp_path / name, **options)

    return write


def make_study(
    root: Path,
    *,
    kind: str = "search",
    trials: int = 24,
    epochs: int = 30,
    seed: int = 0,
    planned: list[dict[str, Any]] | None = None,
    unfinished: int = 0,
    failed: tuple[int, ...] = (),
    policy: bool = True,
    effect: Mapping[str, float] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Path:
    """Write a study to `root`: `unfinished` of its last trials are left running, `failed` ones fail after two epochs.

    The curves follow from the hyperparameters (averages that lag, collapses after DRW, noise of the class counts);
    `effect` adds to the level of a variant. Which trials stop, and when, is decided by the real policy.
    """
    files = StudyFiles(root)
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {
        "data": "/data/adrenal/table.csv",
        "kind": kind,
        "trials": trials,
        "seed": seed,
    }
    fields |= {"config": {"epochs": epochs, "depth": 10, "volume_shape": 28}}
    fields |= {"space": SPACE} if kind == "search" else {"planned": planned}
    fields["policy"] = dict(
        FORMER_DEFAULTS
    )  # several rungs, finalists and the guard: all there is to show
    checked = build_spec(fields | dict(spec or {}))
    files.root.mkdir(parents=True)
    files.write(
        {
            "spec": checked.model_dump(mode="json"),
            "cohort": "9f2c5e",
            "created": CREATED,
            "versions": {
                "medtune": "0.1.0",
                "torch": "2.13.0",
                "optuna": "5.0.0",
                "python": "3.11.7",
            },
            "hardware": {
                "host": "gpu-01",
                "resources": {"CPU": 16.0, "GPU": 4.0, "memory": 1.2e11},
            },
        }
    )
    running: dict[str, _Run] = {}
    for number in range(checked.num_trials):
        variant: str | None = None
        if kind == "search":
            overrides = _sample(number, checked, rng)
        else:
            variant, overrides = (
                checked.planned[number].variant,
                dict(checked.planned[number].overrides),
            )
        extra = (effect or {}).get(variant or "", 0.0)
        running[f"{number:05d}"] = _Run(
            f"{number:05d}", variant, overrides, checked.config, rng, extra
        )
    _drive(files, checked, running, unfinished, failed, policy)
    return root


class _Run:
    """One trial's curves, an epoch at a time."""

    def __init__(
        self,
        trial: str,
        variant: str | None,
        overrides: dict[str, Any],
        base: Mapping[str, Any],
        rng: Any,
        extra: float,
    ) -> None:
        self.trial, self.variant, self.overrides = trial, variant, overrides
        self.config = build_config({**base, **overrides})
        c = self.config
        distance = abs(math.log10(c.backbone_lr / 1.2e-4)) + 0.7 * abs(
            math.log10(c.classifier_lr / 1e-3)
        )
        distance += 1.5 * abs(c.max_m - 0.2) + 0.02 * abs(c.s - 15)
        self.level = 0.9 - 0.07 * distance + rng.normal(0, 0.008) + extra
        self.speed = rng.uniform(0.1, 0.25) * c.epochs / 6
        self.lags = not c.ema_warmup and c.ema_decay > 0.997
        self.collapses = c.backbone_lr > 6e-4 and c.drw_start_epoch < c.epochs / 2
        self.dips = rng.random() < 0.2
        self.rng = np.random.default_rng([int(trial), c.seed, c.fold, 7])
        self.epoch = 0
        self.clock = CREATED + 20.0 * int(trial)

    def row(self) -> dict[str, Any]:
        self.epoch += 1
        c, epoch, rng = self.config, self.epoch, self.rng
        raw = 0.5 + (self.level - 0.5) * (1 - math.exp(-epoch / self.speed)) + rng.normal(0, 0.012)
        ema = (
            0.5
            + (self.level + 0.008 - 0.5) * (1 - math.exp(-epoch / (self.speed * 1.3)))
            + rng.normal(0, 0.004)
        )
        if self.dips and rng.random() < 0.08:
            raw -= 0.2
        if self.collapses and epoch > c.drw_start_epoch + 1:
            raw, ema = 0.55 + rng.normal(0, 0.02), 0.53 + rng.normal(0, 0.01)
        if self.lags:
            ema = 0.5 + rng.normal(0, 0.03)
        progress = epoch / c.epochs
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        active = epoch >= c.drw_start_epoch
        row: dict[str, Any] = dict.fromkeys(METRICS)
        row |= {
            "epoch": epoch,
            "updates": 20 * epoch,
            "skipped_updates": int(epoch == 1),
            "train_loss": c.s * (0.08 + 0.25 * math.exp(-epoch / 8)) * (1.3 if active else 1)
            + rng.normal(0, 0.05),
            "train_auc": min(1.0, raw + 0.04 + 0.05 * progress),
            "lr_backbone": c.backbone_lr * factor,
            "lr_classifier": c.classifier_lr * factor,
            "drw_active": active,
            "frozen_stages": 0,
            "grad_norm": 2.0 + rng.normal(0, 0.1),
            "grad_norm_max": 5.0,
            "clipped_share": 0.9,
            "val_positive": POSITIVE,
            "val_negative": NEGATIVE,
            "precision": "fp16",
            "epoch_s": 12.0 + rng.normal(0, 0.3),
            "train_s": 10.0,
            "validation_s": 2.0,
            "volumes_per_s": 90.0,
            "peak_memory_gib": 2.1,
        }
        for weights, auc in (("raw", raw), ("ema", ema)):
            auc = min(max(auc, 0.3), 0.995)
            half = 1.96 * expected_error(auc, POSITIVE, NEGATIVE)
            scores = {
                "auc": auc,
                "auprc": auc - 0.1,
                "accuracy": auc - 0.02,
                "balanced_accuracy": auc - 0.06,
            }
            scores |= {
                "balanced_accuracy_best": auc - 0.03,
                "threshold": 0.4,
                "sensitivity_at_90_specificity": auc - 0.2,
            }
            scores |= {
                "brier": 0.3 - 0.2 * auc,
                "ece": 0.08,
                "tied": 0.0,
                "auc_probability": auc,
                "logit_gap": 6.0,
            }
            row |= {
                f"val_{name}_{weights}": value
                for name, value in (scores | {"nonfinite": 0.0}).items()
            }
            row |= {
                f"val_auc_{weights}_low": max(auc - half, 0.0),
                f"val_auc_{weights}_high": min(auc + half, 1.0),
            }
        row |= {f"val_auc{end}": row[f"val_auc_ema{end}"] for end in ("", "_low", "_high")}
        self.clock += row["epoch_s"]
        return {"trial": self.trial, "time": self.clock, **row}


def _drive(
    files: StudyFiles,
    spec: Any,
    runs: dict[str, _Run],
    unfinished: int,
    failed: tuple[int, ...],
    policy: bool,
) -> None:
    """Four trials at a time, rows in turn, written as a driver writes them."""
    policy_spec = spec.policy if spec.kind == "search" else watching_only(spec.policy)
    judge = Policy(policy_spec, spec.epochs) if policy else None
    waiting, left = list(runs.values()), set(list(runs)[len(runs) - unfinished :])
    active: list[_Run] = []
    now = CREATED
    recorder = Recorder(spec, files, clock=lambda: now)
    while waiting or active:
        while waiting and len(active) < 4:
            run = waiting.pop(0)
            now = run.clock = max([run.clock, *(other.clock for other in active)])
            write_json(files.trial(run.trial).config, run.config.model_dump(mode="json"))
            files.trial(run.trial).checkpoint.write_bytes(b"")
            node = f"gpu-0{int(run.trial) % 3}"
            recorder.began(run.trial, run.overrides, run.variant, node=node, gpus=1.0)
            active.append(run)
        for run in list(active):
            row = run.row()
            now = run.clock
            recorder.row(row)
            if run.trial in left and run.epoch >= 0.4 * spec.epochs:
                active.remove(run)
                continue
            decision = None
            if judge is not None:
                decision = judge.decide(run.trial, run.config.model_dump(mode="json"), row)
                recorder.decision(decision)
            if int(run.trial) in failed and run.epoch == 2:
                error = "CUDA error: \x1b[31mdevice-side assert\x1b[0m <script>"
                recorder.ended(run.trial, "failed", error, error=error)
            elif decision is not None and decision.stops:
                recorder.ended(run.trial, "stopped", stop_reason(decision))
            elif run.epoch >= run.config.epochs:
                recorder.ended(run.trial, "completed", "")
            else:
                continue
            active.remove(run)
    recorder.close()


SPACE: dict[str, Any] = {
    "base": "documented",
    "search": {
        "head": ["cosine", "linear"],
        "ema_warmup": [True, False],
        "ema_buffers": ["averaged", "copied"],
        "backbone_lr": {"low": 2e-5, "high": 1e-3, "log": True},
        "one_minus_ema_decay": {"low": 5e-4, "high": 2e-2, "log": True},
    },
}
"""The documented knobs, and those of the collapse: this space contains the document's settings before and after."""


def _sample(number: int, spec: Any, rng: Any) -> dict[str, Any]:
    if number < 2:
        return (baseline, all_fixes)[number](spec.epochs)
    space = spec.resolved_space()

    def suggest(parameter: Any) -> Any:
        if isinstance(parameter.distribution, CategoricalDistribution):
            return parameter.choices[
                rng.integers(len(parameter.choices)) if rng.random() < 0.5 else 0
            ]
        low, high = parameter.ends
        if isinstance(parameter.distribution, IntDistribution):
            return int(rng.integers(low, high + 1))
        if parameter.distribution.log:
            return float(10 ** rng.uniform(math.log10(low), math.log10(high)))
        return float(rng.uniform(low, high))

    return dict(space.sample_to_overrides(space.sample(suggest, spec.epochs), spec.epochs))


def plan(variants: Mapping[str, Mapping[str, Any]], seeds: int, folds: int) -> list[dict[str, Any]]:
    """Trials of an ablation or confirmation, as a study file holds them."""
    return [
        {"variant": name, "overrides": {**overrides, "fold": fold, "seed": seed}}
        for fold in range(folds)
        for seed in range(seeds)
        for name, overrides in variants.items()
    ]


# A study whose trials were really trained: seconds on one core ---------------------------------------------------------

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 3,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 2,
    "amp": "off",
    "backbone_lr": 1e-3,
    "drw_start_epoch": 3,
    "train_auc_volumes": 0,
}


@pytest.fixture(scope="session")
def trained_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained trials, the second on fold 1 with a linear head; next to it `cohort/table.csv`. Only to be read."""
    from trainables.checkpoints import TrialFiles
    from trainables.data.manifest import read_manifest
    from trainables.data.scans import Recipe
    from trainables.data.volumes import prepare_cohort
    from trainables.finetune import finetune
    from trainables.saved_run import open_inputs, saved_run
    from tune_app.synthetic import write_cohort

    root = tmp_path_factory.mktemp("trained") / "a small study"
    table = write_cohort(root.parent / "cohort", subjects=16, side=(14, 18), noise=0.3)
    cache = root.parent / "cache"
    spec = build_spec({"data": str(table), "trials": 2, "config": TINY, "cache": str(cache)})
    cohort_folder = prepare_cohort(
        read_manifest(table), Recipe.from_config(build_config(TINY)), cache
    )
    files = StudyFiles(root)
    files.write(
        {"spec": spec.model_dump(mode="json"), "cohort": cohort_folder.name, "created": CREATED}
    )
    recorder = Recorder(spec, files, clock=lambda: CREATED)
    trials: list[dict[str, Any]] = [
        {"s": 12.0},
        {"head": "linear", "seed": 1, "fold": 1, "dropout": 0.0},
    ]
    for number, overrides in enumerate(trials):
        trial = f"{number:05d}"
        config = build_config({**TINY, **overrides})
        cohort, split = open_inputs(config, table, cohort_folder)

        def epochs(resume: Any, run: Any = (config, cohort, split)) -> Any:
            return finetune(*run, resume=resume)

        recorder.began(trial, overrides, None, gpus=0.0)
        for row in saved_run(config, TrialFiles(files.trial(trial).folder), epochs):
            recorder.row({"trial": trial, "time": CREATED, **row})
        recorder.ended(trial, "completed", "")
    recorder.close()
    return root


@pytest.fixture(scope="session")
def exported_model(trained_study: Path) -> Path:
    """The first trial of `trained_study`, exported. Only to be read."""
    import torch

    from tune_app.models.export import export_model

    out = trained_study.parent / "model"
    export_model(trained_study, out, trial="0", device=torch.device("cpu"), say=lambda text: None)
    return out


@pytest.fixture(scope="session")
def exported_ensemble(trained_study: Path) -> Path:
    """Both trials of `trained_study`, of two folds, as one model. Only to be read."""
    import torch

    from tune_app.models.export import export_model

    out = trained_study.parent / "ensemble"
    export_model(trained_study, out, ensemble=2, device=torch.device("cpu"), say=lambda text: None)
    return out
