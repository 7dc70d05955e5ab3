"""The page that sets two studies side by side."""

import json
from collections.abc import Iterable, Sequence

from trainables.config import FineTuneConfig
from trainables.objective import OBJECTIVES
from tune_app.report import figures, findings
from tune_app.report.cautions import Caution
from tune_app.report.parts import Cell, Head, Page, Row, Table, written_at
from tune_app.results.study import Study
from tune_app.results.text import duration


def comparison_page(first: Study, second: Study) -> Page:
    names = [first.name, second.name] if first.name != second.name else [first.place, second.place]
    pair = list(zip(names, (first, second), strict=True))
    page = Page(
        f"{names[0]} against {names[1]}",
        " · ".join(study.place for _, study in pair),
        "Which of the two studies found the better configuration, and at what cost?",
        _verdict_of_two(pair),
        [
            {
                "value": _best_text(study),
                "text": f"{name}: {OBJECTIVES[study.spec.objective].title}",
            }
            for name, study in pair
        ]
        + [
            {
                "value": str(len(study.epochs)),
                "text": f"{name}: epochs of {len(study.trials_full)} trials",
            }
            for name, study in pair
        ],
        f"Written by medtune, {written_at()} UTC.",
    )
    doubts = list(_doubts(pair))
    if doubts:
        page.section("cautions", "Before you compare").parts.append(
            {"kind": "cautions", "cautions": doubts}
        )
    scored = all(study.scored for _, study in pair)
    if scored:
        section = page.section("budget", "Results of the same budget")
        section.figure(
            page, "budget", figures.progress_of_two(pair), "best objective so far over epochs spent"
        )
        section = page.section("best", "The two best trials")
        section.figure(
            page,
            "best",
            figures.best_of_two(pair),
            "validation AUC of both best trials with intervals",
            "Averaged weights; the bands are 95 % intervals.",
        )
        section.table(_two_configurations(pair), style="stack")
    section = page.section("numbers", "Side by side")
    section.table(_numbers(pair), style="stack")
    section = page.section("specifications", "Specifications")
    section.table(_specifications(pair), style="stack")
    for name, study in pair:
        section.head(name)
        for sentence in findings.summary(study):
            section.text(sentence)
    return page


def _best_text(study: Study) -> str:
    return f"{study.best()['objective']:.3f}" if study.scored else "-"


def _verdict_of_two(pair: Sequence[tuple[str, Study]]) -> str:
    if not all(study.scored for _, study in pair):
        return "There is nothing to compare yet: one of them has no score."
    (first_name, first), (second_name, second) = pair
    left, right = first.best(), second.best()
    ahead, by = (first_name, left["objective"] - right["objective"])
    if by < 0:
        ahead, by = second_name, -by
    noise = 1.96 * max(findings.standard_error(left), findings.standard_error(right))
    told = f"{ahead} is ahead by {by:.3f} ({left['objective']:.3f} and {right['objective']:.3f})"
    if first.spec.objective != second.spec.objective:
        return f"{told}, but the two have different objectives."
    if noise == noise:
        told += f", which is {'within' if by <= noise else 'beyond'} the noise of {noise:.3f}"
    return f"{told}; they spent {len(first.epochs)} and {len(second.epochs)} epochs."


def _doubts(pair: Sequence[tuple[str, Study]]) -> Iterable[Caution]:
    (_, first), (_, second) = pair
    if first.spec.objective != second.spec.objective:
        yield Caution(
            "The objectives differ",
            f"{first.spec.objective} and {second.spec.objective}: their values do not compare.",
            "Compare a metric both have, in `medtune results`.",
        )
    if first.info.get("cohort") != second.info.get("cohort") or first.spec.data != second.spec.data:
        yield Caution(
            "The data differ",
            f"{first.spec.data} and {second.spec.data}: a difference may be one of the data.",
            "Run both on the same table and recipe.",
        )
    folds = [sorted(set(study.trials_full["fold"].dropna())) for _, study in pair]
    if folds[0] != folds[1]:
        yield Caution(
            "The folds differ",
            " against ".join(", ".join(map(str, each)) or "none" for each in folds) + ".",
            "Run both on the same folds.",
        )
    if first.spec.epochs != second.spec.epochs:
        yield Caution(
            "Trials are of different length",
            f"{first.spec.epochs} and {second.spec.epochs} epochs.",
            "Compare by epochs spent, below.",
        )


def _two_configurations(pair: Sequence[tuple[str, Study]]) -> Table:
    best = [study.best() for _, study in pair]
    rows = []
    for name in FineTuneConfig.model_fields:
        texts = [findings.setting_text(name, trial[name]) for trial in best]
        searched = any(name in study.searched for _, study in pair)
        if texts[0] == texts[1] and not searched:
            continue
        differs = texts[0] != texts[1]
        rows.append(
            Row(
                [Cell(name), Cell(texts[0]), Cell(f"{texts[1]} {'≠' if differs else ''}".strip())],
                kind="differs" if differs else "",
            )
        )
    heads = [
        Head("hyperparameter"),
        *(Head(f"{name}: {trial['trial']}") for (name, _), trial in zip(pair, best, strict=True)),
    ]
    return Table("best configurations", heads, rows)


def _numbers(pair: Sequence[tuple[str, Study]]) -> Table:
    def of(study: Study) -> dict[str, str]:
        trials = study.trials_full
        states = trials["state"].value_counts()
        verdicts = trials["verdict"].value_counts()
        return {
            "best": _best_text(study),
            "trials": ", ".join(f"{count} {state}" for state, count in states.items()),
            "epochs run": f"{len(study.epochs)} of {int(trials['epochs'].sum())}",
            "time in epochs": duration(float(trials["work_s"].sum())),
            "GPU time": duration(gpu_s) if (gpu_s := float(trials["gpu_s"].sum())) else "none",
            "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items()),
            "folds": ", ".join(str(fold) for fold in sorted(set(trials["fold"].dropna()))),
        }

    left, right = (of(study) for _, study in pair)
    rows = [Row([Cell(name), Cell(left[name], "text"), Cell(right[name], "text")]) for name in left]
    return Table("numbers", [Head(""), *(Head(name) for name, _ in pair)], rows)


def _specifications(pair: Sequence[tuple[str, Study]]) -> Table:
    specs = [study.spec.model_dump(mode="json") for _, study in pair]
    rows = []
    for name in specs[0]:
        texts = [
            f"{len(spec[name])} trials" if name == "planned" else json.dumps(spec[name])
            for spec in specs
        ]
        differs = specs[0][name] != specs[1][name]
        if differs:
            rows.append(Row([Cell(name), *(Cell(text[:400], "text") for text in texts)]))
    if not rows:
        rows.append(Row([Cell("all fields"), Cell("the same"), Cell("the same")]))
    return Table(
        "differences of the specifications",
        [Head("field"), *(Head(name) for name, _ in pair)],
        rows,
    )
