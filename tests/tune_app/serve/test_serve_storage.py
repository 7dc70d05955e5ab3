"""The service over a URL, with a real S3 server on loopback: its content, its growth, its requests, and deleted studies."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from object_storage import put_folder, put_raw, s3_server
from starlette.testclient import TestClient

from trainables.data.storage import Remote, StorageError
from tune_app.driver.stopping import stopping_on_request
from tune_app.results.loading import load_study
from tune_app.serve import replica as serve_storage
from tune_app.serve.access import Access
from tune_app.serve.app import build_app
from tune_app.serve.replica import Replica
from tune_app.serve.server import serve
from tune_app.study import mirror as storage
from tune_app.study.copies import LEASE, fetch_study, opened
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.mirror import mirrored
from tune_app.study.requests import TrialRequests, asked_to_stop

WriteStudy = Callable[..., Path]
TOKEN = "a token of the test"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_storage, "EVERY_S", 0.5)
    monkeypatch.setattr(storage, "BEAT_S", 0.5)


@contextmanager
def service(url: str) -> Iterator[TestClient]:
    replica = Replica(url)
    replica.begin()
    app = build_app(replica.root, Access(TOKEN), replica=replica)
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        yield client


def wait_for(what: Callable[[], Any], deadline_s: float = 60) -> Any:
    end = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end, f"not within {deadline_s} s"
        time.sleep(0.05)
    return found


def listed(client: TestClient) -> dict[str, Any]:
    return {row["id"]: row for row in client.get("/api/studies").json()["studies"]}


def test_studies_below_a_url_are_shown_as_those_of_a_folder(
    bucket: str, a_search: Path, tmp_path: Path
) -> None:
    put_folder(f"{bucket}/group/first", a_search)
    remote = Remote(bucket)
    remote.write("group/first/trials/00001/trial.log", b"epoch 1 of 12\n")
    remote.write("group/first/trials/00001/best.pt", b"weights")
    remote.write("volumes/0001.nii.gz", b"a scan")
    remote.write("epochs.jsonl", b"of no study\n")
    study = load_study(a_search)
    with service(bucket) as client:
        wait_for(lambda: "best" in listed(client).get("group~first", {}))
        told = client.get("/api/studies").json()
        assert (told["folder"], told["trouble"]) == (bucket, None)
        (row,) = told["studies"]
        assert row["best"] == pytest.approx(study.best()["objective"])
        assert (row["name"], row["folder"], row["state"]) == ("first", "group", "ended")
        base = "/api/studies/group~first"
        about = client.get(base).json()
        assert about["path"] == f"{bucket}/group/first"
        names = [column["name"] for column in client.get(f"{base}/trials").json()["columns"]]
        rows = client.get(f"{base}/trials").json()["rows"]
        assert {row["trial"]: row["values"][names.index("verdict")] for row in rows} == {
            row["trial"]: row["verdict"] if isinstance(row["verdict"], str) else None
            for row in study.trials_full.to_dict("records")
        }
        page = client.get(f"{base}/trials/00001").json()
        assert page["verdict_summary"] == study.trials_full.iloc[1]["verdict_summary"]
        assert len(client.get(f"{base}/curves").json()["trials"]) == study.epochs["trial"].nunique()
        report = client.get(f"{base}/report").text
        assert f"{bucket}/group/first" in report
        assert str(tmp_path) not in report, "the copy's folder is nothing that a reader can use"
        log = client.get(
            f"{base}/log", params={"which": "trial", "trial": "00001"}, headers=BEARER
        ).json()
        assert log["lines"] == ["epoch 1 of 12"]
    copied = {path.name for path in (tmp_path / "laptop").rglob("*") if path.is_file()}
    assert {"epochs.jsonl", "trial.json"} <= copied
    assert not {"best.pt", "0001.nii.gz", "study.db"} & copied
    assert not (Replica(bucket).root / "epochs.jsonl").exists()


def test_a_study_named_itself_is_shown_and_one_that_was_removed_is_not(
    bucket: str, write_study: WriteStudy
) -> None:
    root = write_study("small", trials=2, epochs=3)
    put_folder(f"{bucket}/small", root)
    with service(f"{bucket}/small") as client:
        wait_for(lambda: "best" in listed(client).get("small", {}))
        assert client.get("/api/studies/small").json()["path"] == f"{bucket}/small"
        for name in (remote := Remote(f"{bucket}/small")).names():
            remote.delete(name)
        wait_for(lambda: not listed(client))


def test_rows_come_while_the_driver_writes_and_viewers_cost_no_listings(
    bucket: str, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StudyFiles(write_study("live", trials=3, epochs=6, unfinished=1))
    put_folder(f"{bucket}/live", files.root)
    remote = Remote(f"{bucket}/live")
    remote.write(LEASE, json.dumps({"driver": "another-host 1 x", "beat": 1}).encode())
    listings: list[float] = []
    whole = Remote.listing

    def counted(self: Remote, below: str = "") -> Any:
        listings.append(time.monotonic())
        return whole(self, below)

    monkeypatch.setattr(Remote, "listing", counted)
    new = {
        "trial": "00002",
        "epoch": 90,
        "time": time.time(),
        "val_auc": None,
        "val_auc_raw": 0.75,
        "val_auc_ema": None,
    }
    with service(bucket) as client:
        wait_for(lambda: "best" in listed(client).get("live", {}))
        assert listed(client)["live"]["state"] == "running"
        assert client.get("/api/studies/live/trials/00002").json()["state"] == "running"
        seen = client.get("/api/studies/live/curves").json()["seen"]

        async def news() -> list[bytes]:
            streams = [client.app.state.service.feeds.events("live", seen) for _ in range(5)]  # type: ignore[attr-defined]
            for stream in streams:
                await anext(stream)
            append_line(files.epochs, new)
            remote.put("epochs.jsonl", files.epochs)

            async def first_rows(stream: Any) -> bytes:
                async for event in stream:
                    if b"event: rows" in event:
                        await stream.aclose()
                        return bytes(event)
                raise AssertionError("the stream ended")

            return await asyncio.wait_for(asyncio.gather(*map(first_rows, streams)), 60)

        listings.clear()
        began = time.monotonic()
        events = asyncio.run(news())
        assert len(events) == 5
        assert all(b'["00002",90,0.75,null,false]' in event for event in events)
        for _ in range(20):
            client.get("/api/studies")
            client.get("/api/studies/live")
        assert len(listings) <= (time.monotonic() - began) / 0.5 + 2

        def last_epoch() -> int:
            curves = client.get("/api/studies/live/curves").json()["trials"]
            return int(curves["00002"]["epoch"][-1])

        wait_for(lambda: last_epoch() == 90)
        remote.delete(LEASE)
        wait_for(lambda: listed(client)["live"]["state"] == "interrupted")


def test_a_driver_that_gives_no_sign_of_life_is_not_shown_as_running(
    bucket: str, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_storage, "FRESH_S", 6.0)
    put_folder(f"{bucket}/killed", write_study("killed", trials=3, epochs=6, unfinished=1))
    remote = Remote(f"{bucket}/killed")
    beats = iter(range(1000))

    def beat() -> None:
        remote.write(
            LEASE, json.dumps({"driver": "another-host 1 x", "beat": next(beats)}).encode()
        )

    beat()
    with service(bucket) as client:
        wait_for(lambda: listed(client).get("killed", {}).get("state") == "running")
        end = time.monotonic() + 9.0
        while time.monotonic() < end:
            beat()
            assert listed(client)["killed"]["state"] == "running"
            time.sleep(0.5)
        wait_for(lambda: listed(client)["killed"]["state"] == "interrupted")


def test_what_is_asked_for_on_the_page_reaches_the_driver_and_its_answer_the_page(
    bucket: str, write_study: WriteStudy
) -> None:
    url = f"{bucket}/study"
    put_folder(url, write_study("study", trials=3, epochs=6, unfinished=1))
    path = "/api/studies/study"
    with service(bucket) as client, mirrored(url) as files:
        wait_for(lambda: listed(client).get("study", {}).get("state") == "running")
        assert client.post(f"{path}/trials/00002/stop", headers=BEARER).json()["became"] == "asked"
        assert client.get(path).json()["stop_requests"] == ["00002"]
        wait_for(lambda: asked_to_stop(files) == ["00002"])
        TrialRequests(files).answered("00002")
        wait_for(lambda: client.get(path).json()["stop_requests"] == [])
        assert asked_to_stop(files) == []
        Remote(url).write("requests/00001.json", b"by hand")
        wait_for(lambda: asked_to_stop(files) == ["00001"])
        wait_for(lambda: client.get(path).json()["stop_requests"] == ["00001"])
        assert client.post(f"{path}/stop", headers=BEARER).json()["became"] == "asked"
        wait_for(files.stop_request.exists)
        files.stop_request.unlink()
    assert Remote(url).names().count("requests/study.json") == 0, "an answered request was left"
    with mirrored(url) as files:
        assert asked_to_stop(files) == ["00001"], (
            "a request without an answer waits for the next session"
        )


def test_a_request_to_stop_that_was_there_at_the_start_is_void(bucket: str) -> None:
    Remote(bucket).write("requests/study.json", b"{}")
    with mirrored(bucket) as files, stopping_on_request(files):
        wait_for(lambda: "requests/study.json" not in Remote(bucket).names())
        assert not files.stop_request.exists()

    def work() -> None:
        with mirrored(bucket) as files, stopping_on_request(files):
            Remote(bucket).write("requests/study.json", b"{}")
            threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert Remote(bucket).names() == []


def test_a_study_is_started_in_the_bucket_and_one_that_cannot_begin_says_why(
    bucket: str, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label,subject\nmissing.nii.gz,0,anna\n")
    spec = {"data": str(table), "space": "documented", "trials": 2, "config": {"epochs": 2}}
    with service(bucket) as client:
        wait_for(lambda: client.get("/api/studies").json()["trouble"] is None)
        asked = client.post("/api/studies", json={"name": "new", "spec": spec}, headers=BEARER)
        assert asked.status_code == 201
        assert (
            client.post(
                "/api/studies", json={"name": "new", "spec": spec}, headers=BEARER
            ).status_code
            == 409
        )
        told = wait_for(
            lambda: (row := client.get("/api/studies/new").json())["exit_code"] is not None and row,
            120,
        )
        assert (told["exit_code"], told["state"], told["path"]) == (1, "unstarted", f"{bucket}/new")
        said = client.get(
            "/api/studies/new/log", params={"which": "console"}, headers=BEARER
        ).json()["lines"]
        assert f"study: {bucket}/new" in said
        assert any("no such file" in line for line in said)
        assert not any("Traceback" in line for line in said)
    assert Remote(f"{bucket}/new").read(LEASE) is None
    with service(bucket) as client:
        assert listed(client)["new"]["state"] == "unstarted", "a service that starts again knows it"


def test_storage_that_goes_away_is_told_on_the_page_and_comes_back(
    tmp_path: Path, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "laptop"))
    root = write_study("study", trials=3, epochs=6, unfinished=1)
    with ExitStack() as running:
        leading_there = running.enter_context(s3_server())
        for name, value in leading_there.items():
            monkeypatch.setenv(name, value)
        url = "s3://studies/gone"
        put_folder(f"{url}/study", root)
        Remote(f"{url}/study").write(LEASE, b'{"driver": "another-host 1 x"}')
        with service(url) as client:
            wait_for(lambda: listed(client).get("study", {}).get("state") == "running")
            running.close()
            trouble = wait_for(lambda: client.get("/api/studies").json()["trouble"])
            assert trouble.startswith("the storage does not answer since ")
            assert "the page shows the state at that time" in trouble
            assert listed(client)["study"]["state"] == "running", "nothing is known of an end"
            assert client.get("/api/studies/study").json()["trouble"] == trouble
            assert client.get("/api/studies/study/trials").status_code == 200
            for change in ("stop", "trials/00002/stop"):
                refused = client.post(f"/api/studies/study/{change}", headers=BEARER)
                assert refused.status_code == 503
                assert refused.json()["detail"] == [trouble]
            log = client.get(
                "/api/studies/study/log",
                params={"which": "trial", "trial": "00002"},
                headers=BEARER,
            )
            assert log.status_code == 503
            with s3_server(int(leading_there["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])):
                wait_for(lambda: client.get("/api/studies").json()["trouble"] is None)
                assert (
                    client.post("/api/studies/study/trials/00002/stop", headers=BEARER).status_code
                    == 200
                )


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("ftp://host/studies", SpecError, "name a folder, or a bucket in object storage: s3, gs"),
        (
            "s3://nowhere/studies",
            StorageError,
            "s3://nowhere/studies: there is no 'nowhere': make it, or name another",
        ),
    ],
)
def test_a_url_that_cannot_be_served_is_an_error_at_the_start(
    bucket: str,
    place: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        serve(Path(place), host="127.0.0.1", port=0)
    assert not [path for path in tmp_path.iterdir() if path.name != "laptop"], (
        "a URL was taken for a folder"
    )


class Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does to credentials that it does not know, or none: moto lets everybody list."""

    def do_GET(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_credentials_that_do_not_do_are_an_error_at_the_start(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
    try:
        with pytest.raises(StorageError, match=f"^{bucket}: cannot be listed: .*ACCESS_DENIED"):
            serve(Path(bucket), host="127.0.0.1", port=0)
    finally:
        refusing.shutdown()


def test_storage_that_does_not_answer_at_the_start_is_an_error(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=f"^{bucket}: cannot be listed: .*NETWORK_CONNECTION"):
        serve(Path(bucket), host="127.0.0.1", port=0)


def test_no_object_is_written_outside_the_folder_it_is_copied_to(
    server: dict[str, str], bucket: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    put_folder(f"{bucket}/study", write_study("study", trials=2, epochs=3))
    below = bucket.removeprefix("s3:/")
    for name in (
        "../../../evil.json",
        "trials/../../../evil/trial.json",
        "/etc/evil.json",
        "requests/../../evil.json",
    ):
        put_raw(server, f"{below}/study/{name}", b"{}")
    opened(f"{bucket}/study")
    fetch_study(f"{bucket}/study", tmp_path / "copy")
    with mirrored(f"{bucket}/study"):
        pass
    replica = Replica(bucket)
    replica.pull()
    found = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("*")}
    assert any("served" in parts and parts[-1] == "epochs.jsonl" for parts in found)
    assert not [parts for parts in found if any("evil" in part for part in parts)]
