"""Confirmation: the best of a search run again on all folds and new seeds, and the one look at the test rows.

A search picks the best of many noisy values, so its winner's own value is too good: partly luck of the seed, partly
luck of the fold it was chosen on. Here the candidates start from seeds that the search never used, and are judged on
folds that it did not choose by, against the documented settings on the same folds and seeds. A winner is one whose
difference holds after correction for having been picked as the best of several (Holm 1979, over all that are compared
with the documented settings). Without one the documented settings stay, and that is said.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_spaces.fixes import all_fixes, documented_after
from trainables.checkpoints import load_state, without_nonfinite, write_json
from trainables.config import Scalar, build_config
from trainables.data.manifest import Manifest, read_manifest, split_rows
from trainables.data.scans import Recipe
from trainables.data.volumes import open_cohort, prepare_cohort
from trainables.metrics import auc_interval, compare_auc, ranking_scores, score_metrics
from tune_app.compare.ablation import (
    ADJUSTED_LEVEL,
    choose_folds,
    difference_text,
    only,
    plan,
    run_lines,
)
from tune_app.results.effects import COLLAPSES, interval_over_folds
from tune_app.results.study import ENDED, Study, load_study
from tune_app.results.tables import format_value, printable
from tune_app.study.objective import OBJECTIVES
from tune_app.study.spec import SpecError, StudyFiles, StudySpec, build_spec, default_cache

REFERENCE = "documented"
"""Variant that runs the document's recommended settings; the others are compared with it."""

OF_SEARCHES = (
    "space",
    "planned",
    "trials",
    "seed",
    "sampler",
    "warm_start",
    "warm_start_from",
    "storage",
    "policy",
)
"""Fields of a spec that mean nothing in a confirmation."""

REPORTED = (
    "auprc",
    "balanced_accuracy",
    "accuracy",
    "brier",
    "ece",
    "auc_probability",
    "logit_gap",
)
"""What is recorded of the test rows beside AUC: nothing whose threshold would be chosen on them."""


# The plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """What a confirmation runs beside the documented settings and the defaults."""

    overrides: dict[str, dict[str, Scalar]]
    """By variant: `trial-` and the id in the search."""
    notes: list[str]
    """What was passed over, and why."""


def choose_candidates(search: Study, top: int) -> Candidates:
    """Return the best `top` configurations of a search: whole, sound runs, each configuration once.

    Left out: trials that were stopped or failed, those that collapsed, and the documented and default settings, which
    a confirmation runs anyway. Raises SpecError when nothing is left.
    """
    epochs = search.spec.epochs
    known = {
        _same_setting(search.spec, documented_after(epochs)): "the documented settings",
        _same_setting(search.spec, all_fixes(epochs)): "the default settings",
    }
    trials = search.trials
    whole = trials[(trials["state"] == "completed") & trials["objective"].notna()]
    sound = whole[~whole["verdict"].isin(COLLAPSES)]
    found = Candidates({}, [])
    for trial in sound.sort_values(["objective", "number"], ascending=[False, True])["trial"]:
        if len(found.overrides) == top:
            break
        overrides = {
            name: value
            for name, value in search.record(str(trial))["overrides"].items()
            if name != "seed"
        }
        setting = _same_setting(search.spec, overrides)
        if setting in known:
            found.notes.append(f"trial {trial} is {known[setting]}: run as such")
            continue
        known[setting] = f"the same as trial {trial}"
        found.overrides[f"trial-{trial}"] = overrides
    if not found.overrides:
        raise SpecError(
            [
                f"{search.path}: no trial to confirm: {len(trials)} trials, {len(whole)} completed with a score, "
                f"{len(whole) - len(sound)} of these collapsed"
            ]
        )
    if len(found.overrides) < top:
        found.notes.append(
            f"the search has {len(found.overrides)} configurations to confirm, not {top}"
        )
    unended = int((~trials["state"].isin(ENDED)).sum())
    if unended:
        found.notes.append(
            f"{unended} trials of the search have not ended; `medtune resume {search.path}` ends them"
        )
    return found


def _same_setting(spec: StudySpec, overrides: Mapping[str, Any]) -> str:
    """A text that is equal for runs which differ in fold and seed only."""
    return build_config({**spec.config, **overrides, "fold": 0, "seed": 0}).hash()


def confirmation_spec(
    search: Study, *, top: int = 3, folds: str = "all", seeds: int = 3, **fields: Any
) -> tuple[StudySpec, list[str]]:
    """Return the study that confirms `search`, and notes for the user.

    Variants: the documented settings, the defaults, and the best `top` configurations. Seeds are `seeds` new ones, since
    a run repeated with the seed it was chosen by would repeat its luck. `fields` go before the search's own. Raises
    SpecError when `search` is none, is running or has nothing to confirm, and ManifestError for the table.
    """
    spec = search.spec
    if spec.kind != "search":
        raise SpecError(
            [
                f"{search.path}: this is a study of kind {spec.kind}: name the search whose best to confirm"
            ]
        )
    if search.running:
        raise SpecError([f"{search.path}: the search is still running: confirm when it has ended"])
    if problems := [
        f"{name}={value}: 1 or more"
        for name, value in (("top", top), ("seeds", seeds))
        if value < 1
    ]:
        raise SpecError(problems)
    chosen = choose_candidates(search, top)
    shared = build_config(spec.config)
    manifest = read_manifest(Path(spec.data), num_classes=shared.num_classes)
    where = choose_folds(manifest, folds, shared.num_folds)
    variants = {
        REFERENCE: documented_after(spec.epochs),
        "defaults": all_fixes(spec.epochs),
        **chosen.overrides,
    }
    first_seed = int(search.trials["seed"].max()) + 1
    split_decided = bool((manifest.rows["split"] == "val").any()) and not shared.cross_validate
    searched = {0} if split_decided else {int(fold) for fold in search.trials["fold"].dropna()}
    seen = tuple(sorted(searched)) if split_decided == where.own_split else ()
    given = spec.model_dump(mode="json", exclude=set(OF_SEARCHES))
    planned = plan(variants, where, range(first_seed, first_seed + seeds))
    confirmation = build_spec(
        {
            **given,
            **fields,
            "kind": "confirmation",
            "planned": planned,
            "confirms": str(search.path),
            "seen_folds": seen,
        }
    )
    notes = list(chosen.notes)
    if split_decided and not where.own_split:
        notes.append("the search chose by the table's own val rows: " + _SPLIT_SEEN)
    return confirmation, notes


def same_plan(files: StudyFiles, spec: StudySpec) -> None:
    """Raise SpecError unless the confirmation in `files` runs what `spec` would."""
    there = files.read_spec()
    if there.planned != spec.planned:
        raise SpecError(
            [
                f"{files.root}: holds a confirmation with other candidates, folds or seeds "
                f"({_variants_text(there)}): `medtune resume {files.root}` goes on with it, --out starts another"
            ]
        )


def _variants_text(spec: StudySpec) -> str:
    names = list(dict.fromkeys(trial.variant for trial in spec.planned))
    seeds = {trial.overrides["seed"] for trial in spec.planned}
    folds = {trial.overrides["fold"] for trial in spec.planned}
    return f"{', '.join(names)}; {len(folds)} folds x {len(seeds)} seeds"


def unfinished(study: Study) -> int:
    """Return how many of the planned runs have not ended."""
    return len(study.spec.planned) - int(study.trials["state"].isin(ENDED).sum())


_SPLIT_SEEN = "every fold holds some of them, so the candidates look a little better than they are"


# What came of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confirmation:
    """What a confirmation says."""

    effects: pd.DataFrame
    """`Study.effects` against the documented settings, on the folds judged by; with the columns own_mean,
    own_low and own_high: each variant's mean and its 95 % interval."""
    folds: tuple[int, ...]
    """Folds judged by."""
    unseen: bool
    """Whether the search chose by none of them."""
    finished: bool
    winner: str | None
    """The best variant that is better than the documented settings at p < .05 after correction; None where there is none,
    and where a fold judged by is one that the search chose by."""
    ahead: str | None
    """The variant that would be the winner, had the search not chosen it by one of these folds."""
    not_told_apart: tuple[str, ...]
    """Other variants that may be as good as the winner."""

    @property
    def choice(self) -> str:
        """The variant to use: the winner, or the documented settings where there is none."""
        return self.winner or REFERENCE


def judge(study: Study) -> Confirmation:
    """Return what the runs of a confirmation say by now. Raises SpecError when `study` is none, or has hardly begun."""
    if study.spec.kind != "confirmation":
        raise SpecError(
            [f"{study.path}: this is a study of kind {study.spec.kind}, not a confirmation"]
        )
    begun = set(study.trials["variant"].dropna())
    if REFERENCE not in begun or len(begun) < 2:
        raise SpecError(
            [f"{study.path}: the confirmation has not begun: `medtune resume {study.path}` runs it"]
        )
    run = sorted({int(fold) for fold in study.trials["fold"].dropna()})
    unseen = [fold for fold in run if fold not in study.spec.seen_folds]
    folds = unseen if len(unseen) > 1 else run  # one fold would not tell how much folds differ
    judged = only(study, folds=folds)
    compared = judged.effects(baseline=REFERENCE)
    effects = compared.join(_means(judged), on="variant")
    effects.attrs = compared.attrs  # a join loses them
    finished = unfinished(study) == 0
    sure = effects[(effects["call"] == "better") & (effects["p_holm"] < ADJUSTED_LEVEL)]
    best = (
        str(sure.sort_values("mean", ascending=False)["variant"].iloc[0])
        if finished and len(sure)
        else None
    )
    chosen_by = bool(set(folds) & set(study.spec.seen_folds))
    winner, ahead = (None, best) if chosen_by else (best, None)
    ties: tuple[str, ...] = ()
    if winner is not None:
        against = judged.effects(baseline=winner)
        apart = (against["call"] == "worse") & (against["p_holm"] < ADJUSTED_LEVEL)
        ties = tuple(against.loc[~apart & ~against["variant"].isin([winner, REFERENCE]), "variant"])
    is_unseen = bool(study.spec.seen_folds) and not chosen_by
    return Confirmation(effects, tuple(folds), is_unseen, finished, winner, ahead, ties)


def _means(study: Study) -> pd.DataFrame:
    """The 95 % interval of each variant's mean objective, by variant."""
    trials = study.trials[
        (study.trials["state"] == "completed") & study.trials["objective"].notna()
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
    record = _read_record(_test_file(study))
    for line in score_lines(record[-1]) if record else []:
        console.print(line, markup=False)


def _table(effects: pd.DataFrame) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True
    )
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
    """Return in words what the confirmation says, and on what."""
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
            lines.append(f"Not told apart from it: {', '.join(found.not_told_apart)}.")
        lines.append(f"      {_settings(study, found.winner)}")
    elif not found.finished:
        lines.append(
            f"Not finished: {unfinished(study)} of {len(study.spec.planned)} runs have not ended, and no winner is "
            f"named before. Go on with: medtune resume {study.path}"
        )
    elif found.ahead is not None:
        row = effects.set_index("variant").loc[found.ahead]
        lines.append(
            f"No winner: {found.ahead} is ahead of the documented settings by {row['mean']:+.3f} ({row['low']:+.3f} to "
            f"{row['high']:+.3f}), but the search chose it by some of these volumes. The documented settings stay, until it "
            f"is confirmed on two other folds: medtune confirm {study.spec.confirms or 'SEARCH'} --folds all --out NEW"
        )
    else:
        lines.append(
            "No winner: the data cannot tell any of them from the documented settings, which therefore stay."
        )
        alone = effects[(effects["call"] == "better") & ~(effects["p_holm"] < ADJUSTED_LEVEL)]
        lines += [
            f"{row['variant']} would be better if it were the only one compared (p {row['p']:.3f}); as one of {others} "
            f"it may be luck (Holm p {row['p_holm']:.3f})."
            for row in alone.to_dict("records")
        ]
        worse = effects.loc[
            (effects["call"] == "worse") & (effects["p_holm"] < ADJUSTED_LEVEL), "variant"
        ]
        if len(worse):
            lines.append(f"Worse than the documented settings: {', '.join(worse)}.")
    shown = ", ".join(map(str, found.folds))
    if len(found.folds) < 2:
        chose = (
            ", which chose the candidates too"
            if set(found.folds) & set(study.spec.seen_folds)
            else ""
        )
        lines.append(f"On one split{chose}; intervals speak of seeds only.")
    elif found.unseen:
        seen = ", ".join(map(str, study.spec.seen_folds))
        lines.append(
            f"Judged on folds {shown}; fold {seen} chose the candidates and is not counted."
        )
    elif study.spec.seen_folds:
        lines.append(
            f"Judged on folds {shown}, also those that chose the candidates: too few others were run."
        )
    if _chosen_by_own_split(study.spec):
        lines.append(f"The search chose by the table's own val rows: {_SPLIT_SEEN}.")
    return [*lines, f"({effects.attrs['how']})"]


def _chosen_by_own_split(spec: StudySpec) -> bool:
    return (
        any(trial.overrides.get("cross_validate") for trial in spec.planned) and not spec.seen_folds
    )


def _settings(study: Study, variant: str) -> str:
    """What a variant changes against the documented settings."""
    configs = [
        build_config({**study.spec.config, **_planned(study.spec, name)}).model_dump()
        for name in (variant, REFERENCE)
    ]
    changed = [name for name in configs[0] if configs[0][name] != configs[1][name]]
    return (
        ", ".join(f"{name} {format_value(name, configs[0][name])}" for name in changed)
        or "no other settings"
    )


def _planned(spec: StudySpec, variant: str) -> dict[str, Scalar]:
    return next(trial.overrides for trial in spec.planned if trial.variant == variant)


# The test rows ---------------------------------------------------------------------------------------------------------


def confirmed_on_test(
    search: Path, root: Path, *, cache: Path | None, again: bool, notes: Console
) -> None:
    """Score the test rows for the confirmation in `root`, or say that this was done before; see `score_test`."""
    if not StudyFiles(root).spec.exists():
        raise SpecError(
            [
                f"{root}: no confirmation here: `medtune confirm {search}` runs it, then --test scores it"
            ]
        )
    study = load_study(root)
    earlier = _read_record(_test_file(study))
    if earlier and not again:
        notes.print(
            f"The test rows were scored before, which is recorded in {_test_file(study)}: shown again, not scored "
            "again. --again scores anew, and counts it.",
            markup=False,
            soft_wrap=True,
        )
        return
    folder = cache or Path(study.spec.cache or default_cache())
    score_test(root, cache=folder, again=again, notes=lambda text: notes.print(text, markup=False))


def score_test(
    root: Path,
    *,
    cache: Path,
    again: bool = False,
    notes: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Score the confirmed variant of the study in `root` on the table's test rows, once; return the record.

    Each of its runs scores the test rows with its averaged weights (best.pt). Recorded are every run's AUC, their mean,
    and the ensemble (mean of the runs' log-odds) with DeLong's interval; the documented settings beside it, with
    DeLong's paired test, where another variant was confirmed. The record goes to test.json of the search that was
    confirmed, so that a second confirmation does not give a second look. When there is a record it is returned, and
    nothing is scored; with `again` the rows are scored anew and the record says how often that was.

    Raises SpecError when the confirmation is not finished, the table has no test rows, or it changed since.
    """
    study = load_study(root)
    target = _test_file(study)
    earlier = _read_record(target)
    if earlier and not again:
        return earlier[-1]
    found = judge(study)
    if not found.finished:
        raise SpecError(
            [judged_lines(study, found)[0] + "; the test rows are scored at the very end"]
        )
    spec = study.spec
    base = build_config(spec.config)
    manifest = read_manifest(Path(spec.data), num_classes=base.num_classes)
    rows = split_rows(manifest, **_split_of(study, found.choice)).test
    if not len(rows):
        raise SpecError(
            [
                f"{spec.data}: no test rows: name them in a column `split` before a search, with the word test"
            ]
        )
    labels = manifest.rows["label"].to_numpy()[rows]
    if missing := sorted(set(range(base.num_classes)) - set(labels.tolist())):
        raise SpecError(
            [f"{spec.data}: the test rows have no volume of class {', '.join(map(str, missing))}"]
        )
    folder = prepare_cohort(manifest, Recipe.from_config(base), cache)
    if folder.name != study.info.get("cohort"):
        raise SpecError(
            [
                f"{spec.data}: the data changed since the confirmation (cohort {study.info.get('cohort')})"
            ]
        )
    names = [found.choice] + ([REFERENCE] if found.choice != REFERENCE else [])
    scored = {name: _score_variant(study, name, folder, manifest, rows, notes) for name in names}
    record = _as_record(study, found, scored, labels, times=len(earlier) + 1)
    write_json(target, {"scored": [*earlier, record]})
    return record


def _test_file(study: Study) -> Path:
    """test.json of the search that was confirmed; beside the confirmation where the search is gone."""
    search = Path(study.spec.confirms) if study.spec.confirms else study.path
    return StudyFiles(search if search.is_dir() else study.path).test


def _read_record(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        scored: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["scored"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            [f"{path}: damaged ({error}): it is the record of the test scores, restore it"]
        ) from None
    return scored


def _split_of(study: Study, variant: str) -> dict[str, Any]:
    config = build_config({**study.spec.config, **_planned(study.spec, variant)})
    return {
        "fold": config.fold,
        "num_folds": config.num_folds,
        "cross_validate": config.cross_validate,
    }


@dataclass(frozen=True)
class _Scored:
    """One variant on the test rows."""

    runs: list[dict[str, Any]]
    scores: np.ndarray
    """Log-odds of the ensemble, as `ranking_scores`."""
    metrics: dict[str, float]


def _score_variant(
    study: Study,
    variant: str,
    cohort_folder: Path,
    manifest: Manifest,
    rows: np.ndarray,
    notes: Callable[[str], None],
) -> _Scored:
    cohort = open_cohort(cohort_folder)
    labels = np.asarray(cohort.labels)[rows]
    total: np.ndarray = np.zeros(())
    runs = []
    own = study.trials[
        (study.trials["variant"] == variant) & (study.trials["state"] == "completed")
    ]
    for trial in own.to_dict("records"):
        path = StudyFiles(study.path).trial(str(trial["trial"])).best
        if not path.is_file():
            raise SpecError(
                [
                    f"{path}: the averaged weights of trial {trial['trial']} are gone: they score the test rows"
                ]
            )
        state = load_state(path)
        if set(rows.tolist()) & {*state["train_rows"].tolist(), *state["val_rows"].tolist()}:
            raise SpecError(
                [
                    f"trial {trial['trial']} was trained on test rows: the table's split changed since"
                ]
            )
        logits, scale = _averaged_logits(state, cohort.volumes, rows)
        scores = ranking_scores(logits, scale=scale)
        auc = auc_interval(scores, labels).auc
        runs.append(
            {
                "trial": trial["trial"],
                "fold": trial["fold"],
                "seed": trial["seed"],
                "epoch": state["epoch"],
                "auc": auc,
            }
        )
        notes(
            f"{variant}, fold {trial['fold']}, seed {trial['seed']}: scored with epoch {state['epoch']}"
        )
        total = total + scale * logits.astype(np.float64)
    if not runs:
        raise SpecError(
            [f"{study.path}: no run of {variant} completed: nothing to score the test rows with"]
        )
    logits = total / len(runs)
    return _Scored(
        runs, ranking_scores(logits, scale=1.0), score_metrics(logits, labels, scale=1.0)
    )


def _averaged_logits(
    state: Mapping[str, Any], volumes: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, float]:
    """Logits (N, C) float32 of the averaged weights on `rows` in float32, and their scale."""
    import torch

    from trainables.finetune import configured_network
    from trainables.losses import logit_scale

    config = build_config(state["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = configured_network(config)
    network.load_state_dict(state["average"]["network"])
    network.to(device).eval()
    size = config.validation_batch_size
    with torch.no_grad():
        parts = [
            network(
                torch.from_numpy(volumes[rows[start : start + size]].astype(np.float32)).to(device)
            )
            .float()
            .cpu()
            for start in range(0, len(rows), size)
        ]
    return torch.cat(parts).numpy(), logit_scale(config.loss, config.head, config.s)


def _as_record(
    study: Study, found: Confirmation, scored: Mapping[str, _Scored], labels: np.ndarray, times: int
) -> dict[str, Any]:
    chosen = scored[found.choice]
    values = [run["auc"] for run in chosen.runs]
    record: dict[str, Any] = {
        "time": time.time(),
        "times": times,
        "confirmation": str(study.path),
        "study_hash": study.spec.hash(),
        "variant": found.choice,
        "winner": found.winner is not None,
        "config_hash": _same_setting(study.spec, _planned(study.spec, found.choice)),
        "table": study.spec.data,
        "cohort": study.info.get("cohort"),
        "volumes": len(labels),
        "positive": int((labels > 0).sum()),
        "negative": int((labels == 0).sum()),
        "runs": chosen.runs,
        "mean_auc": float(np.mean(values)),
        "lowest_auc": min(values),
        "highest_auc": max(values),
        "auc": chosen.metrics["auc"],
        "auc_low": chosen.metrics["auc_low"],
        "auc_high": chosen.metrics["auc_high"],
        "metrics": {name: chosen.metrics[name] for name in REPORTED},
    }
    if found.choice != REFERENCE:
        reference = scored[REFERENCE]
        difference = compare_auc(chosen.scores, reference.scores, labels)
        record["documented"] = {
            "auc": reference.metrics["auc"],
            "auc_low": reference.metrics["auc_low"],
            "auc_high": reference.metrics["auc_high"],
            "mean_auc": float(np.mean([run["auc"] for run in reference.runs])),
            "difference": difference.difference,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
        }
    cleaned: dict[str, Any] = without_nonfinite(record)
    return cleaned


def score_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a record of the test rows in words."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["time"]))
    what = "the winner" if record["winner"] else "no winner was named"
    runs = len(record["runs"])
    lines = [
        f"Test rows ({record['volumes']}: {record['positive']} positive, {record['negative']} negative), scored "
        f"{when} with {record['variant']} ({what}), config {record['config_hash']}:",
        f"  ensemble of {runs} runs: AUC {_shown(record['auc'])} [95 % CI {_shown(record['auc_low'])}, "
        f"{_shown(record['auc_high'])}]",
        f"  single runs: mean AUC {_shown(record['mean_auc'])}, from {_shown(record['lowest_auc'])} to "
        f"{_shown(record['highest_auc'])}",
    ]
    if other := record.get("documented"):
        line = f"  documented settings: AUC {_shown(other['auc'])}; difference {_shown(other['difference'], '+')}"
        if other["low"] is not None:
            line += f" [{other['low']:+.3f}, {other['high']:+.3f}], DeLong p {other['p']:.3f}"
        lines.append(line)
    if record["times"] > 1:
        lines.append(
            f"  This was look number {record['times']} at the test rows: the first one is the honest one."
        )
    return lines


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
