"""An exported model scores as in the study, describes itself, reports later changes, and replaces nothing by accident."""

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from trainables.checkpoints import load_state, save_state
from trainables.config import build_config
from trainables.data.folds import split_rows
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import CohortError, open_cohort, prepare_cohort
from trainables.losses import logit_scale
from trainables.metrics import score_metrics
from trainables.network.model import build_network
from trainables.subject_auc import score_metrics_over_subjects, subject_interval
from tune_app.models import evaluation, export
from tune_app.models.card import model_card
from tune_app.models.evaluation import ExportError, evaluate, judge, wilson
from tune_app.models.export import choose, export_model
from tune_app.models.folder import Measured, ModelError, ModelFiles, ModelInfo
from tune_app.models.model import load_model
from tune_app.models.onnx import require_onnx
from tune_app.models.predict import find_scans, predict
from tune_app.models.retrain import retrain_model
from tune_app.results.calibration import Calibration
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles

CPU = torch.device("cpu")


@pytest.fixture
def a_copy(trained_study: Path, tmp_path: Path) -> Path:
    """The trained study, free to be changed; its data stay where they are."""
    return Path(shutil.copytree(trained_study, tmp_path / "study"))


def info_of(folder: Path) -> ModelInfo:
    return ModelInfo.model_validate_json(ModelFiles(folder).info.read_text())


def quiet(text: str) -> None:
    pass


def study_network(study: Path, trial: str) -> tuple[Any, dict[str, Any]]:
    """A trial's averaged network as the run itself had it, and its best.pt."""
    state = load_state(StudyFiles(study).trial(trial).best)
    config = build_config(state["config"])
    network = build_network(
        **{
            name: getattr(config, name)
            for name in (
                "depth",
                "width",
                "geometry",
                "head",
                "num_classes",
                "in_channels",
                "dropout",
            )
        }
    )
    network.load_state_dict(state["average"]["network"])
    return network.eval(), state


# The weights that are exported -----------------------------------------------------------------------------------------


def test_prediction_from_files_reproduces_the_studys_validation_scores(
    trained_study: Path, exported_model: Path
) -> None:
    network, state = study_network(trained_study, "00000")
    table = trained_study.parent / "cohort" / "table.csv"
    rows = state["val_rows"].numpy()
    config = build_config(state["config"])
    cohort = open_cohort(
        prepare_cohort(
            read_manifest(table), Recipe.from_config(config), trained_study.parent / "cache"
        )
    )
    with torch.no_grad():
        logits = network(torch.from_numpy(cohort.volumes[rows].astype(np.float32))).double().numpy()
    expected = logit_scale(config.loss, config.head, config.s) * (logits[:, 1] - logits[:, 0])

    sources = [find_scans([table], 2)[row] for row in rows]
    found = list(predict(load_model(exported_model), sources, batch_size=4))
    scores = np.stack([one.scored.log_odds_C for one in found if one.scored])
    np.testing.assert_allclose(scores[:, 1], expected, atol=1e-5)

    recorded = state["row"]
    metrics = score_metrics_over_subjects(
        scores / 2, cohort.labels[rows], cohort.subjects[rows], scale=1.0
    )
    for name in (
        "auc",
        "auc_low",
        "auprc",
        "balanced_accuracy_best",
        "threshold",
        "brier",
        "ece",
        "logit_gap",
    ):
        column = f"val_{name}_ema" if name != "auc_low" else "val_auc_ema_low"
        assert metrics[name] == pytest.approx(recorded[column], abs=1e-5), name
    info = info_of(exported_model)
    assert info.threshold == pytest.approx(recorded["val_threshold_ema"], abs=1e-5)
    assert info.members[0].auc == pytest.approx(recorded["val_auc"], abs=1e-9)
    decided = score_metrics(scores / 2, cohort.labels[rows], scale=1.0)["balanced_accuracy_best"]
    assert info.validation.metrics["balanced_accuracy"].value == pytest.approx(decided)


def test_people_are_counted_where_a_class_has_few_of_them(
    trained_study: Path, exported_model: Path
) -> None:
    _, state = study_network(trained_study, "00000")
    table = read_manifest(trained_study.parent / "cohort" / "table.csv").rows
    validated = table.iloc[state["val_rows"].numpy()]
    people = [set(validated.loc[validated["label"] == label, "subject"]) for label in (0, 1)]
    assert sum(map(len, people)) < len(validated), "some subjects have several volumes"
    recorded, seen = state["row"], info_of(exported_model).validation
    assert [recorded[f"val_{sign}_subjects"] for sign in ("negative", "positive")] == [
        len(each) for each in people
    ]
    assert recorded["val_rarest_subjects"] == min(map(len, people))
    assert seen.class_subjects == tuple(map(len, people))


@pytest.mark.parametrize(
    ("of_classes", "told"),
    [
        ((9, 4), "- **Few subjects**: only 4 subjects of class 1 to validate on"),
        ((9, 5), None),
        (None, None),  # a model of a version that counted volumes alone: 12 and 12
    ],
)
def test_the_card_counts_people_not_volumes(
    exported_model: Path, of_classes: tuple[int, ...] | None, told: str | None
) -> None:
    info = info_of(exported_model)
    changed = info.validation.model_copy(
        update={"volumes": 24, "classes": (12, 12), "class_subjects": of_classes}
    )
    card = model_card(info.model_copy(update={"validation": changed}), [build_config()])
    few = [line for line in card.splitlines() if line.startswith("- **Few ")]
    assert len(few) == (told is not None)
    assert told is None or few[0].startswith(told)
    rarest = "12 validation volumes" if of_classes is None else f"{min(of_classes)} validation subj"
    assert f"The rarest class has {rarest}" in card
    assert f"with 1 to 20 {'volumes' if of_classes is None else 'subjects'}, where" in card


@pytest.mark.parametrize(
    ("objective", "weights", "told"),
    [
        ("best_median3", "ema", "running average over training (EMA), of the epoch"),
        ("last_raw", "raw", "own, without averaging over training, of the epoch"),
        ("last_raw", "ema", "best 3-epoch median of validation AUC."),  # format 1
        ("last_raw", "raw", "objective: last epoch, weights not averaged."),
    ],
)
def test_the_card_says_which_weights_of_which_epoch_these_are(
    exported_model: Path, objective: str, weights: str, told: str
) -> None:
    """It said EMA and the best median of every model, also where the objective is of the raw network."""
    info = info_of(exported_model)
    (member,) = info.members
    changed = info.model_copy(
        update={
            "members": (member.model_copy(update={"weights": weights}),),
            "choice": info.choice.model_copy(update={"objective": objective}),
        }
    )
    [line] = [
        line
        for line in model_card(changed, [build_config()]).splitlines()
        if line.startswith("The weights are ")
    ]
    assert told in line


def test_validation_csv_has_the_scores_and_nobodys_name(
    trained_study: Path, exported_model: Path
) -> None:
    table = trained_study.parent / "cohort" / "table.csv"
    written = pd.read_csv(ModelFiles(exported_model).validation)
    sources = find_scans([table], 2)
    found = predict(load_model(exported_model), [sources[row - 1] for row in written["row"]])
    np.testing.assert_allclose(
        [one.scored.log_odds_C[1] for one in found if one.scored], written["score_1"], atol=1e-5
    )
    assert list(written["label"]) == [sources[row - 1].label for row in written["row"]]
    for path in exported_model.rglob("*"):
        content = path.read_bytes()
        assert b"subject-" not in content, path
        assert str(trained_study.parent).encode() not in content, path
        assert b"volumes/0" not in content, path


def test_an_ensemble_averages_calibrated_log_odds(
    trained_study: Path, exported_ensemble: Path
) -> None:
    sources = find_scans([trained_study.parent / "cohort"], 2)[:3]
    assert len(sources) == 3
    model = load_model(exported_ensemble)
    found = [one.scored for one in predict(model, sources)]
    single = {}
    for member in model.info.members:
        out = trained_study.parent / f"alone-{member.trial}"
        if not out.exists():
            export_model(trained_study, out, trial=member.trial, device=CPU, say=quiet)
        single[member.trial] = np.stack(
            [one.scored.log_odds_C for one in predict(load_model(out), sources) if one.scored]
        )
    odds = [
        member.calibration.slope * single[member.trial][:, 1] + member.calibration.offsets[1]
        for member in model.info.members
    ]
    np.testing.assert_allclose(
        [one.log_odds_C[1] for one in found if one], np.mean(odds, axis=0), atol=1e-5
    )
    for number, one in enumerate(found):
        assert one is not None
        np.testing.assert_allclose(
            one.members_MC[:, 1], 1 / (1 + np.exp(-np.array(odds)[:, number])), atol=1e-6
        )


def test_an_ensemble_over_folds_is_judged_by_members_that_did_not_train_on_the_volume(
    trained_study: Path, exported_ensemble: Path
) -> None:
    info = info_of(exported_ensemble)
    table = trained_study.parent / "cohort" / "table.csv"
    manifest = read_manifest(table)
    assert info.validation.volumes == len(manifest.rows), (
        "both folds together validate every volume"
    )
    assert info.training.volumes == len(manifest.rows)
    written = pd.read_csv(ModelFiles(exported_ensemble).validation).set_index("row")["score_1"]
    for trial, fold in (("00000", 0), ("00001", 1)):
        network, state = study_network(trained_study, trial)
        config = build_config(state["config"])
        cohort = open_cohort(
            prepare_cohort(manifest, Recipe.from_config(config), trained_study.parent / "cache")
        )
        rows = split_rows(manifest, fold=fold, num_folds=2, cross_validate=False).val
        with torch.no_grad():
            logits = (
                network(torch.from_numpy(cohort.volumes[rows].astype(np.float32))).double().numpy()
            )
        member = next(one for one in info.members if one.trial == trial)
        odds = (
            member.calibration.slope * member.scale * (logits[:, 1] - logits[:, 0])
            + member.calibration.offsets[1]
        )
        np.testing.assert_allclose(written[rows + 1], odds, atol=1e-5)


# Refused exports -------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_give_the_studys_auc_are_not_exported(
    a_copy: Path, tmp_path: Path
) -> None:
    best = StudyFiles(a_copy).trial("00000").best
    state = load_state(best)
    state["row"]["val_auc"] = state["row"]["val_auc"] - 0.1
    save_state(best, state)
    with pytest.raises(
        ExportError, match=r"trial 00000: its weights give validation AUC .*the study recorded"
    ):
        export_model(a_copy, tmp_path / "model", trial="0", device=CPU, say=quiet)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_not_exported(a_copy: Path, tmp_path: Path) -> None:
    best = StudyFiles(a_copy).trial("00000").best
    state = load_state(best)
    state["average"]["network"]["head.weight"].fill_(float("nan"))
    save_state(best, state)
    with pytest.raises(ExportError, match="scores are not finite"):
        export_model(a_copy, tmp_path / "model", trial="0", device=CPU, say=quiet)


def test_a_cut_checkpoint_is_named(a_copy: Path, tmp_path: Path) -> None:
    best = StudyFiles(a_copy).trial("00000").best
    best.write_bytes(best.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"best\.pt: damaged"):
        export_model(a_copy, tmp_path / "model", trial="0", device=CPU, say=quiet)


def test_another_table_than_the_studys_is_refused(trained_study: Path, tmp_path: Path) -> None:
    table = trained_study.parent / "cohort" / "table.csv"
    rows = pd.read_csv(table)
    rows["path"] = [str(table.parent / path) for path in rows["path"]]
    rows.iloc[2:].to_csv(tmp_path / "fewer.csv", index=False)
    with pytest.raises(
        ExportError, match=r"fewer\.csv: its rows or folds are not those trial 00000 had"
    ):
        export_model(
            trained_study,
            tmp_path / "model",
            trial="0",
            data=tmp_path / "fewer.csv",
            device=CPU,
            say=quiet,
        )


def test_a_table_that_moved_is_found_where_it_is_named(
    trained_study: Path, exported_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained_study.parent / "cohort", tmp_path / "elsewhere")
    table, out = tmp_path / "elsewhere" / "table.csv", tmp_path / "model"
    moved = export_model(
        trained_study, out, trial="0", data=table, cache=tmp_path / "cache", device=CPU, say=quiet
    )
    assert moved.threshold == info_of(exported_model).threshold


def test_an_ensemble_of_named_trials_is_theirs_in_that_order(
    trained_study: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"trial": "1", "along": ["00000", "1"]}
    info = export_model(trained_study, tmp_path / "model", device=CPU, say=quiet, **asked)
    assert [member.trial for member in info.members] == ["00001", "00000"]
    assert info.kind == "ensemble"
    assert info.choice.how == "trials 00001, 00000, together, were asked for by name"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trial": "7"}, "no trial '00007' with weights and a score; there are 00000, 00001"),
        ({"ensemble": 3}, "--ensemble 3: 2 to 2 are possible"),
        ({"ensemble": 1}, "--ensemble 1: 2 to 2 are possible"),
        ({"trial": "1", "along": ["9"]}, "no trial '00009' with weights and a score"),
    ],
)
def test_what_the_study_does_not_have_is_said(
    trained_study: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        choose(load_study(trained_study), **asked)


def test_a_search_has_nothing_confirmed(trained_study: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a confirmation"):
        export_model(trained_study, tmp_path / "model", confirmed=True, device=CPU, say=quiet)


def test_the_confirmed_variant_is_exported_by_its_middle_run(
    write_study: Callable[..., Path],
) -> None:
    variants = {"documented": {}, "trial-00003": {"s": 12.0}, "trial-00004": {"s": 20.0}}
    root = write_study(
        variants=variants,
        kind="confirmation",
        seeds=3,
        folds=5,
        epochs=8,
        effect={"trial-00003": 0.08},
    )
    study = load_study(root)
    for trial in study.trials_full["trial"]:
        StudyFiles(root).trial(str(trial)).best.write_bytes(b"")
    study = load_study(root)
    chosen = choose(study, confirmed=True)
    runs = study.trials_full[study.trials_full["variant"] == "trial-00003"]
    assert len(runs) == 15
    assert chosen.trials["variant"].tolist() == ["trial-00003"]
    assert chosen.trials["objective"].iloc[0] == pytest.approx(runs["objective"].median())
    assert chosen.epochs == int(np.ceil(runs["best_epoch"].median()))
    assert "confirmed as better" in chosen.choice.how
    together = choose(study, confirmed=True, ensemble=5)
    assert sorted(together.trials["fold"]) == [0, 1, 2, 3, 4], (
        "one of each fold before a second of any"
    )
    assert set(choose(study, confirmed=True, ensemble=15).trials["trial"]) == set(runs["trial"])


# The folder ------------------------------------------------------------------------------------------------------------


def test_the_sums_are_those_of_sha256sum(exported_ensemble: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"],
        cwd=exported_ensemble,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == 6, (
        "model.json, validation.csv, and two files of each member"
    )


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "model.json", "validation.csv"]
)
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_changed_cut_and_missing_files_are_refused(
    exported_model: Path, tmp_path: Path, file: str, damage: str
) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    content = bytearray((model / file).read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    if damage == "gone":
        (model / file).unlink()
    else:
        (model / file).write_bytes(content[: -7 if damage == "cut" else None])
    with pytest.raises(ModelError) as error:
        load_model(model)
    assert len(error.value.problems) == 1
    assert file in error.value.problems[0]
    assert ("No such file" if damage == "gone" else "SHA-256 differs") in error.value.problems[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0" * 64 + "  ../outside.json"], "is no checksum of a file in this folder"),
        (["0" * 64 + "  /etc/passwd"], "is no checksum of a file in this folder"),
        (["garbage"], "is no checksum of a file in this folder"),
        ([], "does not list model.json"),
    ],
)
def test_sums_that_are_not_of_this_folder_are_refused(
    exported_model: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    ModelFiles(model).sums.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ModelError, match=message):
        load_model(model)


def rewritten(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change model.json and make its sum right again, as a careless editor with sha256sum would."""
    files = ModelFiles(model)
    fields = json.loads(files.info.read_text())
    change(fields)
    files.info.write_text(json.dumps(fields))
    files.write_sums()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 99, "format 99, this version reads 1"),
        ("threshold", "high", "threshold"),
        ("preprocessing", {"volume_shape": [16, 16, 16]}, "damaged .*spacing_mm"),
        ("num_classes", 3, "disagree on input or classes"),
    ],
)
def test_a_model_json_that_makes_no_sense_is_refused(
    exported_model: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    rewritten(model, lambda fields: fields.update({field: value}))
    with pytest.raises(ModelError, match=message):
        load_model(model)


def test_the_card_may_be_completed_by_hand(exported_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    before = load_model(model).id
    card = ModelFiles(model).card
    card.write_text(card.read_text() + "\nOrigin: synthetic.\n")
    assert load_model(model).id == before


def test_nothing_but_a_model_is_replaced_and_that_only_by_force(
    trained_study: Path, exported_model: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported_model, tmp_path / "model"))
    with pytest.raises(ModelError, match="--force replaces it"):
        export_model(trained_study, out, trial="0", device=CPU, say=quiet)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(ModelError, match="no exported model"):
        export_model(
            trained_study, tmp_path / "thesis", trial="0", device=CPU, force=True, say=quiet
        )
    with pytest.raises(ExportError):
        export_model(trained_study, out, trial="7", device=CPU, force=True, say=quiet)
    assert load_model(out).info.members[0].trial == "00000", "a failed export leaves the old model"
    export_model(trained_study, out, trial="1", device=CPU, force=True, say=quiet)
    assert load_model(out).info.members[0].trial == "00001"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "thesis"}, (
        "nothing temporary is left"
    )


def test_an_export_that_fails_half_way_leaves_nothing(
    trained_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_model(trained_study, tmp_path / "model", trial="0", device=CPU, say=quiet)
    assert not list(tmp_path.iterdir())


# The card and its numbers ----------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is_worth_and_not_for(exported_ensemble: Path) -> None:
    info, card = info_of(exported_ensemble), ModelFiles(exported_ensemble).card.read_text()
    auc = info.validation.metrics["auc"]
    for text in (
        "Not for clinical use",
        f"| AUC | {auc.value:.3f} | {auc.low:.3f} to {auc.high:.3f} | over subjects |",
        f"{info.threshold:.6g}",
        f"{info.threshold_calibrated:.6g}",
        "Optimistic",
        "scored by those members only that were not trained on it",
        info.training.cohort,
        "of class 1",
    ):
        assert text in card
    for one in info.members:
        assert f"| {one.trial} | {one.epoch} |" in card


@pytest.mark.parametrize(
    ("verdict", "summary", "told"),
    [
        (None, None, None),
        ("healthy", "nothing found", None),
        ("no_fault", "nothing found", None),
        (
            "healthy",
            "nothing found; healed: ema_lag in epochs 28 to 52",
            "healed: ema\\_lag in epochs 28 to 52",
        ),
        ("saturated", "scores saturate since epoch 6", "scores saturate since epoch 6"),
        ("collapsed", None, "collapsed"),
    ],
)
def test_the_card_says_what_went_wrong_in_the_run_also_if_it_healed(
    exported_model: Path, verdict: str | None, summary: str | None, told: str | None
) -> None:
    info = info_of(exported_model)
    (member,) = info.members
    member = member.model_copy(update={"verdict": verdict, "verdict_summary": summary})
    card = model_card(info.model_copy(update={"members": (member,)}), [build_config()])
    lines = [
        line
        for line in card.splitlines()
        if line.startswith(f"- **The run of trial {member.trial}**: ")
    ]
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


@pytest.mark.parametrize(("before", "unseen", "told"), [(0.21, 0.24, True), (0.24, 0.21, False)])
def test_the_card_says_when_the_calibration_makes_it_worse(
    exported_model: Path, before: float, unseen: float, told: bool
) -> None:
    info = info_of(exported_model)
    briers = {"brier_uncalibrated": Measured(value=before), "brier_unseen": Measured(value=unseen)}
    metrics = {**info.validation.metrics, **briers}
    info = info.model_copy(
        update={"validation": info.validation.model_copy(update={"metrics": metrics})}
    )
    card = " ".join(model_card(info, [build_config()]).split())
    assert (
        "It did not help here**: fitted on the other subjects, it takes the Brier score from 0.210 to 0.240"
        in card
    ) == told


def test_names_in_the_card_cannot_become_markup(exported_model: Path) -> None:
    info, card_of = info_of(exported_model), model_card
    choice = info.choice.model_copy(
        update={"study": "a`b|<script>", "how": "the *best* [of](http://x) <b>"}
    )
    card = card_of(info.model_copy(update={"choice": choice}), [build_config()])
    assert "`a'b/<script>`" in card
    assert r"The \*best\* \[of\](http://x) \<b\>" in card


def test_the_threshold_means_the_same_on_every_scale(exported_model: Path) -> None:
    info = info_of(exported_model)
    assert info.threshold is not None
    for odds in (info.threshold - 0.01, info.threshold + 0.01):
        above = odds >= info.threshold
        assert (1 / (1 + np.exp(-odds)) >= info.threshold_probability) == above
        calibrated = info.calibration.probabilities(np.array([[-odds / 2, odds / 2]]))[0, 1]
        assert (calibrated >= info.threshold_calibrated) == above


def noise(
    count: int = 60, subjects: int = 30, seed: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % subjects < subjects // 3).astype(np.int64)
    return rng.normal(0, 3, (count, 2)), labels, (np.arange(count) % subjects).astype(str)


def test_scores_that_know_nothing_are_shown_up_by_the_unseen_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "BOOTSTRAPS", 2)
    found = [
        judge(*(z, 1.0, labels, subjects)).evaluation.metrics
        for z, labels, subjects in (noise(seed=s) for s in range(12))
    ]
    fitted, unseen = (
        np.array([one[name].value for one in found], dtype=float)
        for name in ("balanced_accuracy", "balanced_accuracy_unseen")
    )
    assert np.mean(fitted) > 0.58, "the threshold was chosen on these very volumes"
    assert abs(np.mean(unseen) - 0.5) < 0.04


def test_intervals_hold_their_values() -> None:
    z, labels, subjects = noise()
    z[:, 1] += 3 * labels
    measured = judge(z, 1.0, labels, subjects).evaluation.metrics
    with_interval = [one for one in measured.values() if one.interval]
    assert len(with_interval) == 12
    for one in with_interval:
        assert one.value is not None
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.value <= one.high


def test_metrics_equal_score_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BOOTSTRAPS", 20)
    z, labels, subjects = noise()
    identity = Calibration(slope=1.0, offsets=(0.0, 0.0))
    oracle = score_metrics(z, labels, scale=2.0)
    found = evaluate(z, 2.0, labels, subjects, threshold=oracle["threshold"], calibration=identity)
    for name in ("auc", "auprc", "sensitivity_at_90_specificity", "brier", "ece"):
        assert found.metrics[name].value == pytest.approx(oracle[name])
    of_subjects = subject_interval(z[:, 1] - z[:, 0], labels, subjects)
    assert found.metrics["auc"].low == pytest.approx(of_subjects.low)
    assert found.metrics["auc"].high == pytest.approx(of_subjects.high)
    assert found.metrics["balanced_accuracy"].value == pytest.approx(
        oracle["balanced_accuracy_best"]
    )
    assert found.classes == (40, 20)
    assert (found.volumes, found.subjects) == (60, 30)


def test_three_classes_have_recalls_and_no_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BOOTSTRAPS", 20)
    rng = np.random.default_rng(6)
    labels = np.arange(60) % 3
    z = rng.normal(0, 1, (60, 3)) + 2 * np.eye(3)[labels] + np.array([0.0, 2.0, -1.0])
    found = judge(z, 1.0, labels, np.arange(60).astype(str))
    assert found.threshold is None
    likeliest = found.calibration.logits(z).argmax(axis=1)
    for label in range(3):
        recall = found.evaluation.metrics[f"recall_{label}"].value
        assert recall == pytest.approx((likeliest == label)[labels == label].mean())
    assert {"recall_0", "recall_1", "recall_2", "balanced_accuracy", "brier"} <= set(
        found.evaluation.metrics
    )


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (7, 9), (50, 200)])
def test_wilson_equals_scipys(right: int, count: int) -> None:
    oracle = binomtest(right, count).proportion_ci(method="wilson")
    found = wilson(np.arange(count) < right, np.arange(count))
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_a_share_of_volumes_that_repeat_their_subject_is_one_of_the_subjects() -> None:
    right, subjects = np.arange(30) < 24, np.arange(30)
    alone = wilson(right, subjects)
    repeated = wilson(np.repeat(right, 5), np.repeat(subjects, 5))
    assert repeated.value == alone.value
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    certain = wilson(np.ones(150, dtype=bool), np.repeat(subjects, 5))
    assert certain.low == pytest.approx(wilson(np.ones(30, dtype=bool), subjects).low)


# ONNX ------------------------------------------------------------------------------------------------------------------


def test_onnx_without_its_packages_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError,
        match=r"--onnx needs onnx, onnxscript, onnxruntime: pip install 'medtune\[onnx\]'",
    ):
        require_onnx()


@pytest.mark.slow
def test_onnx_gives_the_logits_of_torch(trained_study: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs medtune[onnx]")
    pytest.importorskip("onnxscript", reason="needs medtune[onnx]")
    info = export_model(
        trained_study, tmp_path / "model", trial="0", onnx=True, device=CPU, say=quiet
    )
    assert info.members[0].onnx_difference is not None
    assert info.members[0].onnx_difference < 1e-4
    model = load_model(tmp_path / "model")
    session = runtime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    for batch in (1, 5):
        volumes = (
            np.random.default_rng(batch).normal(size=(batch, 1, 16, 16, 16)).astype(np.float32)
        )
        found = session.run(["logits"], {"volumes": volumes})[0]
        np.testing.assert_allclose(
            found, info.members[0].scale * model.logits(volumes)[0], atol=1e-4
        )
    assert "`model.onnx`" in ModelFiles(tmp_path / "model").card.read_text()


# Training on everything ------------------------------------------------------------------------------------------------


def test_retraining_uses_every_volume_and_claims_no_validation(
    a_copy: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    out = tmp_path / "retrained"
    info = retrain_model(a_copy, out, trial="0", device=CPU, say=said.append)
    state = load_state(StudyFiles(a_copy).trial("00000").best)
    count = len(state["train_rows"]) + len(state["val_rows"])
    assert (info.kind, info.training.volumes) == ("retrained", count)
    assert info.members[0].epoch == state["epoch"]
    assert sum(line.startswith("epoch ") for line in said) == state["epoch"]
    assert info.members[0].auc is None
    card = ModelFiles(out).card.read_text()
    assert "This network itself was never validated" in card
    assert (info.decides, info.threshold) == ("nothing", None)
    assert (info.calibration.slope, info.calibration.offsets) == (1.0, (0.0, 0.0))
    assert "## Operating point and calibration\n\n**None.**" in card
    assert "Validated on" not in card
    assert {path.name for path in tmp_path.iterdir()} == {"study", "retrained"}, (
        "the working folder is gone"
    )
    source = tmp_path / "source"
    assert export_model(a_copy, source, trial="0", device=CPU, say=quiet).decides == "threshold"
    volumes = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16))
    assert not np.allclose(load_model(out).logits(volumes), load_model(source).logits(volumes))


def test_retraining_goes_on_after_a_kill_to_the_same_weights(
    trained_study: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill_after_one(text: str) -> None:
        if text.startswith("epoch 1/"):
            raise Killed

    asked: dict[str, Any] = {"trial": "1", "device": CPU}
    assert int(load_study(trained_study).trials_full["best_epoch"].iloc[1]) > 1
    with pytest.raises(Killed):
        retrain_model(trained_study, tmp_path / "killed", say=kill_after_one, **asked)
    assert not (tmp_path / "killed").exists()
    retrain_model(trained_study, tmp_path / "killed", say=quiet, **asked)
    retrain_model(trained_study, tmp_path / "whole", say=quiet, **asked)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_a_working_folder_of_another_run_is_named(trained_study: Path, tmp_path: Path) -> None:
    out = tmp_path / "retrained"
    shutil.copytree(
        StudyFiles(trained_study).trial("00001").folder, tmp_path / "retrained.training"
    )
    with pytest.raises(ExportError, match=r"retrained\.training: holds another run"):
        retrain_model(trained_study, out, trial="0", device=CPU, say=quiet)


def test_what_was_confirmed_on_the_test_rows_is_in_the_card(a_copy: Path, tmp_path: Path) -> None:
    config = build_config(load_state(StudyFiles(a_copy).trial("00000").best)["config"])
    record = {
        "config_hash": config.model_copy(update={"fold": 0, "seed": 0}).hash(),
        "time": 1.78e9,
        "times": 2,
    }
    record |= {
        "runs": [{}] * 6,
        "volumes": 31,
        "positive": 9,
        "negative": 22,
        "mean_auc": 0.81,
        "lowest_auc": 0.77,
    }
    record |= {"highest_auc": 0.84, "auc": 0.83, "auc_low": 0.7, "auc_high": 0.91}
    other = {**record, "config_hash": "another", "mean_auc": 0.5}
    StudyFiles(a_copy).test.write_text(json.dumps({"scored": [other, record]}))
    export_model(a_copy, tmp_path / "model", trial="0", device=CPU, say=quiet)
    card = ModelFiles(tmp_path / "model").card.read_text()
    assert "31 test rows (9 positive, 22 negative), scored on 2026-" in card
    assert (
        "6 confirming runs of this configuration, not with this model: mean AUC of a single run 0.810 (0.770 to 0.840)"
        in card
    )
    assert "look number 2" in card
    export_model(a_copy, tmp_path / "second", trial="1", device=CPU, say=quiet)
    assert "test rows" not in ModelFiles(tmp_path / "second").card.read_text()


def test_a_model_is_only_written_where_nothing_is(trained_study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="a file is there"):
        export_model(trained_study, tmp_path / "file", trial="0", device=CPU, say=quiet)
    with pytest.raises((ModelError, CohortError)):
        retrain_model(trained_study, tmp_path, trial="0", device=CPU, say=quiet)
