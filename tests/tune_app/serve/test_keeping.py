"""Notes, renamed, archived and deleted studies, and many tabs that change the same one."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browsing import wait_for
from filelock import FileLock
from serving import BEARER, SECOND_PATH
from starlette.testclient import TestClient

from tune_app.results.loading import load_study
from tune_app.serve import change_routes, keeping
from tune_app.serve.queue import QueueError, StudyQueue
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import is_held


def test_notes_and_tags_are_kept_in_the_studys_folder(client: TestClient, tmp_path: Path) -> None:
    note = {"note": "first try\x1b[31m\nof <b>two</b>", "tags": ["baseline", " baseline ", ""]}
    path = "/api/studies/first/notes"
    assert client.put(path, json=note).status_code == 401
    client.put(path, json=note, headers=BEARER).raise_for_status()
    kept = {"note": "first try\nof <b>two</b>", "tags": ["baseline"]}
    assert client.get(path).json() == {"study": kept, "trials": {}}
    assert (tmp_path / "first" / "notes.json").is_file()
    trial = "/api/studies/first/trials/00001/notes"
    client.put(trial, json={"note": "odd", "tags": []}, headers=BEARER).raise_for_status()
    assert client.get(path).json()["trials"] == {"00001": {"note": "odd", "tags": []}}
    client.put(trial, json={}, headers=BEARER).raise_for_status()
    assert client.get(path).json()["trials"] == {}
    rows = client.get("/api/studies").json()["studies"]
    assert {row["id"]: row["tags"] for row in rows}["first"] == ["baseline"]
    missing = client.put("/api/studies/first/trials/99999/notes", json={}, headers=BEARER)
    assert missing.status_code == 404
    assert client.put(path, json={"note": "x" * 4001}, headers=BEARER).status_code == 422
    (tmp_path / "first" / "notes.json").write_text("[" * 100_000)
    assert client.get(path).json() == {"study": {"note": "", "tags": []}, "trials": {}}


def test_a_study_is_renamed_archived_and_deleted_when_it_does_not_run(
    client: TestClient, tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    root = write_study("old name", trials=2, epochs=3)
    for weights in root.rglob("*.pt"):
        weights.unlink()
    (StudyFiles(root).trial("00000").record.parent / "best.pt").write_bytes(b"x" * 1000)
    lost = client.get("/api/studies/old%20name/contents").json()
    assert (lost["trials"], lost["with_weights"], lost["confirmation"]) == (2, 1, False)
    assert lost["bytes"] == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    with FileLock(StudyFiles(root).lock):
        for method, path, body in (
            ("POST", "rename", {"name": "new"}),
            ("POST", "archive", {}),
            ("DELETE", "", {"name": "old name"}),
        ):
            url = f"/api/studies/old%20name/{path}".rstrip("/")
            refused = client.request(method, url, json=body, headers=BEARER)
            assert (refused.status_code, "stop it first" in refused.text) == (409, True)
    taken = client.post("/api/studies/old%20name/rename", json={"name": "first"}, headers=BEARER)
    assert taken.status_code == 409
    out = client.post("/api/studies/old%20name/rename", json={"name": "../out"}, headers=BEARER)
    assert out.status_code == 422
    renamed = client.post("/api/studies/old%20name/rename", json={"name": "new"}, headers=BEARER)
    assert renamed.json()["study"] == "new"
    assert client.get("/api/studies/new/trials").status_code == 200
    wrong = client.request("DELETE", "/api/studies/new", json={"name": "nwe"}, headers=BEARER)
    assert wrong.status_code == 409
    assert client.request("DELETE", "/api/studies/new", json={"name": "new"}).status_code == 401
    deleted = client.request("DELETE", "/api/studies/new", json={"name": "new"}, headers=BEARER)
    assert deleted.json()["became"] == "deleted"
    assert not (tmp_path / "new").exists()
    client.post("/api/studies/first/archive", headers=BEARER).raise_for_status()
    wait_for(lambda: "first" not in [r["id"] for r in client.get("/api/studies").json()["studies"]])
    (kept,) = (tmp_path / ".medtune" / "archive").iterdir()
    assert load_study(kept).trials_full["trial"].tolist()


def test_a_study_does_not_begin_while_it_is_moved_or_deleted(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by hand and not by the queue; and two tabs that delete the same study get an answer each."""
    root, met = tmp_path / "first", []

    def hide(path: Path) -> Path:
        met.append(is_held(StudyFiles(path).lock))
        return keeping.hide(path)

    monkeypatch.setattr(change_routes, "hide", hide)
    told = {"name": "first"}
    deleted = client.request("DELETE", "/api/studies/first", json=told, headers=BEARER)
    assert (deleted.status_code, met, root.exists()) == (200, [True], False)
    assert not list(tmp_path.glob(".deleted-*"))
    again = client.request("DELETE", "/api/studies/first", json=told, headers=BEARER)
    noted = client.put("/api/studies/first/notes", json={"note": "a"}, headers=BEARER)
    assert (again.status_code, noted.status_code) == (404, 404)


def test_of_many_tabs_that_delete_a_study_one_does(client: TestClient, tmp_path: Path) -> None:
    def delete(_: int) -> int:
        told = {"name": "first"}
        answer = client.request("DELETE", "/api/studies/first", json=told, headers=BEARER)
        return answer.status_code

    with ThreadPoolExecutor(8) as tabs:
        codes = list(tabs.map(delete, range(8)))
    assert codes.count(200) == 1
    assert set(codes) <= {200, 404, 409}
    assert not (tmp_path / "first").exists()


def test_of_many_tabs_that_begin_a_study_of_one_name_one_does(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyQueue, "advance", lambda self: False)
    (tmp_path / "table.csv").write_text("path,label,subject\n")
    asked = {"name": "new", "spec": {"data": str(tmp_path / "table.csv"), "trials": 2}}

    def begin(_: int) -> int:
        return client.post("/api/studies", json=asked, headers=BEARER).status_code

    with ThreadPoolExecutor(8) as tabs:
        assert sorted(tabs.map(begin, range(8))) == [201, *[409] * 7]


def test_many_tabs_may_stop_one_trial(client: TestClient) -> None:
    def stop(_: int) -> int:
        return client.post(f"{SECOND_PATH}/trials/00003/stop", headers=BEARER).status_code

    with ThreadPoolExecutor(8) as tabs:
        assert set(tabs.map(stop, range(24))) == {200}


def test_notes_of_two_tabs_are_both_kept(client: TestClient, tmp_path: Path) -> None:
    def write(trial: int) -> int:
        return client.put(
            f"/api/studies/first/trials/{trial:05d}/notes",
            json={"note": str(trial)},
            headers=BEARER,
        ).status_code

    with ThreadPoolExecutor(8) as tabs:
        assert set(tabs.map(write, range(20))) == {200}
    assert len(json.loads((tmp_path / "first" / "notes.json").read_text())["trials"]) == 20


@pytest.mark.parametrize("name", ["study.json", "epochs.jsonl", "study.log", ".driver.lock"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_folder_whose_files_lead_elsewhere_is_neither_shown_nor_started(
    client: TestClient, tmp_path: Path, name: str, kind: str
) -> None:
    """A stranger's folder: the driver would write to another file, or wait for a pipe."""
    file, outside = tmp_path / "first" / name, tmp_path / "outside"
    if file.exists():
        file.rename(outside)
    outside.touch()
    content = outside.read_bytes()
    if kind == "link":
        file.symlink_to(outside)
    else:
        os.mkfifo(file)
    watched = name == "epochs.jsonl" or (name, kind) == ("study.json", "link")
    if (
        watched
    ):  # the others are looked at when the study is read again, and a pipe is no study.json
        shown = client.get("/api/studies/first/trials")
        assert (shown.status_code, "regular files" in shown.text) == (409, True)
    with pytest.raises(SpecError, match="regular files in its folder"):
        StudyFiles(tmp_path / "first").require_own()
    assert outside.read_bytes() == content


def test_the_console_of_a_driver_goes_to_no_other_file(tmp_path: Path, own_cache: None) -> None:
    root, outside = tmp_path / "asked", tmp_path / "outside"
    root.mkdir()
    outside.touch()
    StudyFiles(root).asked.write_text("data: /nowhere/table.csv\n")
    StudyFiles(root).console.symlink_to(outside)
    queue = StudyQueue(tmp_path / "queue.json", lambda: [root])
    with pytest.raises(QueueError, match=r"console\.log: a link"):
        queue.add(root)
    StudyFiles(root).console.unlink()
    queue.add(root)
    StudyFiles(root).console.symlink_to(outside)  # in the meantime
    with pytest.raises(OSError, match="symbolic links"):
        queue.advance()
    assert outside.read_bytes() == b""
