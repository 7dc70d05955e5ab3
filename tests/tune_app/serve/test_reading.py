"""What the service tells: its answers equal those of `tune_app.results.study`."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import wait_for
from filelock import FileLock
from serving import BEARER, SECOND, SECOND_PATH, TOKEN
from starlette.testclient import TestClient

from tune_app.results.loading import load_study
from tune_app.serve import live
from tune_app.serve.access import (
    Access,
)
from tune_app.serve.app import build_app
from tune_app.serve.views import progress
from tune_app.study.files import StudyFiles


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
    client: TestClient, write_study: Callable[..., Path]
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
    client: TestClient, tmp_path: Path, write_study: Callable[..., Path]
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
    tmp_path: Path, write_study: Callable[..., Path], own_cache: None
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
    client: TestClient, tmp_path: Path, write_study: Callable[..., Path]
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


def test_the_estimated_end_lies_between_what_usually_happens_and_no_more_stops(
    write_study: Callable[..., Path],
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
