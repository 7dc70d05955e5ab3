"""One study that misled its readers: console, CSV, JSON, Python, page and report have the same words and numbers of it."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from filelock import FileLock
from typer.testing import CliRunner

from trainables.checkpoints import write_json
from tune_app.cli.app import app
from tune_app.report import findings
from tune_app.report.cautions import cautions
from tune_app.report.checklist import checklist
from tune_app.report.page import write_report
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.serve.access import Access
from tune_app.serve.app import build_app
from tune_app.study.files import StudyFiles, append_line

WriteStudy = Callable[..., Path]

RISE_AND_DECLINE = [0.62, 0.72, 0.78, 0.819, 0.819, 0.819, 0.80, 0.78, 0.77, 0.764]
AT_CHANCE = [0.306, 0.30, 0.306, 0.29, 0.306, 0.306, 0.28, 0.30, 0.306, 0.306]
HALF = 0.07
"""Half the interval of every AUC: .819 and .764 are within noise, and so are .819 and the .811 that a rung stopped."""


class Trial(NamedTuple):
    """A trial of the study: its AUC by epoch, the facts of its record, and the verdict that every reader must show."""

    curve: list[float]
    frozen: int
    state: str
    recorded: str | None
    verdict: str
    reason: str | None = None


TRIALS = {
    "00000": Trial(RISE_AND_DECLINE, 3, "completed", "loss_spike", "loss_spike"),
    "00001": Trial(RISE_AND_DECLINE, 0, "completed", "healthy", "healthy"),  # ties with 00000
    "00002": Trial(
        [0.60, 0.65, 0.66], 5, "stopped", "healthy", "no_fault", "requested: stopped by hand"
    ),
    "00003": Trial(
        [0.60, 0.70, 0.811, 0.811], 2, "stopped", "healthy", "no_fault", "halving: rank 3 of 3"
    ),
    "00004": Trial(AT_CHANCE, 6, "completed", "healthy", "no_fault"),
    "00005": Trial([0.60, 0.70, 0.72, 0.74], 1, "running", None, "no_fault"),
}
"""Of eight that are asked for. `healthy` in the records is what version 0.1 wrote."""


@pytest.fixture
def misleading(write_study: WriteStudy) -> Path:
    space = {
        "search": {
            "freeze_backbone_epochs": {"low": 0, "high": 6},
            "max_m": {"low": 0.05, "high": 0.5},
        }
    }
    root = write_study(
        "misleading", trials=6, epochs=10, policy=False, unfinished=1, spec={"space": space}
    )
    files = StudyFiles(root)
    info = json.loads(files.spec.read_text())
    info["spec"]["trials"] = 8
    files.spec.write_text(json.dumps(info))
    rows = [json.loads(line) for line in files.epochs.read_text().splitlines()]
    files.epochs.write_text("")
    files.decisions.write_text("")
    for row in rows:
        trial = TRIALS[row["trial"]]
        if row["epoch"] > len(trial.curve):
            continue
        value = trial.curve[row["epoch"] - 1]
        for weights in ("", "_raw", "_ema"):
            row |= {
                f"val_auc{weights}": value,
                f"val_auc{weights}_low": value - HALF,
                f"val_auc{weights}_high": value + HALF,
            }
        append_line(files.epochs, row | {"drw_active": False, "epoch_s": 10.0})
    for name, trial in TRIALS.items():
        own = files.trial(name)
        record = json.loads(own.record.read_text())
        record |= {"state": trial.state, "verdict": trial.recorded, "objective": None}
        record |= {"reason": trial.reason, "overrides": {"freeze_backbone_epochs": trial.frozen}}
        record |= {"verdict_epoch": 7 if trial.recorded == "loss_spike" else None}
        write_json(own.record, record)
        config = json.loads(own.config.read_text())
        write_json(own.config, config | {"freeze_backbone_epochs": trial.frozen})
    stops = {"00002": ("requested", 3, "stopped by hand"), "00003": ("halving", 4, "rank 3 of 3")}
    for name, (reason, epoch, summary) in stops.items():
        decision = {"trial": name, "epoch": epoch, "action": "stop", "reason": reason}
        append_line(files.decisions, decision | {"verdict": "healthy", "summary": summary})
    return root


class Report(HTMLParser):
    """The cells of each table row, the legend, and all words of a report."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._skipped, self._cell = "", False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._skipped = tag
        if tag in ("table", "tr"):  # an empty row before each table
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._skipped = ""
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += data

    def table(self, *heads: str) -> list[dict[str, str]]:
        """Rows of the last table whose heads begin so."""
        [*_, at] = [i for i, row in enumerate(self.rows) if tuple(row[: len(heads)]) == heads]
        names = [name.strip() for name in self.rows[at]]
        found = []
        for row in self.rows[at + 1 :]:
            if len(row) != len(names):
                break
            found.append(dict(zip(names, (cell.strip() for cell in row), strict=True)))
        return found


class Readers(NamedTuple):
    """What each reader of the study has."""

    study: Study
    console: str
    json: list[dict[str, Any]]
    csv: list[dict[str, str]]
    file: pd.DataFrame
    page: dict[str, Any]
    table: dict[str, Any]
    trial: Callable[[str], dict[str, Any]]
    report: Report


def medtune(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def read_all(root: Path, tmp_path: Path, client: TestClient) -> Readers:
    study = load_study(root)
    study.to_csv(tmp_path / "tables")

    def answer(path: str) -> dict[str, Any]:
        got = client.get(f"/api/studies/misleading{path}")
        assert got.status_code == 200, got.text
        found: dict[str, Any] = got.json()
        return found

    return Readers(
        study,
        medtune("results", root),
        json.loads(medtune("results", root, "--format", "json")),
        list(csv.DictReader(io.StringIO(medtune("results", root, "--format", "csv")))),
        pd.read_csv(tmp_path / "tables" / "trials.csv", dtype={"trial": str}),
        answer(""),
        answer("/trials"),
        lambda trial: answer(f"/trials/{trial}"),
        Report(write_report(study, tmp_path / "report.html")),
    )


@pytest.fixture
def client(
    misleading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    service = build_app(misleading.parent, Access("a token of the test"))
    with TestClient(service, base_url="http://127.0.0.1:8321") as client:
        yield client


def test_every_reader_of_a_study_has_the_same_words_and_numbers(
    misleading: Path, tmp_path: Path, client: TestClient
) -> None:
    with FileLock(StudyFiles(misleading).lock):  # its driver runs
        readers = read_all(misleading, tmp_path, client)
    same_verdicts(readers)
    same_best(readers)
    same_counts(readers, state="running")
    same_stops(readers)
    same_checklist(readers)
    no_edge_at_a_natural_bound(readers)
    after = read_all(misleading, tmp_path, client)
    same_counts(after, state="interrupted")


def same_verdicts(readers: Readers) -> None:
    """A trial that was cut, runs or is at chance is not healthy, wherever it is read."""
    expected = {name: trial.verdict for name, trial in TRIALS.items()}
    assert readers.study.trials.set_index("trial")["verdict"].to_dict() == expected
    assert readers.file.set_index("trial")["verdict"].to_dict() == expected
    assert {row["trial"]: row["verdict"] for row in readers.json} == expected
    assert {row["trial"]: row["verdict"] for row in readers.csv} == expected
    at = [column["name"] for column in readers.table["columns"]].index("verdict")
    for kind in ("values", "texts"):
        assert {row["trial"]: row[kind][at] for row in readers.table["rows"]} == expected
    in_report = {row["trial"]: row["verdict"] for row in readers.report.table("trial", "state")}
    for name, verdict in expected.items():
        [line] = [line for line in readers.console.splitlines() if line.startswith(name)]
        since = verdict == "loss_spike"
        assert line.split()[2:4] == [verdict, "(7)"] if since else line.split()[2] == verdict
        assert readers.trial(name)["verdict"] == verdict
        assert in_report[name] == (f"{verdict} since 7" if since else verdict)
    assert set(readers.study.decisions["verdict"]) == {"no_fault"}
    groups = {group["title"]: group["count"] for group in readers.page["groups"]}
    shown = {"stopped at a rung": 1, "stopped on request": 1}
    assert groups == {"healthy": 1, "loss_spike": 1, "no_fault": 2, **shown}
    assert all(f"{title} ({count})" in readers.report.text for title, count in groups.items())


def same_best(readers: Readers) -> None:
    """Two trials tie at .819: the one without a fault leads, and every reader says how many are within noise."""
    best = readers.study.best()
    assert (best["trial"], round(best["objective"], 3)) == ("00001", 0.819)
    assert readers.study.leaderboard(1)["trial"].tolist() == ["00001"]
    assert readers.json[0]["trial"] == readers.csv[0]["trial"] == "00001"
    found = findings.summary(readers.study)[1]
    assert found.startswith("Trial 00001 is best so far with 0.819 (AUC 0.819, 95 % interval ")
    assert "; 2 other trials lie within the noise of 0.070; " in found
    assert readers.page["found"] == found
    assert found in readers.console
    assert found in readers.report.text
    assert (readers.page["best_trial"], readers.page["best"]) == ("00001", best["objective"])
    assert (readers.page["rivals"], round(readers.page["noise"], 3)) == (2, 0.07)
    value, words = readers.page["first_tile"]
    assert value == "0.819 [0.75, 0.89]"
    assert words.endswith("; 2 others within its noise")
    assert f"{value} {words}" in readers.report.text.replace("0.89]b", "0.89] b")


def same_counts(readers: Readers, *, state: str) -> None:
    """Six of eight trials have begun and five have ended; one state of the study."""
    words = f"trials ended: 3 completed, 2 stopped; 1 {state}"
    assert readers.page["trials_tile"] == ["5 of 8", words]
    assert (readers.page["ended"], readers.page["trials"]) == (5, 8)
    assert f"5 of 8 {words}" in readers.console
    assert "5 of 8" in readers.report.text
    assert words in readers.report.text
    assert readers.page["state"] == state
    assert readers.study.running == (state == "running")
    told = [caution["title"] for caution in readers.page["cautions"]]
    assert ("The study is still running" in told) == (state == "running")
    assert ("The study was interrupted" in told) == (state == "interrupted")
    assert all(title in readers.report.text for title in told)
    if state == "running":
        now = readers.study.epochs["time"].max()
        assert readers.page["progress"]["running"] == 1
        assert now < readers.page["progress"]["likely"] < readers.page["progress"]["latest"]


def same_stops(readers: Readers) -> None:
    """Stopping by hand spares nothing: 6 of the 50 epochs of the other trials."""
    spared = "1 of 6 trials that have started was stopped early"
    assert findings.epochs_saved(readers.study) == pytest.approx(6 / 50)
    assert f"{spared}, which spared 12 % of the epochs" in readers.page["found"]
    assert f"{spared}: 6 epochs were not run" in readers.report.text
    assert "; 1 was stopped on request, which spares nothing." in readers.report.text
    reasons = {row["reason"]: row for row in readers.report.table("reason", "trials")}
    assert reasons["stopped on request"]["epochs spared"] == "0"
    assert reasons["halving"]["epochs spared"] == "6"


def same_checklist(readers: Readers) -> None:
    """A fall from .819 to .764 within .07 is no decline, and no increase either."""
    checks = {check.text: check for check in checklist(readers.study)}
    rows = readers.report.table("success indicators") + readers.report.table("warning signs")
    assert len(rows) == len(checks)
    for row in rows:
        check = checks[row.get("success indicators") or row["warning signs"]]
        said = {True: "yes", False: "no", None: "unclear"}[check.present]
        assert row["present"].endswith(said)
        assert row["evidence"] == check.evidence
        assert row["among all"] == check.among
    steady = checks["Validation AUC increases steadily"]
    assert steady.present is None
    assert "0.819 at best, 0.770 at the end: no change beyond noise (± 0.070)" in steady.evidence


def no_edge_at_a_natural_bound(readers: Readers) -> None:
    """No stage of the backbone can be frozen for less than 0 epochs: there is no wider range to search."""
    assert readers.study.best()["freeze_backbone_epochs"] == 0
    told = [caution["title"] for caution in readers.page["cautions"]]
    assert told == [caution.title for caution in cautions(readers.study)]
    assert "The best freeze_backbone_epochs is at the edge of its range" not in told
    assert "freeze_backbone_epochs is at the edge" not in readers.report.text
