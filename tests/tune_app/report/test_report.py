import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from search_spaces.fixes import all_fixes, baseline
from tune_app.report import figures, findings, sections
from tune_app.report.page import watch_report, write_comparison, write_report
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.files import StudyFiles, append_line

WriteStudy = Callable[..., Path]

NASTY = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"><svg onload=alert(3)> & 'quoted'",
    "<a href='javascript:alert(4)'>{{ 7 * 7 }}</a>",
]


class Page(HTMLParser):
    """The page as a browser parses it: elements with attributes, text, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.words.append(data)

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def json(self, name: str) -> Any:
        return json.loads("".join(data for attrs, data in self.scripts if attrs.get("id") == name))


@pytest.fixture(scope="module")
def search_page(a_search: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_report(load_study(a_search), tmp_path_factory.mktemp("report") / "search.html")
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ablation_page(an_ablation: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_report(
        load_study(an_ablation), tmp_path_factory.mktemp("report") / "ablation.html"
    )
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def search(a_search: Path) -> Study:
    return load_study(a_search)


# The page --------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_search_holds_everything_a_reader_is_promised(
    search_page: Page, search: Study
) -> None:
    text = search_page.text()
    asked, found = findings.summary(search)
    for words in (
        asked,
        found,
        "Before you trust this",
        "The best configuration against the documented one",
        "success indicators",
        "warning signs",
        "Averaged weights (EMA)",
        "Raw weights",
        "Stopped trials, why, and the epochs saved",
        "All settings at a glance",
        "Which hyperparameters mattered",
        "One hyperparameter at a time",
        "Every trial",
        "torch 2.13.0",
        "gpu-01",
    ):
        assert words.replace("version: ", "") in text.replace("version: ", ""), words
    drawn = {attrs["data-figure"] for _, attrs in search_page.elements if "data-figure" in attrs}
    assert drawn == set(search_page.json("figures"))
    assert {f"slice-{name}" for name in search.searched} < drawn


def test_the_page_of_an_ablation_shows_effects_with_intervals(
    ablation_page: Page, an_ablation: Path
) -> None:
    figure = ablation_page.json("figures")["effects-0"]
    table = load_study(an_ablation).effects().set_index("variant")
    points = {
        name: (x, plus, minus)
        for trace in figure["data"]
        for name, x, plus, minus in zip(
            trace["y"],
            trace["x"],
            trace["error_x"]["array"],
            trace["error_x"]["arrayminus"],
            strict=True,
        )
    }
    assert set(points) == set(table.index) - {"baseline"}
    for name, (x, plus, minus) in points.items():
        assert x == pytest.approx(table["mean"][name], abs=1e-4)
        assert x + plus == pytest.approx(table["high"][name], abs=2e-4)
        assert x - minus == pytest.approx(table["low"][name], abs=2e-4)
    assert "What each variant changes" in ablation_page.text()
    assert "Holm p" in ablation_page.text()


def test_the_effects_name_runs_that_collapsed_for_a_time(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    root = write_study(variants={"baseline": {}, "other": {}}, seeds=2, epochs=4)
    record = root / "trials" / "00001" / "trial.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "healed_epochs": 25}))
    text = Page(
        write_report(load_study(root), tmp_path / "page.html").read_text(encoding="utf-8")
    ).text()
    assert re.search(r" other [^%]* 0 of 2, 1 healed ", text)
    assert len(re.findall(r"\d of \d, \d healed", text)) == 1, "the others are not mentioned"


def test_a_confirmation_has_a_section_that_names_its_winner_or_none(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    variants = {"documented": {}, "trial-00003": {"max_m": 0.21}}
    root = write_study(kind="confirmation", variants=variants, seeds=2, folds=3, epochs=4)
    page = Page(write_report(load_study(root), tmp_path / "page.html").read_text())
    assert "Confirmation over folds and seeds" in page.text()
    assert "inner" in page.text()


def test_the_page_of_a_search_shows_the_confirmation_in_its_folder(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    root = write_study(trials=4, epochs=6)
    assert (
        "Confirmation over folds"
        not in Page(write_report(load_study(root), tmp_path / "a.html").read_text()).text()
    )
    variants = {"documented": {}, "trial-00003": {"max_m": 0.21}}
    options = {"kind": "confirmation", "variants": variants, "seeds": 2, "folds": 3, "epochs": 4}
    write_study(f"{root.name}/confirmation", **options)
    page = Page(write_report(load_study(root), tmp_path / "b.html").read_text())
    assert "Confirmation over folds and seeds" in page.text()
    assert "12 of 12 runs" in page.text()


def test_the_page_needs_nothing_but_itself(search_page: Page) -> None:
    for tag, attrs in search_page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert sum(tag == "script" for tag, _ in search_page.elements) == 4


def test_the_policy_lets_exactly_the_pages_own_scripts_run(search_page: Page) -> None:
    policy = next(
        attrs["content"]
        for tag, attrs in search_page.elements
        if tag == "meta" and "http-equiv" in attrs
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    scripts = [
        "".join(data)
        for attrs, data in search_page.scripts
        if attrs.get("type") != "application/json"
    ]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert len(hashes) == 2


def test_whatever_comes_from_a_study_is_escaped(write_study: WriteStudy, tmp_path: Path) -> None:
    root = write_study(
        f"{NASTY[0]} study".replace("/", ""),
        variants={name: {} for name in NASTY},
        seeds=2,
        epochs=4,
    )
    files = StudyFiles(root)
    info = json.loads(files.spec.read_text())
    info["versions"] = dict.fromkeys(NASTY, NASTY[1])
    info["hardware"] = {"host": NASTY[2]}
    files.spec.write_text(json.dumps(info))
    for number, path in enumerate(sorted(files.trials.glob("*/trial.json"))):
        record = json.loads(path.read_text())
        record |= {
            "error": NASTY[0],
            "reason": NASTY[1],
            "verdict": NASTY[2],
            "verdict_summary": NASTY[3],
        }
        record |= {
            "advice": NASTY[0],
            "node": NASTY[1],
            "state": ["stopped", "failed", "completed"][number % 3],
        }
        record["overrides"] |= {NASTY[3]: NASTY[0]}
        path.write_text(json.dumps(record))
    unlike = files.trial(NASTY[2].replace("/", ""))  # a folder that no driver made
    unlike.folder.mkdir(parents=True)
    append_line(
        unlike.record,
        {
            "state": "failed",
            "error": NASTY[3],
            "overrides": {NASTY[0]: NASTY[1], "max_m": NASTY[2]},
        },
    )
    append_line(unlike.config, {NASTY[1]: NASTY[2], "head": NASTY[0], "optimizer": NASTY[3]})
    append_line(
        files.epochs,
        {
            "trial": "00000",
            "epoch": 5,
            "time": 1.0,
            "val_auc": 0.5,
            "precision": NASTY[1],
            NASTY[2]: 1,
        },
    )
    decision = {
        "trial": "00000",
        "epoch": 5,
        "action": "stop",
        "reason": NASTY[0],
        "summary": NASTY[1],
        "verdict": NASTY[2],
    }
    append_line(files.decisions, decision)
    study = load_study(root)
    plain = Page(
        write_report(
            load_study(write_study("plain", variants={"a": {}, "b": {}}, epochs=4)), tmp_path / "p"
        ).read_text()
    )
    for path in (
        write_report(study, tmp_path / "nasty.html"),
        write_comparison(study, study, tmp_path / "both.html"),
    ):
        page = Page(path.read_text(encoding="utf-8"))
        assert page.tags() <= plain.tags() | {"details", "summary", "code", "ul", "li", "b"}
        assert sum(tag == "script" for tag, _ in page.elements) == 4
        assert not [
            attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)
        ]
        assert "7 * 7" in page.text() or path.name == "both.html"
        for text in _strings(page.json("figures")):
            assert not re.search(r"<(?!br>|b>|/b>|extra>|/extra>)", text), text


def test_what_a_search_tried_is_escaped(write_study: WriteStudy, tmp_path: Path) -> None:
    """A text among the settings and a reason to stop reach the figures of a search, as ticks, labels and groups."""
    files = StudyFiles(write_study(trials=12, epochs=4))
    for number, path in enumerate(sorted(files.trials.glob("*/trial.json"))):
        record = json.loads(path.read_text())
        record["overrides"]["head"] = NASTY[number % 4]
        path.write_text(json.dumps(record | {"reason": NASTY[0], "state": "stopped"}))
        config = path.with_name("config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"head": NASTY[number % 4]}))
        decision = {
            "trial": record["trial"],
            "epoch": 4,
            "action": "stop",
            "reason": "diagnosis",
            "summary": NASTY[1],
        }
        append_line(
            files.decisions,
            decision | {"verdict": NASTY[2], "cutoff": 0.5, "rank": 1, "arrived": 1},
        )
    page = Page(
        write_report(load_study(files.root), tmp_path / "nasty.html").read_text(encoding="utf-8")
    )
    texts = list(_strings(page.json("figures")))
    assert sum("img src=x" in text for text in texts) > 1, "the text to escape is missing"
    for text in texts:
        assert not re.search(r"<(?!br>|b>|/b>|extra>|/extra>)", text), text
    assert sum(tag == "script" for tag, _ in page.elements) == 4


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for item in node.values():
            yield from _strings(item)
    elif isinstance(node, list):
        for item in node:
            yield from _strings(item)


@pytest.mark.parametrize(
    "options",
    [
        {"trials": 1, "epochs": 1},
        {"trials": 1, "epochs": 2, "unfinished": 1},
        {"trials": 3, "epochs": 6, "unfinished": 3, "policy": False},
        {"trials": 2, "epochs": 4, "failed": (0, 1)},
        {"trials": 5, "epochs": 3},
        {"variants": {"only": {}}, "epochs": 3},
        {"variants": {"a": {}, "b": {}}, "epochs": 3, "unfinished": 2},
        {"variants": {"a": {}, "b": {}}, "epochs": 3, "failed": (0,)},
    ],
)
def test_studies_in_every_stage_have_a_page(
    write_study: WriteStudy, tmp_path: Path, options: dict[str, Any]
) -> None:
    page = Page(
        write_report(load_study(write_study(**options)), tmp_path / "page.html").read_text()
    )
    assert "Every trial" in page.text()
    _check_figures(page)


def test_a_study_that_has_not_begun_has_a_page(write_study: WriteStudy, tmp_path: Path) -> None:
    root = write_study(trials=1, epochs=2)
    for path in (root / "trials" / "00000").iterdir():
        path.unlink()
    (root / "epochs.jsonl").unlink()
    page = Page(write_report(load_study(root), tmp_path / "page.html").read_text())
    assert "Nothing yet: 0 trials have started" in page.text()


def test_only_the_page_of_a_running_study_loads_itself_again(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    from filelock import FileLock

    root = write_study(trials=2, epochs=3, unfinished=1)
    path = tmp_path / "page.html"
    assert (
        'http-equiv="refresh"' not in write_report(load_study(root), path, refresh_s=30).read_text()
    )
    with FileLock(StudyFiles(root).lock):
        assert (
            'http-equiv="refresh" content="30"'
            in write_report(load_study(root), path, refresh_s=30).read_text()
        )
        assert 'http-equiv="refresh"' not in write_report(load_study(root), path).read_text()


def test_watching_writes_when_there_is_news_and_ends_with_the_driver(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    root = write_study(trials=2, epochs=6, unfinished=1)
    files, path = StudyFiles(root), tmp_path / "page.html"
    looks: list[int] = []
    said: list[str] = []

    def until(study: Study) -> bool:
        looks.append(len(study.epochs))
        if len(looks) == 2:
            append_line(
                files.epochs,
                {"trial": "00001", "epoch": 4, "time": 1.0, "val_auc": 0.8, "epoch_s": 1.0},
            )
        return len(looks) == 4

    watch_report(root, path, say=said.append, every_s=0.01, until=until)
    assert looks == [looks[0], looks[0], looks[0] + 1, looks[0] + 1]
    assert len(said) == 3  # first, the new row, the last
    assert path.exists()
    assert {each.name for each in tmp_path.iterdir()} == {path.name, root.name}


def test_the_report_loads_neither_torch_nor_ray(an_ablation: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tune_app.report.page import write_report\nfrom tune_app.results import load_study\n"
        f"write_report(load_study({str(an_ablation)!r}), {str(tmp_path / 'page.html')!r})\n"
        "print(sorted({'torch', 'ray', 'monai'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_two_studies_are_set_side_by_side(
    a_search: Path, write_study: WriteStudy, tmp_path: Path
) -> None:
    other = write_study("the other one", trials=8, epochs=20, seed=5, spec={"objective": "best"})
    first, second = load_study(a_search), load_study(other)
    page = Page(write_comparison(first, second, tmp_path / "both.html").read_text())
    text = page.text()
    assert "a search against the other one" in text
    assert "The objectives differ" in text
    for study in (first, second):
        assert f"{study.best()['objective']:.3f}" in text
    budget = page.json("figures")["budget"]
    assert [trace["x"][-1] for trace in budget["data"]] == [len(first.epochs), len(second.epochs)]
    for trace, study in zip(budget["data"], (first, second), strict=True):
        assert trace["y"] == sorted(trace["y"])
        assert trace["y"][-1] == pytest.approx(study.trials_full["objective"].max(), abs=1e-4)
    _check_figures(page)


def test_a_comparison_says_in_plain_words_which_folds_and_settings_differ(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    two = {"base": {}, "other": {"max_m": 0.3}}
    config = {"epochs": 4, "flip_axes": ""}
    first = load_study(write_study("first", variants=two, folds=2, epochs=4))
    second = load_study(
        write_study("second", variants=two, folds=1, epochs=4, spec={"config": config})
    )
    text = Page(write_comparison(first, second, tmp_path / "both.html").read_text()).text()
    assert "0, 1 against 0." in text
    assert "none ≠" in text


# The figures -----------------------------------------------------------------------------------------------------------


def _check_figures(page: Page) -> None:
    """Plotly's own schema, and no colour that dark mode would leave as it is."""
    for name, figure in page.json("figures").items():
        go.Figure(figure)
        for text in _strings(figure):
            if re.fullmatch(r"#[0-9a-fA-F]{3,8}|rgba?\(.*\)", text) and text != "rgba(0,0,0,0)":
                assert text in figures.PALETTE, (name, text)


def test_every_figure_is_one_to_plotly_and_knows_dark_mode(
    search_page: Page, ablation_page: Page
) -> None:
    _check_figures(search_page)
    _check_figures(ablation_page)
    kinds = {
        trace["type"] for figure in search_page.json("figures").values() for trace in figure["data"]
    }
    assert kinds == {"scatter", "bar"}  # nothing that needs WebGL


def test_groups_differ_without_colour() -> None:
    looks = [(group.symbol, group.glyph) for group in figures.GROUPS.values()]
    assert len(set(looks)) == len(looks)
    verdicts = [
        group
        for key, group in figures.GROUPS.items()
        if key not in ("healthy", "no_fault", "halved", "requested", "failed")
    ]
    assert all(group.dash != "solid" for group in verdicts)
    assert {group.dash for group in figures.GROUPS.values()} <= set(sections.DASHES)


def test_curves_hold_every_epoch_rungs_drw_starts_and_stops(search: Study) -> None:
    figure = figures.curves(search, "val_auc_raw")
    lines = [t for t in figure["data"] if t["mode"] == "lines" and "group" in t["meta"]]
    points = {
        (trial, x): y
        for trace in lines
        for trial, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True)
        if trial is not None
    }
    rows = search.epochs
    assert points == {
        (trial, epoch): round(value, 4)
        for trial, epoch, value in zip(
            rows["trial"], rows["epoch"], rows["val_auc_raw"], strict=True
        )
    }
    for trace in lines:  # a gap between any two trials
        for before, after in zip(trace["customdata"], trace["customdata"][1:], strict=False):
            assert before is None or after is None or before == after
    dotted = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["line"]["dash"] == "dot"]
    assert dotted == list(search.rungs)
    ended = (
        search.trials_full[search.trials_full["state"].isin(["stopped", "failed"])]
        .set_index("trial")["epochs_run"]
        .to_dict()
    )
    marks = [t for t in figure["data"] if t["mode"] == "markers" and not t["meta"].get("drw")]
    assert {
        t: x for trace in marks for t, x in zip(trace["customdata"], trace["x"], strict=True)
    } == ended
    begun = (
        rows[rows["drw_active"].fillna(False).astype(bool)]
        .groupby("trial")["epoch"]
        .min()
        .to_dict()
    )
    starts = [t for t in figure["data"] if t["meta"].get("drw")]
    assert {
        t: x for trace in starts for t, x in zip(trace["customdata"], trace["x"], strict=True)
    } == begun
    best = next(t for t in figure["data"] if t["meta"].get("best"))
    assert set(best["customdata"]) == {search.best()["trial"]}


@pytest.mark.parametrize(("epochs", "dtick"), [(5, 1), (20, None)])
def test_an_axis_of_few_epochs_has_no_tick_between_two(
    write_study: WriteStudy, epochs: int, dtick: int | None
) -> None:
    study = load_study(write_study(trials=4, epochs=epochs))
    assert figures.curves(study, "val_auc")["layout"]["xaxis"].get("dtick") == dtick
    assert (
        figures.best_of_two([("one", study), ("two", study)])["layout"]["xaxis"].get("dtick")
        == dtick
    )


def test_many_trials_are_thinned_and_the_page_says_so(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(write_study(trials=24, epochs=2, policy=False))
    monkeypatch.setattr(figures, "MOST_CURVES", 10)
    drawn = {
        t for trace in figures.curves(study, "val_auc")["data"] for t in trace["customdata"] if t
    }
    ranked = study.trials_full.sort_values("objective", ascending=False)["trial"].tolist()
    assert len(drawn) == 10
    assert set(ranked[:5]) <= drawn
    assert ranked[-1] in drawn


def test_slices_mark_the_documents_values_before_and_after(search: Study) -> None:
    for name in ("max_m", "backbone_lr", "ema_decay", "drw_start_epoch"):
        figure, axis = figures.slice_of(search, name), search.axis(name)
        marks = {shape["line"]["dash"]: shape["x0"] for shape in figure["layout"]["shapes"]}
        assert marks["dash"] == pytest.approx(axis.place(baseline(20)[name]))
        assert marks["solid"] == pytest.approx(axis.place(all_fixes(20)[name]))
        points = [x for trace in figure["data"] if "group" in trace["meta"] for x in trace["x"]]
        ended = search.trials_full[
            search.trials_full["objective"].notna() & (search.trials_full["state"] != "failed")
        ]
        assert sorted(points) == pytest.approx(sorted(axis.places(ended)), abs=1e-4)


def test_parallel_coordinates_show_each_trial_once_in_the_tier_of_its_objective(
    search: Study,
) -> None:
    figure = figures.parallel(search)
    axes = figure["layout"]["meta"]["axes"]
    assert axes == [*search.searched, "objective"]
    ended = search.trials_full[
        search.trials_full["objective"].notna() & (search.trials_full["state"] != "failed")
    ]
    tiers = {
        trace["meta"]["tier"]: [t for t in trace["customdata"] if t]
        for trace in figure["data"]
        if "tier" in trace["meta"]
    }
    assert sorted(t for names in tiers.values() for t in names) == sorted(
        list(ended["trial"]) * len(axes)
    )
    assert search.best()["trial"] in tiers["top"]
    for trace in figure["data"]:
        assert all(y is None or -0.05 <= y <= 1.05 for y in trace["y"])


def test_stops_add_up_in_the_figure(search: Study) -> None:
    figure = figures.stopped(findings.stops(search))
    run, spared = (sum(trace["x"]) for trace in figure["data"])
    stopped = search.trials_full[search.trials_full["state"] == "stopped"]
    assert run == stopped["epochs_run"].sum()
    assert run + spared == stopped["epochs"].sum()


def test_the_budget_curve_is_the_best_objective_by_epochs_spent(search: Study) -> None:
    spent, best = figures.budget_curve(search)
    assert spent == sorted(set(spent))
    assert best == sorted(best)  # type: ignore[type-var]
    assert best[-1] is not None
    assert math.isclose(best[-1], search.trials_full["objective"].max(), abs_tol=1e-4)
