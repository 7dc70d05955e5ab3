"""Table and volumes in object storage, with a real S3 server on loopback."""

import dataclasses
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from object_storage import put_folder

from trainables.config import build_config
from trainables.data import storage, volumes
from trainables.data.manifest import read_manifest
from trainables.data.manifest_check import check_manifest
from trainables.data.scans import Recipe, VolumeError, read_header, read_scan
from trainables.data.storage import Remote, bucket_of
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
    """Six small volumes of six subjects, one of them not compressed; the table is a folder beside them."""
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
    ):  # what was written just now may be written again within the same second
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
    real = volumes.read_scan

    def late(path: Path | str, in_channels: int = 1) -> object:
        scan = real(path, in_channels)
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
