"""A study in object storage, with a real S3 server on loopback: run, killed, resumed elsewhere, read, fetched."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import study_runs
from object_storage import put_folder

from trainables.checkpoints import HURRY, TrialFiles
from trainables.data.storage import (
    Remote,
    StorageError,
    TrialStore,
    bucket_of,
    kept_since_asked,
    url_of,
)
from trainables.own_folder import MARKER
from tune_app.cluster.doctor import diagnose_machine
from tune_app.results.loading import load_study
from tune_app.study import mirror as storage
from tune_app.study.copies import LEASE, fetch_study, opened
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.mirror import BusyError, Mirror, drop_unrecorded, mirrored
from tune_app.study.rows import read_rows
from tune_app.synthetic import write_cohort

TINY = [
    "--set",
    "depth=10",
    "--set",
    "width=0.125",
    "--set",
    "volume_shape=16",
    "--set",
    "num_folds=2",
]
TINY += ["--set", "train_auc_volumes=0"]


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/a/study/", "s3://bucket/a/study"),
        (Path("s3://bucket/a/study"), "s3://bucket/a/study"),
        (Path("gs://bucket/x"), "gs://bucket/x"),
        ("/shared/study", None),
        ("studies/first", None),
        ("s3", None),
        ("s3:/", None),
    ],
)
def test_urls_are_told_from_folders(place: Any, url: str | None) -> None:
    assert url_of(place) == url


def test_objects_are_written_read_listed_and_removed(bucket: str, tmp_path: Path) -> None:
    remote = Remote(bucket)
    assert remote.names() == []
    assert remote.read("study.json") is None
    (tmp_path / "weights.pt").write_bytes(os.urandom(6 * 2**20))
    remote.write("study.json", b"{}")
    remote.put("trials/00000/checkpoint.pt", tmp_path / "weights.pt")
    assert remote.names() == ["study.json", "trials/00000/checkpoint.pt"]
    assert remote.get("trials/00000/checkpoint.pt", tmp_path / "deep" / "again.pt")
    assert (tmp_path / "deep" / "again.pt").read_bytes() == (tmp_path / "weights.pt").read_bytes()
    assert not remote.get("nothing", tmp_path / "nothing")
    remote.delete("study.json")
    remote.delete("study.json")
    assert remote.read("study.json") is None
    with pytest.raises(
        StorageError, match=r"s3://no-such-bucket/x: a cannot be written: .*NO_SUCH_BUCKET"
    ):
        Remote("s3://no-such-bucket/x").write("a", b"")


@pytest.mark.parametrize("name", ["a study", "größe #1 (ü)", "a+b=c"])
def test_a_name_may_hold_what_a_url_may_not(bucket: str, name: str) -> None:
    Remote(f"{bucket}/{name}").write("epochs.jsonl", b"rows")
    assert Remote(bucket).names() == [f"{name}/epochs.jsonl"]
    remote, below = bucket_of(f"{bucket}/{name}/epochs.jsonl")
    assert remote.read(below) == b"rows"


def test_a_trial_finds_its_checkpoint_from_another_node(bucket: str, tmp_path: Path) -> None:
    here, there = TrialFiles(tmp_path / "node1"), TrialFiles(tmp_path / "node2")
    for files in (here, there):
        files.folder.mkdir()
    here.checkpoint.write_bytes(b"epoch 3")
    here.best.write_bytes(b"epoch 2")
    TrialStore(bucket, "00004", here).keep()
    there.checkpoint.write_bytes(b"an older attempt's")
    store = TrialStore(bucket, "00004", there)
    store.fetch()
    assert (there.checkpoint.read_bytes(), there.best.read_bytes()) == (b"epoch 3", b"epoch 2")
    there.checkpoint.write_bytes(b"epoch 4")
    store.keep()
    assert Remote(bucket).read("trials/00004/checkpoint.pt") == b"epoch 4"


def test_a_study_has_one_driver_and_a_dead_one_is_followed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BEAT_S", 0.5)
    monkeypatch.setattr(storage, "SILENT_S", 4.0)
    with mirrored(bucket), pytest.raises(BusyError, match="is driving this study; wait for it"):
        Mirror(Remote(bucket), StudyFiles(Path("unused"))).take()
    assert Remote(bucket).names() == [], "an orderly end leaves no lease"
    dead = Mirror(Remote(bucket), StudyFiles(Path("unused")))
    dead.take()
    living = Mirror(Remote(bucket), StudyFiles(Path("unused")))
    living.take()
    dead.release()
    assert Remote(bucket).names() == [LEASE], "it is not the dead one's any more"
    living.release()


def test_trials_of_other_nodes_find_in_the_storage_that_they_must_hurry(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TrialStore(bucket, "00000", TrialFiles(tmp_path / "node2"))
    with mirrored(bucket) as files:
        assert not store.hurries()
        files.hurry.touch()
        study_runs.wait_until(store.hurries, "the request in the storage")
        files.hurry.unlink()  # as the driver does at its end
    assert not store.hurries()
    assert Remote(bucket).names() == []
    Remote(bucket).write(HURRY, b"{}")  # a driver that was killed left it
    with mirrored(bucket) as files:
        assert not files.hurry.exists()
        study_runs.wait_until(lambda: not store.hurries(), "the end of an earlier request")
    monkeypatch.setattr(store, "remote", Remote(bucket))
    monkeypatch.setattr(store.remote, "stamp", lambda name: raised(StorageError("no answer")))
    assert not store.hurries()


def test_a_checkpoint_counts_as_saved_when_it_is_in_the_storage_and_new(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once counted when the trial had written it to its own folder: the driver ended before it was sent."""
    remote, files = Remote(bucket), TrialFiles(tmp_path / "node")
    files.folder.mkdir()
    files.checkpoint.write_bytes(b"weights")
    assert not kept_since_asked(remote, ["00000"]), "nothing was asked"
    remote.write(HURRY, b"{}")
    assert not kept_since_asked(remote, ["00000"])
    TrialStore(bucket, "00000", files).keep()
    assert kept_since_asked(remote, ["00000"])
    assert not kept_since_asked(remote, ["00000", "00001"])
    stamps = {HURRY: (2, 7_000), "trials/00000/checkpoint.pt": (7, 6_999)}
    monkeypatch.setattr(remote, "stamp", stamps.get)
    assert not kept_since_asked(remote, ["00000"]), "an earlier one"
    stamps["trials/00000/checkpoint.pt"] = (7, 7_000)
    assert kept_since_asked(remote, ["00000"])
    monkeypatch.setattr(remote, "stamp", lambda name: raised(StorageError("no answer")))
    assert not kept_since_asked(remote, ["00000"])


def raised(error: Exception) -> None:
    raise error


def test_what_the_storage_has_goes_before_what_lies_in_the_folder(bucket: str) -> None:
    with mirrored(bucket) as files:
        append_line(files.epochs, {"trial": "00000", "epoch": 1, "val_auc": 0.5})
        folder = files.root
    append_line(StudyFiles(folder).epochs, {"trial": "00000", "epoch": 2, "val_auc": 0.5})
    with mirrored(bucket) as files:
        assert files.root == folder
        assert files.epochs.read_text().count("\n") == 1


def test_rows_that_were_mirrored_before_their_trials_record_are_left_to_the_trial(
    tmp_path: Path,
) -> None:
    """Records are read first and sent last: a driver may die when the first rows of a trial are there and its record is not."""
    files = StudyFiles(tmp_path)
    for trial, epoch in (("00000", 1), ("00001", 1), ("00000", 2), ("00001", 2)):
        append_line(files.epochs, {"trial": trial, "epoch": epoch, "val_auc": 0.5})
    append_line(files.decisions, {"trial": "00001", "epoch": 1})
    files.trial("00000").folder.mkdir(parents=True)
    append_line(files.trial("00000").record, {"trial": "00000"})
    assert drop_unrecorded(files) == ["00001"]
    assert [(row["trial"], row["epoch"]) for row in read_rows(files.epochs)] == [
        ("00000", 1),
        ("00000", 2),
    ]
    assert read_rows(files.decisions) == []
    assert drop_unrecorded(files) == []


def test_a_place_without_a_study_says_so(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{bucket}: no study here"):
        opened(bucket)
    with pytest.raises(SpecError, match="no study here"):
        fetch_study(bucket, tmp_path / "copy")
    with pytest.raises(SpecError, match="a folder can be used as it is"):
        fetch_study("/shared/study", tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["../../written", "trials/../../../written", "//{outside}/written", "trials//written"]
)
def test_an_object_whose_name_leads_elsewhere_is_left_out(
    bucket: str, tmp_path: Path, name: str
) -> None:
    remote = Remote(bucket)
    remote.write("study.json", b"{}")
    key = f"{bucket.removeprefix('s3://studies/')}/{name.format(outside=str(tmp_path)[1:])}"
    boto3.client("s3").put_object(Bucket="studies", Key=key, Body=b"x")
    before = set(tmp_path.rglob("*"))
    copy = tmp_path / "a" / "copy"
    fetch_study(bucket, copy)
    assert set(tmp_path.rglob("*")) - before == {copy.parent, copy, copy / "study.json"}
    folder, _ = opened(bucket)
    there = {path.name for path in folder.rglob("*") if path.is_file()} - {MARKER}
    assert there == {"study.json"}


def test_the_doctor_writes_to_the_bucket_and_says_what_is_wrong_with_it(
    server: dict[str, str], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = server["AWS_ENDPOINT_URL"]
    deny = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::readonly/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]}).encode()
    kind = {"Content-Type": "application/json"}
    for place, data in ((f"{url}/readonly", None), (f"{url}/readonly?policy", policy)):
        asked = urllib.request.Request(place, data=data, headers=kind, method="PUT")
        urllib.request.urlopen(asked, timeout=30).close()

    def storage_of(study: str) -> tuple[str, str]:
        (found,) = [one for one in diagnose_machine(study=study) if one.what == "storage"]
        return found.state, f"{found.said}: {found.remedy}"

    assert storage_of(bucket) == ("good", "can be written: ")
    assert Remote(bucket).names() == [], "something was left"
    for study, why in (
        ("s3://nowhere/study", "bucket does not exist"),
        ("s3://readonly/study", "ACCESS_DENIED"),
    ):
        state, told = storage_of(study)
        assert state == "bad"
        assert told.startswith(f"{study}: ")
        assert why in told
        assert "make the bucket, and let the nodes read, write and remove" in told
    assert not list(tmp_path.iterdir()), "a URL was taken for a folder"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_in_a_bucket_is_killed_and_resumed_on_another_machine(
    server: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    table = write_cohort(tmp_path / "c", subjects=14, side=(14, 18))
    asked = [
        "run",
        "--data",
        table,
        "--trials",
        2,
        "--epochs",
        40,
        "--out",
        bucket,
        "--resume",
        *TINY,
    ]

    def medtune(machine: str, *arguments: object) -> subprocess.Popen[str]:
        return study_runs.medtune(
            *arguments, env=os.environ | server | {"MEDTUNE_CACHE": str(tmp_path / machine)}
        )

    first = medtune("head1", *asked)
    remote = Remote(bucket)
    wait_for(lambda: (remote.read("epochs.jsonl") or b"").count(b"\n") >= 3, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = (remote.read("epochs.jsonl") or b"").splitlines()
    assert 3 <= len(before) < 80
    seen = load_study(bucket)
    assert len(seen.epochs) == len(before)

    out, err = (second := medtune("head2", *asked)).communicate(timeout=600)
    assert second.returncode == 0, err
    assert f"medtune results {bucket}" in out
    study = load_study(bucket)
    assert not study.running
    assert set(study.trials_full["state"]) <= {"completed", "stopped"}
    for trial, rows in study.epochs.groupby("trial"):
        assert list(rows["epoch"]) == list(range(1, len(rows) + 1)), trial
    assert (remote.read("epochs.jsonl") or b"").splitlines()[: len(before)] == before, (
        "a row was rewritten"
    )
    assert {"study.json", "study.db", "trials/00000/checkpoint.pt", "trials/00001/best.pt"} <= set(
        remote.names()
    )
    assert LEASE not in remote.names()

    fetch_study(bucket, tmp_path / "copy")
    copy = load_study(tmp_path / "copy")
    assert copy.best()["trial"] == study.best()["trial"]
    assert Path(copy.best()["best_checkpoint"]).is_file()
    secret = server["AWS_SECRET_ACCESS_KEY"].encode()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if secret in path.read_bytes()], "the secret is in a file"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_of_data_in_a_bucket_runs_where_nothing_of_it_lies_and_is_stopped_from_there(
    server: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    put_folder(f"{bucket}/cohort", write_cohort(tmp_path / "c", subjects=14, side=(14, 18)).parent)
    shutil.rmtree(tmp_path / "c")
    url = f"{bucket}/studies/first"
    asked = [
        "run",
        "--data",
        f"{bucket}/cohort/table.csv",
        "--trials",
        2,
        "--epochs",
        600,
        "--out",
        url,
        *TINY,
    ]
    env = os.environ | server | {"MEDTUNE_CACHE": str(tmp_path / "node")}
    first = study_runs.medtune(*asked, "--max-concurrent", 2, env=env, cwd=tmp_path)
    remote = Remote(url)
    wait_for(lambda: (remote.read("epochs.jsonl") or b"").count(b"\n") >= 2, first)
    remote.write("requests/00000.json", b"{}")
    wait_for(lambda: b'"requested"' in (remote.read("decisions.jsonl") or b""), first)
    remote.write("requests/study.json", b"{}")
    out, err = first.communicate(timeout=120)
    assert first.returncode == 130, f"{out}\n{err}"
    assert f"medtune resume {url}" in err
    assert not [name for name in remote.names() if name.startswith("requests/")], (
        "answered, and left there"
    )

    env |= {"MEDTUNE_CACHE": str(tmp_path / "another node")}
    study_runs.finished(study_runs.medtune("resume", url, env=env, cwd=tmp_path))
    study = load_study(url)
    assert study.spec.data == f"{bucket}/cohort/table.csv"
    trials = study.trials_full.set_index("trial")
    assert list(trials.loc["00000", ["state", "stopped_by"]]) == ["stopped", "requested"]
    assert trials.loc["00001", "state"] in ("completed", "stopped")
    for trial, rows in study.epochs.groupby("trial"):
        assert list(rows["epoch"]) == list(range(1, len(rows) + 1)), trial
    assert len(list((tmp_path / "another node").glob("*/volumes.npy"))) == 1
    assert not list(tmp_path.rglob("*.nii*")), "volumes were kept"


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], *, deadline_s: float = 400
) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"exit {process.poll()}: {process.communicate(timeout=5)}")
        time.sleep(0.2)
