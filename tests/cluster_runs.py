"""Real Ray clusters for tests: nodes started as `ray start` does, commands sent to them as a user would, and their loss."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from study_runs import medtune

ROOT = Path(__file__).parents[1]


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
    host: str = "127.0.0.1"
    """Address of the head."""
    nodes: list[Node] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.dashboard}"

    def start(self, *arguments: object, ip: str, cpus: int = 1, within: Sequence[str] = ()) -> Node:
        """Start a node with the address `ip`; `within`: what its command line begins with."""
        fixed = [
            "--node-ip-address",
            ip,
            "--num-cpus",
            cpus,
            "--object-store-memory",
            80_000_000,
            "--block",
        ]
        fixed += [
            "--min-worker-port",
            0,
            "--max-worker-port",
            0,
            "--dashboard-agent-listen-port",
            0,
        ]
        command = [
            *within,
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *map(str, [*arguments, *fixed]),
        ]
        with (self.folder / f"{ip}.log").open("ab") as log:
            node = Node(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.env, start_new_session=True
                )
            )
        self.nodes.append(node)
        return node

    def start_head(self, *, cpus: int = 1, within: Sequence[str] = ()) -> Node:
        """The head, with dashboard and job server on its address alone."""
        head = self.start(
            *(
                "--head",
                "--port",
                self.port,
                "--temp-dir",
                self.folder / "r",
                "--disable-usage-stats",
            ),
            *(
                "--dashboard-host",
                self.host,
                "--dashboard-port",
                self.dashboard,
                "--include-dashboard",
                "true",
            ),
            ip=self.host,
            cpus=cpus,
            within=within,
        )
        wait_for(lambda: len(self.living()) == 1, "the head")
        return head

    def add_node(self, ip: str = "127.0.0.2", *, within: Sequence[str] = ()) -> Node:
        """A node with a CPU for one rank of a trial."""
        alive = len(self.living())
        # Separate files per node: two nodes of one machine would unpack the job's code over each other.
        there = (
            "--address",
            f"{self.host}:{self.port}",
            "--temp-dir",
            self.folder / f"s{len(self.nodes)}",
        )
        node = self.start(*there, ip=ip, within=within)

        def joined() -> bool:
            nonlocal node
            if (
                node.process.poll() is not None
            ):  # Ray gives a node 30 s to start, which a busy machine may not make
                node.kill()
                node = self.start(*there, ip=ip, within=within)
            return len(self.living()) > alive

        wait_for(joined, f"the node {ip}")
        return node

    def living(self) -> list[dict[str, Any]]:
        found = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

    def get(self, path: str, content: bytes | None = None) -> Any:
        """Ask the job server; with `content`, which is JSON, post it."""
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        headers |= {} if content is None else {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, content, headers), timeout=30
        ) as answer:
            return json.loads(answer.read())

    def medtune(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """Start a command as a user of the cluster would, on another machine as it were."""
        return medtune(
            *arguments, env=self.env | {"RAY_API_SERVER_ADDRESS": self.url} | env, cwd=ROOT
        )

    def done(
        self, *arguments: object, code: int = 0, timeout_s: float = 240, **env: str
    ) -> tuple[str, str]:
        """Run a command to its end, expecting its exit code; returns stdout and stderr."""
        return ended(self.medtune(*arguments, **env), code=code, timeout_s=timeout_s)


def ended(
    process: subprocess.Popen[str], *, code: int = 0, timeout_s: float = 400
) -> tuple[str, str]:
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


def make_cluster(folder: Path, table: Path, **fields: Any) -> Cluster:
    """A cluster with a token and files below `folder`, of which nothing has been started yet."""
    token = folder / "token"
    token.write_text("a-token-of-this-test-alone-0123456789")
    token.chmod(0o600)
    (folder / "home").mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint is `python -m ...`
        "HOME": str(folder / "home"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds
        "RAY_health_check_failure_threshold": "3",
        "RAY_agent_register_timeout_ms": "120000",
    }
    return Cluster(folder, table, free_port(), free_port(), env, **fields)
