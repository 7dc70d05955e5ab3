"""Confirmation: the best of a search run again on all folds and new seeds, and the one look at the test rows.

A search picks the best of many noisy values, so its winner's own value is too good: partly luck of the seed, partly
luck of the fold it was chosen on. Here the candidates start from seeds that the search never used, and are judged on
rows that it did not choose by, against the documented settings on the same folds and seeds. That takes two unseen folds:
with fewer there is an interval over subjects, and no winner. A winner is one whose difference holds after correction for having been picked as the best of several (Holm 1979, over all that are compared
with the documented settings). Without one the documented settings stay, and the report states it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_spaces.fixes import all_fixes, documented_after
from trainables.config import OF_THE_DATA, PREPROCESSING, Scalar, build_config
from trainables.data.manifest import read_manifest
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import (
    ADJUSTED_LEVEL,
    choose_folds,
    difference_text,
    only,
    plan,
    planned_variants,
    run_lines,
)
from tune_app.compare.expected import CANDIDATE, Together, candidates_together, expected_means
from tune_app.compare.paired_auc import PairedSplit, paired_difference
from tune_app.compare.seen_rows import (
    ValidationScores,
    folds_with,
    read_scores,
    rows_that_chose,
    unseen_rows,
    whole_unseen_folds,
)
from tune_app.compare.test_record import read_test_record, score_lines, test_file
from tune_app.results.effects import COLLAPSES, interval_over_folds
from tune_app.results.study import Study
from tune_app.results.tables import plain_table
from tune_app.results.text import format_value, printable
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import ENDED
from tune_app.study.spec import StudySpec, build_spec

REFERENCE = "documented"
"""Variant that runs the document's recommended settings; the others are compared with it."""

OF_SEARCHES = (
    "hours",
    "gpu_hours",
    "confirm_share",
    "space",
    "planned",
    "trials",
    "seed",
    "sampler",
    "prior",
    "warm_start",
    "warm_start_from",
    "storage",
    "policy",
)
"""Fields of a spec that mean nothing in a confirmation."""


# The plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """The candidates that a confirmation runs in addition to the documented settings and the defaults."""

    overrides: dict[str, dict[str, Scalar]]
    """By variant: CANDIDATE and the trial's id in the search."""
    notes: list[str]
    """Trials that were passed over, and why."""


def choose_candidates(search: Study, top: int, *, defaults: bool = True) -> Candidates:
    """Return the best `top` configurations of a search: whole, sound runs, each configuration once.

    Left out: trials that were stopped or failed, those that collapsed, and the documented and (with `defaults`) the default
    settings, which a confirmation runs anyway. Raises SpecError when nothing is left.
    """
    epochs = search.spec.epochs
    known = {setting_key(search.spec, documented_after(epochs)): "the documented settings"}
    if defaults:
        known[setting_key(search.spec, all_fixes(epochs))] = "the default settings"
    trials = search.ranked
    whole = trials[(trials["state"] == "completed") & trials["objective"].notna()]
    sound = whole[~whole["verdict"].isin(COLLAPSES)]
    found = Candidates({}, [])
    for trial in sound["trial"]:
        if len(found.overrides) == top:
            break
        overrides = {
            name: value
            for name, value in search.record(str(trial))["overrides"].items()
            if name != "seed"
        }
        setting = setting_key(search.spec, overrides)
        if setting in known:
            found.notes.append(f"trial {trial} is {known[setting]}: run as such")
            continue
        known[setting] = f"the same as trial {trial}"
        found.overrides[f"{CANDIDATE}{trial}"] = overrides
    if not found.overrides:
        raise SpecError(
            f"{search.path}: no trial to confirm: {len(trials)} trials, {len(whole)} completed with a score, "
            f"{len(whole) - len(sound)} of these collapsed"
        )
    if len(found.overrides) < top:
        found.notes.append(
            f"the search has {len(found.overrides)} configurations to confirm, not {top}"
        )
    unended = int((~trials["state"].isin(ENDED)).sum())
    if unended:
        found.notes.append(
            f"{unended} trials of the search have not ended; `medtune resume {quote(str(search.path))}` ends them"
        )
    return found


def setting_key(spec: StudySpec, overrides: Mapping[str, Any]) -> str:
    """A text that is equal for runs which differ in fold and seed only."""
    return build_config({**shared_config(spec), **overrides, "fold": 0, "seed": 0}).hash()


def shared_config(spec: StudySpec) -> dict[str, Any]:
    """Return what all runs of a confirmation of `spec` hold: its `config`, and what its space fixes of data and volumes.

    Were the documented settings to run on volumes that the space prepares otherwise, the difference would not be theirs.
    """
    of_space = {
        name: value
        for name, value in spec.shared.items()
        if name in (*PREPROCESSING, *OF_THE_DATA, "epochs")
    }
    # A search without a spacing, of a version that did not choose one, scaled each volume separately.
    return {"spacing_mm": None, **of_space, **spec.config}


def confirmation_spec(
    search: Study,
    *,
    top: int = 3,
    folds: str = "all",
    seeds: int = 3,
    defaults: bool = True,
    **fields: Any,
) -> tuple[StudySpec, list[str]]:
    """Return the study that confirms `search`, and notes for the user.

    Variants: the documented settings, with `defaults` the defaults, and the best `top` configurations. Seeds are `seeds`
    new ones, since a run repeated with the seed it was chosen by would repeat its luck. `fields` go before the search's
    own. Raises SpecError when `search` is none, is running or has nothing to confirm, and ManifestError for the table.
    """
    chosen = candidates_to_run(search, top, seeds, defaults=defaults)
    spec = search.spec
    config = shared_config(spec)
    shared = build_config(config)
    manifest = read_manifest(
        Path(spec.data), num_classes=shared.num_classes, classes=shared.classes
    )
    where = choose_folds(manifest, folds, shared.num_folds)
    variants = {
        REFERENCE: documented_after(spec.epochs),
        **({"defaults": all_fixes(spec.epochs)} if defaults else {}),
        **chosen.overrides,
    }
    first_seed = int(search.trials_full["seed"].max()) + 1
    seen = rows_that_chose(search, manifest)
    seen_folds = folds_with(seen, where, manifest)
    given = spec.model_dump(mode="json", exclude=set(OF_SEARCHES))
    planned = plan(variants, where, range(first_seed, first_seed + seeds))
    confirmation = build_spec(
        {
            **given,
            "config": config,
            **fields,
            "kind": "confirmation",
            "planned": planned,
            "confirms": str(search.path),
            "seen_folds": seen_folds,
            "seen_rows": sorted(seen),
        }
    )
    notes = list(chosen.notes)
    if len(where.numbers) - len(seen_folds) < 2:
        notes.append(_few_unseen(len(seen), seen_folds))
    return confirmation, notes


def _few_unseen(seen: int, folds: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, folds)) or "none"
    return (
        f"the search chose by {seen} rows, and folds {listed} hold some of them: these folds count by their other rows, and "
        "without two folds that have such rows of every class no winner is named"
    )


def candidates_to_run(search: Study, top: int, seeds: int, *, defaults: bool = True) -> Candidates:
    """Return the candidates of a confirmation, all checks made that need no table. Raises SpecError."""
    spec = search.spec
    if spec.kind != "search":
        raise SpecError(
            f"{search.path}: this is a study of kind {spec.kind}: name the search whose best to confirm"
        )
    if search.running:
        raise SpecError(f"{search.path}: the search is still running: confirm when it has ended")
    if problems := [
        f"{name}={value}: 1 or more"
        for name, value in (("top", top), ("seeds", seeds))
        if value < 1
    ]:
        raise SpecError(problems)
    return choose_candidates(search, top, defaults=defaults)


def same_plan(files: StudyFiles, spec: StudySpec) -> None:
    """Raise SpecError unless the confirmation in `files` runs what `spec` would."""
    there = files.read_spec()
    if there.planned != spec.planned:
        raise SpecError(
            f"{files.root}: holds a confirmation with other candidates, folds or seeds "
            f"({_variants_text(there)}): `medtune resume {quote(str(files.root))}` continues it, --out starts another"
        )


def _variants_text(spec: StudySpec) -> str:
    names = planned_variants(spec)
    seeds = {trial.overrides["seed"] for trial in spec.planned}
    folds = {trial.overrides["fold"] for trial in spec.planned}
    return f"{', '.join(names)}; {len(folds)} folds x {len(seeds)} seeds"


def unfinished(study: Study) -> int:
    """Return how many of the planned runs have not ended."""
    return len(study.spec.planned) - int(study.trials_full["state"].isin(ENDED).sum())


# What came of it -------------------------------------------------------------------------------------------------------


Basis = Literal["folds", "rows", "subjects"]
"""The basis on which a confirmation is judged.

folds: two or more folds without any row that the search chose by; rows: two or more folds by their other rows; subjects:
fewer than that, so that only an interval over the subjects is given, and no winner and no p.
"""


@dataclass(frozen=True)
class Confirmation:
    """The result of a confirmation."""

    effects: pd.DataFrame
    """`Study.effects` against the documented settings, on the folds judged by; with the columns own_mean,
    own_low and own_high: each variant's mean and its 95 % interval."""
    folds: tuple[int, ...]
    """Folds judged by."""
    basis: Basis
    rows: int | None
    """Validation rows judged by; None where whole folds are, or nothing was scored row by row."""
    unseen: bool
    """Whether the search chose by none of the rows judged by."""
    finished: bool
    winner: str | None
    """The best variant that is better than the documented settings at p < .05 after correction, every run of which has a
    score; None where there is none, and with fewer than two folds that the search did not choose by."""
    ahead: str | None
    """Without two unseen folds: the variant with the best mean whose interval over subjects is above zero."""
    not_told_apart: tuple[str, ...]
    """Other variants that may be as good as the winner."""

    @property
    def choice(self) -> str:
        """The variant to use: the winner, or the documented settings where there is none."""
        return self.winner or REFERENCE


def judge(study: Study) -> Confirmation:
    """Return the present result of a confirmation's runs. Raises SpecError when `study` is none, or has hardly started."""
    if study.spec.kind != "confirmation":
        raise SpecError(
            f"{study.path}: this is a study of kind {study.spec.kind}, not a confirmation"
        )
    begun = set(study.trials_full["variant"].dropna())
    if REFERENCE not in begun or len(begun) < 2:
        raise SpecError(
            f"{study.path}: the confirmation has not started: `medtune resume {quote(str(study.path))}` runs it"
        )
    run = sorted({int(fold) for fold in study.trials_full["fold"].dropna()})
    unseen = whole_unseen_folds(study.spec, run)
    if len(unseen) > 1:
        return _judged_by_folds(study, only(study, folds=unseen), unseen, "folds", None)
    scores = read_scores(study.path)
    if scores is None:
        return _judged_by_subjects(study, unseen or run, None, {}, bool(unseen))
    return _judged_by_rows(study, run, scores)


def _judged_by_rows(study: Study, run: list[int], scores: ValidationScores) -> Confirmation:
    """By the rows that the search did not choose by; where they do not suffice on any fold of `run`, by all."""
    trials = study.trials_full
    rows = {fold: scores.rows_of(trials.loc[trials["fold"] == fold, "trial"]) for fold in run}
    others = {fold: unseen_rows(study.spec, fold, rows[fold]) for fold in run}
    enough = _sufficient(scores, others)
    if len(enough) > 1:
        judged = only(study, folds=enough)
        places = judged.trials_full[["trial", "fold"]].itertuples(index=False)
        aucs = [scores.auc(str(trial), others[int(fold)]) for trial, fold in places]
        trials = judged.trials_full.assign(objective=aucs)
        count = sum(len(others[fold]) for fold in enough)
        return _judged_by_folds(study, replace(judged, trials_full=trials), enough, "rows", count)
    if enough:
        return _judged_by_subjects(study, enough, scores, others, True)
    whole = _sufficient(scores, rows) or run
    return _judged_by_subjects(study, whole, scores, rows, False)


def _sufficient(scores: ValidationScores, rows: Mapping[int, np.ndarray]) -> list[int]:
    return [fold for fold, of_fold in rows.items() if scores.suffice(of_fold)]


def _judged_by_folds(
    study: Study, judged: Study, folds: list[int], basis: Basis, rows: int | None
) -> Confirmation:
    """Student's t over two or more folds that the search did not choose by, with correction for the best of several."""
    effects = _effects_with_means(judged)
    finished = unfinished(study) == 0
    sure = effects[(effects["call"] == "better") & (effects["p_holm"] < ADJUSTED_LEVEL)]
    winner = _best_mean(sure) if finished else None
    ties: tuple[str, ...] = ()
    if winner is not None:
        against = judged.effects(baseline=winner)
        apart = (against["call"] == "worse") & (against["p_holm"] < ADJUSTED_LEVEL)
        ties = tuple(against.loc[~apart & ~against["variant"].isin([winner, REFERENCE]), "variant"])
    return Confirmation(effects, tuple(folds), basis, rows, True, finished, winner, None, ties)


def _judged_by_subjects(
    study: Study,
    folds: list[int],
    scores: ValidationScores | None,
    rows: Mapping[int, np.ndarray],
    unseen: bool,
) -> Confirmation:
    """Intervals over the subjects of too few unseen folds: no winner, and no p."""
    judged = only(study, folds=folds)
    effects = _effects_with_means(judged)
    effects[["low", "high", "p", "p_holm", "own_low", "own_high"]] = math.nan
    effects["call"] = effects["call"].where(effects["call"].isna(), "cannot tell")
    effects.attrs["how"] = (
        "differences of validation AUC from documented; fewer than two unseen folds, hence no test"
    )
    if scores is not None:
        for place, variant in effects["variant"].items():
            if variant == REFERENCE:
                continue
            found = paired_difference(_paired_splits(judged, scores, rows, folds, str(variant)))
            effects.loc[place, ["mean", "low", "high"]] = list(found)
        effects.attrs["how"] += (
            "; 95 % intervals over the subjects (DeLong's variance, Student's t) and the seeds, of these training rows only"
        )
    finished = unfinished(study) == 0
    above = effects[finished & (effects["low"] > 0) & (effects["unscored"] == 0)]
    count = None if scores is None else sum(len(rows[fold]) for fold in folds)
    ahead = _best_mean(above)
    return Confirmation(effects, tuple(folds), "subjects", count, unseen, finished, None, ahead, ())


def _effects_with_means(judged: Study) -> pd.DataFrame:
    compared = judged.effects(baseline=REFERENCE)
    effects = compared.join(_means(judged), on="variant")
    effects.attrs = compared.attrs  # a join loses them
    return effects


def _best_mean(effects: pd.DataFrame) -> str | None:
    by_mean = effects.sort_values("mean", ascending=False)["variant"]
    return str(by_mean.iloc[0]) if len(by_mean) else None


def _paired_splits(
    study: Study,
    scores: ValidationScores,
    rows: Mapping[int, np.ndarray],
    folds: list[int],
    variant: str,
) -> list[PairedSplit]:
    def by_seed(name: str, fold: int) -> dict[int, str]:
        trials = study.trials_full
        own = trials[(trials["variant"] == name) & (trials["fold"] == fold)]
        return {
            int(seed): str(trial) for seed, trial in zip(own["seed"], own["trial"], strict=True)
        }

    found = [
        scores.paired(by_seed(variant, fold), by_seed(REFERENCE, fold), rows[fold])
        for fold in folds
    ]
    return [split for split in found if split is not None]


def _means(study: Study) -> pd.DataFrame:
    """The 95 % interval of each variant's mean objective, by variant."""
    trials = study.trials_full[
        (study.trials_full["state"] == "completed") & study.trials_full["objective"].notna()
    ]
    cut_into = int(trials["num_folds"].max()) if len(trials) else 0
    rows = {
        variant: interval_over_folds(own.set_index(["fold", "seed"])["objective"], cut_into)
        for variant, own in trials.groupby("variant", observed=True)
    }
    names = {"mean": "own_mean", "low": "own_low", "high": "own_high"}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*names]).rename(columns=names)


def print_confirmation(study: Study, console: Console) -> None:
    """Print means, differences from the documented settings, and whether there is a winner; 80 columns wide."""
    try:
        found = judge(study)
    except SpecError as error:
        console.print(str(error), soft_wrap=True, markup=False)
        return
    console.print(
        f"{OBJECTIVES[study.spec.objective].title}; {len(study.spec.planned)} runs", soft_wrap=True
    )
    console.print()
    console.print(_table(found.effects))
    console.print()
    for line in [*judged_lines(study, found), *run_lines(study)]:
        console.print(line, markup=False)
    record = read_test_record(test_file(study))
    for line in score_lines(record[-1]) if record else []:
        console.print(line, markup=False)


def _table(effects: pd.DataFrame) -> Table:
    table = plain_table()
    table.add_column("variant", max_width=14, overflow="ellipsis", no_wrap=True, vertical="bottom")
    for head in ("mean [95 % CI]", "difference [95 % CI]", "Holm p", "col-\nlapsed"):
        table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    for row in effects.to_dict("records"):
        mean = format_value("auc", row["own_mean"])
        if not pd.isna(row["own_low"]):
            mean += f" [{max(0.0, row['own_low']):.3f}, {min(1.0, row['own_high']):.3f}]"
        is_reference = row["variant"] == REFERENCE
        table.add_row(
            Text(printable(str(row["variant"]))),
            mean,
            "reference" if is_reference else difference_text(row),
            "-" if pd.isna(row["p_holm"]) else f"{row['p_holm']:.3f}",
            f"{row['collapsed']}/{row['runs']}" if row["collapsed"] else "-",
        )
    return table


def judged_lines(study: Study, found: Confirmation) -> list[str]:
    """Return the confirmation's result in words, and its basis."""
    effects = found.effects
    others = len(effects) - 1
    lines = []
    if found.winner is not None:
        row = effects.set_index("variant").loc[found.winner]
        lines.append(
            f"Winner: {found.winner}, better than the documented settings by {row['mean']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f}); p {row['p_holm']:.3f} after correction for {others} comparisons."
        )
        if found.not_told_apart:
            lines.append(f"Not distinguished from it: {', '.join(found.not_told_apart)}.")
        lines.append(f"      {_settings(study, found.winner)}")
    elif not found.finished:
        lines.append(
            f"Not finished: {unfinished(study)} of {len(study.spec.planned)} runs have not ended, and no winner is "
            f"named before. Continue with: medtune resume {quote(str(study.path))}"
        )
    elif found.basis == "subjects":
        lines += _no_test_lines(study, found)
    else:
        lines.append(
            "No winner: the data distinguish none of them from the documented settings, which therefore stay."
        )
        alone = effects[(effects["call"] == "better") & ~(effects["p_holm"] < ADJUSTED_LEVEL)]
        lines += [
            f"{row['variant']} would be better if it were the only one compared (p {row['p']:.3f}); as one of {others} "
            f"it may be luck (Holm p {row['p_holm']:.3f})."
            for row in alone.to_dict("records")
        ]
        lost = effects[(effects["low"] > 0) & (effects["unscored"] > 0)]
        lines += [
            f"{row['variant']} cannot win: {row['unscored']} of its runs ended without a score, and the others are its "
            "survivors."
            for row in lost.to_dict("records")
        ]
        worse = effects.loc[
            (effects["call"] == "worse") & (effects["p_holm"] < ADJUSTED_LEVEL), "variant"
        ]
        if len(worse):
            lines.append(f"Worse than the documented settings: {', '.join(worse)}.")
    return [
        *lines,
        *_expected_lines(study, found),
        _basis_line(study, found),
        f"({effects.attrs['how']})",
    ]


def _expected_lines(study: Study, found: Confirmation) -> list[str]:
    """The best guess and its expected value, and the candidates' ensemble, where two unseen folds can tell them."""
    if not found.finished or found.basis != "folds":
        return []
    lines = []
    means = expected_means(study, found.folds)
    if means.notna().all() and len(means) > 1:
        best = str(means.idxmax())
        observed = found.effects.set_index("variant")["own_mean"][best]
        lines.append(
            f"Best guess: {best}, expected {means[best]:.3f} (shrunken mean; observed {observed:.3f})."
            if means.max() - means.min() > 0
            else f"The means differ by no more than their noise: {means[best]:.3f} is expected of each."
        )
    scores = read_scores(study.path)
    together = None if scores is None else candidates_together(study, scores)
    return lines if together is None else lines + _together_lines(study.spec, together)


def _together_lines(spec: StudySpec, together: Together) -> list[str]:
    first = together.members[0]
    one, *others = (name.removeprefix(CANDIDATE).lstrip("0") or "0" for name in together.members)
    command = " ".join([f"--trial {one}", *(f"--with {other}" for other in others)])
    return [
        f"Together, {', '.join(together.members)}: cross-validated AUC {_with_interval(together.auc, '.3f')} on "
        f"{len(together.folds)} folds, {_with_interval(together.gain, '+.3f')} over {first} alone:",
        f"      medtune export {quote(spec.confirms or 'SEARCH')} {command} --out model",
    ]


def _with_interval(found: Mapping[str, float], form: str) -> str:
    if math.isnan(found["low"]):
        return format(found["mean"], form)
    low, high = max(-1.0, found["low"]), min(1.0, found["high"])
    return f"{found['mean']:{form}} [{low:{form}}, {high:{form}}]"


def _no_test_lines(study: Study, found: Confirmation) -> list[str]:
    """Why no winner is named with fewer than two unseen folds, and what would name one."""
    lines = [
        "No winner: fewer than two folds are unseen, and one split cannot separate luck from merit."
    ]
    if found.ahead is not None:
        row = found.effects.set_index("variant").loc[found.ahead]
        lines.append(
            f"{found.ahead} is ahead of the documented settings by {row['mean']:+.3f} ({row['low']:+.3f} to "
            f"{row['high']:+.3f})"
            + ("." if found.unseen else ", but the search chose it by these volumes.")
        )
    elif found.rows is None and found.finished:
        lines.append(
            f"No interval yet: `medtune confirm {quote(study.spec.confirms or 'SEARCH')}` scores the validation rows one by one."
        )
    elif study.trials_full["seed"].nunique() < 2:
        lines.append("No interval: one seed does not show how much another one would change.")
    lines.append(
        "The documented settings stay until two unseen folds are run: "
        f"medtune confirm {quote(study.spec.confirms or 'SEARCH')} --folds all --out NEW"
    )
    return lines


def _basis_line(study: Study, found: Confirmation) -> str:
    """The basis on which a confirmation is judged, in a sentence."""
    shown = ", ".join(map(str, found.folds))
    seen = ", ".join(map(str, study.spec.seen_folds))
    if found.basis == "folds":
        if seen:
            return f"Judged on folds {shown}; fold {seen} chose the candidates and is not counted."
        known = study.spec.seen_rows is not None  # older versions knew nothing of other cuts
        return f"Judged on folds {shown}" + (
            "; none of their rows chose the candidates." if known else "."
        )
    if found.basis == "rows":
        return (
            f"Judged on the {found.rows} validation rows of folds {shown} that the search did not choose by, by the AUC of "
            "each run's kept weights."
        )
    rows = "" if found.rows is None else f"{found.rows} validation rows of "
    return f"On {rows}fold {shown}" + (
        ", by which the search did not choose." if found.unseen else ", by which the search chose."
    )


def _settings(study: Study, variant: str) -> str:
    """The settings of a variant that differ from the documented ones."""
    configs = [
        study.spec.config_of(planned_overrides(study.spec, name)).model_dump()
        for name in (variant, REFERENCE)
    ]
    changed = [name for name in configs[0] if configs[0][name] != configs[1][name]]
    return (
        ", ".join(f"{name} {format_value(name, configs[0][name])}" for name in changed)
        or "no other settings"
    )


def planned_overrides(spec: StudySpec, variant: str) -> dict[str, Scalar]:
    return next(trial.overrides for trial in spec.planned if trial.variant == variant)
