"""Table and volumes in object storage, with a real S3 server on loopback."""

import dataclasses
import io
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_storage import BUCKET, put_folder, s3_server

from trainables.config import build_config
from trainables.data import storage, volumes
from trainables.data.manifest import read_manifest
from trainables.data.manifest_check import check_manifest
from trainables.data.scans import Recipe, VolumeError, read_header, read_scan
from trainables.data.storage import Remote, StorageError, bucket_of, patient
from trainables.data.table_file import ManifestError
from trainables.data.volumes import CohortError, open_cohort, prepare_cohort
from trainables.saved_run import open_inputs
from tune_app.cluster.doctor import diagnose_machine
from tune_app.study.errors import SpecError
from tune_app.study.spec import build_spec

Write = Callable[..., Path]
TINY = {"volume_shape": 16, "num_folds": 2}
RECIPE = Recipe.from_config(build_config(TINY))


@pytest.fixture
def table(write_scan: Write, tmp_path: Path) -> Path:
    """Six small volumes of six subjects, one of them not compressed; the table is in a folder next to them."""
    lines = ["path,label,subject", ""]  # an empty line has a number, too
    for row in range(6):
        name = f"{row}.nii" if row == 3 else f"{row}.nii.gz"
        write_scan(f"data/scans/{name}", (8 + row, 9, 10), seed=row)
        lines.append(f"../scans/{name},{row % 2},s{row}")
    path = tmp_path / "data" / "tables" / "table.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def url(bucket: str, table: Path) -> str:
    """The same in the bucket."""
    put_folder(bucket, table.parents[1])
    return f"{bucket}/tables/table.csv"


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are opened from now on."""
    opened: list[str] = []
    whole = Remote.opened

    def counted(self: Remote, name: str) -> object:
        opened.append(name.rpartition("/")[2])
        return whole(self, name)

    monkeypatch.setattr(Remote, "opened", counted)
    return opened


def test_a_cohort_from_objects_is_that_from_files(
    table: Path, url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BUFFER", 4096)  # an object comes in several pieces
    local = open_cohort(prepare_cohort(read_manifest(table), RECIPE, tmp_path / "one"))
    for where in (url, Path(url)):  # a Path has lost a slash
        manifest = read_manifest(where)  # type: ignore[arg-type]
        assert manifest.table == url
        assert manifest.rows["path"].tolist()[:1] == [f"{bucket}/scans/0.nii.gz"]
    newest = max(one.written.timestamp() for one in Remote(bucket).listing())
    while (
        time.time() < newest + 2.1
    ):  # a file written just now may be written again within the same second
        time.sleep(0.1)
    cohort = open_cohort(prepare_cohort(manifest, RECIPE, tmp_path / "two"))
    np.testing.assert_array_equal(cohort.volumes, local.volumes)
    assert cohort.paths[3] == f"{bucket}/scans/3.nii"
    assert cohort.folder.name.split("-")[0] == local.folder.name.split("-")[0], (
        "the same bytes are the same volumes"
    )
    opened = reads(monkeypatch)
    assert prepare_cohort(manifest, RECIPE, tmp_path / "two") == cohort.folder
    again = prepare_cohort(
        manifest, dataclasses.replace(RECIPE, intensity="zscore_nonzero"), tmp_path / "two"
    )
    assert again != cohort.folder
    assert sorted(opened) == sorted(path.rpartition("/")[2] for path in cohort.paths), (
        "once for the other recipe"
    )


def test_a_local_table_may_name_objects(url: str, bucket: str, tmp_path: Path) -> None:
    table = tmp_path / "here.csv"
    table.write_text(
        f"path,label,subject\n{bucket}/scans/0.nii.gz,0,a\n{bucket}/scans/1.nii.gz,1,b\n"
    )
    cohort = open_cohort(prepare_cohort(read_manifest(table), RECIPE, tmp_path / "cache"))
    assert cohort.paths == (f"{bucket}/scans/0.nii.gz", f"{bucket}/scans/1.nii.gz")
    with table.open("a") as file:
        file.write(f"{bucket}/scans/1.nii.gz,1,b\ns3://bucket,1,c\n")
    with pytest.raises(ManifestError) as refusal:
        read_manifest(table)
    assert refusal.value.problems == [
        "row 4 (scan s3://bucket): s3://bucket: a bucket, an object in one is needed",
        f"row 3 (scan {bucket}/scans/1.nii.gz): the same file as row 2 (scan {bucket}/scans/1.nii.gz): keep one of the rows",
    ]


def test_a_header_is_read_without_the_rest(
    url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BUFFER", 4096)
    whole = Remote(bucket).read("scans/3.nii")
    assert whole is not None
    Remote(bucket).write("scans/large.nii", whole[:352] + bytes(8 << 20))
    assert (
        read_header(f"{bucket}/scans/3.nii").shape == read_header(f"{bucket}/scans/large.nii").shape
    )
    with pytest.raises(VolumeError, match=f"^scan {bucket}/scans/large.nii: constant: "):
        read_scan(f"{bucket}/scans/large.nii")
    remote, name = bucket_of(f"{bucket}/scans/large.nii")
    with remote.opened(name) as (stream, size):
        assert size == 352 + (8 << 20)
        stream.read(2)
        assert stream.raw.tell() == 4096, "more than a piece came"


def test_a_node_without_the_cohort_makes_it_from_the_objects(
    url: str, bucket: str, table: Path, tmp_path: Path
) -> None:
    config = build_config(TINY)
    made = prepare_cohort(read_manifest(Path(url)), Recipe.from_config(config), tmp_path / "driver")
    shutil.rmtree(table.parents[1])
    elsewhere = tmp_path / "node" / made.name
    cohort, split = open_inputs(config, url, elsewhere)
    np.testing.assert_array_equal(cohort.volumes, open_cohort(made).volumes)
    assert sorted([*split.train, *split.val]) == list(range(6))

    Remote(bucket).delete("scans/1.nii.gz")
    Remote(bucket).delete("scans/4.nii.gz")
    with pytest.raises(CohortError) as refusal:
        open_inputs(config, url, tmp_path / "another node" / made.name)
    assert refusal.value.problems == [
        f"node {socket.gethostname()}: row {row}: scan {bucket}/scans/{name}.nii.gz: no such object: copy it there, or drop the row"
        for row, name in ((3, 1), (6, 4))
    ]
    Remote(bucket).delete("tables/table.csv")
    with pytest.raises(CohortError, match=f"^node .*: table {url}: no such object$"):
        open_inputs(config, url, elsewhere)


def test_an_object_that_is_written_while_it_is_read_is_refused(
    url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path | str, in_channels: int = 1) -> object:
        scan = read_scan(path, in_channels)
        if str(path).endswith("/2.nii.gz"):
            Remote(bucket).write("scans/2.nii.gz", b"another")
        return scan

    monkeypatch.setattr(volumes, "read_scan", late)
    with pytest.raises(
        CohortError, match=f"^row 4: scan {bucket}/scans/2.nii.gz: changed while it was being read"
    ):
        prepare_cohort(read_manifest(Path(url)), RECIPE, tmp_path / "cache")


def test_every_problem_of_objects_is_told_at_once(url: str, bucket: str) -> None:
    Remote(bucket).delete("scans/1.nii.gz")
    Remote(bucket).write("scans/2.nii.gz", b"not a scan")
    report = check_manifest(Path(url), 2, build_config(TINY))
    assert [problem.split(": ")[0] for problem in report.problems] == [
        f"row {row} (scan ../scans/{row - 2}.nii.gz)" for row in (3, 4)
    ]
    assert "no such object" in report.problems[0]
    assert "not a NIfTI file" in report.problems[1]


def test_storage_that_does_not_answer_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(Path(url))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ManifestError, match=f"^table {url}: .*NETWORK_CONNECTION"):
        read_manifest(Path(url))
    with pytest.raises(
        CohortError, match=r"^row 2: scan s3://.*/0\.nii\.gz: cannot be read: .*NETWORK_CONNECTION"
    ):
        prepare_cohort(manifest, RECIPE, tmp_path / "cache", workers=6)


def test_the_doctor_looks_for_the_objects_of_a_table(url: str, bucket: str, tmp_path: Path) -> None:
    def told() -> tuple[str, str, str]:
        (found,) = [one for one in diagnose_machine(url, None, tmp_path) if one.what == "data"]
        return found.state, found.said, found.remedy

    assert told()[0] == "good"
    assert told()[1].startswith("6 volumes, table ")
    Remote(bucket).delete("scans/1.nii.gz")
    state, said, remedy = told()
    assert (state, said) == (
        "bad",
        f"1 of 6 volumes are missing, the first is {bucket}/scans/1.nii.gz",
    )
    assert remedy.startswith("let the nodes read these objects")


def test_a_cache_is_a_folder() -> None:
    with pytest.raises(SpecError, match="cache: s3://bucket/cache: a folder is needed"):
        build_spec({"data": "s3://bucket/table.csv", "cache": "s3://bucket/cache"})


OUTAGES: dict[str, Callable[[Any, Path], Any]] = {
    "read": lambda remote, folder: remote.read("a"),
    "get": lambda remote, folder: remote.get("a", folder / "a") and (folder / "a").read_bytes(),
    "stamp": lambda remote, folder: remote.stamp("a")[0] * b"x",
    "listing": lambda remote, folder: remote.listing()[0].size * b"x",
    "write": lambda remote, folder: remote.write("b", b"x" * 10) or remote.read("b"),
    "stream": lambda remote, folder: streamed(remote),
}


def streamed(remote: Remote) -> bytes:
    with remote.opened("a") as (stream, _):
        return stream.read()


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Remote, Callable[[], None]]]:
    """Object storage that has stopped answering, with an object of ten bytes in it, and what brings it back."""
    with ExitStack() as back:
        with s3_server() as variables:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            remote = Remote(f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")
            remote.write("a", b"x" * 10)
        port = int(variables["AWS_ENDPOINT_URL"].rpartition(":")[2])
        calls: list[int] = []

        def bring_back() -> None:
            if not calls:
                back.enter_context(s3_server(port))
            calls.append(1)

        yield remote, bring_back


@pytest.mark.slow  # the client itself tries for some seconds
@pytest.mark.parametrize("what", OUTAGES)
def test_a_trial_outlasts_an_outage_of_object_storage(
    outage: tuple[Remote, Callable[[], None]], what: str, tmp_path: Path
) -> None:
    remote, bring_back = outage
    with patient(120.0, bring_back):
        assert OUTAGES[what](remote, tmp_path) == b"x" * 10


@pytest.mark.slow
def test_an_outage_without_patience_or_longer_than_it_is_an_error(
    outage: tuple[Remote, Callable[[], None]], caplog: pytest.LogCaptureFixture
) -> None:
    remote, _ = outage
    with pytest.raises(StorageError, match="a cannot be read"):
        remote.read("a")
    assert not caplog.records
    with (
        pytest.raises(StorageError, match=r"a cannot be read.*; tried again for 1 s"),
        patient(1.0),
    ):
        remote.read("a")
    (told,) = caplog.records
    assert "tried again until" in told.getMessage()


def test_a_stream_can_be_read_in_any_order(bucket: str) -> None:
    content = bytes(range(256)) * 100
    remote = Remote(bucket)
    remote.write("a", content)
    with remote.opened("a") as (stream, size):
        assert size == len(content)
        assert stream.read(10) == content[:10]
        stream.seek(-5, io.SEEK_END)
        assert stream.read() == content[-5:]
        assert stream.read() == b""
        stream.seek(20_000)
        stream.seek(-100, io.SEEK_CUR)
        assert stream.tell() == 19_900
        assert stream.read(300) == content[19_900:20_200]
