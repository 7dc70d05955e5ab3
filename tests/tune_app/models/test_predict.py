"""Files in, one row each out: scored as in the study, or refused with a reason, and never the worse for its neighbours."""

import csv
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from trainables.metrics import auc_interval
from trainables.subject_auc import subject_interval
from tune_app.cli.app import app
from tune_app.models import predict as module
from tune_app.models.explain import explain
from tune_app.models.fingerprint import fingerprint
from tune_app.models.folder import ModelFiles, ModelInfo
from tune_app.models.model import Model, Prediction, Scored, Source, decide, load_model
from tune_app.models.predict import find_scans, predict, run_predict
from tune_app.models.subjects import pool_subjects
from tune_app.results.calibration import Calibration

CPU = torch.device("cpu")

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 2,
    "backbone_lr": 1e-3,
    "train_auc_volumes": 0,
}


@pytest.fixture
def model(exported_model: Path) -> Model:
    return load_model(exported_model)


@pytest.fixture
def cohort(trained_study: Path) -> Path:
    return trained_study.parent / "cohort"


def info_of(folder: Path) -> ModelInfo:
    return ModelInfo.model_validate_json(ModelFiles(folder).info.read_text())


def said_of(model: Model, path: Path) -> tuple[str | None, tuple[str, ...]]:
    (found,) = predict(model, [Source(str(path))])
    assert (found.scored is None) == (found.problem is not None)
    return found.problem, found.notes


# Refused inputs --------------------------------------------------------------------------------------------------------


def test_a_file_like_the_training_files_is_scored(
    model: Model, cohort: Path, write_scan: Callable[..., Path]
) -> None:
    assert said_of(model, sorted((cohort / "volumes").iterdir())[0]) == (None, ())
    problem, notes = said_of(model, write_scan(voxels=(16, 17, 18), axes="LPS"))
    assert problem is None
    assert all(note.startswith("intensity: ") for note in notes), "noise, and not a ball in noise"


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ({"voxels": (16, 16, 16, 2)}, "2 channel(s), the model takes 1"),
        ({"spacing": (1.0, 1.0, 5.0)}, "spacing 1x1x5 mm (RAS+), the model was trained on 0.8"),
        ({"spacing": (0.2, 1.0, 1.0)}, "spacing 0.2x1x1 mm (RAS+), the model was trained on 0.8"),
        ({"spacing": (5.0, 1.0, 1.0), "axes": "ILP"}, "spacing 1x1x5 mm (RAS+)"),
        ({"voxels": np.ones((9, 9, 9))}, "constant"),
        ({"voxels": np.full((9, 9, 9), np.nan)}, "not finite"),
    ],
)
def test_scans_the_model_was_not_made_for_are_refused(
    model: Model, write_scan: Callable[..., Path], scan: dict[str, Any], message: str
) -> None:
    if "spacing" in scan:
        scan["voxels"] = (9, 9, 9)
        write = write_scan(**{**scan, "axes": scan.get("axes", "RAS")})
    else:
        write = write_scan(**scan)
    problem, _ = said_of(model, write)
    assert problem is not None
    assert message in problem


def unoriented(path: Path) -> Path:
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    assert not nib.load(path).header["sform_code"]
    assert not nib.load(path).header["qform_code"]
    return path


def test_a_scan_without_orientation_is_refused_unless_training_had_some(
    model: Model, write_scan: Callable[..., Path]
) -> None:
    scan = unoriented(write_scan(voxels=(16, 17, 18)))
    problem, _ = said_of(model, scan)
    assert problem is not None
    assert "its header states no orientation" in problem
    training = model.info.training.model_copy(update={"unoriented": 2})
    tolerant = Model(
        model.folder,
        model.id,
        model.info.model_copy(update={"training": training}),
        model.networks,
        CPU,
    )
    assert said_of(tolerant, scan)[0] is None


def test_what_is_unusual_but_not_refused_is_noted(
    model: Model, write_scan: Callable[..., Path]
) -> None:
    problem, notes = said_of(model, write_scan(voxels=(12, 12, 12), spacing=(1.6, 1.0, 1.0)))
    assert problem is None
    assert notes[0].startswith("spacing 1.6x1x1 mm outside training's 0.8")


def test_files_that_cannot_be_read_are_told_apart(
    model: Model, write_scan: Callable[..., Path], tmp_path: Path
) -> None:
    cut = write_scan("cut.nii.gz", voxels=(16, 16, 16))
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "text.nii").write_text("patient notes")
    (tmp_path / "empty").mkdir()
    bad = [cut, tmp_path / "text.nii", tmp_path / "gone.nii.gz", tmp_path / "empty"]
    found = list(predict(model, find_scans(bad, 2)))
    assert [one.problem is not None for one in found] == [True] * 4
    for one, word in zip(
        found,
        ("truncated", "not a NIfTI file", "No such file", "no .nii or .nii.gz file"),
        strict=True,
    ):
        assert one.problem is not None
        assert word in one.problem


def test_scores_that_are_not_finite_are_a_problem_and_no_number(model: Model, cohort: Path) -> None:
    weight = model.networks[0].get_parameter("head.weight")
    before = weight.clone()
    weight.fill_(float("nan"))
    (found,) = predict(model, find_scans([cohort], 2)[:1])
    weight.copy_(before)
    assert found.scored is None
    assert found.problem is not None
    assert "not finite" in found.problem


# Scores ----------------------------------------------------------------------------------------------------------------


def test_bad_files_cost_their_own_row_only(model: Model, cohort: Path, tmp_path: Path) -> None:
    good = find_scans([cohort], 2)[:7]
    alone = list(predict(model, good, batch_size=3))
    mixed = [
        good[0],
        Source("gone.nii"),
        *good[1:4],
        Source("a", problem="no"),
        *good[4:],
        Source("b", problem="no"),
    ]
    found = list(predict(model, mixed, batch_size=3))
    assert [one.source for one in found] == mixed
    assert sum(one.problem is not None for one in found) == 3
    for one, other in zip([one for one in found if one.scored], alone, strict=True):
        assert one.scored is not None
        assert other.scored is not None
        np.testing.assert_allclose(one.scored.log_odds_C, other.scored.log_odds_C, atol=1e-5)


def test_the_decision_is_the_threshold_on_the_log_odds() -> None:
    odds = np.array([[1.0, -1.0], [0.4, -0.4], [-2.0, 2.0]])
    assert decide(odds, -0.4).tolist() == [0, 1, 1]
    assert decide(np.array([[0.1, 0.3, -1.0], [2.0, 0.0, 0.0]]), None).tolist() == [1, 0]


def test_with_three_classes_decision_and_probability_come_from_one_vector(
    exported_model: Path, tmp_path: Path
) -> None:
    """The largest score before calibration was decided for: in 112 of 260 rows it was not the likeliest class."""
    info = info_of(exported_model)
    offsets = (0.0, 1.5, -2.0)
    three = info.model_copy(
        update={
            "num_classes": 3,
            "threshold": None,
            "decides": "likeliest",
            "calibration": Calibration(slope=0.4, offsets=offsets),
            "members": (
                info.members[0].model_copy(
                    update={"scale": 1.0, "calibration": Calibration(slope=1.0, offsets=(0.0,) * 3)}
                ),
            ),
        }
    )
    logits = np.random.default_rng(0).normal(0, 2, (1, 200, 3))
    found = Model(tmp_path, "", three, (), CPU).predict(logits)
    expected = softmax(0.4 * logits[0] + np.array(offsets), axis=1)
    np.testing.assert_allclose(found.probabilities_BC, expected, atol=1e-12)
    np.testing.assert_array_equal(found.decisions_B, expected.argmax(axis=1))
    before = Model(
        tmp_path, "", three.model_copy(update={"decides": "largest score"}), (), CPU
    ).predict(logits)
    assert (before.decisions_B != found.decisions_B).any(), "as models of before decide"


def test_a_model_json_of_an_earlier_version_decides_as_it_did(exported_model: Path) -> None:
    fields = json.loads(ModelFiles(exported_model).info.read_text())
    del fields["decides"]
    assert ModelInfo.model_validate(fields).decides == "threshold"
    assert ModelInfo.model_validate(fields | {"threshold": None}).decides == "largest score"


def test_a_model_that_decides_nothing_leaves_decision_and_probability_empty(
    exported_model: Path, cohort: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    files = ModelFiles(model)
    fields = json.loads(files.info.read_text())
    files.info.write_text(json.dumps(fields | {"decides": "nothing", "threshold": None}))
    files.write_sums()
    said: list[str] = []
    asked: dict[str, Any] = {"device": "cpu", "batch_size": 8, "explain": None}
    out = tmp_path / "scores.csv"
    run_predict(
        model, [cohort / "table.csv"], out, explain_layer="layer4", say=said.append, **asked
    )
    rows = pd.read_csv(out)
    assert rows[["decision", "probability_0", "probability_1"]].isna().all(axis=None)
    assert rows["score_1"].notna().all()
    assert any(line.startswith("decision: none: no threshold") for line in said)
    assert "AUC" in said[-1]
    assert "recall" not in said[-1]


def test_a_model_says_what_it_is_in_a_line(model: Model, exported_ensemble: Path) -> None:
    assert repr(model).startswith(f"<Model {model.folder.name} {model.id}: network of trial 0")
    assert "validation AUC 0." in repr(model) or "validation AUC 1." in repr(model)
    assert "ensemble of trial" in repr(load_model(exported_ensemble))
    assert max(len(repr(model)), len(repr(load_model(exported_ensemble)))) < 160


def test_batches_too_large_for_the_gpu_are_cut(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model.networks[0]
    forward = network.forward
    seen: list[int] = []

    def small_gpu(volumes: torch.Tensor) -> torch.Tensor:
        if len(volumes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(volumes))
        return forward(volumes)

    volumes = np.random.default_rng(0).normal(size=(7, 1, 16, 16, 16))
    expected = model.logits(volumes)
    monkeypatch.setattr(network, "forward", small_gpu)
    np.testing.assert_allclose(model.logits(volumes), expected, atol=1e-5)
    assert seen == [1, 2, 2, 2]


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_the_cpu(exported_ensemble: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    volumes = np.random.default_rng(0).normal(size=(5, 1, 16, 16, 16)).astype(np.float16)
    scores = [load_model(exported_ensemble, device) for device in ("cpu", "cuda")]
    cpu, cuda = (model.predict(model.logits(volumes)) for model in scores)
    np.testing.assert_allclose(cuda.log_odds_BC, cpu.log_odds_BC, atol=1e-4)
    ours, theirs = (explain(model, volumes[0], 1, layer="layer1") for model in scores)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_nothing_is_unpickled(
    exported_model: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    assert next(predict(load_model(exported_model), find_scans([cohort], 2)[:1])).scored is not None


# Finding files ---------------------------------------------------------------------------------------------------------


def test_a_table_labels_scans_that_a_folder_has_named_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    for name in ("1.nii", "2.nii"):
        (tmp_path / "s" / name).write_bytes(b"")
    (tmp_path / "t.csv").write_text("path,label,subject\ns/1.nii,1,a\ns/2.nii,0,b\n")
    (tmp_path / "other.csv").write_text("path,label\ns/1.nii,0\n")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for folder in (Path("s"), tmp_path / "s"):
        found = find_scans([folder, Path("t.csv"), tmp_path / "other.csv"], 2, said.append)
        assert [(Path(one.path).name, one.label, one.subject) for one in found] == [
            ("1.nii", 1, "a"),
            ("2.nii", 0, "b"),
        ]
    assert len(said) == 2
    assert "1.nii: label 1 first, then 0: the first counts" in said[0]


def test_a_table_may_have_the_names_of_the_models_classes_as_labels(tmp_path: Path) -> None:
    lines = ["path,label"]
    for name, label in (("1", "benign"), ("2", "likely"), ("3", "0"), ("4", "other"), ("5", "")):
        (tmp_path / f"{name}.nii").touch()
        lines.append(f"{name}.nii,{label}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines) + "\n")
    info = ModelInfo.model_construct(class_names=("benign", "malignant/likely"))  # type: ignore[call-arg]
    said: list[str] = []
    found = find_scans([table], 2, said.append, info.class_numbers)
    assert [one.label for one in found] == [0, 1, 0, None, None]
    (note,) = said
    assert "1 labels are not evaluated, the first is 'other': classes are 0 to 1, or benign" in note


def test_files_folders_and_tables_name_scans(tmp_path: Path) -> None:
    for name in (
        "b/2.nii.gz",
        "b/1.nii",
        "b/deep/3.nii.gz",
        "b/._1.nii",
        "b/.cache/4.nii",
        "b/notes.txt",
        "a.nii",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "table.csv").write_text("path,label\na.nii,1\nb/1.nii,\nb/2.nii.gz,7\n,0\n")
    found = find_scans([tmp_path / "b"], 2)
    assert [Path(one.path).name for one in found] == ["1.nii", "2.nii.gz", "3.nii.gz"]
    table = find_scans([tmp_path / "table.csv"], 2)
    assert [(Path(one.path).name, one.label) for one in table[:3]] == [
        ("a.nii", 1),
        ("1.nii", None),
        ("2.nii.gz", None),
    ]
    assert table[3].problem == "no path"
    twice = find_scans(
        [tmp_path / "a.nii", tmp_path / "b", tmp_path / "table.csv", tmp_path / "b" / "1.nii"], 2
    )
    assert len(twice) == 5, "each once"
    both = find_scans([tmp_path / "b", tmp_path / "a.nii", tmp_path / "table.csv"], 2)
    assert [one.label for one in both if Path(one.path).name == "a.nii"] == [1]
    pd.read_csv(tmp_path / "table.csv").to_parquet(tmp_path / "table.parquet")
    assert [one.label for one in find_scans([tmp_path / "table.parquet"], 2)] == [
        1,
        None,
        None,
        0,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("scan,label\na,1\n", "no column 'path'; its columns are scan, label"),
        ("", "not a table"),
        ("\x00\xff", "not a table"),
    ],
)
def test_tables_that_are_none_have_their_row(tmp_path: Path, content: str, message: str) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(content.encode("latin-1"))
    (found,) = find_scans([table, tmp_path / "table.csv"], 2)
    assert found.problem is not None
    assert message in found.problem


# The command -----------------------------------------------------------------------------------------------------------


def test_the_command_writes_csv_alone_to_stdout_and_says_the_rest_to_stderr(
    exported_model: Path, cohort: Path, write_scan: Callable[..., Path]
) -> None:
    bad = write_scan("far.nii.gz", voxels=(9, 9, 9), spacing=(1.0, 1.0, 9.0))
    scans = sorted((cohort / "volumes").iterdir())[:2]
    done = CliRunner().invoke(
        app, ["predict", str(exported_model), str(scans[0]), str(bad), str(scans[1])]
    )
    assert done.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in rows] == [str(scans[0]), str(bad), str(scans[1])]
    assert [bool(row["problem"]) for row in rows] == [False, True, False]
    assert rows[1]["decision"] == rows[1]["score_1"] == ""
    info = info_of(exported_model)
    assert info.threshold is not None
    for row in (rows[0], rows[2]):
        score = float(row["score_1"])
        assert float(row["score_0"]) == -score
        assert row["decision"] == str(int(score >= info.threshold))
        calibrated = 1 / (1 + np.exp(-info.calibration.slope * score - info.calibration.offsets[1]))
        assert float(row["probability_1"]) == pytest.approx(calibrated, abs=1e-6)
        assert float(row["probability_0"]) + float(row["probability_1"]) == pytest.approx(1)
    assert f"error: scan {bad}: spacing 1x1x9 mm" in done.stderr
    assert "2 scored, 1 not" in done.stderr


def test_a_labelled_table_is_evaluated(exported_model: Path, cohort: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "new" / "scores.csv"
    code = run_predict(
        exported_model,
        [cohort / "table.csv"],
        out,
        device="cpu",
        batch_size=8,
        explain=None,
        explain_layer="layer4",
        say=said.append,
    )
    assert code == 0
    rows = pd.read_csv(out)
    auc = subject_interval(
        rows["score_1"].to_numpy(), rows["label"].to_numpy(), rows["subject"].to_numpy()
    )
    assert f"AUC {auc.auc:.3f} [{auc.low:.3f}, {auc.high:.3f}]" in said[-1]
    right = (rows["decision"] == rows["label"]).groupby(rows["label"]).mean()
    assert f"{right[0]:.3f}, {right[1]:.3f}" in said[-1]
    assert [path.name for path in out.parent.iterdir()] == ["scores.csv"]


def test_an_ensemble_tells_how_far_its_members_are_apart(
    exported_ensemble: Path, cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    run_predict(
        exported_ensemble,
        [cohort],
        out,
        device="cpu",
        batch_size=8,
        explain=None,
        explain_layer="layer4",
        say=lambda text: None,
    )
    rows = pd.read_csv(out)
    assert (rows["members_low"] <= rows["members_high"]).all()
    # of two values the standard deviation is their distance over the root of two
    np.testing.assert_allclose(
        rows["members_sd"], (rows["members_high"] - rows["members_low"]) / 2**0.5, atol=1e-7
    )
    assert (rows["members_sd"] > 0).any()


def test_what_was_scored_survives_an_interruption(
    exported_model: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = module._scored
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(module, "_scored", interrupted)
    said: list[str] = []
    out = tmp_path / "scores.csv"
    with pytest.raises(KeyboardInterrupt):
        run_predict(
            exported_model,
            [cohort],
            out,
            device="cpu",
            batch_size=2,
            explain=None,
            explain_layer="layer4",
            say=said.append,
        )
    assert not out.exists()
    assert len(pd.read_csv(tmp_path / "scores.csv.partial")) == 4
    assert said[-1].endswith("scores.csv.partial")


def test_a_damaged_model_is_one_line_on_stderr(exported_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported_model, tmp_path / "model"))
    (model / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["predict", str(model), str(tmp_path)])
    assert done.exit_code == 1
    assert type(done.exception).__name__ == "ModelError"
    assert not done.stdout


# Subjects and intensities ----------------------------------------------------------------------------------------------


def test_subjects_have_a_score_each_and_the_evaluation_an_interval_over_them(
    exported_model: Path, cohort: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(cohort / "table.csv")
    table["path"] = [str(cohort / path) for path in table["path"]]
    table.to_csv(tmp_path / "table.csv", index=False)
    asked: dict[str, Any] = {"device": "cpu", "batch_size": 8, "explain": None}
    said: list[str] = []
    by_subject = tmp_path / "subjects.csv"
    run_predict(
        exported_model,
        [tmp_path / "table.csv"],
        tmp_path / "scores.csv",
        explain_layer="layer4",
        say=said.append,
        by_subject=by_subject,
        **asked,
    )
    rows = pd.read_csv(tmp_path / "scores.csv")
    assert rows["subject"].tolist() == table["subject"].tolist()
    found = pd.read_csv(by_subject).set_index("subject")
    assert rows["subject"].duplicated().any()
    expected = rows.groupby("subject")["score_1"].agg(["mean", "min", "max", "size"])
    expected = expected.loc[found.index]
    np.testing.assert_allclose(found["score_1"], expected["mean"], rtol=1e-6)
    np.testing.assert_allclose(found["score_1_low"], expected["min"], rtol=1e-6)
    assert found["volumes"].tolist() == expected["size"].tolist()
    labels = rows.groupby("subject")["label"].first().loc[found.index]
    assert found["label"].tolist() == labels.tolist()
    auc = roc_auc_score(labels, expected["mean"])
    assert any(f"{len(found)} subjects, each by the mean" in line for line in said)
    assert any(f"AUC {auc:.3f} [" in line and "subjects" in line for line in said)


def test_the_largest_score_speaks_for_a_subject_where_it_is_asked_to() -> None:
    odds = np.array([[-1.0, 1.0], [2.0, -2.0], [-3.0, 3.0]])
    mean = pool_subjects(["a", "b", "a"], odds, [1, 0, 1], "mean")
    largest = pool_subjects(["a", "b", "a"], odds, [1, 0, None], "max")
    assert [(one.subject, one.volumes, one.label) for one in mean] == [("a", 2, 1), ("b", 1, 0)]
    assert [one.log_odds_C[1] for one in mean] == [2.0, -2.0]
    assert [one.log_odds_C[1] for one in largest] == [3.0, -2.0]
    assert (largest[0].low, largest[0].high, largest[0].label) == (1.0, 3.0, 1)
    assert pool_subjects(["a", "a"], odds[:2], [1, 0], "mean")[0].label is None


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_an_interval_over_subjects_covers_where_their_volumes_are_alike(alike: float) -> None:
    """True AUC .76; 40 subjects of one to five volumes. Taken as independent, volumes that are alike cover too little."""
    rng = np.random.default_rng(0)
    truth = NormalDist().cdf(1 / np.sqrt(2))
    covered, plain = [], []
    for _ in range(400):
        sizes = rng.integers(1, 6, 40)
        subjects = np.repeat(np.arange(40), sizes)
        labels = (np.arange(40) % 3 == 0).astype(int)[subjects]
        shared = rng.normal(size=40)[subjects]
        scores = labels + np.sqrt(alike) * shared
        scores = scores + np.sqrt(1 - alike) * rng.normal(size=len(subjects))
        found = subject_interval(scores, labels, subjects)
        covered.append(found.low <= truth <= found.high)
        naive = auc_interval(scores, labels)
        plain.append(naive.low <= truth <= naive.high)
    assert np.mean(covered) >= 0.92
    if alike:
        assert np.mean(plain) < 0.88


def test_a_model_of_noisy_scans_notices_other_intensities(
    exported_model: Path, write_scan: Callable[..., Path], model: Model
) -> None:
    """Files of the right spacing and size were scored whatever they held."""
    known = model.info.training.intensity
    assert known is not None
    rng = np.random.default_rng(0)
    mask = (rng.random((16, 16, 16)) < 0.2).astype(float)
    problem, _ = said_of(model, write_scan("mask.nii.gz", mask))
    assert problem == (
        "it holds few whole numbers, as a mask does, and no training file does: give the scan itself"
    )
    ct = np.where(rng.random((16, 16, 16)) < 0.5, -1000.0, 40.0) + rng.normal(0, 1, (16, 16, 16))
    problem, notes = said_of(model, write_scan("ct.nii.gz", ct))
    assert problem is None
    assert any("by its values CT in HU" in note or "quantile" in note for note in notes)


def test_training_volumes_are_like_training_and_others_are_not() -> None:
    rng = np.random.default_rng(1)

    def brain() -> Any:
        voxels = np.where(rng.random((1, 16, 16, 16)) < 0.4, 0, rng.gamma(6, 60, (1, 16, 16, 16)))
        return (voxels - voxels.mean()) / voxels.std()

    def lung() -> Any:
        voxels = np.where(rng.random((1, 16, 16, 16)) < 0.6, -900, 40)
        voxels = voxels + rng.normal(0, 30, (1, 16, 16, 16))
        return (voxels - voxels.mean()) / voxels.std()

    known = fingerprint([lung() for _ in range(30)], ["CT in HU"])
    assert all(known.notes_on(lung()) == [] for _ in range(20))
    assert all(known.notes_on(brain()) for _ in range(20))
    assert known.kind_notes("MR or other positive values")
    assert known.kind_notes("CT in HU") == known.kind_notes("unknown") == []


# A run without a study -------------------------------------------------------------------------------------------------


def named_table(cohort: Path, folder: Path) -> Path:
    """The cohort's table with a column `class`, as `medtune data table` writes it."""
    rows = list(csv.DictReader((cohort / "table.csv").open(encoding="utf-8")))
    for row in rows:
        row["path"] = str(cohort / row["path"])
        row["class"] = ("round", "flat")[int(row["label"])]
    table = folder / "named.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


@pytest.mark.slow
def test_a_run_of_medtune_train_is_exported_and_predicts(cohort: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    table = named_table(cohort, tmp_path)
    settings = [
        part
        for name, value in (TINY | {"fold": 1}).items()
        for part in ("--set", f"{name}={value}")
    ]
    trained = CliRunner().invoke(
        app,
        [
            *("train", "--data", str(table), "--out", str(folder), "--no-gpu"),
            *("--cache", str(cache), *settings),
        ],
    )
    assert trained.exit_code == 0, trained.output
    began = json.loads((folder / "config.json").read_text())
    assert began["spacing_mm"] is not None, "a new run has the common spacing"
    scan = sorted((cohort / "volumes").iterdir())[0]
    found = CliRunner().invoke(app, ["predict", str(folder), str(scan), "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert "exported to" in found.stderr
    (row,) = csv.DictReader(io.StringIO(found.stdout))
    assert row["class"] == {"0": "round", "1": "flat"}[row["decision"]]
    assert "classes: 0 = round, 1 = flat" in found.stderr
    assert "(0 round, 1 flat)" in (folder / "model" / "MODEL_CARD.md").read_text()
    info = info_of(folder / "model")
    assert (began["classes"], info.class_names) == ("round=0,flat=1", ("round", "flat"))
    assert info.choice.kind == "train"
    assert info.preprocessing["spacing_mm"] == began["spacing_mm"]
    again = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "model")])
    assert again.exit_code == 0, again.output
    assert "classes:   0 = round, 1 = flat" in again.output
    assert info_of(tmp_path / "model").threshold == info.threshold
    refused = CliRunner().invoke(
        app, ["export", str(folder), "--out", str(tmp_path / "x"), "--ensemble", "2"]
    )
    assert "nothing to choose from" in str(refused.exception)


def test_predictions_name_the_class_where_the_model_knows_names(exported_model: Path) -> None:
    info = info_of(exported_model)
    named = info.model_copy(update={"class_names": ("round", "flat\x1b")})
    assert "class" not in module.columns(info, labelled=False, explained=False)
    assert module.columns(named, labelled=False, explained=False)[:3] == [
        "path",
        "decision",
        "class",
    ]
    source = Source("scan.nii")
    scored = Scored(
        log_odds_C=np.array([-1.0, 1.0]),
        probabilities_C=np.array([0.2, 0.8]),
        members_MC=np.array([[0.2, 0.8]]),
        decision=1,
        volume_CDHW=np.zeros((1, 2, 2, 2)),
    )
    cells = module.row(Prediction(source, scored), named)
    assert (cells["decision"], cells["class"]) == ("1", "flat\\x1b")
    assert "class" not in module.row(Prediction(source, scored), info)
