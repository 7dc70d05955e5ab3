"""The service's REST interface: its answers equal those of `tune_app.results.study`, and the rights that a change needs."""

import asyncio
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsing import DEADLINE_S, wait_for
from filelock import FileLock
from starlette.testclient import TestClient

from trainables.data.storage import DATA_ROOTS, data_roots
from tune_app.results.loading import load_study
from tune_app.serve import change_routes, keeping, live
from tune_app.serve.access import (
    GLOBAL_TRIES,
    MOST_ADDRESSES,
    TRIES,
    WINDOW_S,
    Access,
    Refused,
    Throttle,
)
from tune_app.serve.app import build_app
from tune_app.serve.folder import StudyFolder
from tune_app.serve.live import Feeds, TooManyViewersError
from tune_app.serve.queue import QueueError, StudyQueue
from tune_app.serve.server import serve
from tune_app.serve.views import progress
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.requests import asked_to_stop
from tune_app.study.rows import is_held

WriteStudy = Callable[..., Path]
TOKEN = "a token of the test"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))  # holds the machine's lock


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, a_search: Path) -> Path:
    """Two studies: one that has ended, and one in a folder, with a name that tries to be more, that was interrupted."""
    root = tmp_path_factory.mktemp("written")
    shutil.copytree(a_search, root / "first")
    again = root / "group" / "second & <b>third<"
    shutil.copytree(a_search, again / "b>")
    record = StudyFiles(again / "b>").trial("00003").record
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"state": "running", "ended": None})
    )
    return root


@pytest.fixture
def client(tmp_path: Path, written: Path, own_cache: None) -> Iterator[TestClient]:
    """The service over copies of these studies, bound to this machine."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with TestClient(build_app(tmp_path, Access(TOKEN)), base_url="http://127.0.0.1:8321") as client:
        yield client


SECOND = "group~second & <b>third<~b>"
SECOND_PATH = "/api/studies/group~second%20&%20%3Cb%3Ethird%3C~b%3E"


# Reading ---------------------------------------------------------------------------------------------------------------


def test_the_list_tells_every_study_below_the_folder(client: TestClient, tmp_path: Path) -> None:
    def listed() -> dict[str, Any]:
        return {row["id"]: row for row in client.get("/api/studies").json()["studies"]}

    rows = wait_for(
        lambda: (found := listed()) and all("best" in row for row in found.values()) and found
    )
    assert set(rows) == {"first", SECOND}
    study = load_study(tmp_path / "first")
    assert rows["first"]["best"] == pytest.approx(study.best()["objective"])
    assert rows["first"]["best_trial"] == study.best()["trial"]
    assert rows["first"]["states"] == study.trials_full["state"].value_counts().to_dict()
    assert (rows["first"]["state"], rows[SECOND]["state"]) == ("ended", "interrupted")
    assert (rows["first"]["can_start"], rows[SECOND]["can_start"]) == (False, True)
    assert (rows["first"]["can_retry"], rows[SECOND]["can_retry"]) == (True, True)


def test_trials_and_curves_are_those_of_the_dataframes(client: TestClient, tmp_path: Path) -> None:
    study = load_study(tmp_path / "first")
    told = client.get("/api/studies/first/trials").json()
    names = [column["name"] for column in told["columns"]]
    at = names.index("objective")
    assert {row["trial"]: row["values"][at] for row in told["rows"]} == pytest.approx(
        dict(zip(study.trials_full["trial"], study.trials_full["objective"], strict=True))
    )
    curves = client.get("/api/studies/first/curves").json()
    assert curves["seen"] == StudyFiles(study.path).epochs.stat().st_size
    for trial, rows in study.epochs.groupby("trial"):
        assert curves["trials"][trial]["epoch"] == rows["epoch"].tolist()
        assert curves["trials"][trial]["val_auc_raw"] == pytest.approx(
            rows["val_auc_raw"].tolist(), abs=1e-4
        )
        assert curves["trials"][trial]["val_auc_ema"] == pytest.approx(
            rows["val_auc_ema"].tolist(), abs=1e-4
        )
        assert curves["trials"][trial]["x"] == rows["epoch"].tolist()
    asked = {"metrics": ["train_loss"], "axis": "time"}
    others = client.get("/api/studies/first/curves", params=asked).json()["trials"]
    listed = [each["name"] for each in client.get("/api/studies/first").json()["metrics"]]
    assert {"val_auc_ema", "train_loss", "lr_backbone", "grad_norm"} <= set(listed)
    for trial, rows in study.epochs.groupby("trial"):
        assert others[trial]["train_loss"] == pytest.approx(rows["train_loss"].tolist(), abs=1e-4)
        assert others[trial]["x"] == pytest.approx(
            (rows["epoch_s"].cumsum() / 60).tolist(), abs=1e-4
        )
        assert "val_auc_ema" not in others[trial]
    unknown = client.get("/api/studies/first/curves", params={"metrics": "precision"})
    assert unknown.status_code == 404, "text has no curve"
    some = client.get("/api/studies/first/trials", params={"where": "state == failed"}).json()[
        "rows"
    ]
    assert [row["trial"] for row in some] == ["00005"]
    refused = client.get("/api/studies/first/trials", params={"where": "colour > 3"})
    assert (refused.status_code, "unknown column" in refused.json()["detail"][0]) == (400, True)


def test_a_trial_is_told_with_its_diagnosis_and_two_with_their_differences(
    client: TestClient, tmp_path: Path
) -> None:
    study = load_study(tmp_path / "first")
    row = study.trials_full.iloc[1]
    names = [
        each["name"] for each in client.get("/api/studies/first/trials/00001").json()["settings"]
    ]
    told = client.get("/api/studies/first/trials/00001").json()
    assert (told["verdict"], told["verdict_summary"]) == (row["verdict"], row["verdict_summary"])
    assert {each["name"]: each["value"] for each in told["settings"]}["s"] == f"{row['s']:g}"
    both = client.get(
        "/api/studies/first/compare", params={"first": "00000", "second": "00001"}
    ).json()
    first, second = study.trials_full.iloc[0], study.trials_full.iloc[1]
    assert {each["name"] for each in both["settings"]} == {
        name for name in names if str(first[name]) != str(second[name])
    }
    assert client.get("/api/studies/first/trials/99999").status_code == 404


def test_every_figure_of_the_overview_can_be_had(
    client: TestClient, write_study: WriteStudy
) -> None:
    write_study("long", trials=24, epochs=6)

    def listed(study: str) -> list[str]:
        return [each["name"] for each in client.get(f"/api/studies/{study}").json()["figures"]]

    names = listed("first")
    assert {"progress", "parallel", "stopped", "slice-head"} <= set(names)
    ended = load_study(client.app.state.service.folder.path("first")).trials_full["state"]  # type: ignore[attr-defined]
    assert ("importance" in names) == (ended.isin(["completed", "stopped"]).sum() >= 20)
    study = load_study(client.app.state.service.folder.path("long"))  # type: ignore[attr-defined]

    def states() -> list[str]:
        told = client.get("/api/studies/long/trials").json()
        at = [column["name"] for column in told["columns"]].index("state")
        return [row["values"][at] for row in told["rows"]]

    deadline = time.monotonic() + 60  # the service may have read the folder while it was written
    while sorted(states()) != sorted(study.trials_full["state"]):
        assert time.monotonic() < deadline, states()
        time.sleep(0.2)
    assert "importance" in listed("long")
    figure = client.get("/api/studies/long/figures/importance").json()
    assert figure["figure"]["data"][0]["error_x"]["array"], "importance has its uncertainty"
    some = study.trials_full[study.trials_full["trial"] != "00005"]
    among = client.get(
        "/api/studies/long/figures/importance", params={"trials": ",".join(some["trial"])}
    ).json()["figure"]["data"][0]
    alone = replace(study, trials_full=some).importance().set_index("parameter")["importance"]
    assert dict(zip(among["y"], among["x"], strict=True)) == pytest.approx(
        alone.to_dict(), abs=1e-4
    )
    few = client.get("/api/studies/long/figures/importance", params={"trials": "00001,00002"})
    assert (few.status_code, "fewer than 20" in few.json()["detail"][0]) == (404, True)
    for name in names:
        answer = client.get(f"/api/studies/first/figures/{name}")
        assert answer.status_code == 200, name
        assert answer.json()["figure"]["data"], name
    assert client.get("/api/studies/first/figures/nothing").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/studies/..", "/api/studies/..%2f..%2fetc", "/api/studies/%2e%2e%2ffirst", "/api/studies/first%2f..%2ffirst",
        "/api/studies/first/trials/..%2f..%2fstudy", "/api/studies//etc", "/serve.py", "/..%2fpyproject.toml", "/cli.py",
        "/api/studies/first/log?which=trial&trial=../../study", "/api/studies/first/log?which=/etc/passwd",
    ],
)  # fmt: skip
def test_nothing_outside_the_folder_can_be_asked_for(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 422)


def test_a_log_that_is_a_link_to_somewhere_else_is_not_followed(
    client: TestClient, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for the page\n")
    files = StudyFiles(tmp_path / "first")
    files.log.write_text("what Ray said\n\x1b[31mred\x1b[0m\n")
    assert client.get("/api/studies/first/log").status_code == 401, "it may hold text of any file"
    read = client.get("/api/studies/first/log", headers=BEARER).json()
    assert read["lines"] == ["what Ray said", "red"]
    files.log.unlink()
    files.log.symlink_to(secret)
    assert client.get("/api/studies/first/log", headers=BEARER).json()["lines"] == []


def test_a_damaged_study_is_shown_with_its_notes_and_a_foreign_one_with_its_error(
    client: TestClient, tmp_path: Path, write_study: WriteStudy
) -> None:
    root = write_study("damaged", trials=3, epochs=4)
    with StudyFiles(root).epochs.open("ab") as file:
        file.write(b"not a row\n")
    foreign = write_study("foreign", trials=2, epochs=3)
    info = json.loads(StudyFiles(foreign).spec.read_text())
    StudyFiles(foreign).spec.write_text(json.dumps(info | {"format": 99}))
    # The service may have read both while they were being written, and reads again a little later.
    wait_for(
        lambda: any(
            "not a JSON row" in note for note in client.get("/api/studies/damaged").json()["notes"]
        )
    )
    wait_for(lambda: client.get("/api/studies/foreign").status_code != 200)
    answer = client.get("/api/studies/foreign")
    assert (answer.status_code, "format 99" in answer.json()["detail"][0]) == (409, True)
    assert client.get("/api/studies/first").status_code == 200


def test_a_study_is_there_from_its_first_moment_on(client: TestClient, tmp_path: Path) -> None:
    for number in range(5):  # also right after a look at which studies there are
        assert client.get("/api/studies").status_code == 200
        assert client.get(f"/api/studies/new%20{number}").status_code == 404
        shutil.copytree(tmp_path / "first", tmp_path / f"new {number}")
        assert client.get(f"/api/studies/new%20{number}/trials").status_code == 200


def test_a_study_without_an_epoch_has_no_curves(client: TestClient, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "first", tmp_path / "begun")
    StudyFiles(tmp_path / "begun").epochs.write_bytes(b"")
    for axis in ("epoch", "updates", "time"):
        told = client.get("/api/studies/begun/curves", params={"axis": axis})
        assert told.json() == {"axis": axis, "trials": {}, "seen": 0}


def test_the_folder_may_be_a_study_itself(
    tmp_path: Path, write_study: WriteStudy, own_cache: None
) -> None:
    root = write_study("first", trials=2, epochs=3)
    with TestClient(build_app(root, Access(TOKEN)), base_url="http://127.0.0.1:8321") as client:
        (row,) = client.get("/api/studies").json()["studies"]
        assert (row["id"], row["folder"]) == ("first", ".")
        assert client.get("/api/studies/first/trials").status_code == 200


def test_the_report_can_be_downloaded(client: TestClient) -> None:
    answer = client.get("/api/studies/first/report")
    assert "attachment" in answer.headers["content-disposition"]
    assert "<h1>first</h1>" in answer.text


def test_several_studies_are_set_side_by_side(
    client: TestClient, tmp_path: Path, write_study: WriteStudy
) -> None:
    other = write_study("other", trials=4, epochs=8, seed=5, policy=False)
    studies = [load_study(tmp_path / "first"), load_study(other)]
    told = client.get("/api/studies/first/across", params={"other": ["other"]}).json()
    assert [each["id"] for each in told["studies"]] == ["first", "other"]
    for study, about, budget, best in zip(
        studies, told["studies"], told["budget"], told["best"], strict=True
    ):
        assert about["best"] == pytest.approx(study.best()["objective"])
        assert budget["spent"][-1] == len(study.epochs)
        assert budget["best"][-1] == pytest.approx(study.trials_full["objective"].max(), abs=1e-4)
        rows = study.epochs[study.epochs["trial"] == study.best()["trial"]]
        assert best["val_auc"] == pytest.approx(rows["val_auc"].tolist())
    asked = {row["name"]: row["values"] for row in told["asked"]}
    assert asked["trials"] == [str(study.spec.trials) for study in studies]
    assert "data" not in asked, "both have the same table"
    settings = {row["name"]: row["values"] for row in told["settings"]}
    assert settings["epochs"] == [str(study.spec.epochs) for study in studies]
    assert client.get("/api/studies/first/across").status_code == 422
    assert client.get("/api/studies/first/across", params={"other": "no"}).status_code == 404
    many = {"other": ["other"] * 6}
    assert client.get("/api/studies/first/across", params=many).status_code == 422


# Notes, and the folders of studies ---------------------------------------------------------------------------------------


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
    client: TestClient, tmp_path: Path, write_study: WriteStudy
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


# Access rights ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"created": math.inf}, "created is inf, must be Unix seconds"),
        ({"created": -1e18}, "created is -1e+18"),
        ({"created": "<script>"}, "created is '<script>'"),
        ({"versions": "x"}, "versions is a str, must be an object"),
        ({"hardware": [1]}, "hardware is a list, must be an object"),
        ({"hardware": {"resources": 5}}, "hardware.resources is a int"),
        ({"hardware": {"resources": {"CPU": math.inf}}}, "hardware.resources.CPU is inf"),
    ],
)
def test_one_odd_study_does_not_take_the_list_down(
    client: TestClient, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    spec = StudyFiles(tmp_path / "first").spec
    spec.write_text(json.dumps(json.loads(spec.read_text()) | fields).replace("Infinity", "1e400"))
    shown = client.get("/api/studies/first")
    assert (shown.status_code, told in shown.text) == (409, True)
    assert client.get(SECOND_PATH).status_code == 200
    states = {row["id"]: row["state"] for row in client.get("/api/studies").json()["studies"]}
    assert states == {"first": "unreadable", SECOND: "interrupted"}


def test_a_huge_file_of_rows_is_not_read(client: TestClient, tmp_path: Path) -> None:
    """A file with holes takes no disk, and any size."""
    epochs = StudyFiles(tmp_path / "first").epochs
    os.truncate(epochs, 2**34)
    shown = client.get("/api/studies/first")
    assert (shown.status_code, "17,179,869,184 bytes" in shown.text) == (409, True)
    assert live._whole_size(epochs) == 0


def test_rows_without_a_finite_score_do_not_end_the_stream(tmp_path: Path) -> None:
    epochs = tmp_path / "epochs.jsonl"
    scores = ["1e400", "-1e400", "NaN", "9" * 400, '"a"', "0.5", "1"]
    lines = [f'{{"trial": "00000", "epoch": 1, "val_auc_raw": {score}}}\n' for score in scores]
    epochs.write_text("".join(lines))
    event, _ = live._backlog(epochs, 0, epochs.stat().st_size)
    rows = json.loads(event.decode().split("data: ")[1])["rows"]
    assert [row[2] for row in rows][-2:] == [0.5, 1.0]
    assert {row[2] for row in rows[:-2]} == {None}


def test_a_report_of_a_study_that_lost_its_rows_is_written(
    client: TestClient, tmp_path: Path
) -> None:
    StudyFiles(tmp_path / "first").epochs.write_text("")
    shown = client.get("/api/studies/first/report")
    assert (shown.status_code, "its epochs are missing" in shown.text) == (200, True)


def test_every_answer_forbids_inline_scripts_framing_and_guessing(client: TestClient) -> None:
    for path in ("/", "/serve.js", "/api/studies", "/api/nothing", "/api/openapi.json"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    page = client.get("/").text
    assert "style=" not in page
    assert "<script>" not in page
    assert "http" not in page.replace("http-equiv", ""), "an address of the network"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8321", 200), ("localhost:9000", 200), ("[::1]:8321", 200), ("10.0.0.7", 200),
        ("[::1]evil.example", 421), ("[::1", 421), ("127.0.0.1:8321:1", 421), ("user@127.0.0.1", 421), ("127.0.0.1:x", 421),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:8321", 421), ("", 421),
    ],
)  # fmt: skip
def test_a_name_that_is_not_the_services_is_refused(
    client: TestClient, host: str, status: int
) -> None:
    assert client.get("/api/studies", headers={"host": host}).status_code == status


CHANGES = [
    ("/api/studies", {"name": "x", "spec": {}}),
    ("/api/check", {}),
    ("/api/measure", {}),
    ("/api/studies/first/start", None),
    ("/api/studies/first/stop", None),
    ("/api/studies/first/trials/00001/stop", None),
    ("/api/studies/first/confirm", {"folds": "7"}),
    ("/api/studies/first/ablate", {"name": "first"}),
    ("/api/studies/first/export", {"name": "x", "trial": "00001", "confirmed": True}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES)
def test_changing_takes_the_token_and_for_a_browser_its_own_page(
    client: TestClient, path: str, body: Any
) -> None:
    def status(**headers: str) -> int:
        return client.post(
            path,
            json=body,
            headers={name.replace("_", "-"): text for name, text in headers.items()},
        ).status_code

    assert status() == 401
    assert status(authorization="Bearer wrong") == 401
    assert status(**BEARER, origin="http://evil.example") == 403
    assert status(**BEARER) in (409, 422), "let through, and refused for its content"
    session = client.post("/api/session", json={"token": TOKEN}).json()
    assert status() == 403, "a cookie alone is what another site's form would send"
    assert status(x_medtune_csrf="0" * 64) == 403
    good = {"x_medtune_csrf": session["csrf"]}
    assert status(**good, origin="http://evil.example") == 403
    assert status(**good, origin="null") == 403
    assert status(**good, sec_fetch_site="cross-site") == 403
    assert status(**good, origin="http://127.0.0.1:8321", sec_fetch_site="same-origin") in (
        409,
        422,
    )


def test_the_cookie_is_out_of_scripts_and_other_sites_reach_and_expires(client: TestClient) -> None:
    answer = client.post("/api/session", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    clock = [1e9]
    access = Access(TOKEN, now=lambda: clock[0])
    session = access.new_session()
    assert access.is_session(session)
    assert not access.is_session(session[:-1] + ("0" if session[-1] != "0" else "1"))
    assert not Access("another token", now=lambda: clock[0]).is_session(session)
    clock[0] += 13 * 3600
    assert not access.is_session(session)
    for nonsense in ("", ".", "..", "x.y.z", "9" * 400):
        assert not access.is_session(nonsense)


def test_reading_takes_the_token_where_others_can_reach_the_service(
    tmp_path: Path, own_cache: None
) -> None:
    for access in (Access(TOKEN, host="0.0.0.0"), Access(TOKEN, private=True)):
        with TestClient(build_app(tmp_path, access), base_url="http://127.0.0.1:8321") as client:
            for path in ("/api/studies", "/api/form", "/api/openapi.json", "/api/studies/x/events"):
                assert client.get(path).status_code == 401, path
            assert client.get("/").status_code == 200
            assert client.get("/api/studies", headers=BEARER).status_code == 200
            client.post("/api/session", json={"token": TOKEN})
            assert client.get("/api/studies").status_code == 200


def test_wrong_tokens_wait_and_the_right_one_is_let_in(client: TestClient) -> None:
    def read(token: str) -> int:
        return client.get("/api/studies", headers={"authorization": f"Bearer {token}"}).status_code

    for _ in range(TRIES):
        assert client.post("/api/session", json={"token": "guess"}).status_code == 403
    refused = client.post("/api/session", json={"token": "another guess"})
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= WINDOW_S + 1
    assert (read("a guess"), read(TOKEN[:-1]), read(TOKEN)) == (429, 429, 200)
    assert client.post("/api/session", json={"token": TOKEN}).status_code == 200
    assert read("a guess") == 429, "the right one must not give the guesses a new start"


def test_a_token_that_is_easy_to_guess_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="MEDTUNE_TOKEN has 4 characters: choose at least 16"):
        serve(tmp_path, host="127.0.0.1", port=0, token="1234")


def test_the_throttle_forgets_and_cannot_be_filled_up() -> None:
    clock = [0.0]
    throttle = Throttle(now=lambda: clock[0])
    for _ in range(TRIES):
        throttle.check("a")
        throttle.wrong("a")
    throttle.check("b")
    with pytest.raises(Refused, match="too many"):
        throttle.check("a")
    clock[0] += WINDOW_S + 1
    throttle.check("a")
    for number in range(GLOBAL_TRIES):
        throttle.wrong(f"address {number}")
    with pytest.raises(Refused):
        throttle.check("somebody new")
    for number in range(2 * MOST_ADDRESSES):
        throttle.wrong(f"{number}")
    assert len(throttle._by_address) == MOST_ADDRESSES


def test_a_body_that_is_too_large_is_refused(client: TestClient) -> None:
    assert client.post("/api/check", content=b"x" * 300_000, headers=BEARER).status_code == 413


def test_a_body_with_two_lengths_is_refused_and_the_connection_ends(client: TestClient) -> None:
    """A proxy that goes by the other length would read what follows as another client's request."""
    both = BEARER | {"content-length": "2", "transfer-encoding": "chunked"}
    answer = client.post("/api/check", content=b"{}", headers=both)
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")


# Live ------------------------------------------------------------------------------------------------------------------


async def first_events(
    feeds: Feeds, study: str, seen: int, count: int, meanwhile: Callable[[], None]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def read() -> None:
        async for event in feeds.events(study, seen):
            fields = dict(
                line.split(": ", 1)
                for line in event.decode().strip().splitlines()
                if not line.startswith(":")
            )
            if "data" in fields:
                found.append(fields | {"data": json.loads(fields["data"])})
            if len([each for each in found if each["event"] == "rows"]) >= count:
                return

    task = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    meanwhile()
    await asyncio.wait_for(task, DEADLINE_S)
    return found


def test_a_viewer_gets_what_came_while_it_was_away_and_then_what_comes(
    tmp_path: Path, write_study: WriteStudy
) -> None:
    root = write_study("live", trials=3, epochs=6, unfinished=1)
    files, folder = StudyFiles(root), StudyFolder(tmp_path)
    content = files.epochs.read_bytes()
    lines = content.splitlines(keepends=True)
    away = len(b"".join(lines[:-2]))
    new = {
        "trial": "00002",
        "epoch": 90,
        "time": time.time(),
        "val_auc": None,
        "val_auc_raw": 0.75,
        "val_auc_ema": None,
        "drw_active": True,
    }

    def add() -> None:
        append_line(files.epochs, new)

    feeds = Feeds(folder, lambda study, reading: {"id": study})
    events = asyncio.run(first_events(feeds, "live", away, 2, add))
    rows = [event for event in events if event["event"] == "rows"]
    missed = [json.loads(line) for line in lines[-2:]]
    assert [row[:2] for row in rows[0]["data"]["rows"]] == [
        [row["trial"], row["epoch"]] for row in missed
    ]
    assert rows[0]["id"] == str(len(content))
    assert rows[1]["data"]["rows"] == [["00002", 90, 0.75, None, True]]
    assert rows[1]["id"] == str(files.epochs.stat().st_size)
    assert feeds.viewers == 0, "a client that left is not kept"

    middle = away - 5
    events = asyncio.run(first_events(feeds, "live", middle, 1, lambda: None))
    assert [row[:2] for row in events[0]["data"]["rows"]][-3:] == [
        *([r["trial"], r["epoch"]] for r in missed),
        ["00002", 90],
    ]
    assert len(events[0]["data"]["rows"]) == 4, "half a row is sent whole"


def test_viewers_without_the_token_do_not_keep_others_out(
    tmp_path: Path, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 3)
    monkeypatch.setattr(live, "KEPT_FOR_TOKEN", 1)
    write_study("live", trials=2, epochs=6)
    feeds = Feeds(StudyFolder(tmp_path), lambda study, reading: {"id": study})

    async def watch() -> None:
        streams = [feeds.events("live", 0, trusted=False) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(TooManyViewersError, match=r"2 viewers .* or log in"):
            await anext(feeds.events("live", 0, trusted=False))
        streams.append(feeds.events("live", 0, trusted=True))
        await anext(streams[-1])
        with pytest.raises(TooManyViewersError, match="3 viewers"):
            await anext(feeds.events("live", 0, trusted=True))
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(watch())
    assert feeds.viewers == 0


@pytest.mark.parametrize(
    "others",
    ['x={"a":1}; %s', "%s; x=a b", 'x="open; %s', "%s; y=[1;2]; =; ;;z", "medtune_8321=old; %s", "x=é; %s"],
)  # fmt: skip
def test_cookies_of_other_services_do_not_log_the_browser_out(
    client: TestClient, others: str
) -> None:
    value = Access(TOKEN).new_session()
    cookie = (others % f"medtune_8321={value}").encode()
    assert client.get("/api/session", headers={b"cookie": cookie}).json()["logged_in"]


def test_a_session_ends_on_the_server_and_stays_ended(client: TestClient, tmp_path: Path) -> None:
    value = client.post("/api/session", json={"token": TOKEN}).cookies["medtune_8321"]
    copied = {"cookie": f"medtune_8321={value}"}
    assert client.get("/api/session", headers=copied).json()["logged_in"]
    client.delete("/api/session", headers=copied)
    assert not client.get("/api/session", headers=copied).json()["logged_in"]

    file = tmp_path / "ended.json"
    access = Access(TOKEN, ended=file)
    session, other = access.new_session(), access.new_session()
    access.end_session(session)
    access.end_session("nonsense")
    again = Access(TOKEN, ended=file)
    assert (again.is_session(session), again.is_session(other)) == (False, True)
    assert session not in file.read_text()
    file.write_text("[")
    with pytest.raises(ValueError, match="damaged, remove it"):
        Access(TOKEN, ended=file)


@pytest.mark.parametrize(
    ("headers", "secure"),
    [({}, False), ({"x-forwarded-proto": "https"}, True), ({"origin": "https://127.0.0.1:8321"}, True)],
)  # fmt: skip
def test_the_cookie_stays_with_tls_where_there_is_tls(
    client: TestClient, headers: dict[str, str], secure: bool
) -> None:
    answer = client.post("/api/session", json={"token": TOKEN}, headers=headers)
    assert ("secure" in answer.headers["set-cookie"].lower()) == secure


def test_a_long_body_is_refused_however_it_is_sent(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * 65536

    for content in (b" " * 2**19, pieces()):
        headers = {**BEARER, "content-type": "application/json"}
        answer = client.post("/api/check", content=content, headers=headers)
        assert answer.status_code == 413


# Starting and stopping -------------------------------------------------------------------------------------------------


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


# How far it is ---------------------------------------------------------------------------------------------------------


def test_the_estimated_end_lies_between_what_usually_happens_and_no_more_stops(
    write_study: WriteStudy,
) -> None:
    root = write_study("running", trials=12, epochs=20, unfinished=3, policy=False)
    with FileLock(StudyFiles(root).lock):
        study = load_study(root)
        now = float(study.epochs["time"].max())
        told = progress(study, now)
    left = sum(
        20 - epochs
        for epochs in study.trials_full.loc[study.trials_full["state"] == "running", "epochs_run"]
    )
    assert told["running"] == 3
    assert told["gpus_held"] == 3
    assert now < told["likely"] <= told["latest"]
    assert told["latest"] - now == pytest.approx(left * 12 / 3, rel=0.1), (
        "12 s an epoch, three at a time"
    )
    assert 0 < told["busy"] <= 1
    assert progress(load_study(root), now)["likely"] is None, "nothing runs"
