"""Ablation: named variants over seeds and folds, and what each changes against its reference.

All runs of a variant differ in seed and fold only, and so do the runs of two variants that are compared: differences
are paired. Nothing is stopped early, because a comparison needs whole runs. The effects are computed in
`Study.effects`; here they become a table and sentences, which also name the variants that the data do not distinguish.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_spaces.ablations import VARIANT_SETS, Variants, reference, variants
from trainables.config import FineTuneConfig, Scalar, build_config
from trainables.data.folds import Split, split_rows
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.storage import absolute
from trainables.data.table_file import ManifestError
from trainables.objective import OBJECTIVES
from tune_app.results.effects import COLLAPSES
from tune_app.results.study import Study
from tune_app.results.tables import came_back, faulty, plain_table
from tune_app.results.text import format_value, printable
from tune_app.study.asked import AskedAblation
from tune_app.study.errors import SpecError
from tune_app.study.rows import ENDED
from tune_app.study.spec import PlannedTrial, StudySpec, absolute_paths, build_spec
from tune_app.study.yaml_text import YamlError, load_yaml

DECIDED = {"fold": "folds", "cross_validate": "folds", "seed": "seeds"}
"""Hyperparameters that a config of all runs must not hold -> what decides them instead."""

ADJUSTED_LEVEL = 0.05


# The plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folds:
    """Which folds a plan runs, and how the table is cut into them."""

    numbers: tuple[int, ...]
    num_folds: int
    cross_validate: bool
    """Folds over train and val rows of a table that has a split."""
    own_split: bool = False
    """The table's own val rows validate: there are no folds."""

    def overrides(self, fold: int) -> dict[str, Scalar]:
        """Return what puts a trial on `fold`."""
        return {"fold": fold, "cross_validate": self.cross_validate, "num_folds": self.num_folds}

    def split(self, manifest: Manifest, fold: int) -> Split:
        """Return how `fold` cuts the table. Raises ManifestError where a part lacks a class."""
        return split_rows(
            manifest, fold=fold, num_folds=self.num_folds, cross_validate=self.cross_validate
        )

    @property
    def text(self) -> str:
        """The number of folds in words."""
        if self.own_split:
            return "the table's own split"
        return f"{len(self.numbers)} fold{'s' if len(self.numbers) != 1 else ''}"


def choose_folds(manifest: Manifest, asked: str, num_folds: int) -> Folds:
    """Return the folds that `asked` names: `all`, `own` (the table's own val rows), or numbers such as `0,1`.

    Folds are those of the table's fold column, or `num_folds` made ones; test rows are in none of them. Where the table
    has val rows, folds are made over train and val rows together. Raises SpecError naming the folds there are, and
    ManifestError when a fold lacks a class: before anything runs.
    """
    rows = manifest.rows
    has_own = bool((rows["split"] == "val").any())
    if asked.strip() == "own":
        if not has_own:
            raise SpecError(
                f"{manifest.table}: folds=own needs rows with split=val, and there are none: use all"
            )
        return Folds((0,), num_folds, cross_validate=False, own_split=True)
    given = rows.loc[rows["split"] != "test", "fold"]
    there = tuple(range(num_folds))
    if len(given) and given.notna().all():
        there = tuple(sorted({int(number) for number in given}))
        num_folds = max(there) + 1
    numbers = there if asked.strip() == "all" else _numbers(asked)
    if unknown := [str(number) for number in numbers if number not in there]:
        raise SpecError(
            f"no fold {', '.join(unknown)}: there are {', '.join(map(str, there))} (or all, or own)"
        )
    folds = Folds(numbers, num_folds, cross_validate=has_own)
    _check_classes(manifest, folds)
    return folds


def _check_classes(manifest: Manifest, folds: Folds) -> None:
    problems: list[str] = []
    for number in folds.numbers:
        try:
            folds.split(manifest, number)
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"folds={text!r}: all, own, or numbers such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise SpecError(f"folds={text!r}: each fold once")
    return numbers


def plan(
    chosen: Mapping[str, Mapping[str, Scalar]], folds: Folds, seeds: Iterable[int]
) -> list[PlannedTrial]:
    """Return variants x seeds x folds. Variants change fastest: whatever an interrupted plan has run is paired."""
    return [
        PlannedTrial(variant=name, overrides={**overrides, **folds.overrides(fold), "seed": seed})
        for seed in seeds
        for fold in folds.numbers
        for name, overrides in chosen.items()
    ]


def read_variants(text: str, epochs: int) -> Variants:
    """Return a named set of variants, or those of a YAML file that maps names to overrides, the reference first.

    A relative `pretrained_path` in the file starts at the file's folder.

    Raises SpecError for neither.
    """
    path = Path(text)
    if text not in VARIANT_SETS and (path.suffix in (".yaml", ".yml") or path.is_file()):
        return _written_variants(path)
    try:
        return variants(text, epochs)
    except ValueError as error:
        raise SpecError(f"{error}; or a YAML file of your own") from None


def _written_variants(path: Path) -> Variants:
    try:
        written = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text: {error}") from None
    except YamlError as error:
        raise SpecError(f"{path}: {error}") from None
    example = "write `reference: {}` and below it `other: {max_m: 0.3}`"
    if not isinstance(written, dict) or len(written) < 2:
        raise SpecError(f"{path}: two or more variants by name, the reference first: {example}")
    if bad := [
        str(name) for name, overrides in written.items() if not isinstance(overrides, dict | None)
    ]:
        raise SpecError(
            f"{path}: {', '.join(bad)}: a variant is a mapping of hyperparameters to values: {example}"
        )
    if bad := [
        f"{name}: {hyperparameter} is {value!r:.100}"
        for name, overrides in written.items()
        for hyperparameter, value in (overrides or {}).items()
        if not isinstance(value, str | int | float | bool | None)
    ]:
        raise SpecError(f"{path}: {'; '.join(bad)}: one value for each hyperparameter: {example}")
    return {
        str(name): absolute_paths(overrides or {}, path.parent)
        for name, overrides in written.items()
    }


def ablation_spec(
    data: Path,
    chosen: Variants,
    *,
    seeds: int,
    first_seed: int = 0,
    folds: str = "all",
    config: Mapping[str, Any],
    **fields: Any,
) -> StudySpec:
    """Return the study that runs every variant on every fold with every seed (first_seed .. first_seed + seeds - 1).

    `config` holds what all runs share, `fields` are those of StudySpec. Raises SpecError, also where `config` names
    a hyperparameter that the variants or the plan decide and that would be without effect, and ManifestError for the table.
    """
    shared = _checked(chosen, seeds, first_seed, config)
    manifest = read_manifest(data, num_classes=shared.num_classes, classes=shared.classes)
    return _ablation_on(
        choose_folds(manifest, folds, shared.num_folds),
        absolute(data),
        chosen,
        range(first_seed, first_seed + seeds),
        config,
        fields,
    )


def check_without_table(asked: AskedAblation) -> StudySpec:
    """Return the ablation on a single fold, checked but for the table, which another machine sees. Raises SpecError."""
    shared = _checked(asked.variants, asked.seeds, asked.first_seed, asked.config)
    if asked.folds.strip() not in ("all", "own"):
        _numbers(asked.folds)
    one = Folds((0,), shared.num_folds, cross_validate=False)
    return _ablation_on(one, asked.data, asked.variants, (0,), asked.config, asked.fields)


def _checked(
    chosen: Variants, seeds: int, first_seed: int, config: Mapping[str, Any]
) -> FineTuneConfig:
    """Return what all runs share. Raises SpecError for what needs no table to be seen."""
    if problems := [
        f"{name}={value}: {least} or more"
        for name, value, least in (("seeds", seeds, 1), ("first_seed", first_seed, 0))
        if value < least
    ]:
        raise SpecError(problems)
    decided = {name: "the variants" for overrides in chosen.values() for name in overrides}
    decided |= DECIDED
    if clash := [
        f"{name} is decided by {decided[name]}: leave it out" for name in config if name in decided
    ]:
        raise SpecError(clash)
    return build_config(config)


def _ablation_on(
    folds: Folds,
    data: str,
    chosen: Variants,
    seeds: Iterable[int],
    config: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> StudySpec:
    return build_spec(
        {
            **fields,
            "kind": "ablation",
            "data": data,
            "config": dict(config),
            "planned": plan(chosen, folds, seeds),
        }
    )


# What came of it -------------------------------------------------------------------------------------------------------


def comparisons(study: Study) -> list[pd.DataFrame]:
    """Return the effects of the study's variants, a table for each reference; none before two variants have started.

    The reference is the first variant of the plan. Where a plan holds both the baseline and `all-fixes`, variants
    that leave a fix out are read against all fixes.
    """
    begun = set(study.trials_full["variant"].dropna())
    names = [name for name in planned_variants(study.spec) if name in begun]
    if len(names) < 2:
        return []
    return [only(study, group).effects(baseline=group[0]) for group in _compared(names)]


def _compared(names: list[str]) -> list[list[str]]:
    """The variants in the groups that are compared, the reference first in each."""
    all_fixes = reference("leave-one-out")
    without = [name for name in names if name.startswith("without-")]
    if all_fixes not in names or not without or names[0] == all_fixes:
        return [names]
    rest = [name for name in names if name not in without]
    return [*([rest] if len(rest) > 1 else []), [all_fixes, *without]]


def planned_variants(spec: StudySpec) -> list[str]:
    """Return the variants of a plan, in its order."""
    return list(dict.fromkeys(trial.variant for trial in spec.planned))


def only(
    study: Study, names: Iterable[str] | None = None, folds: Iterable[int] | None = None
) -> Study:
    """Return the study with the trials of these variants and folds alone; None lets all through."""
    from dataclasses import replace

    trials = study.trials_full
    if names is not None:
        trials = trials[trials["variant"].isin(list(names))]
    if folds is not None:
        trials = trials[trials["fold"].isin(list(folds))]
    return replace(study, trials_full=trials)


def print_ablation(study: Study, console: Console) -> None:
    """Print each variant's effect and its meaning, 80 columns wide."""
    console.print(_plan_text(study))
    console.print(f"value: {OBJECTIVES[study.spec.objective].title}")
    tables = comparisons(study)
    for effects in tables:
        console.print()
        console.print(effects_table(effects))
        console.print()
        for line in [*effect_lines(effects), *last_epoch_lines(study, effects)]:
            console.print(line, markup=False)
    lines = [
        *run_lines(study),
        *(["no effects yet: two variants have to begin"] if not tables else []),
    ]
    for line in lines:
        console.print(line, markup=False)


def _plan_text(study: Study) -> str:
    planned = study.spec.planned
    parts = [f"{len({trial.variant for trial in planned})} variants"]
    for name in ("seed", "fold"):
        count = len({trial.overrides.get(name) for trial in planned})
        parts.append(f"{count} {name}{'s' if count != 1 else ''}")
    ended = int(study.trials_full["state"].isin(ENDED).sum())
    runs = f"{len(planned)} runs" if ended == len(planned) else f"{ended} of {len(planned)} runs"
    return f"{runs}: {' x '.join(parts)}, {study.spec.epochs} epochs each"


def effects_table(effects: pd.DataFrame) -> Table:
    """Return the effects as a Rich table of at most 80 columns (names up to 23 characters)."""
    table = plain_table()
    table.add_column("variant", max_width=23, overflow="ellipsis", no_wrap=True, vertical="bottom")
    for head in ("value", "difference [95 % CI]", "pairs", "col-\nlapsed"):
        table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    table.add_column("", no_wrap=True)
    for row in effects.to_dict("records"):
        is_reference = row["variant"] == effects.attrs["baseline"]
        table.add_row(
            Text(printable(str(row["variant"]))),
            format_value("auc", row["value"]),
            "reference" if is_reference else difference_text(row),
            "" if is_reference else str(row["pairs"]),
            f"{row['collapsed']}/{row['runs']}" if row["collapsed"] else "-",
            ""
            if is_reference
            else {"cannot tell": "unclear"}.get(str(row["call"]), str(row["call"])),
        )
    return table


def difference_text(row: Mapping[Any, Any]) -> str:
    """Return `+0.031 [+0.010, +0.052]`, without the interval where there is none."""
    if pd.isna(row["mean"]):
        return "-"
    mean = f"{row['mean']:+.3f}"
    return mean if pd.isna(row["low"]) else f"{mean} [{row['low']:+.3f}, {row['high']:+.3f}]"


def effect_lines(effects: pd.DataFrame) -> list[str]:
    """Return the effects in words, and the variants whose effect the data do not settle."""
    reference_name = effects.attrs["baseline"]
    others = effects[effects["variant"] != reference_name].to_dict("records")
    lines = []
    for row in others:
        if row["call"] == "cannot tell":
            continue
        line = (
            f"{row['variant']} is {row['call']} than {reference_name}: "
            f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        )
        if len(others) > 1 and row["p_holm"] >= ADJUSTED_LEVEL:
            line += f"; less sure as one of {len(others)} comparisons (Holm p {row['p_holm']:.2f})"
        lines.append(line)
    lines += _unclear_lines([row for row in others if row["call"] == "cannot tell"], reference_name)
    return [*lines, f"({effects.attrs['how']})"]


def _unclear_lines(unclear: Sequence[Mapping[Any, Any]], reference_name: str) -> list[str]:
    groups: dict[str, list[Mapping[Any, Any]]] = {}
    for row in unclear:
        groups.setdefault(_why_unclear(row), []).append(row)
    lines = []
    for why, text in _UNCLEAR.items():
        if (rows := groups.get(why)) is None:
            continue
        if why == "apart":
            lines += _no_call_lines(rows, reference_name)
            continue
        names = ", ".join(str(row["variant"]) for row in rows)
        widest = max((row["high"] - row["low"]) / 2 for row in rows)
        lines.append(text.format(names=names, reference=reference_name, widest=widest))
    return lines


_UNCLEAR = {
    "same": "{names} and {reference} score the same in every pair: no run reads what is changed.",
    "apart": "",
    "zero": "The data do not distinguish {names} from {reference}: their intervals hold zero, and a difference of less "
    "than about {widest:.3f} would not show in so few runs.",
    "alike": "The data do not distinguish {names} from {reference}: the difference is the same in every fold, "
    "which leaves no spread to judge it by. Give more seeds or folds.",
    "single": "The data do not distinguish {names} from {reference}: one pair has no interval. Give more "
    "seeds or folds.",
    "none": "No completed pair yet with {reference}: {names}",
}
"""Why a comparison has no call -> what is printed of those variants, in this order; see `_no_call_lines` for `apart`."""


def _why_unclear(row: Mapping[Any, Any]) -> str:
    if not row["pairs"]:
        return "none"
    if pd.isna(row["low"]):
        return "single" if row["pairs"] == 1 else "alike"
    if row["low"] == row["high"] == 0:
        return "same"
    return "apart" if row["low"] > 0 or row["high"] < 0 else "zero"


def _no_call_lines(apart: Sequence[Mapping[Any, Any]], reference_name: str) -> list[str]:
    """Why differences whose interval excludes zero are not called: one split, or runs that ended without a score."""
    lines = []
    if untested := [row for row in apart if pd.isna(row["p"])]:
        told = ", ".join(f"{row['variant']} {difference_text(row)}" for row in untested)
        lines.append(
            f"On this one fold, the seeds differ less than: {told} (from {reference_name}). That is no test: all runs share "
            "its volumes. Give more folds."
        )
    for row in apart:
        if not pd.isna(row["p"]):
            whose = row["variant"] if row["unscored"] else reference_name
            lines.append(
                f"{row['variant']} and {reference_name} differ by {difference_text(row)}, but runs of {whose} ended without "
                "a score: the comparison holds only those that came through, and calls neither better."
            )
    return lines


def last_epoch_lines(study: Study, effects: pd.DataFrame) -> list[str]:
    """Return where the last epoch disagrees with the objective, which forgives a run that collapses late."""
    reference_name = str(effects.attrs["baseline"])
    if OBJECTIVES[study.spec.objective].reduction == "last":
        return []
    column = OBJECTIVES[study.spec.objective].column
    last = only(study, effects["variant"]).effects(f"last_{column}", baseline=reference_name)
    both = zip(effects.to_dict("records"), last.to_dict("records"), strict=True)
    other = [
        f"{row['variant']} {difference_text(row)}"
        for first, row in both
        if row["call"] != first["call"]
    ]
    if not other:
        return []
    return [f"In the last epoch instead of the best, it reads otherwise for: {'; '.join(other)}"]


def run_lines(study: Study) -> list[str]:
    """Return what went wrong in the runs, a line a variant, and which runs are in no pair."""
    trials = study.trials_full
    told = [
        f"  {variant}: {found}"
        for variant in planned_variants(study.spec)
        if (found := _diagnoses(trials[trials["variant"] == variant]))
    ]
    lines = ["Diagnoses:", *told] if told else []
    if failed := _named(trials[trials["state"] == "failed"]):
        lines.append(f"failed, and in no pair: {failed}")
    if empty := _named(trials[(trials["state"] == "completed") & trials["objective"].isna()]):
        lines.append(
            f"without a finite score, and in no pair: {empty}; their variant is not called better"
        )
    return lines


def _named(runs: pd.DataFrame) -> str:
    return ", ".join(f"{run.trial} ({run.variant})" for run in runs.itertuples())


def _diagnoses(own: pd.DataFrame) -> str:
    """What went wrong in the runs of a variant; an empty text for nothing."""
    sick = own[faulty(own)]
    healed = own.loc[came_back(own), "healed_epochs"]
    if sick.empty and healed.empty:
        return ""
    told = [f"{len(healed)} for {_range(healed)} epochs, and came back"] if len(healed) else []
    for verdict, rows in sick.groupby("verdict", observed=True, sort=False):
        since = rows["since_epoch"].dropna()
        when = f" (since epoch {_range(since)})" if len(since) else ""
        told.append(f"{len(rows)} {str(verdict).replace('_', ' ')}{when}")
    collapsed = int(sick["verdict"].isin(COLLAPSES).sum())
    return f"{collapsed} of {len(own)} runs collapsed for good; {', '.join(told)}"


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
