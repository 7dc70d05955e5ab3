"""The prepared cohorts that a study needs: one for each way in which its trials prepare volumes.

A study has its own cohort, which the configuration that all trials share prepares. A trial that prepares volumes
otherwise (another spacing, shape, intensity or window) trains on another cohort of the same data, made when it is first
needed and shared by all trials that ask for it. Checked here before the study begins: settings of the
data cannot differ between trials, planned variants are prepared, and the disk has to hold every cohort.
"""

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution

from search_spaces.space import Parameter
from trainables.config import OF_THE_DATA, PREPROCESSING, FineTuneConfig, build_config
from trainables.data.folds import split_rows, thin_folds
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe, bytes_text
from trainables.data.spacing import with_common_spacing
from trainables.data.table_file import ManifestError
from trainables.data.visible import visible
from trainables.data.volumes import (
    VolumesRefused,
    cohort_like,
    cohort_name_like,
    is_moved,
    prepare_cohort,
    prepared_bytes,
    same_volumes,
)
from tune_app.driver.display import print_lines
from tune_app.study.errors import SpecError
from tune_app.study.files import (
    CHOSEN,
    EACH_RECIPE,
    FIRST_COHORT,
    PLACED,
    PREPARES,
    StudyFiles,
    default_cache,
)
from tune_app.study.spec import StudySpec, build_spec

MOST_LISTED = 1000
"""Combinations of preprocessing values that are looked at one by one."""


@dataclass(frozen=True)
class Cohorts:
    """The cohorts of a study besides its own."""

    recipes: tuple[Recipe, ...]
    """Those that can be listed: of planned variants, or of all combinations that a search chooses from."""
    most: int
    """How many of them the study can need at most."""

    def bytes(self, volumes: int) -> int:
        """Return how many bytes they take at most, for a table of `volumes` rows."""
        sizes = sorted((prepared_bytes(volumes, one) for one in self.recipes), reverse=True)
        if not sizes:
            return 0
        return sum(sizes[: self.most]) + max(0, self.most - len(sizes)) * sizes[0]


def plan_cohorts(spec: StudySpec) -> Cohorts:
    """Return the cohorts that trials of `spec` need besides the study's own.

    Raises SpecError where trials differ in what belongs to the data: all use the same table.
    """
    base = build_config(spec.shared)
    own = Recipe.from_config(base)
    if spec.kind != "search":
        _refuse_other_data(spec, base)
        recipes = [Recipe.from_config(spec.config_of(one.overrides)) for one in spec.planned]
        others = _distinct(recipes, own)
        return Cohorts(tuple(others), len(others))
    parameters = [
        one
        for one in spec.resolved_space().parameters.values()
        if one.hyperparameter in PREPROCESSING
    ]
    if math.prod(_count(one) for one in parameters) > MOST_LISTED:
        # The sizes are those of the ends: nothing but the shape decides them, and a shape has choices.
        options: list[list[Any]] = [list(one.ends) for one in parameters]
        return Cohorts(tuple(_distinct(_combined(spec, parameters, options), own)), spec.trials)
    listed = _distinct(_combined(spec, parameters, [_values(one) for one in parameters]), own)
    return Cohorts(tuple(listed), min(len(listed), spec.trials))


def _refuse_other_data(spec: StudySpec, base: FineTuneConfig) -> None:
    problems: dict[str, None] = {}
    for trial in spec.planned:
        config = spec.config_of(trial.overrides)
        for name in OF_THE_DATA:
            if getattr(config, name) != getattr(base, name):
                problems[
                    f"variant {trial.variant}: {name}={getattr(config, name)}, the study has {getattr(base, name)}: it "
                    f"belongs to the data and is the same in all variants; set it for all with --set {name}=..., or "
                    "make a separate study"
                ] = None
    if problems:
        raise SpecError(list(problems))


def _distinct(recipes: list[Recipe], own: Recipe) -> list[Recipe]:
    """The recipes whose volumes differ from those of `own` and of each other."""
    found: list[Recipe] = []
    for recipe in recipes:
        if not any(same_volumes(recipe, other) for other in (own, *found)):
            found.append(recipe)
    return found


def _combined(
    spec: StudySpec, parameters: list[Parameter], options: list[list[Any]]
) -> list[Recipe]:
    return [
        Recipe.from_config(
            build_config(
                {
                    **spec.shared,
                    **{one.hyperparameter: v for one, v in zip(parameters, values, strict=True)},
                }
            )
        )
        for values in itertools.product(*options)
    ]


def _count(parameter: Parameter) -> float:
    """How many values a parameter can take; infinite for a range without steps."""
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return len(parameter.choices)
    if distribution.step is None:
        return math.inf
    return float(round((distribution.high - distribution.low) / distribution.step) + 1)


def _values(parameter: Parameter) -> list[Any]:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return list(parameter.choices)
    assert distribution.step is not None
    return [
        distribution.low + number * distribution.step for number in range(int(_count(parameter)))
    ]


def choose_spacing(spec: StudySpec, manifest: Manifest, notes: Any) -> dict[str, Any]:
    """Return the entries that a new study adds to its `config`: the spacing at which all volumes fit, where nothing else sets it.

    Nothing for a study whose config, space or every variant names a spacing, None included, and for a confirmation, which
    has the spacing of its search. The choice and its consequence are printed.
    """
    if spec.kind == "confirmation" or "spacing_mm" in spec.shared:
        return {}
    if spec.kind == "search" and "spacing_mm" in spec.resolved_space().parameters:
        return {}
    if spec.planned and all("spacing_mm" in trial.overrides for trial in spec.planned):
        return {}
    _, found = with_common_spacing(build_config(spec.shared), manifest)
    assert found is not None
    print_lines(notes, found.lines())
    return {"spacing_mm": found.every_mm}


def choose_classes(spec: StudySpec, manifest: Manifest) -> dict[str, Any]:
    """Return the names of the classes that a new study takes from the table's column `class`, where nothing else names them.

    Nothing for a confirmation, which has those of its search.
    """
    if spec.kind == "confirmation" or "classes" in spec.shared or manifest.classes is None:
        return {}
    return {"classes": manifest.classes}


@dataclass(frozen=True)
class Prepared:
    """A study whose data are there."""

    spec: StudySpec
    """With the values that the study itself has chosen in its `config`."""
    base: FineTuneConfig
    """What all trials share."""
    cohort: Path
    """Folder of the study's own cohort."""
    further_bytes: int
    """Of the other cohorts, at most."""
    recorded: dict[str, Any]
    """For study.json: of a new study, or of one whose data have moved."""
    identity: str
    """Name of the cohort with which the study began; its data are the same, wherever they are now."""


def prepare_study(spec: StudySpec, files: StudyFiles, *, resume: bool, notes: Any) -> Prepared:
    """Return the study with its data prepared, as far as they are known before it begins.

    Raises SpecError where the data are not those that the study began with, the disk cannot hold its cohorts, or a planned
    variant cannot be prepared; ManifestError and CohortError for the data.
    """
    base = build_config(spec.shared)
    manifest = _read_table(spec, base, files, resume=resume)
    check_folds(spec, manifest)
    print_lines(notes, thin_folds(manifest, base))
    chosen = (
        {} if resume else choose_spacing(spec, manifest, notes) | choose_classes(spec, manifest)
    )
    if chosen:
        spec = build_spec({**spec.model_dump(mode="json"), "config": {**spec.config, **chosen}})
        base = build_config(spec.shared)
    first = prepare_cohort(manifest, Recipe.from_config(base), Path(spec.cache or default_cache()))
    written: dict[str, Any] = {PREPARES: EACH_RECIPE, CHOSEN: chosen, PLACED: placement(manifest)}
    identity = first.name
    if resume:
        written, identity = _same_data(spec, files, first, manifest, notes)
    cohorts, volumes = plan_cohorts(spec), len(manifest.rows)
    check_room(cohorts, first, volumes)
    if spec.kind != "search":
        prepare_planned(spec, cohorts, manifest, first, notes)
    elif cohorts.most:
        notes.print(
            f"preprocessing: up to {cohorts.most} further ways to prepare the volumes, each when it is first needed, "
            f"{bytes_text(cohorts.bytes(volumes))} in {first.parent} at most",
            soft_wrap=not notes.is_terminal,
        )
    return Prepared(spec, base, first, cohorts.bytes(volumes), written, identity)


def _read_table(
    spec: StudySpec, base: FineTuneConfig, files: StudyFiles, *, resume: bool
) -> Manifest:
    """The study's table. Raises ManifestError, with the remedy where the data of a study that is resumed have moved."""
    try:
        return read_manifest(Path(spec.data), num_classes=base.num_classes, classes=base.classes)
    except ManifestError as error:
        if not resume:
            raise
        raise ManifestError(
            [
                *error.problems,
                f"if the data have moved, name their table: medtune resume {files.root} --data TABLE (they are checked to "
                "be the same)",
            ]
        ) from None


def placement(manifest: Manifest) -> dict[str, list[Any]]:
    """Return the columns `split` and `fold` as study.json holds them, None where a cell is empty; no column that is empty."""
    columns = {name: manifest.rows[name].astype(object) for name in ("split", "fold")}
    return {
        name: rows.where(rows.notna(), None).tolist()
        for name, rows in columns.items()
        if rows.notna().any()
    }


def _same_data(
    spec: StudySpec, files: StudyFiles, first: Path, manifest: Manifest, notes: Any
) -> tuple[dict[str, Any], str]:
    """Return what changes in study.json, and the name of the cohort with which the study began.

    Raises SpecError where `first` does not hold its data, or the table `manifest` has other splits or folds.
    """
    there = files.read()
    recorded, before = str(there.get("cohort")), str(there["spec"].get("data"))
    identity = str(there.get(FIRST_COHORT) or recorded)
    if recorded == first.name and before == spec.data:
        return _same_placement(there, manifest, spec.data), identity
    if recorded != first.name and not is_moved(recorded, first, before, spec.data):
        raise SpecError(
            f"{spec.data}: not the data that the study began with (cohort {recorded}, now {first.name}): files, labels or "
            "subjects differ, or their order: start a new study, or name the table of the same data with --data"
        )
    placed = _same_placement(there, manifest, spec.data)
    compared = "volumes, labels and subjects" if placed else "volumes, labels, subjects and folds"
    notes.print(
        f"data: {spec.data} holds the {compared} that the study began with ({before}); study.json names it "
        "from now on",
        soft_wrap=True,
        markup=False,
    )
    moved = {**there["spec"], "data": spec.data}
    return {"spec": moved, "cohort": first.name, FIRST_COHORT: identity, **placed}, identity


def _same_placement(there: Mapping[str, Any], manifest: Manifest, table: str) -> dict[str, Any]:
    """Return what a study of an earlier version, which has not recorded its splits and folds, adds to study.json; else nothing.

    Raises SpecError that names the volumes whose split or fold differs from what the study recorded.
    """
    now, then = placement(manifest), there.get(PLACED)
    if then is None:
        return {PLACED: now}
    empty = [None] * len(manifest.rows)
    differ = [
        f"{path}: {name} {_cell(arrived)}, the study has {_cell(expected)}"
        for name in ("split", "fold")
        for path, arrived, expected in zip(
            manifest.rows["path"], now.get(name, empty), then.get(name, empty), strict=True
        )
        if arrived != expected
    ]
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise SpecError(
            f"{table}: splits or folds differ from those that the study began with: "
            f"{'; '.join(map(visible, differ[:3]))}{more}: restore the columns split and fold, or start a new study"
        )
    return {}


def _cell(value: Any) -> str:
    return "none" if value is None else str(value)


# Before the study begins -----------------------------------------------------------------------------------------------


def check_folds(spec: StudySpec, manifest: Manifest) -> None:
    """Raise SpecError where the table has no such fold as a planned trial asks for, or not with both classes in it."""
    asked: dict[tuple[int, int, bool], str] = {}
    for trial in spec.planned:
        config = spec.config_of(trial.overrides)
        asked.setdefault((config.fold, config.num_folds, config.cross_validate), trial.variant)
    problems: list[str] = []
    for (fold, num_folds, cross_validate), variant in asked.items():
        try:
            split_rows(manifest, fold=fold, num_folds=num_folds, cross_validate=cross_validate)
        except ManifestError as error:
            problems += [f"variant {variant}: {problem}" for problem in error.problems]
    if problems:
        raise SpecError(problems)


def check_room(cohorts: Cohorts, first: Path, volumes: int) -> None:
    """Raise SpecError where the disk of the cache cannot hold the cohorts that are not there yet.

    `first` is the folder of the study's own cohort, of `volumes` rows.
    """
    missing = [
        recipe
        for recipe in cohorts.recipes
        if not (first.parent / cohort_name_like(first, recipe)).exists()
    ]
    there = len(cohorts.recipes) - len(missing)
    needed = Cohorts(tuple(missing), max(0, cohorts.most - there)).bytes(volumes)
    free = shutil.disk_usage(first.parent).free
    if needed > free:
        raise SpecError(
            [
                f"preprocessing: up to {cohorts.most} ways to prepare {volumes} volumes need {bytes_text(needed)} in the "
                f"cache {first.parent}, {bytes_text(free)} are free: give choices instead of a range, or fewer of them, "
                "a smaller volume_shape, or another cache"
            ]
        )


def prepare_planned(
    spec: StudySpec, cohorts: Cohorts, manifest: Manifest, first: Path, notes: Any
) -> None:
    """Prepare the cohorts of planned variants, so that one that cannot be had is known before anything runs.

    Raises SpecError that names the variants and every volume that their preprocessing leaves unusable.
    """
    own = Recipe.from_config(build_config(spec.shared))
    problems: list[str] = []
    for recipe in cohorts.recipes:
        names = ", ".join(dict.fromkeys(_variants_of(spec, recipe)))
        if not (first.parent / cohort_name_like(first, recipe)).exists():
            notes.print(
                f"preparing volumes for {names}: {differences(recipe, own)}", soft_wrap=True
            )
        try:
            cohort_like(manifest, recipe, first, own)
        except VolumesRefused as error:
            told = f"variant {names} ({differences(recipe, own)})"
            problems += [f"{told}: {problem}" for problem in error.problems]
    if problems:
        raise SpecError(problems)


def _variants_of(spec: StudySpec, recipe: Recipe) -> Iterator[str]:
    for trial in spec.planned:
        config = spec.config_of(trial.overrides)
        if same_volumes(Recipe.from_config(config), recipe):
            yield trial.variant


def differences(recipe: Recipe, own: Recipe) -> str:
    """Return in words how a recipe differs from the study's own: `spacing_mm=1x1x1, intensity=window`."""

    def shown(value: object) -> str:
        return "x".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)

    return ", ".join(
        f"{name}={shown(getattr(recipe, name))}"
        for name in PREPROCESSING
        if getattr(recipe, name) != getattr(own, name)
    )


# Studies of earlier versions -------------------------------------------------------------------------------------------


def refuse_preprocessing(spec: StudySpec, written: Mapping[str, Any] | None) -> None:
    """Raise SpecError for trials that differ in what belongs to the data, and see `refuse_ignored`.

    `written`: study.json of a study that is resumed; None for a new one.
    """
    if written is not None:
        refuse_ignored(spec, written)
    plan_cohorts(spec)


def refuse_ignored(spec: StudySpec, written: Mapping[str, Any]) -> None:
    """Raise SpecError for a study of an earlier version whose trials were to differ in preprocessing.

    That version prepared all of them by `config` alone: trials that follow would not be comparable.
    """
    if written.get(PREPARES) == EACH_RECIPE:
        return
    as_prepared = Recipe.from_config(build_config(spec.config))
    own = Recipe.from_config(build_config(spec.shared))
    if not same_volumes(own, as_prepared) or plan_cohorts(spec).recipes:
        raise SpecError(
            [
                "this study was started by a version that ignored the preprocessing of single trials, of variants and of "
                "the space: all its trials had the volumes of `config`. Its results are not about preprocessing; start "
                "a new study"
            ]
        )
