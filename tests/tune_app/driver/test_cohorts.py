"""Preprocessing that differs between trials: each way to prepare volumes has a separate cohort, or is refused."""

import io
import itertools
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search_spaces.spaces import SPACES
from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.spacing import spacing_of_table
from trainables.data.table_file import ManifestError
from trainables.data.volumes import cohort_like, open_cohort, prepare_cohort, same_volumes
from trainables.finetune import finetune
from trainables.saved_run import open_inputs
from tune_app.driver import cohorts
from tune_app.driver.cohorts import (
    Cohorts,
    check_room,
    choose_spacing,
    plan_cohorts,
    prepare_planned,
    prepare_study,
)
from tune_app.driver.disk import plan_budget
from tune_app.driver.run import other_versions, own_versions, run_study
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import CHOSEN, EACH_RECIPE, PLACED, PREPARES, StudyFiles, resumed_spec
from tune_app.study.spec import StudySpec, build_spec
from tune_app.synthetic import write_cohort

CONFIG: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 2,
    "amp": "off",
    "train_auc_volumes": 0,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=12, side=(14, 18))


def ablation(table: Path, *variants: tuple[str, dict[str, Any]], **fields: Any) -> StudySpec:
    planned = [{"variant": name, "overrides": overrides} for name, overrides in variants]
    given = {"data": str(table), "kind": "ablation", "planned": planned, "config": CONFIG}
    return build_spec({**given, **fields})


def search(space: Any, trials: int = 20, **config: Any) -> StudySpec:
    return build_spec(
        {"data": "t.csv", "space": space, "trials": trials, "config": CONFIG | config}
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.ray
@pytest.mark.slow
def test_every_variant_is_trained_on_volumes_of_its_own_preprocessing(
    table: Path, tmp_path: Path
) -> None:
    """The oracle is the run without a study, on the cohort that the variant's own recipe prepares."""
    changes: dict[str, dict[str, Any]] = {
        "as-is": {},
        "window": {"intensity": "window", "window_low": 0.0, "window_high": 150.0},
        "coarse": {"spacing_mm": 2.0},
        "unread": {"window_low": 5.0},
    }
    root, cache = tmp_path / "study", tmp_path / "cache"
    spec = ablation(table, *changes.items(), cache=str(cache), max_concurrent=2)
    outcome = run_study(spec, root, console=quiet(), notes=quiet())
    assert outcome.states == {"completed": 4}
    assert len(list(cache.glob("*/volumes.npy"))) == 3, "the same volumes are prepared once"
    study = load_study(root)
    manifest = read_manifest(table)
    common = spacing_of_table(manifest, (16, 16, 16)).every_mm
    assert study.spec.config == CONFIG | {"spacing_mm": common}, "chosen when the study began"
    losses = set()
    for trial in study.trials_full.to_dict("records"):
        config = build_config({**study.spec.config, **changes[trial["variant"]]})
        folder = prepare_cohort(manifest, Recipe.from_config(config), tmp_path / "elsewhere")
        expected = [
            result.metrics["val_auc"]
            for result in finetune(config, *open_inputs(config, table, folder))
        ]
        rows = study.epochs[study.epochs["trial"] == trial["trial"]]
        assert rows["val_auc"].tolist() == pytest.approx(expected, abs=1e-6), trial["variant"]
        losses.add(round(float(rows["train_loss"].iloc[0]), 6))
    assert len(losses) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_sampled_preprocessing_that_leaves_no_volume_fails_once_and_the_search_continues(
    table: Path, tmp_path: Path
) -> None:
    space = {
        "search": {"window_low": [0.0, 5000.0], "spacing_mm": [None, 2.0]},
        "fixed": {"intensity": "window", "window_high": 6000.0},
    }
    spec = build_spec(
        {
            "data": str(table),
            "space": space,
            "trials": 6,
            "config": CONFIG | {"epochs": 1},
            "cache": str(tmp_path / "cache"),
            "sampler": "random",
            "warm_start": [],
            "policy": {"halving": False},
        }
    )
    run_study(spec, tmp_path / "study", console=quiet(), notes=quiet())
    trials = load_study(tmp_path / "study").trials_full
    impossible = trials["window_low"] == 5000
    assert 0 < impossible.sum() < 6
    assert set(trials["state"][impossible]) == {"failed"}
    assert set(trials["state"][~impossible]) == {"completed"}
    assert (trials["failures"][impossible] <= 1).all()
    told = f"its preprocessing leaves {len(read_manifest(table).rows)} volumes"
    assert trials["reason"][impossible].str.contains(told).all()


def test_what_belongs_to_the_data_cannot_be_a_variants(table: Path) -> None:
    spec = ablation(
        table,
        ("one", {}),
        ("two", {"in_channels": 2}),
        ("three", {"num_classes": 3}),
    )
    with pytest.raises(SpecError) as caught:
        plan_cohorts(spec)
    assert [problem.partition(", the study")[0] for problem in caught.value.problems] == [
        "variant two: in_channels=2",
        "variant three: num_classes=3",
    ]


def test_what_a_space_fixes_holds_for_the_studys_own_cohort() -> None:
    space = {
        "search": {"s": {"low": 5, "high": 20}},
        "fixed": {"spacing_mm": 1.25, "num_classes": 3, "epochs": 7, "intensity": "zscore_nonzero"},
    }
    spec = build_spec({"data": "t.csv", "space": space})
    shared = build_config(spec.shared)
    assert shared.spacing_mm == (1.25,) * 3
    assert (shared.num_classes, shared.intensity, spec.epochs) == (3, "zscore_nonzero", 7)
    assert plan_cohorts(spec) == Cohorts((), 0)


@pytest.mark.parametrize(
    ("space", "trials", "most"),
    [
        ("documented", 20, 0),
        ({"search": {"spacing_mm": [None, 1.0, 2.0]}}, 20, 2),
        ({"search": {"spacing_mm": [1.0, 2.0]}}, 20, 2),
        ({"search": {"intensity": ["zscore", "window"], "window_low": [-1000, -160]}}, 20, 2),
        (
            {
                "search": {"window_low": {"low": -1000, "high": 0, "step": 250}},
                "fixed": {"intensity": "window"},
            },
            20,
            4,  # the lowest is the study's own
        ),
        (
            {
                "search": {"window_low": {"low": -1000, "high": 0}},
                "fixed": {"intensity": "window"},
            },
            20,
            20,
        ),
        ("preprocessing", 20, 20),
        ("preprocessing", 200, 47),  # 4 spacings x 2 shapes x (2 + 4 windows), and the study's own
    ],
)
def test_the_cohorts_that_a_space_can_need_are_counted(space: Any, trials: int, most: int) -> None:
    fields: dict[str, Any] = {"data": "t.csv", "space": space, "trials": trials}
    planned = plan_cohorts(build_spec(fields))
    assert planned.most == most
    assert len(planned.recipes) >= min(most, 1)
    for number, one in enumerate(planned.recipes):
        assert not any(same_volumes(one, other) for other in planned.recipes[:number])


def test_the_largest_cohorts_are_counted_in_bytes() -> None:
    spec = build_spec({"data": "t.csv", "space": "preprocessing", "trials": 30})
    large, small = 2 * 10 * 96**3, 2 * 10 * 64**3
    assert (
        plan_cohorts(spec).bytes(10) == 23 * large + 7 * small
    )  # 24 of 96 voxels, one the study's
    assert "preprocessing" in SPACES


def test_cohorts_that_the_disk_cannot_hold_are_refused_before_the_study_begins(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, own = read_manifest(table), Recipe.from_config(build_config(CONFIG))
    first = prepare_cohort(manifest, own, tmp_path)
    spec = search({"search": {"spacing_mm": [None, 1.0, 2.0]}})
    planned = plan_cohorts(spec)
    size = 2 * 12 * 16**3
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2 * size - 1))
    with pytest.raises(SpecError, match=r"up to 2 ways to prepare 12 volumes need 192 KiB"):
        check_room(planned, first, 12)
    monkeypatch.undo()
    cohort_like(manifest, planned.recipes[0], first, own)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, size))
    check_room(planned, first, 12)  # the one that is there takes no more room


def test_cohorts_count_against_the_disk_budget() -> None:
    spec = build_spec({"data": "t.csv", "config": CONFIG, "disk_budget_gib": 1.0})
    without, cohort_bytes = plan_budget(spec, 1), 100 * 2**20
    having = plan_budget(spec, 1, cohort_bytes)
    assert without is not None
    assert having is not None
    assert having.least - without.least == cohort_bytes
    with pytest.raises(SpecError, match=r"cohorts of other preprocessing 2\.00 GiB"):
        plan_budget(spec, 1, 2 * 2**30)


def test_a_variant_that_cannot_be_prepared_is_named_before_the_study_begins(
    table: Path, tmp_path: Path
) -> None:
    spec = ablation(
        table,
        ("as-is", {}),
        ("bright", {"intensity": "window", "window_low": 5000.0, "window_high": 6000.0}),
        cache=str(tmp_path / "cache"),
    )
    with pytest.raises(SpecError) as caught:
        run_study(spec, tmp_path / "study", console=quiet(), notes=quiet())
    assert len(caught.value.problems) == len(read_manifest(table).rows)
    start = "variant bright (intensity=window, window_low=5000.0, window_high=6000.0): row 1: scan"
    assert caught.value.problems[0].startswith(start)
    assert not StudyFiles(tmp_path / "study").spec.exists()


def test_planned_cohorts_are_prepared_and_named(table: Path, tmp_path: Path) -> None:
    own = Recipe.from_config(build_config(CONFIG))
    manifest = read_manifest(table)
    first = prepare_cohort(manifest, own, tmp_path)
    spec = ablation(table, ("a", {}), ("b", {"spacing_mm": 2.0}), ("c", {"spacing_mm": "2x2x2"}))
    notes = quiet()
    prepare_planned(spec, plan_cohorts(spec), manifest, first, notes)
    assert notes.file.getvalue() == "preparing volumes for b, c: spacing_mm=2x2x2\n"  # type: ignore[attr-defined]
    (other,) = set(tmp_path.glob("*/volumes.npy")) - {first / "volumes.npy"}
    assert open_cohort(other.parent).recipe.spacing_mm == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("varies", [True, False])
def test_a_study_of_the_version_that_ignored_preprocessing_is_not_mixed_with_this_one(
    table: Path, tmp_path: Path, varies: bool
) -> None:
    variants = [("a", {}), ("b", {"spacing_mm": 2.0} if varies else {"s": 20.0})]
    spec = ablation(table, *variants)
    written = json.loads(json.dumps({"spec": spec.model_dump(mode="json")}))
    if varies:
        with pytest.raises(SpecError, match="ignored the preprocessing"):
            cohorts.refuse_ignored(spec, written)
    else:
        cohorts.refuse_ignored(spec, written)
    cohorts.refuse_ignored(spec, written | {PREPARES: EACH_RECIPE})


def test_a_new_study_takes_the_common_spacing_where_nothing_else_decides_it(table: Path) -> None:
    manifest = read_manifest(table)
    common = spacing_of_table(manifest, (16, 16, 16)).every_mm
    plain = build_spec({"data": str(table), "config": CONFIG})
    notes = quiet()
    assert choose_spacing(plain, manifest, notes) == {"spacing_mm": common}
    assert f"spacing_mm: {common:g} is the smallest" in notes.file.getvalue()  # type: ignore[attr-defined]
    named = plain.model_copy(update={"config": CONFIG | {"spacing_mm": None}})
    searched = search({"search": {"spacing_mm": [None, 1.0]}})
    fixed = search({"search": {"s": {"low": 5, "high": 9}}, "fixed": {"spacing_mm": 1.0}})
    every = ablation(table, ("a", {"spacing_mm": 1.0}), ("b", {"spacing_mm": None}))
    confirmation = ablation(table, ("a", {}), ("b", {}), kind="confirmation")
    for spec in (build_spec(named.model_dump()), searched, fixed, every, confirmation):
        assert choose_spacing(spec, manifest, notes) == {}
    assert choose_spacing(ablation(table, ("a", {}), ("b", {"spacing_mm": 1.0})), manifest, notes)


def test_what_a_study_chose_does_not_make_it_another_study(table: Path, tmp_path: Path) -> None:
    asked = build_spec({"data": str(table), "config": CONFIG})
    files = StudyFiles(tmp_path)
    there = build_spec({"data": str(table), "config": CONFIG | {"spacing_mm": 1.25}})
    written = {"spec": there.model_dump(mode="json")}
    files.write(written | {CHOSEN: {"spacing_mm": 1.25}})
    assert resumed_spec(files, asked).config["spacing_mm"] == 1.25
    files.write(written)
    with pytest.raises(SpecError, match="holds another study"):
        resumed_spec(files, asked)


# A study whose data have moved -----------------------------------------------------------------------------------------


def begun(table: Path, tmp_path: Path) -> tuple[StudySpec, StudyFiles, str]:
    """A study that has begun on `table`: its spec, its files, and the name of its cohort."""
    spec = build_spec(
        {
            "data": str(table),
            "cache": str(tmp_path / "cache"),
            "config": CONFIG | {"spacing_mm": 1.5},
        }
    )
    files = StudyFiles(tmp_path / "study")
    files.root.mkdir()
    made = prepare_study(spec, files, resume=False, notes=quiet())
    files.write({"spec": spec.model_dump(mode="json"), "cohort": made.cohort.name, **made.recorded})
    return spec, files, made.cohort.name


@pytest.mark.parametrize("cache_kept", [True, False])
def test_data_that_moved_are_taken_where_they_are_the_same(
    table: Path, tmp_path: Path, cache_kept: bool
) -> None:
    shutil.copytree(table.parent, tmp_path / "data")
    spec, files, name = begun(tmp_path / "data" / "table.csv", tmp_path)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    if not cache_kept:
        shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ManifestError, match=r"medtune resume .* --data TABLE"):
        prepare_study(spec, files, resume=True, notes=quiet())
    moved = spec.model_copy(update={"data": str(tmp_path / "elsewhere" / "table.csv")})
    notes = quiet()
    found = prepare_study(moved, files, resume=True, notes=notes)
    assert found.identity == name != found.cohort.name
    assert "holds the volumes, labels, subjects and folds that the study began with" in (
        notes.file.getvalue()  # type: ignore[attr-defined]
    )
    files.write({**files.read(), **found.recorded})
    assert files.read_spec() == moved
    again = prepare_study(files.read_spec(), files, resume=True, notes=quiet())
    assert (again.identity, again.recorded) == (name, {}), "it begins no other study"


def test_a_table_that_moved_alone_is_recorded(table: Path, tmp_path: Path) -> None:
    """Its paths are absolute: the volumes are where they were, and the cohort is the same."""
    head, *rows = table.read_text().splitlines()
    absolute = [f"{table.parent / row.partition(',')[0]},{row.partition(',')[2]}" for row in rows]
    (tmp_path / "first.csv").write_text("\n".join([head, *absolute]) + "\n")
    spec, files, name = begun(tmp_path / "first.csv", tmp_path)
    (tmp_path / "first.csv").rename(tmp_path / "second.csv")
    moved = spec.model_copy(update={"data": str(tmp_path / "second.csv")})
    found = prepare_study(moved, files, resume=True, notes=quiet())
    assert found.identity == name == found.cohort.name
    files.write({**files.read(), **found.recorded})
    assert files.read_spec() == moved


@pytest.mark.parametrize("cache_kept", [True, False])
@pytest.mark.parametrize("change", ["label", "subject", "scan", "order"])
def test_data_that_moved_and_changed_are_refused(
    table: Path, tmp_path: Path, change: str, cache_kept: bool
) -> None:
    shutil.copytree(table.parent, tmp_path / "data")
    spec, files, _ = begun(tmp_path / "data" / "table.csv", tmp_path)
    other = tmp_path / "other" / "table.csv"
    (tmp_path / "data").rename(other.parent)
    if not cache_kept:
        shutil.rmtree(tmp_path / "cache")
    head, *rows = other.read_text().splitlines()
    first, last = rows[0].split(","), rows[-1].split(",")
    if change == "label":
        subject = first[2]
        rows = [
            ",".join((path, str(1 - int(label)), who))
            if who == subject
            else f"{path},{label},{who}"
            for path, label, who in (row.split(",") for row in rows)
        ]
    elif change == "subject":
        rows[0] = ",".join((first[0], first[1], "someone-else"))
    elif change == "scan":
        shutil.copy(other.parent / last[0], other.parent / first[0])
    else:
        rows.reverse()
    other.write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(SpecError, match="not the data that the study began with"):
        prepare_study(
            spec.model_copy(update={"data": str(other)}), files, resume=True, notes=quiet()
        )


PLACES = {"split": ["train", "val", "test"], "fold": ["0", "1", "2"]}


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_other_splits_and_folds_than_the_study_began_with_are_refused(
    table: Path, tmp_path: Path, name: str, moved: bool
) -> None:
    shutil.copytree(table.parent, tmp_path / "data")
    file = tmp_path / "data" / "table.csv"
    head, *rows = file.read_text().splitlines()
    place: dict[str, str] = {}
    for label in "01":  # the subjects of a class in turn, so that each place has both
        subjects = dict.fromkeys(row.split(",")[2] for row in rows if row.split(",")[1] == label)
        place |= dict(zip(subjects, itertools.cycle(PLACES[name]), strict=False))
    placed = [f"{row},{place[row.split(',')[2]]}" for row in rows]
    file.write_text("\n".join([f"{head},{name}", *placed]) + "\n")
    spec, files, _ = begun(file, tmp_path)
    prepare_study(spec, files, resume=True, notes=quiet())
    if moved:
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        file = tmp_path / "elsewhere" / "table.csv"
        spec = spec.model_copy(update={"data": str(file)})
        prepare_study(spec, files, resume=True, notes=quiet())
    ((path, _, subject), *_) = (row.split(",") for row in rows)
    given, other = PLACES[name][0], PLACES[name][2]
    changed = [
        f"{row.rpartition(',')[0]},{other}" if row.split(",")[2] == subject else row
        for row in placed
    ]
    file.write_text("\n".join([f"{head},{name}", *changed]) + "\n")
    with pytest.raises(SpecError) as refused:
        prepare_study(spec, files, resume=True, notes=quiet())
    assert f"{path}: {name} {other}, the study has {given}" in str(refused.value)
    file.write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(SpecError, match=f"{name} none, the study has {given}.*; and .* more"):
        prepare_study(spec, files, resume=True, notes=quiet())
    before = files.read()
    del before[PLACED]  # of an earlier version: what the table has now is recorded
    files.write(before)
    assert prepare_study(spec, files, resume=True, notes=quiet()).recorded[PLACED] == {}


def test_other_versions_than_those_a_study_began_with_are_told() -> None:
    now = own_versions()
    assert other_versions(now) is None
    assert other_versions({}) is None, "studies of earlier versions may not have recorded them"
    told = other_versions(now | {"torch": "1.0", "python": "2.7"})
    assert told is not None
    assert f"torch 1.0, here {now['torch']}; python 2.7, here {now['python']}" in told
