"""A real cluster on loopback: head with dashboard, job server and token, and a second node that can be lost."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tune_app.results import load_study
from tune_app.spec import StudyFiles
from tune_app.synthetic import write_cohort

ROOT = Path(__file__).parents[2]
TINY = ["--set", "depth=10", "--set", "width=0.125", "--set", "volume_shape=16", "--set", "num_folds=2"]
TINY += ["--set", "train_auc_volumes=0"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Node:
    """One `ray start --block`, and all that it started."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End every process of the node at once, as a power cut would."""
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.process.pid)
            for one in [node, *node.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait(30)


@dataclass
class Cluster:
    folder: Path
    table: Path
    port: int
    dashboard: int
    env: dict[str, str]
    nodes: list[Node] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, *arguments: object, ip: str) -> Node:
        fixed = ["--node-ip-address", ip, "--num-cpus", 1, "--object-store-memory", 80_000_000, "--block"]
        fixed += ["--min-worker-port", 0, "--max-worker-port", 0, "--dashboard-agent-listen-port", 0]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, [*arguments, *fixed])]
        with (self.folder / f"{ip}.log").open("ab") as log:
            node = Node(subprocess.Popen(command, stdout=log, stderr=log, env=self.env, start_new_session=True))
        self.nodes.append(node)
        return node

    def add_node(self) -> Node:
        """A node with the address 127.0.0.2, and a CPU for one trial."""
        alive = len(self.living())
        # Files of its own: two nodes of one machine would unpack the job's code over each other.
        there = ("--address", f"127.0.0.1:{self.port}", "--temp-dir", self.folder / "s")
        node = self.start(*there, ip="127.0.0.2")

        def joined() -> bool:
            nonlocal node
            if node.process.poll() is not None:  # Ray gives a node 30 s to start, which a busy machine may not make
                node.kill()
                node = self.start(*there, ip="127.0.0.2")
            return len(self.living()) > alive

        wait_for(joined, "the second node")
        return node

    def living(self) -> list[dict[str, Any]]:
        found = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

    def get(self, path: str) -> Any:
        token = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=token), timeout=30) as answer:
            return json.loads(answer.read())

    def medtune(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """Start a command as a user of the cluster would, on another machine as it were."""
        return subprocess.Popen(
            [sys.executable, "-m", "tune_app.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env=self.env | {"RAY_API_SERVER_ADDRESS": self.url} | env,
        )

    def done(self, *arguments: object, code: int = 0, timeout_s: float = 240, **env: str) -> tuple[str, str]:
        """Run a command to its end, expecting its exit code; returns stdout and stderr."""
        return ended(self.medtune(*arguments, **env), code=code, timeout_s=timeout_s)


def ended(process: subprocess.Popen[str], *, code: int = 0, timeout_s: float = 400) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == code, f"exit {process.returncode}, not {code}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def wait_for(
    condition: Callable[[], bool],
    what: str,
    *,
    during: subprocess.Popen[str] | None = None,
    deadline_s: float = 240,
) -> None:
    """Wait until `condition` holds; fails at the deadline, and when the command `during` which it must come has ended."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if during is not None and during.poll() is not None:
            pytest.fail(f"ended with {during.returncode} before {what}: {during.communicate()}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, KeyError, TypeError):
            if condition():
                return
        time.sleep(0.2)
    pytest.fail(f"waited {deadline_s:.0f} s for {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="mt"))  # sockets below it: the whole path may have 107 characters
    token = folder / "token"
    token.write_text("a-token-of-this-test-alone-0123456789")
    token.chmod(0o600)
    table = write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=14, side=(14, 18))
    (folder / "home").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint is `python -m ...`
        "HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds
        "RAY_health_check_failure_threshold": "3",
        "RAY_agent_register_timeout_ms": "120000",
    }
    made = Cluster(folder, table, free_port(), free_port(), env)
    try:
        made.start(
            *("--head", "--port", made.port, "--temp-dir", folder / "r", "--disable-usage-stats"),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", made.dashboard, "--include-dashboard", "true"),
            ip="127.0.0.1",
        )
        wait_for(lambda: len(made.living()) == 1, "the head")
        yield made
    finally:
        for node in made.nodes:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def rows_of(root: Path) -> list[dict[str, Any]]:
    path = StudyFiles(root).epochs
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_whole(root: Path, *, trials: int, epochs: int) -> None:
    """Every trial ended, with each of its epochs exactly once."""
    study = load_study(root)
    assert len(study.trials) == trials
    assert set(study.trials["state"]) <= {"completed", "stopped"}
    for trial, rows in study.epochs.groupby("trial"):
        assert list(rows["epoch"]) == list(range(1, len(rows) + 1)), trial
    completed = study.trials[study.trials["state"] == "completed"]
    assert (completed["epochs_run"] == epochs).all()
    assert Counter((row["trial"], row["epoch"]) for row in rows_of(root)).most_common(1)[0][1] == 1


def test_a_study_is_submitted_left_stopped_and_resumed(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "a study"
    asked = ["submit", "--no-pip", "--", "run", "--data", cluster.table, "--trials", 2, "--epochs", 60]
    asked += ["--out", root, "--cache", tmp_path / "cache", *TINY]

    watching = cluster.medtune(*asked)
    wait_for(lambda: len(rows_of(root)) >= 2, "two epochs", during=watching)
    watching.send_signal(signal.SIGINT)
    out, err = ended(watching, code=130)
    assert f"study: {root}" in out
    assert "detached; the job goes on" in err
    stopped, _ = cluster.done("jobs", "stop", root)
    job = stopped.split()[0]
    assert stopped == f"{job} stopped\n"
    before = rows_of(root)
    assert 0 < len(before) < 120
    log, _ = cluster.done("jobs", "logs", job)
    assert "interrupted; go on with: medtune resume" in log, "the driver closed the study before it ended"

    following = cluster.medtune(*asked)
    wait_for(lambda: len(cluster.get("/api/jobs/")) == 2, "the second job", during=following)
    again, err = cluster.done("submit", "--no-pip", "--detach", *asked[2:])
    assert "is running already" in err
    assert again == job.removesuffix("1") + "2\n"
    out, err = ended(following)
    assert out.count("best: trial") == 1
    check_whole(root, trials=2, epochs=60)
    assert rows_of(root)[: len(before)] == before, "a row was rewritten"
    listed = json.loads(cluster.done("jobs", "list", "--format", "json")[0])
    assert [(row["study"], row["state"]) for row in listed] == [(str(root), "stopped"), (str(root), "succeeded")]

    refused, err = cluster.done(*asked, "--seed", 7, code=1)
    assert "holds another study: seed is 0 there, 7 was asked for" in " ".join(refused.split())


@pytest.mark.parametrize(
    ("token", "message"),
    [({"RAY_AUTH_TOKEN": "another-cluster's"}, "refuses the token of RAY_AUTH_TOKEN"), ({}, "asks for a token")],
)
def test_without_the_clusters_token_nothing_is_sent(cluster: Cluster, token: dict[str, str], message: str) -> None:
    env = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "token" if token else "disabled", **token}
    asked = ["submit", "--no-pip", "--", "run", "--data", cluster.table, "--out", "/nowhere/study", *TINY]
    for command in (asked, ["jobs", "list"]):
        out, err = cluster.done(*command, code=1, **env)
        assert message in " ".join(err.split())
        assert out == ""
    secret = (cluster.folder / "token").read_text()
    shown = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any(secret in line for line in shown), "the token is in the process list"
    # Ray's own files apart from the packages: logs of head, agents, drivers.
    logs = [
        path for path in (cluster.folder / "r").rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")
    ]
    assert len(logs) > 5
    assert not [path for path in logs if secret in path.read_text(errors="replace")]


def test_the_doctor_looks_at_the_nodes_from_within(cluster: Cluster, tmp_path: Path) -> None:
    """Exit code left aside: what this machine lacks (shared memory, say) is told too."""
    asked = cluster.medtune(
        "doctor", "--address", cluster.url, "--data", "/nowhere/table.csv", "--out", tmp_path / "study"
    )
    out, err = asked.communicate(timeout=400)
    assert asked.returncode == 1, err
    told = [line.split() for line in out.splitlines()]
    states = {words[1]: words[0] for words in told if len(words) > 2}
    assert (states["data"], states["storage"], states["clock"], states["ports"]) == ("BAD", "ok", "ok", "ok")
    assert states["State"] == "ok"
    assert "mount the folder with the data at the same path on every" in " ".join(out.split())


def test_trials_of_a_lost_node_go_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    second = cluster.add_node()
    root = tmp_path / "study"
    asked = ["submit", "--no-pip", "--", "run", "--data", cluster.table, "--trials", 3, "--epochs", 30]
    asked += ["--out", root, "--cache", tmp_path / "cache", *TINY]
    watching = cluster.medtune(*asked)

    def records() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in StudyFiles(root).trials.glob("*/trial.json")]

    def there() -> set[str]:
        away = {record["trial"] for record in records() if record["node"] == "127.0.0.2" and record["ended"] is None}
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
