"""Trials of a study -> the folder of a model that can be used elsewhere; and the chosen configuration trained on all.

The model is measured again before it is exported: the kept weights (averaged ones, or raw ones where the objective is of
the raw network) score the validation volumes of their run, and unless
that gives the AUC that the study recorded, nothing is written. From these scores come the threshold, the calibration
and every number in the model card, so that a card always describes the weights next to it.
"""

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainables import installed_version
from trainables.checkpoints import CheckpointError, TrialFiles, load_state, write_json
from trainables.config import FineTuneConfig, build_config
from trainables.data.folds import Split, split_of
from trainables.data.json_files import read_json
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe, read_header
from trainables.data.volumes import Cohort, open_cohort, prepare_cohort, same_volumes
from trainables.diagnosis import diagnose
from trainables.errors import one_line
from trainables.losses import logit_scale
from trainables.metrics import score_metrics
from trainables.network.model import Classifier
from trainables.saved_run import kept_weights
from tune_app.compare import confirm
from tune_app.models.card import model_card
from tune_app.models.evaluation import ExportError, class_counts, judge
from tune_app.models.fingerprint import fingerprint, kinds_of
from tune_app.models.folder import (
    Choice,
    HeldOut,
    Measured,
    Member,
    ModelInfo,
    Training,
    check_target,
    new_model,
)
from tune_app.models.model import class_scores, network_logits, network_of, pooled
from tune_app.models.onnx import require_onnx, write_onnx
from tune_app.results.calibration import Array, fit_calibration
from tune_app.results.loading import hold_any_text, load_study
from tune_app.results.study import Study
from tune_app.study.files import EACH_RECIPE, PREPARES, StudyFiles, default_cache

AUC_TOLERANCE = {"float32": 0.005, "fp16": 0.02, "bf16": 0.02}
"""By how much the AUC at export, in float32, may differ from the study's, by the precision the study ran in."""


BATCH = 16
"""Volumes scored at a time."""


VERSIONS = ("medtune", "torch", "monai", "numpy", "nibabel", "safetensors")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chosen:
    """Which trials of a study make the model, and why these."""

    trials: pd.DataFrame
    """Their rows of `Study.trials`, best first."""
    epochs: int
    """Epochs after which their configuration was at its best: for training it again without validation."""
    choice: Choice


def choose(
    study: Study,
    *,
    trial: str | None = None,
    along: Sequence[str] = (),
    confirmed: bool = False,
    ensemble: int | None = None,
) -> Chosen:
    """Return the trials to export: one by its id, the best by the study's objective, or the `ensemble` best.

    `along`: ids of trials that make an ensemble with `trial`.

    `confirmed` looks only at the runs of the variant that the confirmation chose, and takes of them the one in the
    middle: the best of equal runs is merely lucky. Raises ExportError when there is no such trial, SpecError when
    `study` is no confirmation.
    """
    usable = study.exportable
    scored = len(usable)
    told = f"by the study's objective, {study.spec.objective}"

    def chosen(rows: pd.DataFrame, how: str, luck: str, epochs: float) -> Chosen:
        about = {"study": study.name, "kind": study.spec.kind, "objective": study.spec.objective}
        return Chosen(rows, math.ceil(epochs), Choice(**about, trials=scored, how=how, luck=luck))

    if trial is not None:
        rows = _named(study, usable, (trial, *along))
        names = ", ".join(rows["trial"].astype(str))
        asked = f"trial {names} was" if len(rows) == 1 else f"trials {names}, together, were"
        luck = "the trial's score may have been known when it was asked for"
        return chosen(rows, f"{asked} asked for by name", luck, rows["best_epoch"].iloc[0])

    usable = usable[usable["state"] != "failed"]
    how = f"of {scored} trials, the best {told}"
    luck = f"the trial was chosen on them as the best of {scored}"
    if confirmed:
        found = confirm.judge(study)
        if not found.finished:
            raise ExportError(
                f"{study.path}: the confirmation has not ended; `medtune resume {quote(str(study.path))}` continues it"
            )
        usable = usable[usable["variant"] == found.choice]
        how = f"variant {found.choice}, confirmed as better than the documented settings"
        if found.winner is None:
            how = "the documented settings: the confirmation could not distinguish any variant from them"
        how += f"; {len(usable)} runs on {usable['fold'].nunique()} fold(s) with {usable['seed'].nunique()} seed(s)"
        luck = "the run was not picked by its score"
    if usable.empty:
        raise ExportError(f"{study.path}: no trial has weights and a score yet")
    if ensemble is not None and not 2 <= ensemble <= len(usable):
        raise ExportError(
            f"--ensemble {ensemble}: 2 to {len(usable)} are possible, as many trials as have weights and a score"
        )
    if confirmed:
        epochs = statistics.median(usable["best_epoch"])
        if ensemble is not None:
            rows = usable.sort_values(["seed", "fold"], kind="stable").head(ensemble)
            how += f"; {ensemble} of them together, over as many folds as there are"
        else:
            rows = usable.iloc[[(len(usable) - 1) // 2]]
            how += "; the run in the middle of them"
        return chosen(rows, how, luck, epochs)
    if ensemble is not None:
        how = f"of {scored} trials, the best {ensemble} {told}, together"
        luck = f"the trials were chosen on them as the best {ensemble} of {scored}"
    return chosen(usable.head(ensemble or 1), how, luck, usable["best_epoch"].iloc[0])


def _named(study: Study, usable: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows of trials asked for by name, in that order, each once."""
    padded = list(dict.fromkeys(name.zfill(5) if name.isdigit() else name for name in names))
    by_name = usable.set_index("trial", drop=False)
    for name in padded:
        if name not in by_name.index:
            raise ExportError(_no_such(study, name))
    return by_name.loc[padded].reset_index(drop=True)


def _no_such(study: Study, trial: str) -> str:
    known = study.trials_full[study.trials_full["best_checkpoint"].notna()]["trial"].tolist()
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
    along: Sequence[str] = (),
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

    `root` may be the folder of a run of `medtune train`, which is its only trial.

    `data`: the table, where it has moved since the study. `cache`: folder of prepared cohorts, else the study's. `force` replaces a model in `out`. Raises ExportError, ModelError, and the errors of study, table and volumes.
    """
    check_target(out, force=force)
    if onnx:
        require_onnx()
    if is_single_run(root):
        if trial is not None or confirmed or ensemble is not None:
            raise ExportError(
                f"{root}: one run of `medtune train`: there is nothing to choose from"
            )
        single = _single_run(root, data, cache)
        return _write_runs(out, *single, device=device, onnx=onnx, force=force, say=say)
    study = load_study(confirmation_of(root) if confirmed else root)
    chosen = choose(study, trial=trial, along=along, confirmed=confirmed, ensemble=ensemble)
    if study.running:
        say(f"note: {study.name} is still running; a better trial may follow")
    runs = [read_run(row) for _, row in chosen.trials.iterrows()]
    manifest, cohort = open_data(runs[0].config, study, data, cache)
    return _write_runs(
        out,
        runs,
        manifest,
        cohort,
        common_fields(chosen.choice, runs[0].config, held_out_of(study, runs[0].config)),
        device=device,
        onnx=onnx,
        force=force,
        say=say,
    )


def is_single_run(root: Path) -> bool:
    """Whether `root` is the folder of a run of `medtune train`."""
    files = TrialFiles(root)
    return not StudyFiles(root).spec.is_file() and files.config.is_file() and files.best.is_file()


def _single_run(
    root: Path, data: Path | None, cache: Path | None
) -> tuple[list["_Run"], Manifest, Cohort, dict[str, Any]]:
    """The run in `root` with its table and cohort, which are the run's unless they are named, and its common fields."""
    files = TrialFiles(root)
    try:
        known = read_json(files.run) if files.run.is_file() else {}
    except (OSError, ValueError) as error:
        raise ExportError(f"{files.run}: damaged ({error}): name the table with --data") from None
    table = data or known.get("data")
    if table is None:
        raise ExportError(f"{root}: does not record its table: name it with --data")
    ended = diagnose(load_state(files.checkpoint)["rows"]) if files.checkpoint.is_file() else None
    hold_any_text(str(root.resolve()))
    run = read_run(
        pd.Series(
            {
                "trial": root.resolve().name,
                "best_checkpoint": str(files.best),
                "verdict": None if ended is None else ended.verdict,
                "verdict_summary": None if ended is None else ended.summary,
            }
        )
    )
    folder = cache or Path(known.get("cache") or default_cache())
    manifest, cohort = _open(run.config, Path(table), folder)
    choice = Choice(
        study=root.resolve().name,
        kind="train",
        objective="best_median3",
        trials=1,
        how="the only run: `medtune train` trained one configuration",
        luck="nothing else was chosen on them",
    )
    return [run], manifest, cohort, common_fields(choice, run.config, None)


def _write_runs(
    out: Path,
    runs: Sequence["_Run"],
    manifest: Manifest,
    cohort: Cohort,
    common: dict[str, Any],
    *,
    device: torch.device,
    onnx: bool,
    force: bool,
    say: Say,
) -> ModelInfo:
    members = [
        score_member(run, manifest, cohort, device, folder=_folder(run, runs)) for run in runs
    ]
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
        training=training_of(
            manifest,
            cohort,
            np.unique(np.concatenate([one.split.train for one in members])),
            runs[0].config,
        ),
        **judged_fields(z_NC, scale, cohort, rows),
        **common,
    )
    scores = scores_csv(rows, cohort.labels[rows], class_scores(z_NC, scale=scale))
    return write_model(out, info, members, scores, cohort, onnx=onnx, force=force)


def _folder(run: "_Run", runs: Sequence["_Run"]) -> str:
    return "." if len(runs) == 1 else f"members/{run.trial}"


def common_fields(
    choice: Choice, config: FineTuneConfig, held_out: HeldOut | None
) -> dict[str, Any]:
    """Return the fields of model.json that every kind of model has."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "num_classes": config.num_classes,
        "class_names": config.class_names,
        "preprocessing": asdict(Recipe.from_config(config)),
        "choice": choice,
        "test": held_out,
        "versions": {name: installed_version(name) for name in VERSIONS},
    }


def held_out_of(study: Study, config: FineTuneConfig) -> HeldOut | None:
    """The first record of the test rows that is of this configuration, fold and seed apart; test rows are not scored here."""
    search = Path(study.spec.confirms) if study.spec.confirms else study.path
    files = StudyFiles(search if search.is_dir() else study.path)
    if not files.test.is_file():
        return None
    setting = build_config({**config.model_dump(mode="json"), "fold": 0, "seed": 0}).hash()
    try:
        for record in read_json(files.test)["scored"]:
            if record["config_hash"] == setting:
                return HeldOut(
                    when=time.strftime("%Y-%m-%d", time.gmtime(record["time"])),
                    runs=len(record["runs"]),
                    ensemble_auc=Measured(
                        value=record["auc"],
                        low=record["auc_low"],
                        high=record["auc_high"],
                        interval="score",
                    ),
                    **{
                        name: record[name]
                        for name in HeldOut.model_fields.keys() - {"when", "runs", "ensemble_auc"}
                    },
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{files.test}: damaged ({one_line(error)}); restore it") from None
    return None


def judged_fields(z_NC: Array, scale: float, cohort: Cohort, rows: Array) -> dict[str, Any]:
    found = judge(z_NC, scale, cohort.labels[rows], cohort.subjects[rows])
    return {
        "threshold": found.threshold,
        "calibration": found.calibration,
        "decides": "likeliest" if found.threshold is None else "threshold",
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
    weights_of: Literal["raw", "ema"]
    train: Array
    val: Array
    row: dict[str, Any]


def read_run(trial: pd.Series) -> _Run:
    path = str(trial["best_checkpoint"])
    try:
        state = load_state(Path(path))
        weights_of, weights = kept_weights(state)
        return _Run(
            trial=str(trial["trial"]),
            verdict=None if pd.isna(trial["verdict"]) else str(trial["verdict"]),
            verdict_summary=None
            if pd.isna(trial["verdict_summary"])
            else str(trial["verdict_summary"]),
            config=build_config(state["config"]),
            epoch=int(state["epoch"]),
            weights=weights,
            weights_of=weights_of,
            train=state["train_rows"].numpy(),
            val=state["val_rows"].numpy(),
            row=state["row"],
        )
    except (CheckpointError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: damaged or of another version ({one_line(error)})") from None


@dataclass(frozen=True, eq=False)
class ScoredMember:
    """A network of the model, and how it scores the volumes it was validated on."""

    member: Member
    config: FineTuneConfig
    network: Classifier
    split: Split
    logits: Array
    """(N, C) of all rows of the cohort, NaN for those it was not asked to score."""


def open_data(
    config: FineTuneConfig, study: Study, data: Path | None, cache: Path | None
) -> tuple[Manifest, Cohort]:
    _refuse_ignored(config, study)
    folder = cache or Path(study.spec.cache or default_cache())
    return _open(config, data or Path(study.spec.data), folder)


def _open(config: FineTuneConfig, table: Path, cache: Path) -> tuple[Manifest, Cohort]:
    manifest = read_manifest(table, num_classes=config.num_classes, classes=config.classes)
    return manifest, open_cohort(prepare_cohort(manifest, Recipe.from_config(config), cache))


def _refuse_ignored(config: FineTuneConfig, study: Study) -> None:
    """Raise ExportError for a trial whose recorded preprocessing is not that of the volumes that it was trained on."""
    own = Recipe.from_config(config)
    if study.info.get(PREPARES) == EACH_RECIPE or same_volumes(
        own, Recipe.from_config(build_config(study.spec.config))
    ):
        return
    raise ExportError(
        f"{study.path}: the version that ran this study recorded the preprocessing of the chosen trial, but trained it "
        "on the volumes of the study's `config`: run the configuration again in a new study and export that"
    )


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


def score_member(
    run: _Run, manifest: Manifest, cohort: Cohort, device: torch.device, *, folder: str
) -> ScoredMember:
    """Score the run's validation volumes again. Raises ExportError unless rows, recipe and AUC are those of the study."""
    trial, config = run.trial, run.config
    split = split_of(manifest, config)
    if not (np.array_equal(split.train, run.train) and np.array_equal(split.val, run.val)):
        raise ExportError(
            f"{manifest.table}: its rows or folds are not those trial {trial} had; name the study's table with --data"
        )
    if not same_volumes(Recipe.from_config(config), cohort.recipe):
        raise ExportError(
            f"trial {trial}: prepares volumes otherwise than the first member; they cannot be one model"
        )
    network = network_of(config, run.weights, device)
    logits = _logits(network, cohort, split.val, config.num_classes, device)
    scale = logit_scale(config.loss, config.head, config.s)
    labels = cohort.labels[split.val]
    if not np.isfinite(logits[split.val]).all():
        raise ExportError(
            f"trial {trial}: its scores are not finite, it is of no use; choose another"
        )
    auc = score_metrics(logits[split.val], labels, scale=scale)["auc"]
    recorded, precision = (
        run.row["val_auc_raw" if run.weights_of == "raw" else "val_auc"],
        str(run.row["precision"]),
    )
    if not abs(auc - recorded) <= AUC_TOLERANCE[precision]:
        raise ExportError(
            f"trial {trial}: its weights give validation AUC {auc:.4f}, the study recorded {recorded:.4f} ({precision}): "
            "the volumes, or how they are prepared, have changed since; export with the data of the study"
        )
    own = (manifest.rows["split"] == "val").any() and not config.cross_validate
    member = Member(
        folder=folder,
        trial=trial,
        epoch=run.epoch,
        weights=run.weights_of,
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
    return ScoredMember(member, config, network, split, logits)


def training_of(
    manifest: Manifest, cohort: Cohort, rows: Array, config: FineTuneConfig
) -> Training:
    """Ranges of the volumes that were trained on; reads the headers of their files, and the voxels of some."""
    paths = [manifest.rows["path"].iloc[row] for row in rows]
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(read_header, paths))
    spacings = np.array([header.spacing_mm for header in headers])
    extents = spacings * np.array([header.shape for header in headers])
    return Training(
        table=manifest.table.rpartition("/")[2],
        cohort=cohort.folder.name,
        volumes=len(rows),
        subjects=len(np.unique(cohort.subjects[rows])),
        classes=class_counts(cohort.labels[rows], config.num_classes),
        spacing_low_mm=tuple(spacings.min(axis=0)),
        spacing_high_mm=tuple(spacings.max(axis=0)),
        extent_low_mm=tuple(extents.min(axis=0)),
        extent_high_mm=tuple(extents.max(axis=0)),
        unoriented=sum(not header.oriented for header in headers),
        intensity=fingerprint(
            (cohort.volumes[row] for row in rows), kinds_of(paths, Recipe.from_config(config))
        ),
        pretrained=Path(config.pretrained_path).name if config.pretrained_path else None,
    )


def scores_csv(rows: Array, labels: Array, scores_NC: Array) -> str:
    """Scores of the validation volumes: enough to choose another threshold, and nothing that names a subject or a file."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "label", *[f"score_{c}" for c in range(scores_NC.shape[1])]])
    for row, label, scores in zip(rows, labels, scores_NC, strict=True):
        writer.writerow([int(row) + 1, int(label), *[f"{score:.9g}" for score in scores]])
    return stream.getvalue()


def write_model(
    out: Path,
    info: ModelInfo,
    members: Sequence[ScoredMember],
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
            # Only the name: the place of a checkpoint on this machine is private, and no part of the model.
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
        card = model_card(info, [one.config for one in members])
        files.card.write_text(card, encoding="utf-8", errors="backslashreplace")
    return info


def outcome_lines(info: ModelInfo, out: Path) -> list[str]:
    """Return a summary of the model written, in lines of at most 80 columns but for names."""
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
    if info.kind == "ensemble":
        alone = ", ".join(
            f"{one.trial} {'-' if one.auc is None else f'{one.auc:.3f}'}" for one in info.members
        )
        lines.append(f"alone:     AUC of each member on its own validation volumes: {alone}")
    if info.named_classes:
        lines.append(f"classes:   {info.named_classes}")
    if info.decides == "nothing":
        lines.append("decides:   nothing: no threshold and no calibration belong to these weights")
    if info.decides == "likeliest":
        lines.append("decides:   the class with the largest calibrated probability")
    if info.threshold is not None:
        lines.append(
            f"decides 1: score_1 >= {info.threshold:.4g}, which is probability_1 >= {info.threshold_calibrated:.4g}"
        )
    onnx = [one.onnx_difference for one in info.members if one.onnx_difference is not None]
    lines += [f"onnx:      differs from torch by at most {max(onnx):.2g}"] if onnx else []
    return [
        *lines,
        "not for clinical use; complete the data section of MODEL_CARD.md",
        f"next:      medtune predict {quote(str(out))} SCANS",
    ]
