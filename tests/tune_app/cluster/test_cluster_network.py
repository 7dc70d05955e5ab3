"""Nodes with addresses of their own, in network namespaces, and a trial of two ranks that spans two of them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_runs import Cluster, ended, make_cluster, wait_for
from study_runs import TINY, check_whole, rows_of

from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles
from tune_app.synthetic import write_cohort

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

WORKERS = 3
"""Nodes with a CPU each, in addition to a head that takes no trials: two are enough for a trial."""
NETWORK = "198.18.23"
"""Of the addresses that are set aside for testing networks (RFC 2544)."""


def ip_command(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=30)


@dataclass
class Network:
    """A bridge of this machine, and a namespace for each node with a cable to it."""

    name: str

    def address(self, number: int) -> str:
        return f"{NETWORK}.{number}"

    def within(self, number: int) -> list[str]:
        """First words of a command line that runs on the node."""
        return ["ip", "netns", "exec", f"{self.name}n{number}"]

    def build(self, nodes: int) -> None:
        ip_command("link", "add", self.name, "type", "bridge")
        ip_command("address", "add", f"{NETWORK}.254/24", "dev", self.name)
        ip_command("link", "set", self.name, "up")
        for number in range(1, nodes + 1):
            space = f"{self.name}n{number}"
            ip_command("netns", "add", space)
            ip_command(
                "link", "add", f"{space}h", "type", "veth", "peer", "name", "eth0", "netns", space
            )
            ip_command("link", "set", f"{space}h", "master", self.name, "up")
            ip_command("-n", space, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip_command("-n", space, "link", "set", device, "up")

    def cut(self, number: int) -> None:
        """Pull the node's cable; its processes keep running."""
        ip_command("link", "set", f"{self.name}n{number}h", "down")

    def remove(self) -> None:
        # Cables first: a namespace outlives its name for as long as connections in it wait for an answer.
        cables = [["link", "delete", f"{self.name}n{number}h"] for number in range(1, WORKERS + 2)]
        spaces = [["netns", "delete", f"{self.name}n{number}"] for number in range(1, WORKERS + 2)]
        for command in [*cables, *spaces, ["link", "delete", self.name]]:
            subprocess.run(["ip", *command], capture_output=True, timeout=30)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(f"mt{os.getpid()}")  # names of devices have 15 characters at most
    try:
        ip_command("netns", "add", f"{made.name}n0")
        ip_command("netns", "delete", f"{made.name}n0")
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"no network namespaces here, which take root and iproute2: {told}")
    try:
        made.build(WORKERS + 1)
        yield made
    finally:
        made.remove()


@pytest.fixture
def cluster(network: Network, tmp_path: Path) -> Iterator[Cluster]:
    folder = Path(
        tempfile.mkdtemp(prefix="mt")
    )  # sockets below it: the whole path may have 107 characters
    made = make_cluster(
        folder, write_cohort(tmp_path / "c", subjects=14, side=(14, 18)), host=network.address(1)
    )
    # No message reports that a cut-off node is gone: Ray asks it three times, and waits ten seconds each time.
    made.env["RAY_health_check_timeout_ms"] = "3000"
    try:
        made.start_head(cpus=0, within=network.within(1))
        for number in range(2, WORKERS + 2):
            made.add_node(network.address(number), within=network.within(number))
        yield made
    finally:
        for node in made.nodes:
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_trial_across_two_nodes_goes_on_when_one_is_cut_off(
    cluster: Cluster, network: Network, tmp_path: Path
) -> None:
    """Submitted from outside. Gloo has to choose the nodes' own addresses, whatever the host's name resolves to."""
    root = tmp_path / "study"
    asked = [
        "submit",
        "--no-pip",
        "--",
        "run",
        "--data",
        cluster.table,
        "--trials",
        1,
        "--epochs",
        60,
        "--ranks",
        2,
    ]
    asked += ["--out", root, "--cache", tmp_path / "cache", *TINY, "--set", "batch_size=3"]
    watching = cluster.medtune(*asked)
    wait_for(lambda: len(rows_of(root)) >= 2, "two epochs", during=watching)
    nodes = {node["node_id"]: node["node_ip"] for node in cluster.living()}
    actors = cluster.get("/api/v0/actors?detail=1")["data"]["result"]["result"]
    homes = {one["class_name"]: nodes[one["node_id"]] for one in actors if one["state"] == "ALIVE"}
    lost = homes["Rank"]
    assert lost != homes["ImplicitFunc"], "the trial spans two nodes"
    network.cut(int(lost.rpartition(".")[2]))
    out, _ = ended(watching)
    assert f"trial 00000: rank 1 on node {lost} died: " in out
    check_whole(root, trials=1, epochs=60)
    (trial,) = load_study(root).trials_full.to_dict("records")
    assert trial["failures"] == 1
    assert f"rank 1 on node {lost} died" in StudyFiles(root).trial("00000").log.read_text()
