"""A real cluster on loopback: head with dashboard, job server and token, and a second node that can be lost."""

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_runs import Cluster, ended, make_cluster, wait_for
from object_storage import put_folder
from study_runs import SMALL, TINY, check_whole, rows_of

from trainables.data.storage import Remote
from tune_app.study.files import StudyFiles
from tune_app.synthetic import write_cohort

WriteStudy = Callable[..., Path]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, server: dict[str, str]) -> Iterator[Cluster]:
    folder = Path(
        tempfile.mkdtemp(prefix="mt")
    )  # sockets below it: the whole path may have 107 characters
    made = make_cluster(
        folder, write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=14, side=(14, 18))
    )
    made.env |= server
    try:
        made.start_head()
        yield made
    finally:
        for node in made.nodes:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_study_is_submitted_left_stopped_and_resumed(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "a study"
    epochs = 400  # longer than the client may take to notice the signal
    asked = [
        "submit",
        "--no-pip",
        "--",
        "run",
        "--data",
        cluster.table,
        "--trials",
        2,
        "--epochs",
        epochs,
    ]
    asked += ["--out", root, "--cache", tmp_path / "cache", *TINY]

    watching = cluster.medtune(*asked)
    wait_for(lambda: len(rows_of(root)) >= 2, "two epochs", during=watching)
    watching.send_signal(signal.SIGINT)
    out, err = ended(watching, code=130)
    assert f"study: {root}" in out
    assert "detached; the job continues" in err
    stopped, _ = cluster.done("jobs", "stop", root)
    job = stopped.split()[0]
    assert stopped == f"{job} stopped\n"
    before = rows_of(root)
    assert 0 < len(before) < 2 * epochs
    log, _ = cluster.done("jobs", "logs", job)
    assert "interrupted; resume with: medtune resume" in log, (
        "the driver closed the study before it ended"
    )

    def jobs() -> list[dict[str, str]]:
        listed = json.loads(cluster.done("jobs", "list", "--format", "json")[0])
        return [
            row for row in listed if row["study"] == str(root)
        ]  # another test's, or another try's, are there too

    following = cluster.medtune(*asked)
    ours = job.removesuffix("1") + "2"
    wait_for(
        lambda: any(ours == one["submission_id"] for one in cluster.get("/api/jobs/")),
        ours,
        during=following,
    )
    again, err = cluster.done("submit", "--no-pip", "--detach", *asked[2:])
    assert "is running already" in err
    assert again == f"{ours}\n"
    out, err = ended(following)
    assert out.count("best: trial") == 1
    check_whole(root, trials=2, epochs=epochs)
    assert rows_of(root)[: len(before)] == before, "a row was rewritten"
    assert [row["state"] for row in jobs()] == ["stopped", "succeeded"]

    refused, err = cluster.done(*asked, "--seed", 7, code=1)
    assert "holds another study: seed is 0 there, 7 was asked for" in " ".join(refused.split())


def test_a_plan_is_made_where_table_and_search_are(
    cluster: Cluster, bucket: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    """They are in a bucket that the submitting machine cannot reach, and the head can."""
    hidden: dict[str, Any] = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    put_folder(f"{bucket}/cohort", cluster.table.parent)
    table = f"{bucket}/cohort/table.csv"
    variants = tmp_path / "variants.yaml"
    variants.write_text("reference: {}\nwider: {max_m: 0.5}\n")
    send, cache = ["submit", "--no-pip", "--"], ["--cache", tmp_path / "cache"]
    asked = [*send, "ablate", "--data", table, "--variants", variants, "--seeds", 1, *cache]
    asked += ["--epochs", 1, *TINY, "--out", tmp_path / "ablation"]
    log, err = cluster.done(*asked, "--folds", 7, code=1, **hidden)
    assert f"note: {table} cannot be read on this machine: the job checks it" in err
    assert "error: no fold 7: there are 0, 1" in log
    log, err = cluster.done(*asked, **hidden)
    assert "4 runs of 1 epochs: 2 variants, seeds 1, folds all" in log
    assert {row["epoch"] for row in rows_of(tmp_path / "ablation")} == {1}
    assert len(rows_of(tmp_path / "ablation")) == 4

    config = SMALL | {"epochs": 1}
    search = write_study(trials=4, epochs=1, spec={"data": table, "config": config})
    put_folder(f"{bucket}/search", search)
    asked = [*send, "confirm", f"{bucket}/search", "--top", 1, "--seeds", 1, "--folds", 0]
    log, err = cluster.done(*asked, *cache, "--out", tmp_path / "confirmation", **hidden)
    assert f"note: {bucket}/search cannot be read on this machine" in err
    assert len(rows_of(tmp_path / "confirmation")) == 3
    assert "3 runs" in log


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"RAY_AUTH_TOKEN": "another-cluster's"}, "refuses the token of RAY_AUTH_TOKEN"),
        ({}, "asks for a token"),
    ],
)
def test_without_the_clusters_token_nothing_is_sent(
    cluster: Cluster, token: dict[str, str], message: str
) -> None:
    mode = "token" if token else "disabled"
    env: dict[str, Any] = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": mode, **token}
    asked = [
        "submit",
        "--no-pip",
        "--",
        "run",
        "--data",
        cluster.table,
        "--out",
        "/nowhere/study",
        *TINY,
    ]
    for command in (asked, ["jobs", "list"]):
        out, err = cluster.done(*command, code=1, **env)
        assert message in " ".join(err.split())
        assert out == ""
    secret = (cluster.folder / "token").read_text()
    shown = [
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    ]
    assert not any(secret in line for line in shown), "the token is in the process list"
    # Ray's own files apart from the packages: logs of head, agents, drivers.
    logs = [
        path
        for path in (cluster.folder / "r").rglob("*")
        if path.is_file() and path.suffix in (".log", ".out", ".err")
    ]
    assert len(logs) > 5
    assert not [path for path in logs if secret in path.read_text(errors="replace")]


def test_the_doctor_looks_at_the_nodes_from_within(cluster: Cluster, tmp_path: Path) -> None:
    """The exit code is not checked: this machine's own shortages (such as shared memory) are reported too."""
    asked = cluster.medtune(
        "doctor",
        "--address",
        cluster.url,
        "--data",
        "/nowhere/table.csv",
        "--out",
        tmp_path / "study",
    )
    out, err = asked.communicate(timeout=400)
    assert asked.returncode == 1, err
    told = [line.split() for line in out.splitlines()]
    states = {words[1]: words[0] for words in told if len(words) > 2}
    assert (states["data"], states["storage"], states["clock"], states["ports"]) == (
        "BAD",
        "ok",
        "ok",
        "ok",
    )
    assert states["State"] == "ok"
    assert "mount the folder with the data at the same path on every" in " ".join(out.split())


def test_the_doctor_names_the_node_that_cannot_write_to_the_bucket(
    cluster: Cluster, bucket: str
) -> None:
    good = cluster.env
    cluster.env = good | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    try:
        second = cluster.add_node()
    finally:
        cluster.env = good
    asked = cluster.medtune("doctor", "--address", cluster.url, "--out", f"{bucket}/study")
    out, err = asked.communicate(timeout=400)
    second.kill()
    wait_for(lambda: len(cluster.living()) == 1, "the loss of the second node")
    assert asked.returncode == 1, err
    told: dict[str, list[str]] = {}
    for line in out.splitlines():
        words = line.split()
        if line and not line.startswith(" "):
            node = words[0]
        elif "storage" in words[1:2]:
            told[node] = words
    assert len(told) == 2, out
    assert told.pop("127.0.0.2")[:3] == ["BAD", "storage", f"{bucket}/study:"]
    assert [*told.values()] == [["ok", "storage", "can", "be", "written"]], "the head"
    assert "NETWORK_CONNECTION" in out
    assert "AWS_ENDPOINT_URL" in out, "what to do"
    assert Remote(bucket).names() == [], "something was left"


def test_trials_of_a_lost_node_go_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    second = cluster.add_node()
    root = tmp_path / "study"
    asked = [
        "submit",
        "--no-pip",
        "--",
        "run",
        "--data",
        cluster.table,
        "--trials",
        3,
        "--epochs",
        30,
    ]
    asked += ["--out", root, "--cache", tmp_path / "cache", *TINY]
    watching = cluster.medtune(*asked)

    def records() -> list[dict[str, Any]]:
        return [
            json.loads(path.read_text()) for path in StudyFiles(root).trials.glob("*/trial.json")
        ]

    def there() -> set[str]:
        away = {
            record["trial"]
            for record in records()
            if record["node"] == "127.0.0.2" and record["ended"] is None
        }
        return away & {row["trial"] for row in rows_of(root) if row["epoch"] >= 2}

    wait_for(lambda: bool(there()), "two epochs of a trial on the second node", during=watching)
    lost = there()
    second.kill()
    ended(watching)
    check_whole(root, trials=3, epochs=30)
    by_name = {record["trial"]: record for record in records()}
    for trial in lost:
        assert by_name[trial]["failures"] == 1
        assert by_name[trial]["node"] != "127.0.0.2"
