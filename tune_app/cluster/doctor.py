"""Obstacles to running studies, on this machine or on every node of a cluster; each finding with its remedy.

A check reports its observation even when all is well: the list is read when something fails for an unknown reason.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trainables import installed_version, mps
from trainables.data.storage import Remote, StorageError, bucket_of, is_url, url_of
from tune_app.cluster.submit import pack_code, required_packages
from tune_app.driver.ray_access import join
from tune_app.study.files import default_cache

State = Literal["good", "look", "bad"]

VERSIONS = ("medtune", "torch", "ray", "optuna", "monai", "numpy", "nibabel")
SHM_GIB, DISK_GIB, FILES, SKEW_S = 1.0, 10.0, 4096, 2.0
"""Least shared memory and free disk, least open files, largest difference of clocks that is well."""
BUCKET_REMEDY = (
    "make the bucket, and let the nodes read, write and remove objects below this URL: by their role, or by AWS_... in the "
    "environment of `ray start`, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION among it where the storage is not Amazon's"
)
DATA_REMEDY = "let the nodes read these objects: by their role, or by AWS_... in the environment of `ray start`"
NODE_S = 120.0
"""Seconds a node may take to answer, with the start of a process on it."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    node: str
    what: str
    state: State
    said: str
    remedy: str = ""


def diagnose_machine(
    data: str | None = None, study: str | None = None, cache: Path | None = None
) -> list[Finding]:
    """Look at this machine alone."""
    facts = node_facts(data, study, str(cache) if cache else None, None)
    found = judge_node(facts, node="here")
    found += [_port(port, use) for port, use in ((6379, "a Ray head"), (8265, "Ray's dashboard"))]
    if "SLURM_JOB_ID" in os.environ:
        found += judge_allocation(os.environ, _slurm_job(os.environ["SLURM_JOB_ID"]))
    return found


def diagnose_cluster(
    address: str, data: str | None = None, study: str | None = None, cache: Path | None = None
) -> list[Finding]:
    """Look at every node of the Ray cluster at `address`, and at the connections between them. Raises AddressError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        if not ray.is_initialized():
            package = Path(folder) / "medtune.zip"
            package.write_bytes(pack_code(Path(__file__).parents[2]))
            # a job's code is on every node already
            in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
            join(address, runtime_env=None if in_job else {"working_dir": str(package)}, **options)
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            lost = [node for node in ray.nodes() if not node["Alive"]]
            nonce = uuid.uuid4().hex
            with _marked(study, nonce), _listening() as meet:
                probe = ray.remote(num_cpus=0, max_retries=0)(_timed_facts)
                asked = {}
                for node in nodes:
                    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    asked[node["NodeID"]] = probe.options(scheduling_strategy=place).remote(
                        data, study, str(cache) if cache else None, nonce, meet
                    )
                ray.wait(list(asked.values()), num_returns=len(asked), timeout=NODE_S)
                found, facts = [], {}
                for node in nodes:
                    name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
                    try:
                        answer = ray.get(asked[node["NodeID"]], timeout=0.1)
                        # Clocks are asked apart, of a process that runs already: its start would blur them.
                        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                        clock, took = _clock(ray, probe.options(scheduling_strategy=place))
                    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
                        said = (
                            f"no answer within {NODE_S:.0f} s: {str(error).strip().splitlines()[0]}"
                        )
                        found.append(
                            Finding(
                                name,
                                "answers",
                                "bad",
                                said,
                                "look at that node's raylet.out, or take it away",
                            )
                        )
                        continue
                    facts[name] = answer
                    found += judge_node(answer, node=name, gpus=node["Resources"].get("GPU", 0.0))
                    found.append(judge_clock(name, clock, took))
            found += judge_together(facts)
            found += [
                Finding(
                    node["NodeManagerAddress"],
                    "answers",
                    "look",
                    "lost",
                    "nothing, if you took it away",
                )
                for node in lost
            ]
            found.append(_state_api())
        finally:
            ray.shutdown()
    return found


def _slurm_job(number: str) -> dict[str, str] | None:
    """Slurm's record of a job, by its own names; None where it does not answer."""
    asked = ["scontrol", "show", "job", "-o", number]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(word.split("=", 1) for word in told.split() if "=" in word)


def judge_allocation(env: Mapping[str, str], job: Mapping[str, str] | None) -> list[Finding]:
    """Findings on the Slurm job in which this runs; pure. `job`: output of `scontrol show job`, None without one."""
    number = env["SLURM_JOB_ID"]
    cpus = env.get("SLURM_CPUS_PER_TASK") or env.get("SLURM_CPUS_ON_NODE") or "all"
    gpus = [one for one in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    said = f"job {number}, {env.get('SLURM_JOB_NUM_NODES', '1')} nodes, {cpus} CPUs and {len(gpus)} GPUs on this one"
    found = [Finding("here", "Slurm", "good", said)]
    if job is None:
        remedy = "nothing for one run; a job that requeues itself needs scontrol on its nodes"
        found.append(Finding("here", "requeue", "look", "scontrol does not answer", remedy))
    elif job.get("Requeue") != "1":
        remedy = "sbatch --requeue, as `medtune submit --slurm` writes it"
        said = f"no: preempted, job {number} ends for good"
        found.append(Finding("here", "requeue", "look", said, remedy))
    else:
        said = f"yes, {job.get('Restarts', '0')} times so far; time limit {job.get('TimeLimit')}"
        found.append(Finding("here", "requeue", "good", said))
    return found


# On a node -------------------------------------------------------------------------------------------------------------


def node_facts(
    data: str | None, study: str | None, cache: str | None, nonce: str | None
) -> dict[str, Any]:
    """Everything that is seen from a node, as plain values."""
    place = Path(cache) if cache else default_cache()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {name: installed_version(name) for name in VERSIONS},
        "nccl": _nccl(),
        "gpus": _gpus(),
        "mps": [mps.look(gpu).text for gpu in mps.visible_gpus()],
        "shm_gib": _free_gib(Path("/dev/shm"), total=True),
        "disk_gib": _free_gib(place),
        "cache": str(place),
        "files": _open_files(),
        "data": _data_seen(data) if data else None,
        "study": _study_seen(study, nonce) if study else None,
    }


def _timed_facts(
    data: str | None,
    study: str | None,
    cache: str | None,
    nonce: str | None,
    meet: tuple[str, int] | None,
) -> dict[str, Any]:
    if meet is None:
        return {"time": time.time()}
    return node_facts(data, study, cache, nonce) | {"meets": _meets(*meet)}


def _clock(ray: Any, probe: Any) -> tuple[float, float]:
    """The node's clock less this one's in seconds, and how long it took to ask; the fastest of three counts."""
    best = (0.0, float("inf"))
    for _ in range(3):
        began = time.time()
        there = ray.get(probe.remote(None, None, None, None, None), timeout=NODE_S)["time"]
        took = time.time() - began
        if took < best[1]:
            best = (there - (began + took / 2), took)
    return best


def _nccl() -> str | None:
    import torch

    if torch.version.cuda is None:
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _gpus() -> list[str]:
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    asked = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]


def _free_gib(path: Path, *, total: bool = False) -> float | None:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return float((usage.total if total else usage.free) / 2**30)


def _open_files() -> int:
    import resource

    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _data_seen(table: str) -> dict[str, str]:
    """Digest of the table, or the error: of the table, or of the first volume that it names."""
    from trainables.data.manifest import listed_volumes
    from trainables.data.table_file import ManifestError, table_bytes
    from trainables.data.threads import in_threads

    remedy = {"remedy": DATA_REMEDY} if is_url(table) else {}
    try:
        paths = listed_volumes(Path(table))
        content = hashlib.sha256(table_bytes(Path(table))).hexdigest()[:16]
        there = in_threads(_is_there, paths)
    except (ManifestError, OSError) as error:
        return {"error": str(error).splitlines()[0], **remedy}
    missing = [path for path, found in zip(paths, there, strict=True) if not found]
    if missing:
        remedy = {"remedy": DATA_REMEDY} if is_url(missing[0]) else {}
        return {
            "error": f"{len(missing)} of {len(paths)} volumes are missing, the first is {missing[0]}",
            **remedy,
        }
    return {"digest": content, "volumes": str(len(paths))}


def _is_there(path: str) -> bool:
    if (url := url_of(path)) is None:
        return Path(path).is_file()
    bucket, name = bucket_of(url)
    return bucket.stamp(name) is not None


def _study_seen(study: str, nonce: str | None) -> dict[str, str]:
    """Whether this node can write below the study's folder or URL, and sees the files that the driver wrote there."""
    if (url := url_of(study)) is not None:
        return _bucket_seen(url, nonce)
    folder = _mark_folder(study)
    probe = folder / f".medtune-doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("here", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        return {"error": f"cannot be written: {error.strerror}"}
    if nonce is not None and not (folder / f".medtune-doctor-{nonce}").exists():
        return {"error": "is a folder of this node alone: the head's files are not seen here"}
    return {}


def _bucket_seen(url: str, nonce: str | None) -> dict[str, str]:
    """As `_study_seen`, for object storage: written, read and removed with the credentials of this node."""
    probe = f".medtune-doctor-{uuid.uuid4().hex[:8]}"
    try:
        remote = Remote(url)
        remote.write(probe, b"here")
        came = remote.read(probe) == b"here" and (
            nonce is None or remote.read(f".medtune-doctor-{nonce}") is not None
        )
        remote.delete(probe)
    except StorageError as error:
        return {"error": str(error), "remedy": BUCKET_REMEDY}
    return (
        {}
        if came
        else {"error": f"{url}: the head's objects are not seen here", "remedy": BUCKET_REMEDY}
    )


def _mark_folder(study: str) -> Path:
    """The folder that studies are put in: the study itself may not be there yet."""
    path = Path(study)
    return path if path.exists() else path.parent


@contextmanager
def _marked(study: str | None, nonce: str) -> Iterator[None]:
    """A file in the study's folder, or an object below its URL, while the nodes look for it."""
    if not study:
        yield
        return
    if (url := url_of(study)) is not None:
        name = f".medtune-doctor-{nonce}"
        with suppress(StorageError):  # the nodes report it, the head among them
            Remote(url).write(name, b"")
        try:
            yield
        finally:
            with suppress(StorageError):
                Remote(url).delete(name)
        return
    mark = _mark_folder(study) / f".medtune-doctor-{nonce}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        pass  # the nodes report it, the head among them
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def _listening() -> Iterator[tuple[str, int]]:
    """A port here that the nodes try to reach, as the ranks of a trial reach each other."""
    import ray

    with socket.socket() as server:
        host = ray.util.get_node_ip_address()
        server.bind((host, 0))
        server.listen(64)
        yield host, int(server.getsockname()[1])


def _meets(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=10):
            return None
    except OSError as error:
        return f"{host}:{port}: {error}"


# Judgements ------------------------------------------------------------------------------------------------------------


def judge_node(facts: Mapping[str, Any], *, node: str, gpus: float | None = None) -> list[Finding]:
    """Findings on the facts of one node; pure. `gpus`: its GPUs as Ray counts them, None where there is no Ray."""
    say = partial(_judged, node)
    return [*_software(facts, gpus, say), *_room(facts, say), *_reach(facts, say)]


def _judged(
    node: str, what: str, good: bool, said: str, remedy: str, *, otherwise: State = "bad"
) -> Finding:
    return Finding(node, what, "good" if good else otherwise, said, "" if good else remedy)


def _software(
    facts: Mapping[str, Any], gpus: float | None, say: Callable[..., Finding]
) -> Iterator[Finding]:
    versions = facts["versions"]
    required = {package.name: package.specifier for package in required_packages()}
    old = [
        name
        for name in set(VERSIONS) & set(required)
        if versions[name] is None or not required[name].contains(versions[name], prereleases=True)
    ]
    told = ", ".join(f"{name} {versions[name] or 'not installed'}" for name in VERSIONS)
    yield say(
        "versions",
        not old,
        f"Python {facts['python']}, {told}",
        "install " + ", ".join(f"{name}{required[name]}" for name in sorted(old)),
    )
    yield _gpus_judged(facts, gpus, say)
    if facts["mps"]:
        told = "; ".join(dict.fromkeys(facts["mps"]))
        yield say("MPS", True, f"trials that share a GPU run {told}", "")
    yield say("NCCL", True, facts["nccl"] or "none: ranks on CPUs use gloo", "")


def _gpus_judged(
    facts: Mapping[str, Any], gpus: float | None, say: Callable[..., Finding]
) -> Finding:
    seen = len(facts["gpus"])
    if gpus is not None and gpus > seen:
        said = f"Ray counts {gpus:g}, nvidia-smi shows {seen}"
        return say("GPUs", False, said, "install the driver, or mend --num-gpus")
    if seen and facts["nccl"] is None:
        said = f"{seen}, but torch is built for CPUs only"
        return say("GPUs", False, said, "install torch for the driver's CUDA version")
    return say("GPUs", True, "; ".join(facts["gpus"]) or "none", "")


def _room(facts: Mapping[str, Any], say: Callable[..., Finding]) -> Iterator[Finding]:
    shm = facts["shm_gib"]
    said = "there is no /dev/shm" if shm is None else f"{shm:.1f} GiB"
    yield say(
        "shared memory",
        shm is not None and shm >= SHM_GIB,
        said,
        "docker run --shm-size=8g, or mount /dev/shm larger",
    )
    disk = facts["disk_gib"]
    said = (
        f"{disk:.0f} GiB free at {facts['cache']}"
        if disk is not None
        else f"{facts['cache']} cannot be looked at"
    )
    yield say(
        "disk",
        disk is not None and disk >= DISK_GIB,
        said,
        "free some room, or choose another --cache",
        otherwise="look",
    )
    yield say(
        "open files",
        facts["files"] >= FILES,
        f"{facts['files']} at most",
        "ulimit -n 65536",
        otherwise="look",
    )


def _reach(facts: Mapping[str, Any], say: Callable[..., Finding]) -> Iterator[Finding]:
    if facts.get("data") is not None:
        error = facts["data"].get("error")
        said = error or f"{facts['data']['volumes']} volumes, table {facts['data']['digest']}"
        remedy = facts["data"].get(
            "remedy", "mount the folder with the data at the same path on every node"
        )
        yield say("data", not error, said, remedy)
    if facts.get("study") is not None:
        error = facts["study"].get("error")
        remedy = facts["study"].get(
            "remedy", "mount the same shared folder on every node, writable"
        )
        yield say("storage", not error, error or "can be written", remedy)
    if "meets" in facts:
        error = facts["meets"]
        said = error or "the driver's node can be reached"
        yield say(
            "ports",
            not error,
            said,
            "let the nodes reach each other on all ports: ranks choose theirs",
        )


def judge_clock(node: str, skew_s: float, took_s: float) -> Finding:
    """Finding on the difference of a node's clock; pure."""
    if abs(skew_s) - took_s / 2 > SKEW_S:
        return Finding(
            node,
            "clock",
            "look",
            f"{skew_s:+.1f} s",
            "run chrony or ntpd: times in the study would mislead",
        )
    return Finding(node, "clock", "good", f"{skew_s:+.2f} s, within {took_s / 2:.2f} s")


def judge_together(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What must be the same on all nodes; pure."""
    kinds: dict[str, tuple[Callable[[Mapping[str, Any]], Any], str]] = {
        "same Python": (
            lambda one: one["python"],
            "install one Python version: Ray refuses to mix them",
        ),
        "same versions": (
            lambda one: tuple(one["versions"].items()),
            "pip install -c constraints.txt . on every node",
        ),
        "same NCCL": (
            lambda one: one["nccl"] if one["gpus"] else None,
            "install the same torch on every node",
        ),
        "same data": (
            lambda one: (one["data"] or {}).get("digest"),
            "mount the same folder on every node",
        ),
    }
    found = []
    for what, (value, remedy) in kinds.items():
        groups: dict[Any, list[str]] = {}
        for node, one in facts.items():
            if value(one) is not None:
                groups.setdefault(value(one), []).append(node)
        if len(groups) > 1:
            few = min(groups.values(), key=len)
            found.append(
                Finding(
                    "all nodes", what, "bad", f"{', '.join(few)} differ from the others", remedy
                )
            )
    if not found and len(facts) > 1:
        found.append(Finding("all nodes", "alike", "good", f"{len(facts)} nodes"))
    return found


def _state_api() -> Finding:
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # Without an address it takes any Ray of this machine, or fails where there are several.
        here = ray.get_runtime_context().gcs_address
        number = len(list_nodes(address=here, timeout=20))
    except (RayStateApiException, OSError, ValueError) as error:
        said = f"does not answer: {str(error).splitlines()[0]}"
        return Finding(
            "head", "State API", "look", said, "start the head with --include-dashboard=true"
        )
    return Finding("head", "State API", "good", f"answers, {number} node{'s' * (number != 1)}")


def _port(port: int, use: str) -> Finding:
    with socket.socket() as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    said = f"{port} is in use" if taken else f"{port} is free"
    remedy = f"if that is not {use} of yours, give another port to `ray start`"
    return Finding("here", "ports", "look" if taken else "good", said, remedy if taken else "")
