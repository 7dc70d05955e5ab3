"""Trials of a study -> the folder of a model that can be used elsewhere; and the chosen configuration trained on all.

What is exported is measured again first: the averaged weights score the validation volumes of their run, and unless
that gives the AUC that the study recorded, nothing is written. From these scores come the threshold, the calibration
and every number in the model card, so that a card never speaks of other weights than those beside it.
"""

import csv
import io
import json
import logging
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import util
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as save_tensors
from scipy.special import softmax
from torch import Tensor, nn

from trainables import installed_version
from trainables.checkpoints import TrialFiles, load_state, write_json
from trainables.config import FineTuneConfig, build_config
from trainables.data.manifest import Manifest, Split, read_manifest, split_rows
from trainables.data.scans import Recipe, read_header
from trainables.data.volumes import Cohort, open_cohort, prepare_cohort
from trainables.finetune import configured_network, finetune
from trainables.losses import logit_scale
from trainables.metrics import score_metrics
from trainables.network.model import Classifier
from trainables.saved_run import saved_run
from tune_app.compare import confirm
from tune_app.models.calibration import Array, Calibration, cross_fits, fit_calibration
from tune_app.models.card import model_card
from tune_app.models.folder import (
    Choice,
    Evaluation,
    HeldOut,
    Measured,
    Member,
    ModelInfo,
    Training,
    check_target,
    new_model,
)
from tune_app.models.predict import class_scores, decide, network_logits, on_device, pooled
from tune_app.results.study import Study, load_study
from tune_app.study.spec import StudyFiles, default_cache

BOOTSTRAPS = 500
"""Resamples of the subjects behind each bootstrap interval."""

AUC_TOLERANCE = {"float32": 0.005, "fp16": 0.02, "bf16": 0.02}
"""By how much the AUC at export, in float32, may differ from the study's, by the precision the study ran in."""

ONNX_TOLERANCE = 1e-3
"""Largest difference of a logit between ONNX Runtime and torch, as a share of the largest logit."""

RETRAIN_WATCHED = 8
"""Training volumes of each class whose AUC is shown while retraining."""

BATCH = 16
"""Volumes scored at a time."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

VERSIONS = ("medtune", "torch", "monai", "numpy", "nibabel", "safetensors")

Say = Callable[[str], None]


class ExportError(ValueError):
    """A model that cannot be made as asked. `problems` holds one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Chosen:
    """Which trials of a study make the model, and why these."""

    trials: pd.DataFrame
    """Their rows of `Study.trials`, best first."""
    epochs: int
    """Epochs after which their configuration was at its best: for training it anew without validation."""
    choice: Choice


def choose(
    study: Study, *, trial: str | None = None, confirmed: bool = False, ensemble: int | None = None
) -> Chosen:
    """Return the trials to export: one by its id, the best by the study's objective, or the `ensemble` best.

    `confirmed` looks only at the runs of the variant that the confirmation chose, and takes of them the one in the
    middle: the best of equal runs is merely lucky. Raises ExportError when there is no such trial, SpecError when
    `study` is no confirmation.
    """
    usable = study.trials[
        study.trials["best_checkpoint"].notna() & study.trials["objective"].notna()
    ]
    scored = len(usable)
    told = f"by the study's objective, {study.spec.objective}"

    def chosen(rows: pd.DataFrame, how: str, luck: str, epochs: float) -> Chosen:
        about = {"study": study.name, "kind": study.spec.kind, "objective": study.spec.objective}
        return Chosen(rows, math.ceil(epochs), Choice(**about, trials=scored, how=how, luck=luck))

    if trial is not None:
        rows = usable[usable["trial"] == (trial.zfill(5) if trial.isdigit() else trial)]
        if rows.empty:
            raise ExportError([_no_such(study, trial)])
        name = str(rows["trial"].iloc[0])
        luck = "whoever asked for this trial may have known its score"
        return chosen(rows, f"trial {name} was asked for by name", luck, rows["best_epoch"].iloc[0])

    usable = usable[usable["state"] != "failed"].sort_values(
        "objective", ascending=False, kind="stable"
    )
    how = f"of {scored} trials, the best {told}"
    luck = f"the trial was chosen on them as the best of {scored}"
    if confirmed:
        found = confirm.judge(study)
        if not found.finished:
            raise ExportError(
                [
                    f"{study.path}: the confirmation has not ended; `medtune resume {study.path}` goes on"
                ]
            )
        usable = usable[usable["variant"] == found.choice]
        how = f"variant {found.choice}, confirmed as better than the documented settings"
        if found.winner is None:
            how = "the documented settings: the confirmation could not tell any variant from them"
        how += f"; {len(usable)} runs on {usable['fold'].nunique()} fold(s) with {usable['seed'].nunique()} seed(s)"
        luck = "the run was not picked by its score"
    if usable.empty:
        raise ExportError([f"{study.path}: no trial has weights and a score yet"])
    if ensemble is not None and not 2 <= ensemble <= len(usable):
        raise ExportError(
            [
                f"--ensemble {ensemble}: 2 to {len(usable)} are possible, as many trials as have weights and a score"
            ]
        )
    if confirmed:
        epochs = statistics.median(usable["best_epoch"])
        if ensemble is not None:
            spread = usable.sort_values(["seed", "fold"], kind="stable").head(ensemble)
            return chosen(
                spread,
                f"{how}; {ensemble} of them together, over as many folds as there are",
                luck,
                epochs,
            )
        return chosen(
            usable.iloc[[(len(usable) - 1) // 2]],
            f"{how}; the run in the middle of them",
            luck,
            epochs,
        )
    if ensemble is not None:
        how = f"of {scored} trials, the best {ensemble} {told}, together"
        luck = f"the trials were chosen on them as the best {ensemble} of {scored}"
    return chosen(usable.head(ensemble or 1), how, luck, usable["best_epoch"].iloc[0])


def _no_such(study: Study, trial: str) -> str:
    known = study.trials[study.trials["best_checkpoint"].notna()]["trial"].tolist()
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"{study.path}: no trial {trial!r} with weights and a score; there are {shown or 'none'}"


def confirmation_of(root: Path) -> Path:
    """Return the folder of the confirmation that `root` is or holds."""
    inside = StudyFiles(root).confirmation
    return inside if StudyFiles(inside).spec.is_file() else root


# Export ----------------------------------------------------------------------------------------------------------------


def export_model(
    root: Path,
    out: Path,
    *,
    trial: str | None = None,
    confirmed: bool = False,
    ensemble: int | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    device: torch.device,
    onnx: bool = False,
    force: bool = False,
    say: Say = print,
) -> ModelInfo:
    """Write the chosen trials of the study in `root` as a model to the folder `out`; returns its model.json.

    `data`: the table, where it has moved since the study. `cache`: folder of prepared cohorts, else the study's. `force` replaces a model in `out`. Raises ExportError, ModelError, and the errors of study, table and volumes.
    """
    check_target(out, force=force)
    if onnx:
        require_onnx()
    study = load_study(confirmation_of(root) if confirmed else root)
    chosen = choose(study, trial=trial, confirmed=confirmed, ensemble=ensemble)
    if study.running:
        say(f"note: {study.name} is still running; a better trial may follow")
    runs = [_read_run(row) for _, row in chosen.trials.iterrows()]
    manifest, cohort = _open(runs[0].config, study, data, cache)
    members = [_measured(run, manifest, cohort, device, folder=_folder(run, runs)) for run in runs]
    for one in members:
        if one.member.trouble:
            say(f"note: trial {one.member.trial}: {one.member.trouble}")
    rows = np.unique(np.concatenate([one.split.val for one in members]))
    z_NC, scale = pooled(
        [one.member for one in members], np.stack([one.logits[rows] for one in members])
    )
    info = ModelInfo(
        kind="network" if len(members) == 1 else "ensemble",
        members=tuple(one.member for one in members),
        training=_training(
            manifest,
            cohort,
            np.unique(np.concatenate([one.split.train for one in members])),
            runs[0].config,
        ),
        **_judged(z_NC, scale, cohort, rows),
        **_common(study, cohort, runs[0].config, chosen),
    )
    scores = _scores_csv(rows, cohort.labels[rows], class_scores(z_NC, scale=scale))
    return _write(out, info, members, scores, cohort, onnx=onnx, force=force)


def _folder(run: "_Run", runs: Sequence["_Run"]) -> str:
    return "." if len(runs) == 1 else f"members/{run.trial}"


def _common(study: Study, cohort: Cohort, config: FineTuneConfig, chosen: Chosen) -> dict[str, Any]:
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "num_classes": config.num_classes,
        "preprocessing": asdict(cohort.recipe),
        "choice": chosen.choice,
        "test": _held_out(study, config),
        "versions": {name: installed_version(name) for name in VERSIONS},
    }


def _held_out(study: Study, config: FineTuneConfig) -> HeldOut | None:
    """The first record of the test rows that is of this configuration, fold and seed apart; test rows are not scored here."""
    search = Path(study.spec.confirms) if study.spec.confirms else study.path
    files = StudyFiles(search if search.is_dir() else study.path)
    if not files.test.is_file():
        return None
    setting = build_config({**config.model_dump(mode="json"), "fold": 0, "seed": 0}).hash()
    try:
        for record in json.loads(files.test.read_text(encoding="utf-8"))["scored"]:
            if record["config_hash"] == setting:
                return HeldOut(
                    when=time.strftime("%Y-%m-%d", time.gmtime(record["time"])),
                    runs=len(record["runs"]),
                    ensemble_auc=Measured(
                        value=record["auc"],
                        low=record["auc_low"],
                        high=record["auc_high"],
                        interval="DeLong",
                    ),
                    **{
                        name: record[name]
                        for name in HeldOut.model_fields.keys() - {"when", "runs", "ensemble_auc"}
                    },
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            [f"{files.test}: damaged ({' '.join(str(error).split())[:200]}); restore it"]
        ) from None
    return None


def _judged(z_NC: Array, scale: float, cohort: Cohort, rows: Array) -> dict[str, Any]:
    found = judge(z_NC, scale, cohort.labels[rows], cohort.subjects[rows])
    return {
        "threshold": found.threshold,
        "calibration": found.calibration,
        "validation": found.evaluation,
    }


@dataclass(frozen=True)
class _Run:
    """A trial and what its best.pt holds."""

    trial: str
    verdict: str | None
    verdict_summary: str | None
    config: FineTuneConfig
    epoch: int
    weights: dict[str, Tensor]
    train: Array
    val: Array
    row: dict[str, Any]


def _read_run(trial: pd.Series) -> _Run:
    path = str(trial["best_checkpoint"])
    try:
        state = load_state(Path(path))
        return _Run(
            trial=str(trial["trial"]),
            verdict=None if pd.isna(trial["verdict"]) else str(trial["verdict"]),
            verdict_summary=None
            if pd.isna(trial["verdict_summary"])
            else str(trial["verdict_summary"]),
            config=build_config(state["config"]),
            epoch=int(state["epoch"]),
            weights=state["average"]["network"],
            train=state["train_rows"].numpy(),
            val=state["val_rows"].numpy(),
            row=state["row"],
        )
    except (
        OSError,
        EOFError,
        RuntimeError,
        UnpicklingError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ExportError(
            [f"{path}: damaged or of another version ({' '.join(str(error).split())[:200]})"]
        ) from None


@dataclass(frozen=True, eq=False)
class _Member:
    """A network of the model, and how it scores the volumes it was validated on."""

    member: Member
    config: FineTuneConfig
    network: Classifier
    split: Split
    logits: Array
    """(N, C) of all rows of the cohort, NaN for those it was not asked to score."""


def _open(
    config: FineTuneConfig, study: Study, data: Path | None, cache: Path | None
) -> tuple[Manifest, Cohort]:
    manifest = read_manifest(data or Path(study.spec.data), num_classes=config.num_classes)
    folder = cache or Path(study.spec.cache or default_cache())
    return manifest, open_cohort(prepare_cohort(manifest, Recipe.from_config(config), folder))


def _network(
    config: FineTuneConfig, weights: dict[str, Tensor], device: torch.device
) -> Classifier:
    network = configured_network(config)
    network.load_state_dict(weights, strict=True)
    return on_device(network, device)


def _logits(
    network: Classifier, cohort: Cohort, rows: Array, classes: int, device: torch.device
) -> Array:
    """Logits (N, C) of the whole cohort, NaN but for `rows`."""
    found = np.full((len(cohort.labels), classes), np.nan)
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        found[chunk] = network_logits(
            network, torch.from_numpy(np.array(cohort.volumes[chunk])).float(), device
        )
    return found


def _measured(
    run: _Run, manifest: Manifest, cohort: Cohort, device: torch.device, *, folder: str
) -> _Member:
    """Score the run's validation volumes anew. Raises ExportError unless rows, recipe and AUC are those of the study."""
    trial, config = run.trial, run.config
    split = split_rows(
        manifest, fold=config.fold, num_folds=config.num_folds, cross_validate=config.cross_validate
    )
    if not (np.array_equal(split.train, run.train) and np.array_equal(split.val, run.val)):
        raise ExportError(
            [
                f"{manifest.table}: its rows or folds are not those trial {trial} had; name the study's table with --data"
            ]
        )
    if Recipe.from_config(config) != cohort.recipe:
        raise ExportError(
            [
                f"trial {trial}: prepares volumes otherwise than the first member; they cannot be one model"
            ]
        )
    network = _network(config, run.weights, device)
    logits = _logits(network, cohort, split.val, config.num_classes, device)
    scale = logit_scale(config.loss, config.head, config.s)
    labels = cohort.labels[split.val]
    if not np.isfinite(logits[split.val]).all():
        raise ExportError(
            [f"trial {trial}: its scores are not finite, it is of no use; choose another"]
        )
    auc = score_metrics(logits[split.val], labels, scale=scale)["auc"]
    recorded, precision = run.row["val_auc"], str(run.row["precision"])
    if not abs(auc - recorded) <= AUC_TOLERANCE[precision]:
        raise ExportError(
            [
                f"trial {trial}: its weights give validation AUC {auc:.4f}, the study recorded {recorded:.4f} ({precision}): "
                "the volumes, or how they are prepared, have changed since; export with the data of the study"
            ]
        )
    own = (manifest.rows["split"] == "val").any() and not config.cross_validate
    member = Member(
        folder=folder,
        trial=trial,
        epoch=run.epoch,
        scale=scale,
        validates="the table's val rows" if own else f"fold {config.fold}",
        seed=config.seed,
        precision=precision,
        verdict=run.verdict,
        verdict_summary=run.verdict_summary,
        study_auc=recorded,
        auc=auc,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        calibration=fit_calibration(scale * logits[split.val], labels),
    )
    return _Member(member, config, network, split, logits)


def _training(manifest: Manifest, cohort: Cohort, rows: Array, config: FineTuneConfig) -> Training:
    """What the volumes that were trained on look like; reads the headers of their files."""
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(read_header, [manifest.rows["path"].iloc[row] for row in rows]))
    spacings = np.array([header.spacing_mm for header in headers])
    extents = spacings * np.array([header.shape for header in headers])
    return Training(
        table=manifest.table.rpartition("/")[2],
        cohort=cohort.folder.name,
        volumes=len(rows),
        subjects=len(np.unique(cohort.subjects[rows])),
        classes=_class_counts(cohort.labels[rows], config.num_classes),
        spacing_low_mm=tuple(spacings.min(axis=0)),
        spacing_high_mm=tuple(spacings.max(axis=0)),
        extent_low_mm=tuple(extents.min(axis=0)),
        extent_high_mm=tuple(extents.max(axis=0)),
        unoriented=sum(not header.oriented for header in headers),
        pretrained=Path(config.pretrained_path).name if config.pretrained_path else None,
    )


def _class_counts(labels: Array, classes: int) -> tuple[int, ...]:
    return tuple(int(count) for count in np.bincount(labels, minlength=classes))


def _scores_csv(rows: Array, labels: Array, scores_NC: Array) -> str:
    """Scores of the validation volumes: enough to choose another threshold, and nothing that names a subject or a file."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "label", *[f"score_{c}" for c in range(scores_NC.shape[1])]])
    for row, label, scores in zip(rows, labels, scores_NC, strict=True):
        writer.writerow([int(row) + 1, int(label), *[f"{score:.9g}" for score in scores]])
    return stream.getvalue()


def _write(
    out: Path,
    info: ModelInfo,
    members: Sequence[_Member],
    scores: str,
    cohort: Cohort,
    *,
    onnx: bool,
    force: bool,
) -> ModelInfo:
    with new_model(out, force=force) as files:
        written = []
        for one in members:
            weights, member = files.weights(one.member.folder), one.member
            weights.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                name: tensor.cpu().clone().contiguous()
                for name, tensor in one.network.state_dict().items()
            }
            weights.write_bytes(save_tensors(tensors, {"format": "pt"}))
            # Only the name: where a checkpoint lay on this machine is nobody's business, and no part of the model.
            config = one.config.model_copy(update={"pretrained_path": info.training.pretrained})
            write_json(files.config(member.folder), config.model_dump(mode="json"))
            if onnx:
                sample = np.flatnonzero(np.isfinite(one.logits[:, 0]))[:4]
                volumes = torch.from_numpy(np.array(cohort.volumes[sample])).float()
                difference = write_onnx(
                    files.onnx(member.folder), one.config, tensors, member.scale, volumes
                )
                member = member.model_copy(update={"onnx_difference": difference})
            written.append(member)
        info = info.model_copy(update={"members": tuple(written)})
        write_json(files.info, info.model_dump(mode="json"))
        files.validation.write_text(scores, encoding="utf-8")
        files.card.write_text(model_card(info, [one.config for one in members]), encoding="utf-8")
    return info


def outcome_lines(info: ModelInfo, out: Path) -> list[str]:
    """Return what was written, in lines of at most 80 columns but for names."""
    auc = info.validation.metrics["auc"]
    lines = [f"model:     {out}", f"chosen:    {info.choice.how}"]
    value = "-" if auc.value is None else f"{auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
    if info.kind == "retrained":
        lines.append(
            f"trained:   {info.training.volumes} volumes, {info.members[0].epoch} epochs; not validated, none was left"
        )
        lines.append(f"before:    validation AUC {value}, of trial {info.members[0].trial}")
    else:
        lines.append(
            f"validated: AUC {value} on {info.validation.volumes} volumes that also chose it: optimistic"
        )
    if info.threshold is not None:
        lines.append(
            f"decides 1: score_1 >= {info.threshold:.4g}, which is probability_1 >= {info.threshold_calibrated:.4g}"
        )
    onnx = [one.onnx_difference for one in info.members if one.onnx_difference is not None]
    lines += [f"onnx:      differs from torch by at most {max(onnx):.2g}"] if onnx else []
    return [
        *lines,
        "not for clinical use; complete the data section of MODEL_CARD.md",
        f"next:      medtune predict {out} SCANS",
    ]


# What a model is worth -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What follows from scores of volumes whose class is known."""

    threshold: float | None
    calibration: Calibration
    evaluation: Evaluation


def judge(z_NC: Array, scale: float, labels_N: Array, subjects_N: Array) -> Judged:
    """Return the threshold with the best balanced accuracy, the calibration, and how the model does with both.

    Threshold and calibration are fitted on these very volumes. What they are worth on others is told beside, under
    names that end in `_unseen`: ten times, each on a tenth of the subjects, with both fitted on the others.
    """
    z_NC, classes = np.asarray(z_NC, dtype=np.float64), z_NC.shape[1]
    calibration = fit_calibration(scale * z_NC, labels_N)
    threshold = score_metrics(z_NC, labels_N, scale=scale)["threshold"] if classes == 2 else None
    log_odds = class_scores(z_NC, scale=scale)
    unseen_z, unseen_decisions = np.full_like(z_NC, np.nan), np.full(len(z_NC), -1)
    for fit, held_out in cross_fits(labels_N, subjects_N):
        unseen_z[held_out] = fit_calibration(scale * z_NC[fit], labels_N[fit]).logits(
            scale * z_NC[held_out]
        )
        best = (
            score_metrics(z_NC[fit], labels_N[fit], scale=scale)["threshold"]
            if classes == 2
            else None
        )
        unseen_decisions[held_out] = decide(
            log_odds[held_out], 0.0 if best is not None and math.isnan(best) else best
        )
    evaluation = evaluate(
        z_NC,
        scale,
        labels_N,
        subjects_N,
        threshold=threshold,
        calibration=calibration,
        unseen=(unseen_z, unseen_decisions) if np.isfinite(unseen_z).all() else None,
    )
    return Judged(threshold, calibration, evaluation)


def evaluate(
    z_NC: Array,
    scale: float,
    labels_N: Array,
    subjects_N: Array,
    *,
    threshold: float | None,
    calibration: Calibration,
    unseen: tuple[Array, Array] | None = None,
) -> Evaluation:
    """Return the metrics of scaled logits at a given threshold and calibration, with 95 % intervals.

    AUC: DeLong's. Shares of decisions (sensitivity, specificity, accuracy): Wilson's, taking volumes as independent.
    All others: percentiles over resamples of the subjects, whose volumes stay together. `unseen`: calibrated logits and
    decisions that were made for each volume without its subject.
    """
    classes = z_NC.shape[1]
    decisions = {"": decide(class_scores(z_NC, scale=scale), threshold)}
    calibrated = {"_uncalibrated": scale * z_NC, "": calibration.logits(scale * z_NC)}
    if unseen is not None:
        calibrated["_unseen"], decisions["_unseen"] = unseen

    errors = {name: _squared_errors(logits, labels_N) for name, logits in calibrated.items()}

    def resampled(rows: Array) -> dict[str, float]:
        plain = score_metrics(z_NC[rows], labels_N[rows], scale=scale)
        found = {name: plain[name] for name in ("auc", "auprc", "sensitivity_at_90_specificity")}
        for name, made in decisions.items():
            found[f"balanced_accuracy{name}"] = _balanced_accuracy(
                made[rows], labels_N[rows], classes
            )
        return found | {
            f"brier{name}": float(of_each[rows].mean()) for name, of_each in errors.items()
        }

    values = resampled(np.arange(len(labels_N)))
    low, high = _bootstrap(resampled, subjects_N)
    by_subject = {
        name: Measured(
            value=_known(value),
            low=_known(low[name]),
            high=_known(high[name]),
            interval="bootstrap over subjects",
        )
        for name, value in values.items()
    }
    plain = score_metrics(z_NC, labels_N, scale=scale)
    metrics = {
        "auc": Measured(
            value=_known(plain["auc"]),
            low=_known(plain["auc_low"]),
            high=_known(plain["auc_high"]),
            interval="DeLong",
        )
    }
    if len(np.unique(subjects_N)) < len(subjects_N):
        metrics["auc_by_subject"] = by_subject["auc"]
    metrics |= {name: by_subject[name] for name in ("auprc", "sensitivity_at_90_specificity")}
    for name, made in decisions.items():
        metrics[f"balanced_accuracy{name}"] = by_subject[f"balanced_accuracy{name}"]
        shares = {f"recall_{c}": labels_N == c for c in range(classes)}
        if classes == 2:
            shares = {"sensitivity": shares["recall_1"], "specificity": shares["recall_0"]}
        metrics |= {
            f"{share}{name}": wilson((made == labels_N)[among]) for share, among in shares.items()
        }
    metrics |= {f"brier{name}": by_subject[f"brier{name}"] for name in calibrated}
    for name, logits in calibrated.items():
        # No interval: a resample repeats volumes, which empties bins, and its errors are all larger than the true one.
        metrics[f"ece{name}"] = Measured(
            value=_known(score_metrics(logits, labels_N, scale=1.0)["ece"])
        )
    return Evaluation(
        volumes=len(labels_N),
        subjects=len(np.unique(subjects_N)),
        classes=_class_counts(labels_N, classes),
        metrics=metrics,
    )


def wilson(right: Array) -> Measured:
    """Return the share of `right` with Wilson's score interval (Wilson 1927); no value for no volumes."""
    count, z = len(right), statistics.NormalDist().inv_cdf(0.975)
    if not count:
        return Measured(value=None)
    share = float(right.mean())
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return Measured(
        value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), interval="Wilson"
    )


def _bootstrap(
    measure: Callable[[Array], dict[str, float]], subjects_N: Array
) -> tuple[dict[str, float], dict[str, float]]:
    """2.5 and 97.5 percent points of each value over resamples of the subjects; resamples without a value are left out."""
    _, codes = np.unique(subjects_N, return_inverse=True)
    rows_of = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    rng = np.random.default_rng(0)
    draws = [
        measure(
            np.concatenate([rows_of[code] for code in rng.integers(0, len(rows_of), len(rows_of))])
        )
        for _ in range(BOOTSTRAPS)
    ]
    table = pd.DataFrame(draws)
    low, high = (
        {str(name): float(end) for name, end in table.quantile(q).items()} for q in (0.025, 0.975)
    )
    return low, high


def _squared_errors(logits_NC: Array, labels_N: Array) -> Array:
    """(N,): each volume's part of the Brier score, from 0 to 1."""
    p_NC = softmax(logits_NC, axis=1)
    return np.asarray(((p_NC - np.eye(p_NC.shape[1])[labels_N]) ** 2).sum(axis=1) / 2)


def _balanced_accuracy(decisions_N: Array, labels_N: Array, classes: int) -> float:
    counts = np.bincount(labels_N, minlength=classes)
    if not counts.all():
        return math.nan
    return float(
        (np.bincount(labels_N[decisions_N == labels_N], minlength=classes) / counts).mean()
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


# ONNX ------------------------------------------------------------------------------------------------------------------


def require_onnx() -> None:
    """Raise ExportError unless the packages that write and check ONNX are installed."""
    missing = [name for name in ONNX_PACKAGES if util.find_spec(name) is None]
    if missing:
        raise ExportError([f"--onnx needs {', '.join(missing)}: pip install 'medtune[onnx]'"])


class _Scaled(nn.Module):
    """A network whose softmax is its probability: what is written to ONNX."""

    def __init__(self, network: Classifier, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, volumes: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.network(volumes)
        return logits


def write_onnx(
    path: Path, config: FineTuneConfig, weights: dict[str, Tensor], scale: float, volumes: Tensor
) -> float:
    """Write the network as ONNX and run it on `volumes` in ONNX Runtime; returns the largest difference from torch.

    Input `volumes` (batch, C, D, H, W) float32, prepared; output `logits` (batch, classes), scaled: their softmax is
    the uncalibrated probability. Raises ExportError when the two differ by more than ONNX_TOLERANCE of the logits.
    """
    require_onnx()
    import onnxruntime

    cpu = torch.device("cpu")
    scaled = _Scaled(_network(config, weights, cpu), scale).eval()
    sample = torch.cat([volumes, volumes])[
        : max(2, len(volumes))
    ]  # a batch of one would be taken for fixed
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                scaled,
                (sample,),
                str(path),
                input_names=["volumes"],
                output_names=["logits"],
                dynamic_shapes={"volumes": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    difference = largest = 0.0
    with torch.no_grad():
        for batch in (volumes, volumes[:1]):
            expected = scaled(batch).numpy()
            found = session.run(["logits"], {"volumes": batch.numpy()})[0]
            difference = max(difference, float(np.abs(found - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
    if not difference <= ONNX_TOLERANCE * max(1.0, largest):
        raise ExportError(
            [f"ONNX: its logits differ from torch's by {difference:.2g}; export without --onnx"]
        )
    return difference


# Training on everything ------------------------------------------------------------------------------------------------


def retrain_model(
    root: Path,
    out: Path,
    *,
    trial: str | None = None,
    confirmed: bool = False,
    data: Path | None = None,
    cache: Path | None = None,
    device: torch.device,
    onnx: bool = False,
    force: bool = False,
    say: Say = print,
) -> ModelInfo:
    """Train the chosen configuration on train and validation rows together, and write it as a model to `out`.

    The schedule is the study's, stopped after the epoch that was best there: with no volume left to validate on,
    nothing else can say when to stop. Threshold, calibration and metrics are those of the chosen trial, and the model
    card says that they were not measured on this network. Called again after a kill it goes on from `<out>.training`,
    which is removed at the end. Raises as `export_model` does.
    """
    check_target(out, force=force)
    if onnx:
        require_onnx()
    study = load_study(confirmation_of(root) if confirmed else root)
    chosen = choose(study, trial=trial, confirmed=confirmed)
    run = _read_run(chosen.trials.iloc[0])
    manifest, cohort = _open(run.config, study, data, cache)
    source = _measured(run, manifest, cohort, device, folder=".")
    everything = np.union1d(source.split.train, source.split.val)
    say(
        f"training on {len(everything)} volumes, {chosen.epochs} epochs of a schedule of {run.config.epochs}"
    )
    work = TrialFiles(out.with_name(f"{out.name}.training"))
    weights = _trained(run.config, cohort, everything, chosen.epochs, work, device, say)
    member = source.member.model_copy(
        update={
            "epoch": chosen.epochs,
            "validates": "nothing: it was trained on every volume",
            "auc": None,
        }
    )
    member = member.model_copy(update={"verdict": None, "verdict_summary": None})
    network = _network(run.config, weights, device)
    retrained = _Member(member, run.config, network, source.split, source.logits)
    rows = source.split.val
    info = ModelInfo(
        kind="retrained",
        members=(member,),
        training=_training(manifest, cohort, everything, run.config),
        **_judged(source.logits[rows], member.scale, cohort, rows),
        **_common(study, cohort, run.config, chosen),
    )
    scores = _scores_csv(
        rows, cohort.labels[rows], class_scores(source.logits[rows], scale=member.scale)
    )
    written = _write(out, info, [retrained], scores, cohort, onnx=onnx, force=force)
    shutil.rmtree(work.folder, ignore_errors=True)
    return written


def _trained(
    config: FineTuneConfig,
    cohort: Cohort,
    rows: Array,
    epochs: int,
    work: TrialFiles,
    device: torch.device,
    say: Say,
) -> dict[str, Tensor]:
    """Averaged weights after `epochs` epochs on `rows`, going on from what an earlier call left in `work`."""
    labels = cohort.labels[rows]
    # A run validates something each epoch. Here it is a few of its own training volumes: it shows that the run
    # learns and decides nothing.
    few = np.sort(
        np.concatenate([rows[labels == c][:RETRAIN_WATCHED] for c in range(config.num_classes)])
    )
    split = Split(rows, few, np.empty(0, dtype=np.int64))
    if (
        work.checkpoint.exists()
    ):  # rows of an earlier call are handed out before the run compares itself with them
        left = load_state(work.checkpoint)
        if left["config_hash"] != config.hash() or not np.array_equal(
            left["train_rows"].numpy(), rows
        ):
            raise ExportError(
                [
                    f"{work.folder}: holds another run, left by an earlier retrain: remove that folder"
                ]
            )
    run = saved_run(
        config, work, lambda resume: finetune(config, cohort, split, device=device, resume=resume)
    )
    with closing(run) as epoch_rows:  # type: ignore[type-var]  # generators close
        for row in islice(epoch_rows, epochs):
            say(
                f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  "
                f"AUC on {len(few)} training volumes {row['val_auc']:.3f}  {row['epoch_s']:.1f} s"
            )
    state = load_state(work.checkpoint)
    if state["epoch"] != epochs:
        raise ExportError(
            [
                f"{work.folder}: holds a run of {state['epoch']} epochs, {epochs} are wanted: remove it"
            ]
        )
    weights: dict[str, Tensor] = state["average"]["network"]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ExportError(
            [f"{work.folder}: the run ended in weights that are not finite; choose another trial"]
        )
    return weights
