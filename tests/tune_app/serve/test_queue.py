"""Studies asked for from the page: checked, queued, started, stopped and resumed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsing import wait_for
from filelock import FileLock
from serving import BEARER, SECOND_PATH, TOKEN
from starlette.testclient import TestClient

from trainables.data.storage import DATA_ROOTS, data_roots
from tune_app.serve.access import (
    Access,
)
from tune_app.serve.app import build_app
from tune_app.serve.queue import QueueError, StudyQueue
from tune_app.study.files import StudyFiles
from tune_app.study.requests import asked_to_stop


def test_a_study_is_checked_before_it_is_queued(client: TestClient, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label,subject\n")
    good = {"data": str(table), "space": "documented", "trials": 3, "config": {"epochs": 4}}
    for spec, words in (
        ({**good, "trails": 3}, "did you mean 'trials'"),
        ({**good, "data": "/nowhere/table.csv"}, "no file /nowhere/table.csv"),
        ({**good, "config": {"epochs": 0}}, "epochs"),
        ({**good, "space": {"search": {"s": {"low": 9, "high": 2}}}}, "s"),
    ):
        answer = client.post("/api/check", json=spec, headers=BEARER)
        assert answer.status_code == 422
        assert words in "\n".join(answer.json()["detail"])
        assert (
            client.post(
                "/api/studies", json={"name": "new", "spec": spec}, headers=BEARER
            ).status_code
            == 422
        )
    assert not (tmp_path / "new").exists()
    told = client.post("/api/check", json=good, headers=BEARER).json()
    assert (told["trials"], told["epochs"]) == (3, 4)
    for name in ("../out", ".hidden", "a/b", "", "x" * 65):
        assert (
            client.post(
                "/api/studies", json={"name": name, "spec": good}, headers=BEARER
            ).status_code
            == 422
        )
    assert (
        client.post(
            "/api/studies", json={"name": "first", "spec": good}, headers=BEARER
        ).status_code
        == 409
    )


@pytest.mark.parametrize(
    "data", ["/table\0.csv", "/table\ud800.csv", "/" + "x" * 5000 + ".csv", "~no\0body"]
)
@pytest.mark.parametrize("field", ["data", "cache", "space", "config"])
def test_names_that_no_file_can_have_are_refused(client: TestClient, data: str, field: str) -> None:
    given = {"data": "/table.csv", field: {"s": data} if field == "config" else data}
    content = json.dumps(given).encode()
    headers = {**BEARER, "content-type": "application/json"}
    answer = client.post("/api/check", content=content, headers=headers)
    assert answer.status_code == 422, answer.text


def test_a_study_from_the_page_reads_nothing_outside_the_given_folders(
    tmp_path: Path, own_cache: None
) -> None:
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (inside, outside, tmp_path / "studies"):
        folder.mkdir()
    for folder in (inside, outside):
        (folder / "table.csv").write_text("path,label,subject\n")
    (inside / "link.csv").symlink_to(outside / "table.csv")
    app = build_app(
        tmp_path / "studies", Access(TOKEN), data_roots=[str(inside), "s3://bucket/cohort"]
    )
    good: dict[str, Any] = {"data": str(inside / "table.csv"), "trials": 2}
    written = {"search": {"s": {"low": 1.0, "high": 9.0}}, "retune": {}, "name": "own"}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("data", {"data": str(outside / "table.csv")}),
        ("data", {"data": str(inside / "link.csv")}),
        ("data", {"data": str(inside / ".." / "elsewhere" / "table.csv")}),
        ("data", {"data": "s3://bucket/cohort2/table.csv"}),
        ("data", {"data": "s3://bucket/cohort/../other/table.csv"}),
        ("cache", {"cache": str(outside)}),
        ("warm_start_from", {"warm_start_from": [str(outside)]}),
        ("config.pretrained_path", {"config": {"pretrained_path": "/etc/shadow"}}),
        ("space.fixed.pretrained_path", {"space": written | {"fixed": {"pretrained_path": "/x"}}}),
        ("storage", {"storage": "sqlite:////etc/x"}),
        (
            "planned.1.overrides.pretrained_path",
            {
                "kind": "ablation",
                "trials": None,
                "planned": [
                    {"variant": "a", "overrides": {}},
                    {"variant": "b", "overrides": {"pretrained_path": "/etc/shadow"}},
                ],
            },
        ),
    ]
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        assert client.post("/api/check", json=good, headers=BEARER).status_code == 200
        for field, change in bad:
            answer = client.post("/api/check", json=good | change, headers=BEARER)
            assert answer.status_code == 422
            (told,) = answer.json()["detail"]
            assert told.startswith(f"{field}: ")
            assert "--data-root" in told


def test_rows_of_a_table_are_held_to_the_given_folders_too(
    tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads the table, so it is the driver that has to know the folders."""
    begun: list[dict[str, str]] = []

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        begun.append(env)
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr("tune_app.serve.queue.subprocess.Popen", start)
    inside = tmp_path / "data"
    root = tmp_path / "studies" / "asked"
    root.mkdir(parents=True)
    StudyFiles(root).asked.write_text("data: table.csv\n")
    app = build_app(root.parent, Access(TOKEN), data_roots=[str(inside), "s3://bucket/cohort"])
    queue = app.state.service.queue
    queue.add(root)
    assert queue.advance()
    monkeypatch.setenv(DATA_ROOTS, begun[0][DATA_ROOTS])
    assert data_roots() == [str(inside), "s3://bucket/cohort", str(root.parent)]


def test_stopping_asks_the_driver_and_says_when_there_is_none(
    client: TestClient, tmp_path: Path
) -> None:
    files, path = StudyFiles(tmp_path / "group" / "second & <b>third<" / "b>"), SECOND_PATH
    assert client.post(f"{path}/stop", headers=BEARER).status_code == 409
    with FileLock(files.lock):
        assert client.get(path).json()["state"] == "running"
        assert client.post(f"{path}/stop", headers=BEARER).json()["became"] == "asked"
        assert files.stop_request.is_file()
        assert client.post(f"{path}/trials/00003/stop", headers=BEARER).json()["became"] == "asked"
        assert asked_to_stop(files) == ["00003"]
        assert client.get(path).json()["stop_requests"] == ["00003"]
        assert client.post(f"{path}/start", headers=BEARER).status_code == 409, "it runs already"
    ended = client.post(f"{path}/trials/00000/stop", headers=BEARER)
    assert (ended.status_code, "has ended" in ended.json()["detail"][0]) == (409, True)


def test_failed_trials_go_on_when_they_are_asked_to(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = tmp_path / "first", StudyFiles(tmp_path / "group" / "second & <b>third<" / "b>")
    refused = client.post("/api/studies/first/start", headers=BEARER)
    assert refused.status_code == 409
    assert "1 of its trials failed: retry_failed=true" in refused.json()["detail"][0]
    with FileLock(other.lock):  # a driver started by hand has the machine
        asked = client.post("/api/studies/first/start?retry_failed=true", headers=BEARER)
        assert asked.json()["became"] == "queued"
        told = client.get("/api/studies/first").json()
        assert (told["state"], told["can_retry"]) == ("queued", False)
        assert client.post("/api/studies/first/stop", headers=BEARER).json()["became"] == "removed"
    for record in first.glob("trials/*/trial.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "completed"}))
    assert wait_for(lambda: not client.get("/api/studies/first").json()["can_retry"])
    refused = client.post("/api/studies/first/start?retry_failed=true", headers=BEARER)
    assert (refused.status_code, refused.json()["detail"]) == (409, ["first: no trial has failed"])

    commands = []
    monkeypatch.setattr(
        "tune_app.serve.queue.subprocess.Popen", lambda command, **_: commands.append(command)
    )
    queue = StudyQueue(tmp_path / "queue.json", list)
    queue.add(first, retry_failed=True)
    assert StudyQueue(tmp_path / "queue.json", list).waiting[0].action == "retry", (
        "so it is after a restart"
    )
    assert queue.advance()
    assert commands[0][-3:] == ["resume", str(first), "--retry-failed"]


def an_unrunnable_study(root: Path) -> Path:
    """A study file whose driver prints the error in it and ends, before it loads torch or Ray."""
    root.mkdir()
    StudyFiles(root).asked.write_text("data: table.csv\ntrails: 2\n")
    return root


def test_studies_take_turns_and_one_that_cannot_begin_says_why(
    tmp_path: Path, own_cache: None
) -> None:
    first, second = (an_unrunnable_study(tmp_path / name) for name in ("one", "two"))
    queue = StudyQueue(tmp_path / "queue.json", lambda: [first, second])
    queue.add(first)
    queue.add(second)
    with pytest.raises(QueueError, match="waits or runs already"):
        queue.add(second)
    assert (queue.place(first), queue.place(second)) == (1, 2)
    assert queue.advance()
    assert queue.is_starting(first)
    assert not queue.advance(), "the machine is taken"
    elsewhere = StudyQueue(tmp_path / "other.json", list)
    elsewhere.add(an_unrunnable_study(tmp_path / "three"))
    assert not elsewhere.advance(), "a service of another folder does not get it either"

    again = StudyQueue(
        tmp_path / "queue.json", lambda: [first, second]
    )  # the service died and came back
    assert again.is_starting(first)
    assert again.place(second) == 1
    wait_for(again.advance)
    assert again.last is not None
    assert again.last.path == str(second)
    assert again.stop(second) == "asked"
    wait_for(
        lambda: not again.advance() and again.last is not None and again.last.exit_code is not None
    )
    assert "did you mean 'trials'" in StudyFiles(first).console.read_text()
    assert "Traceback" not in StudyFiles(first).console.read_text()


def test_a_driver_started_by_hand_has_the_machine_too(tmp_path: Path, own_cache: None) -> None:
    waiting = an_unrunnable_study(tmp_path / "waiting")
    queue = StudyQueue(tmp_path / "queue.json", lambda: [waiting, tmp_path / "by hand"])
    queue.add(waiting)
    lock = StudyFiles(tmp_path / "by hand").lock
    lock.parent.mkdir()
    with FileLock(lock):
        assert not queue.advance()
    assert queue.stop(waiting) == "removed"
    with pytest.raises(QueueError, match="is not waiting and not running"):
        queue.stop(waiting)
