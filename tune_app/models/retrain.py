"""A model trained again on all rows."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainables.checkpoints import TrialFiles, load_state
from trainables.config import FineTuneConfig
from trainables.data.folds import Split
from trainables.data.volumes import Cohort
from trainables.finetune import finetune
from trainables.own_folder import is_own, mark_own, remove_own
from trainables.saved_run import saved_run
from tune_app.models.evaluation import ExportError
from tune_app.models.export import (
    Say,
    ScoredMember,
    choose,
    common_fields,
    confirmation_of,
    held_out_of,
    judged_fields,
    open_data,
    read_run,
    score_member,
    scores_csv,
    training_of,
    write_model,
)
from tune_app.models.folder import (
    ModelInfo,
    check_target,
)
from tune_app.models.model import class_scores, network_of
from tune_app.models.onnx import require_onnx
from tune_app.results.calibration import Array, no_calibration
from tune_app.results.loading import load_study

RETRAINING = "a run that makes a model"
"""Mark of the folder that holds it."""
RETRAIN_WATCHED = 8
"""Training volumes of each class whose AUC is shown while retraining."""


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
    there is no other sign of when to stop. Metrics are those of the chosen trial, and the model card states that they
    were not measured on this network. Its threshold and calibration are left out, and the model decides nothing: two networks of one
    configuration put their scores on different scales (recalls of .75 and .68 became .33 and .86), and no volume is left to
    find this one's. Called again after a kill it continues from `<out>.training`,
    which is removed at the end. Raises as `export_model` does.
    """
    check_target(out, force=force)
    if onnx:
        require_onnx()
    study = load_study(confirmation_of(root) if confirmed else root)
    chosen = choose(study, trial=trial, confirmed=confirmed)
    run = read_run(chosen.trials.iloc[0])
    manifest, cohort = open_data(run.config, study, data, cache)
    source = score_member(run, manifest, cohort, device, folder=".")
    everything = np.union1d(source.split.train, source.split.val)
    say(
        f"training on {len(everything)} volumes, {chosen.epochs} epochs of a schedule of {run.config.epochs}"
    )
    work = TrialFiles(out.with_name(f"{out.name}.training"))
    if not is_own(work.folder, RETRAINING) and not work.checkpoint.exists():
        mark_own(work.folder, RETRAINING)
    state = _trained(run.config, cohort, everything, chosen.epochs, work, device, say)
    weights = state["network"] if run.weights_of == "raw" else state["average"]["network"]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ExportError(
            f"{work.folder}: the run ended in weights that are not finite; choose another trial"
        )
    member = source.member.model_copy(
        update={
            "epoch": chosen.epochs,
            "validates": "nothing: it was trained on every volume",
            "auc": None,
            "calibration": no_calibration(run.config.num_classes),
            "verdict": None,
            "verdict_summary": None,
        }
    )
    network = network_of(run.config, weights, device)
    retrained = ScoredMember(member, run.config, network, source.split, source.logits)
    rows = source.split.val
    info = ModelInfo(
        kind="retrained",
        members=(member,),
        training=training_of(manifest, cohort, everything, run.config),
        **judged_fields(source.logits[rows], member.scale, cohort, rows)
        | {
            "threshold": None,
            "calibration": no_calibration(run.config.num_classes),
            "decides": "nothing",
        },
        **common_fields(chosen.choice, run.config, held_out_of(study, run.config)),
    )
    scores = scores_csv(
        rows, cohort.labels[rows], class_scores(source.logits[rows], scale=member.scale)
    )
    written = write_model(out, info, [retrained], scores, cohort, onnx=onnx, force=force)
    remove_own(work.folder, RETRAINING)
    return written


def _trained(
    config: FineTuneConfig,
    cohort: Cohort,
    rows: Array,
    epochs: int,
    work: TrialFiles,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    """State after `epochs` epochs on `rows`, continuing from files that an earlier call left in `work`."""
    labels = cohort.labels[rows]
    # A run must validate volumes each epoch. Here these are a few of its training volumes: this shows that the run
    # learns and decides nothing.
    few = np.sort(
        np.concatenate([rows[labels == c][:RETRAIN_WATCHED] for c in range(config.num_classes)])
    )
    split = Split(rows, few, np.empty(0, dtype=np.int64))
    # rows of an earlier call are handed out before the run compares itself with them
    if work.checkpoint.exists():
        left = load_state(work.checkpoint)
        if left["config_hash"] != config.hash() or not np.array_equal(
            left["train_rows"].numpy(), rows
        ):
            raise ExportError(
                f"{work.folder}: holds another run, left by an earlier retrain: remove that folder"
            )
    run = saved_run(
        config,
        work,
        lambda resume: finetune(config, cohort, split, device=device, resume=resume),
        until=epochs,
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
            f"{work.folder}: holds a run of {state['epoch']} epochs, {epochs} are wanted: remove it"
        )
    return state
