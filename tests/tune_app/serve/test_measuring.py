"""The time of an epoch measured on this machine from the form: once, one at a time, and by its rules."""

import fcntl
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import wait_for
from filelock import FileLock
from starlette.testclient import TestClient

from trainables.data.storage import DATA_ROOTS
from tune_app.serve import measuring
from tune_app.serve.access import Access
from tune_app.serve.app import build_app
from tune_app.serve.measuring import Measurements
from tune_app.serve.queue import QueueError
from tune_app.study.duration import expected_epochs
from tune_app.study.files import StudyFiles
from tune_app.study.policy import Policy
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

TOKEN = "a token of the test"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SMALL = {"depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 2, "epochs": 9}

FOUND = {
    "epoch_s": 3.0,
    "train": 8,
    "val": 2,
    "at_once": 2,
    "device": "CPU",
    "threads": 1,
    "trial_gib": 0.5,
}
"""What a process reports."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), subjects=12, side=(8, 9))


@pytest.fixture
def fields(table: Path) -> dict[str, Any]:
    return {"data": str(table), "trials": 5, "gpus_per_trial": 0, "config": SMALL}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "studies").mkdir()
    app = build_app(tmp_path / "studies", Access(TOKEN))
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        yield client


Program = Callable[[str], None]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Sets the code that runs in the place of the measuring process."""

    def put(code: str) -> None:
        monkeypatch.setattr(measuring, "python", lambda *words: [sys.executable, "-c", code])

    return put


def post(client: TestClient, path: str, body: Any) -> Any:
    return client.post(f"/api/{path}", json=body, headers=BEARER)


def outcome(client: TestClient, key: str) -> dict[str, Any]:
    """Return what became of a measurement, once it has ended."""

    def state() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/api/measure/{key}", headers=BEARER).json()
        return found

    wait_for(lambda: state()["state"] != "measuring")
    return state()


def test_an_epoch_is_measured_once_and_gives_the_time_of_a_study(
    client: TestClient, fields: dict[str, Any], program: Program
) -> None:
    assert post(client, "check", fields).json()["measured"] is None
    began = post(client, "measure", fields).json()
    assert began["state"] == "measuring"
    assert outcome(client, began["key"])["state"] == "measured", "by a real process"
    found = post(client, "check", fields).json()["measured"]
    rows = len(Path(fields["data"]).read_text().splitlines()) - 1
    assert (found["device"], found["train"] + found["val"]) == ("CPU", rows)
    rounds = math.ceil(5 / found["at_once"])
    assert found["latest_s"] == pytest.approx(rounds * 9 * found["epoch_s"])
    policy = build_spec(fields).policy
    expected = expected_epochs(Policy(policy, 9), 5)
    assert found["likely_s"] == pytest.approx(rounds * expected * found["epoch_s"])

    program("raise SystemExit('measured again')")
    assert post(client, "measure", fields).json()["state"] == "measured"
    more = {**fields, "trials": 50, "max_concurrent": 1, "config": {**SMALL, "epochs": 18, "s": 9.0}}  # fmt: skip
    same = post(client, "check", more).json()["measured"]
    assert same["epoch_s"] == found["epoch_s"]
    assert same["latest_s"] == pytest.approx(50 * 18 * found["epoch_s"])


@pytest.mark.parametrize(
    "change",
    [{"depth": 18}, {"volume_shape": 24}, {"batch_size": 2}, {"num_folds": 3}, {"width": 0.25}],
)
def test_another_network_shape_batch_or_split_is_another_measurement(
    tmp_path: Path, fields: dict[str, Any], change: dict[str, Any]
) -> None:
    measurements = Measurements(tmp_path / "pace.json", lambda: os.open(os.devnull, 0), {})
    one, other = (build_spec({**fields, "config": {**SMALL, **more}}) for more in ({}, change))
    assert measurements.key(one) == measurements.key(build_spec({**fields, "trials": 9}))
    assert measurements.key(one) != measurements.key(other)


def test_a_table_that_was_written_again_is_measured_again(
    tmp_path: Path, fields: dict[str, Any], table: Path
) -> None:
    copy = tmp_path / "table.csv"
    copy.write_bytes(table.read_bytes())
    measurements = Measurements(tmp_path / "pace.json", lambda: os.open(os.devnull, 0), {})
    spec = build_spec({**fields, "data": str(copy)})
    key = measurements.key(spec)
    copy.write_bytes(table.read_bytes() + b"\n")
    assert measurements.key(spec) != key


def test_one_measurement_runs_at_a_time_and_no_study_with_it(
    client: TestClient, fields: dict[str, Any], program: Program, tmp_path: Path
) -> None:
    wait_here = tmp_path / "go"
    program(
        f"import json, pathlib, time\nwhile not pathlib.Path({str(wait_here)!r}).exists(): time.sleep(.02)\n"
        f"print(json.dumps({FOUND}))"
    )
    began = post(client, "measure", fields).json()
    assert post(client, "measure", fields).json() == began, "the same one is waited for"
    other = post(client, "measure", {**fields, "config": {**SMALL, "depth": 18}})
    assert (other.status_code, "wait for it" in other.json()["detail"][0]) == (409, True)
    queue = client.app.state.service.queue  # type: ignore[attr-defined]
    with queue.machine_lock.open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what a study's start needs
    wait_here.touch()
    assert outcome(client, began["key"])["state"] == "measured"
    found = post(client, "check", fields).json()["measured"]
    assert {name: found[name] for name in FOUND} == FOUND


def test_nothing_is_measured_while_a_study_runs(
    client: TestClient, fields: dict[str, Any], tmp_path: Path
) -> None:
    files = StudyFiles(tmp_path / "studies" / "running")
    files.root.mkdir()
    files.asked.write_text("{}")
    wait_for(lambda: client.get("/api/studies").json()["studies"])
    with FileLock(files.lock):
        answer = post(client, "measure", fields)
    assert answer.status_code == 409
    assert "runs on this machine" in answer.json()["detail"][0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(600)", "not measured within 0.2 s"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL: where memory is short"),
        ("raise SystemExit('no <b>kernel</b>')", "failed: no <b>kernel</b>"),
        ("print('[1]')", "failed: no message"),
        ('print(\'{"problems": ["row 3: no file"]}\'); raise SystemExit(1)', "row 3: no file"),
    ],
)
def test_a_measurement_that_fails_says_why_and_can_be_tried_again(
    tmp_path: Path, fields: dict[str, Any], program: Program, code: str, words: str
) -> None:
    spec = build_spec(fields)
    deadline_s = 0.2 if "sleep" in code else 60
    measurements = Measurements(
        tmp_path / "pace.json", lambda: os.open(os.devnull, 0), {}, deadline_s=deadline_s
    )
    program(code)
    key = measurements.begin(spec)
    wait_for(lambda: measurements.state(key)["state"] != "measuring")
    (problem,) = measurements.state(key)["problems"]
    assert words in problem
    assert measurements.state(key)["state"] == "failed"
    assert measurements.forecast(spec) is None
    program(f"import json; print(json.dumps({FOUND}))")
    assert measurements.begin(spec) == key
    wait_for(lambda: measurements.state(key)["state"] == "measured")
    found = measurements.forecast(spec)
    assert found is not None
    assert found.epoch_s == FOUND["epoch_s"]


def test_a_damaged_memory_is_measured_again(
    tmp_path: Path, fields: dict[str, Any], program: Program
) -> None:
    file = tmp_path / "pace.json"
    spec = build_spec(fields)
    measurements = Measurements(file, lambda: os.open(os.devnull, 0), {})
    key = measurements.key(spec)
    for content in ("[", "[]", json.dumps({key: 1}), json.dumps({key: {"epoch_s": 1}})):
        file.write_text(content)
        assert measurements.forecast(spec) is None
        assert measurements.state(key)["state"] == "unknown"
    program(f"import json; print(json.dumps({FOUND}))")
    measurements.begin(spec)
    wait_for(lambda: measurements.state(key)["state"] == "measured")
    assert measurements.forecast(spec) is not None


def test_a_table_that_cannot_be_read_is_a_problem_of_its_rows(
    client: TestClient, fields: dict[str, Any], tmp_path: Path
) -> None:
    lines = ["path,label,subject", *(f"/nowhere/{n}.nii.gz,{n % 2},s{n}" for n in range(12))]
    lines[4] = "/nowhere/3.nii.gz,x,s3"
    (tmp_path / "table.csv").write_text("\n".join(lines))
    began = post(client, "measure", {**fields, "data": str(tmp_path / "table.csv")}).json()
    ended = outcome(client, began["key"])
    assert ended["state"] == "failed"
    assert any("label" in line for line in ended["problems"])


def test_the_given_folders_hold_for_a_measurement_and_its_process(
    tmp_path: Path, fields: dict[str, Any], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    inside = tmp_path / "data"
    for folder in (inside, tmp_path / "studies"):
        folder.mkdir()
    app = build_app(tmp_path / "studies", Access(TOKEN), data_roots=[str(inside)])
    program(f"import os, sys; sys.exit(repr(os.environ[{DATA_ROOTS!r}]))")
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        refused = post(client, "measure", fields)
        assert refused.status_code == 422
        assert "outside what --data-root allows" in refused.json()["detail"][0]
        (inside / "table.csv").write_bytes(Path(fields["data"]).read_bytes())
        began = post(client, "measure", {**fields, "data": str(inside / "table.csv")}).json()
        (problem,) = outcome(client, began["key"])["problems"]
        assert repr(f"{inside}\n{tmp_path / 'studies'}")[1:-1] in problem


def test_a_measurement_takes_the_token_and_a_service_of_a_cluster_makes_none(
    client: TestClient, fields: dict[str, Any], tmp_path: Path
) -> None:
    assert client.get(f"/api/measure/{'0' * 16}").status_code == 401
    unknown = client.get(f"/api/measure/{'0' * 16}", headers=BEARER).json()
    assert (unknown["state"], unknown["problems"]) == ("unknown", [])
    app = build_app(tmp_path / "studies", Access(TOKEN), address="ray://10.0.0.1:10001")
    with TestClient(app, base_url="http://127.0.0.1:8321") as other:
        answer = post(other, "measure", fields)
    assert (answer.status_code, "Ray cluster" in answer.json()["detail"][0]) == (409, True)


def test_a_service_that_ends_ends_its_measurement(
    tmp_path: Path, fields: dict[str, Any], program: Program
) -> None:
    measurements = Measurements(tmp_path / "pace.json", lambda: os.open(os.devnull, 0), {})
    program("import time; time.sleep(600)")
    key = measurements.begin(build_spec(fields))
    measurements.close()
    wait_for(lambda: measurements.state(key)["state"] == "failed")


def test_a_machine_that_is_held_starts_no_measurement(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    def held() -> int:
        raise QueueError("held")

    measurements = Measurements(tmp_path / "pace.json", held, {})
    with pytest.raises(QueueError, match="held"):
        measurements.begin(build_spec(fields))
    assert measurements.state(measurements.key(build_spec(fields)))["state"] == "unknown"
