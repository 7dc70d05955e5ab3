"""Reasons for doubt: what to know about a study before trusting it, gravest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Any

import pandas as pd

from trainables.config import FineTuneConfig
from trainables.data.folds import few_of_a_class, few_of_the_rarest
from trainables.diagnosis import WITHOUT_FAULT
from tune_app.compare.ablation import ADJUSTED_LEVEL
from tune_app.report.findings import (
    effects_tables,
    leading,
    listed,
    luck,
    once_per_study,
    rivals_within_noise,
    sentence,
    sizes,
    standard_error,
)
from tune_app.results.effects import COLLAPSES
from tune_app.results.study import Study
from tune_app.results.tables import came_back
from tune_app.results.text import format_value, printable
from tune_app.study.files import StudyFiles

EDGE = 0.04
"""Share of an axis at either end that counts as its edge."""


@dataclass(frozen=True)
class Caution:
    """Something about a study that its numbers alone do not show."""

    title: str
    text: str
    remedy: str


@once_per_study
def cautions(study: Study) -> list[Caution]:
    """Return the reasons for caution before trusting the study, gravest first."""
    if not study.scored:
        return list(_about_the_files(study))
    return [
        *_about_the_files(study),
        *_about_the_best(study),
        *_about_what_healed(study),
        *_about_the_search(study),
        *_about_the_variants(study),
    ]


def _about_the_files(study: Study) -> Iterator[Caution]:
    states = study.trials_full["state"].value_counts()
    if study.running:
        yield Caution(
            "The study is still running",
            f"{states.get('running', 0)} trials run at this moment; everything below is as of the last row.",
            "Write the report again later, or let `medtune report --watch` do it.",
        )
    if states.get("interrupted", 0):
        yield Caution(
            "The study was interrupted",
            f"{states['interrupted']} trials have not ended, and no driver is at work on them.",
            f"`medtune resume {quote(study.place)}` continues where they stopped.",
        )
    if states.get("failed", 0):
        failed = study.trials_full[study.trials_full["state"] == "failed"]
        said = next((str(text) for text in failed["error"].dropna()), "no error recorded")
        yield Caution(
            f"{len(failed)} of {len(study.trials_full)} trials failed",
            f"{listed(failed['trial'].tolist()[:5])}: {printable(said)[:300]}",
            f"Each trial's trial.log has the traceback; `medtune resume {quote(study.place)} --retry-failed` continues them.",
        )
    if study.damage:
        yield Caution(
            "The study's files are damaged",
            "; ".join(study.damage[:5]),
            "Damaged parts were left out.",
        )


def _about_the_best(study: Study) -> Iterator[Caution]:
    best = leading(study)
    if not pd.isna(best["verdict"]) and best["verdict"] not in WITHOUT_FAULT:
        advice = "" if pd.isna(best["advice"]) else str(best["advice"])
        yield Caution(
            f"The best trial itself ({best['trial']}) is diagnosed {best['verdict']}",
            sentence(str(best["verdict_summary"])),
            sentence(advice),
        )
    if (few := _few(best)) is not None:
        yield Caution("The validation fold is very small", sentence(few), "")
    raw, averaged = best["best_val_auc_raw"], best["best_val_auc_ema"]
    half = 1.96 * standard_error(best)
    if (
        math.isfinite(half)
        and math.isfinite(raw)
        and math.isfinite(averaged)
        and raw - averaged > half
    ):
        yield Caution(
            "The weights that would be deployed are worse than the raw ones",
            f"In epoch {best['best_epoch']} of trial {best['trial']} the raw weights reach {raw:.3f}, the averaged ones "
            f"{averaged:.3f}.",
            "Lower ema_decay, or see that ema_warmup is on and ema_buffers is averaged.",
        )


def _few(best: pd.Series) -> str | None:
    positive, negative, unit = sizes(best)
    if best["num_classes"] == 2 and positive is not None and negative is not None:
        return few_of_a_class([negative, positive], unit)
    rarest = best["best_val_rarest_subjects"]
    return None if pd.isna(rarest) else few_of_the_rarest(int(rarest))


def _about_what_healed(study: Study) -> Iterator[Caution]:
    healed = study.trials_full[came_back(study.trials_full)]
    if healed.empty:
        return
    worst = healed.sort_values("healed_epochs").iloc[-1]
    among = ", the best among them" if leading(study)["trial"] in set(healed["trial"]) else ""
    yield Caution(
        f"{len(healed)} of {len(study.trials_full)} trials collapsed for a time and came back{among}",
        f"Trial {worst['trial']} for {worst['healed_epochs']} epochs: {worst['verdict_summary']}. The best epochs, by which "
        "trials are compared, do not show it.",
        "" if pd.isna(worst["advice"]) else sentence(str(worst["advice"])),
    )


def _about_the_search(study: Study) -> Iterator[Caution]:
    if study.spec.kind != "search":
        return
    best = study.best()
    rivals, half = rivals_within_noise(study)
    counts = ""
    positive, negative, unit = sizes(best)
    if positive is not None:
        counts = f" on {positive} positive and {negative} negative {unit}"
    if rivals:
        yield Caution(
            "Noise is larger than the differences",
            f"{rivals} other trials lie within {half:.3f} of the best one, which is what chance alone explains{counts}: "
            "which of them leads is luck.",
            "Go by the confirmation, not by this order."
            if StudyFiles(StudyFiles(study.path).confirmation).spec.is_file()
            else f"`medtune confirm {quote(study.place)} --top {min(rivals + 1, 5)}` runs them over all folds and several "
            "seeds.",
        )
    scored = int(
        (study.trials_full["objective"].notna() & (study.trials_full["state"] != "failed")).sum()
    )
    optimism = luck(half / 1.96, scored)
    if optimism > 0.01 and scored >= 10:
        yield Caution(
            "The validation fold was used often",
            f"The best of {scored} equal trials would look up to {optimism:.3f} better than it is, because one fold "
            f"chose among all of them; so read {best['objective']:.3f} as an upper bound.",
            "Confirm on other folds, and keep the test split for the very end (`medtune confirm --test`).",
        )
    for name in study.searched:
        yield from _about_an_edge(study, best, name)
    came_to_nothing = study.trials_full["verdict"].isin(COLLAPSES)
    if came_to_nothing.mean() > 0.5:
        yield Caution(
            f"{came_to_nothing.sum()} of {len(study.trials_full)} trials came to nothing",
            ", ".join(
                f"{verdict} {n}"
                for verdict, n in study.trials_full.loc[came_to_nothing, "verdict"]
                .value_counts()
                .items()
            ),
            "Training fails in most of the space: move it, or hold what the diagnoses blame.",
        )


def _about_an_edge(study: Study, best: pd.Series, name: str) -> Iterator[Caution]:
    axis = study.axis(name)
    place = axis.places(best.to_frame().T)[0]
    if axis.kind == "choice" or not axis.ranged or not math.isfinite(place):
        return
    share = axis.share(float(place))
    if EDGE < share < 1 - EDGE:
        return
    top = study.trials_full[study.trials_full["state"] != "failed"].nlargest(5, "objective")
    near = [axis.share(float(other)) for other in axis.places(top)]
    together = sum(other < 0.2 if share <= EDGE else other > 0.8 for other in near)
    ahead = (top["objective"] == best["objective"]).sum() == 1
    # one of several that are equally good, and the others lie elsewhere
    if together < 2 and not ahead:
        return
    end = "lower" if share <= EDGE else "upper"
    if _is_natural_bound(name, best[name], end):
        return
    yield Caution(
        f"The best {name} is at the edge of its range",
        f"{format_value(name, best[name])} in {axis.text(axis.low)} to {axis.text(axis.high)}, at the {end} end, as do "
        f"{together} of the 5 best trials: the optimum may lie outside.",
        f"Search again with a wider range of {name}.",
    )


def _is_natural_bound(name: str, value: Any, end: str) -> bool:
    """Whether no configuration may go beyond the value: a wider range of the hyperparameter does not exist."""
    bounds = [
        getattr(rule, kind)
        for rule in FineTuneConfig.model_fields[name].metadata
        for kind in (("ge", "gt") if end == "lower" else ("le", "lt"))
        if hasattr(rule, kind)
    ]
    return any(math.isclose(float(value), float(bound), abs_tol=1e-12) for bound in bounds)


def _about_the_variants(study: Study) -> Iterator[Caution]:
    tables = effects_tables(study)
    if not tables:
        return
    others = pd.concat([table[table["variant"] != table.attrs["baseline"]] for table in tables])
    wanted = others["runs"].max()
    short = others.loc[others["pairs"] < wanted, "variant"].tolist()
    if short and study.spec.kind == "ablation":
        yield Caution(
            "Not every run has a partner",
            f"{listed(short)}: fewer pairs than runs, for runs that failed or have not ended.",
            f"`medtune resume {quote(study.place)}` completes them.",
        )
    if tables[0].attrs["folds"] < 2:
        yield Caution(
            "All runs share one fold",
            "The intervals show how much seeds matter on this fold, and nothing about other subjects.",
            "Run over several folds.",
        )
    unsure = others.loc[
        others["call"].isin(["better", "worse"]) & (others["p_holm"] >= ADJUSTED_LEVEL), "variant"
    ].tolist()
    if unsure:
        yield Caution(
            "Several comparisons, and some were bound to stand out",
            f"{listed(unsure)}: beyond chance when looked at alone, not as one of {len(others)} (Holm).",
            "Treat them as a reason to run more seeds and folds, not as a result.",
        )
    if not others["call"].isin(["better", "worse"]).any():
        yield Caution(
            "The data do not distinguish the variants",
            f"Every interval holds zero, at {others['pairs'].max()} pairs.",
            "More seeds and folds narrow the intervals; a difference that stays within them does not matter here.",
        )
