"""A study -> what is sent to a Ray cluster: the packed code, the job, a KubeRay manifest, a cluster-launcher file.

Pure functions, so that `--dry-run` shows exactly what is sent and a test compares it with a golden text. Only code goes
out: the packages' own files of known kinds, `pyproject.toml` and the study's resolved spec. Data, checkpoints and
weights stay where they are, and are named by paths that every node sees. `jobs.py` does the sending.
"""

import hashlib
import io
import json
import re
import shlex
import uuid
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from trainables.data.storage import is_url, url_of
from tune_app.study.spec import SpecError, StudySpec

PACKAGES = ("search_spaces", "trainables", "tune_app")
KINDS = (".py", ".html", ".css", ".js")
"""Kinds of files that are sent; nothing else is, whatever lies in a package's folder."""

SPEC_FILE = "study.json"
"""Name of the resolved spec in what is sent."""

LIMIT_MIB = 100
"""Ray's own limit for a working directory in its documentation; some versions take more."""

STOP_S = 60
"""Seconds a stopped job's driver has to close the study, before it is killed."""

NOT_PINNED = ("ray", "torch")
"""The cluster's own: Ray must be the one that runs there, and torch belongs to its CUDA driver."""


@dataclass(frozen=True)
class Submission:
    """One job, as it is sent."""

    submission_id: str
    entrypoint: str
    package: bytes
    """Zip of the working directory."""
    runtime_env: Mapping[str, Any]
    """Without the working directory, which is the package."""
    metadata: Mapping[str, str]

    def contents(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every file in the package."""
        with zipfile.ZipFile(io.BytesIO(self.package)) as archive:
            return [(item.filename, item.file_size) for item in archive.infolist()]

    def size_line(self) -> str:
        """What is sent, in a line."""
        return f"{len(self.contents())} files, {len(self.package) / 1024:.0f} KiB packed"

    def dry_run(self) -> str:
        """Return everything that would be sent, as YAML."""
        shown = {
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "metadata": dict(self.metadata),
            "runtime_env": dict(self.runtime_env),
            "package": {"sent": self.size_line(), "files": dict(self.contents())},
        }
        with zipfile.ZipFile(io.BytesIO(self.package)) as archive:
            if SPEC_FILE in archive.namelist():
                shown["study"] = json.loads(archive.read(SPEC_FILE))
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)


def build_submission(
    spec: StudySpec,
    study: str,
    *,
    earlier: Collection[str] = (),
    pip: bool = True,
    source: Path | None = None,
    retry_failed: bool = False,
) -> Submission:
    """Return the job that runs `spec` in the folder or URL `study`, and goes on with what is there already.

    `earlier`: ids of the jobs that the cluster knows, since Ray takes no id twice. `pip`: pin the packages that are
    installed here. `source`: folder that holds the packages; None: where they were imported from. `retry_failed`: trials
    of the study that have failed go on, too.

    Raises SpecError for a study folder that a cluster cannot see, and for a package over Ray's limit.
    """
    study = cluster_place(study)
    return Submission(
        submission_id=next_id(study, earlier),
        entrypoint=f"python -m tune_app.cli {entry_arguments(SPEC_FILE, study, retry_failed=retry_failed)}",
        package=_checked(
            pack_code(source or Path(__file__).parents[2], {SPEC_FILE: spec_text(spec)})
        ),
        runtime_env=_runtime_env(pip),
        metadata={"medtune_study": study, "medtune_spec": spec.hash()},
    )


def build_task(arguments: Sequence[str], *, source: Path | None = None) -> Submission:
    """Return the job that runs another command of medtune on the head, in the cluster's own environment."""
    return Submission(
        submission_id=f"medtune-{arguments[0]}-{uuid.uuid4().hex[:8]}",
        entrypoint=f"python -m tune_app.cli {shlex.join(arguments)}",
        package=_checked(pack_code(source or Path(__file__).parents[2])),
        runtime_env=_runtime_env(pip=False),
        metadata={"medtune_command": arguments[0]},
    )


def _runtime_env(pip: bool) -> dict[str, Any]:
    variables = {
        # Ctrl-C, as on a terminal: the driver closes the study, and says how to go on with it.
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    return {"env_vars": variables} | ({"pip": pinned_requirements()} if pip else {})


def entry_arguments(spec_file: str, study: str, *, retry_failed: bool = False) -> str:
    """Return the arguments of `medtune` that a job runs: start the study, or go on with it if it is there."""
    return shlex.join(
        ["run", spec_file, "--out", study, "--resume", *["--retry-failed"] * retry_failed]
    )


def cluster_place(study: str) -> str:
    """Return the study's folder as a cluster can find it; raises SpecError for a relative one."""
    if url := url_of(study):
        return url.rstrip("/")
    if not Path(study).is_absolute():
        raise SpecError(
            [
                f"--out {study}: on a cluster a study needs a place that every node sees and that stays the same when it "
                "is submitted again: the absolute path of a shared folder, or a URL such as s3://bucket/study"
            ]
        )
    return str(Path(study))


# Names -----------------------------------------------------------------------------------------------------------------


def job_name(study: str) -> str:
    """Return the stem of the ids of all jobs of a study: readable, and equal for equal folders only.

    It has 47 characters at most, which is what KubeRay takes as the name of a RayJob.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", study.rsplit("/", 1)[-1].lower()).strip("-")[:30] or "study"
    return f"medtune-{slug}-{hashlib.sha256(study.encode()).hexdigest()[:8]}"


def next_id(study: str, earlier: Collection[str]) -> str:
    """Return the id of the next job of a study: its name and a number."""
    stem = job_name(study) + "-"
    numbers = [
        int(one.removeprefix(stem))
        for one in earlier
        if re.fullmatch(re.escape(stem) + r"\d+", one)
    ]
    return f"{stem}{max(numbers, default=0) + 1}"


# What is packed --------------------------------------------------------------------------------------------------------


def package_files(source: Path) -> dict[str, Path]:
    """Return the code below `source`, name in the package -> file, in order."""
    found = {
        path.relative_to(source).as_posix(): path
        for package in PACKAGES
        for path in sorted((source / package).rglob("*"))
        if path.is_file() and path.suffix in KINDS and "__pycache__" not in path.parts
    }
    if "tune_app/cli/app.py" not in found:
        raise SpecError([f"{source}: medtune's packages are not there: nothing to send"])
    project = source / "pyproject.toml"
    return found | ({"pyproject.toml": project} if project.is_file() else {})


def pack_code(source: Path, more: Mapping[str, str] | None = None) -> bytes:
    """Return the zip of the code below `source`, with the texts `more` by name.

    The same code and texts give the same bytes, which a cluster stores once.
    """
    content = {name: path.read_bytes() for name, path in package_files(source).items()}
    content |= {name: text.encode() for name, text in (more or {}).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            item = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            item.external_attr = 0o644 << 16
            item.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(item, data)
    return buffer.getvalue()


def _checked(package: bytes) -> bytes:
    """Return the package; raises SpecError for one over Ray's limit, naming its largest files."""
    if len(package) > LIMIT_MIB * 2**20:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            largest = sorted(archive.infolist(), key=lambda item: -item.compress_size)[:5]
        told = ", ".join(
            f"{item.filename} {item.compress_size / 2**20:.1f} MiB" for item in largest
        )
        raise SpecError(
            [
                f"the package has {len(package) / 2**20:.1f} MiB, Ray takes {LIMIT_MIB}: move out what is no code ({told})"
            ]
        )
    return package


def spec_text(spec: StudySpec) -> str:
    """Return the resolved spec as a study file (JSON is YAML); every path in it is absolute or a URL."""
    return (
        json.dumps(
            spec.model_dump(mode="json", exclude_defaults=True) | {"data": spec.data}, indent=1
        )
        + "\n"
    )


def pinned_requirements(requires: Collection[str] | None = None) -> list[str]:
    """Return medtune's requirements at the versions installed here, without Ray and torch, which are the cluster's.

    Where a node has that very version nothing is installed.
    """
    pins = []
    for line in metadata.requires("medtune") or [] if requires is None else requires:
        requirement = Requirement(line)
        if requirement.name in NOT_PINNED or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        # A local part (+cu130) says who built it; no index has it, and without it any build of the version will do.
        version = metadata.version(requirement.name).partition("+")[0]
        pins.append(f"{requirement.name}{extras}=={version}")
    return sorted(pins, key=str.lower)


# Kubernetes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What a cluster made for one study is made of."""

    image: str = "medtune:0.1.0"
    """Container image with medtune and its requirements installed, on every node."""
    ray_version: str = "2.60.0"
    max_workers: int = 4
    """GPU workers at most; there are none until trials wait for them."""
    gpus: int = 1
    """GPUs of a worker."""
    cpus: int = 8
    """CPUs of a worker."""
    memory_gib: int = 32
    """Memory of a worker."""
    claim: str = "medtune-shared"
    """Name of the PersistentVolumeClaim (ReadWriteMany) with the data, and with the study unless that is a URL."""
    mount: str = "/shared"
    """Where it is mounted on every node."""


def kuberay_manifest(spec: StudySpec, study: str, cluster: Cluster) -> str:
    """Return a KubeRay RayJob (KubeRay 1.5.1 or later) and the ConfigMap with the study, as YAML.

    The head has CPUs only and takes no trials, GPU workers come and go with the trials that wait. A head that is lost
    is started again up to three times, and goes on with the study. The operator makes the token and its Secret.
    """
    study = cluster_place(study)
    _check_seen(spec, study, cluster)
    name = job_name(study)
    spec = _waiting(spec)
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": cluster.claim}},
        {"name": "study", "configMap": {"name": name}},
        # torch's loaders and NCCL need more shared memory than a container's 64 MiB.
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, cluster.memory_gib // 4)}Gi"},
        },
    ]
    mounts = [
        {"name": "shared", "mountPath": cluster.mount},
        {"name": "study", "mountPath": "/etc/medtune", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]

    def pod(
        container: str, resources: dict[str, str], ports: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"name": container, "image": cluster.image}
        if ports:
            body["ports"] = ports
        body |= {"resources": {"requests": resources, "limits": resources}, "volumeMounts": mounts}
        return {"spec": {"containers": [body], "volumes": volumes}}

    ports = [("gcs-server", 6379), ("dashboard", 8265), ("client", 10001)]
    worker = {
        "cpu": str(cluster.cpus),
        "memory": f"{cluster.memory_gib}Gi",
        **({"nvidia.com/gpu": str(cluster.gpus)} if cluster.gpus else {}),
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"medtune {entry_arguments(f'/etc/medtune/{SPEC_FILE}', study)}",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": cluster.ray_version,
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"idleTimeoutSeconds": 300},
                "headGroupSpec": {
                    "serviceType": "ClusterIP",  # reached by `kubectl port-forward` only
                    "rayStartParams": {"num-cpus": "0"},
                    "template": pod(
                        "ray-head",
                        {"cpu": "4", "memory": "16Gi"},
                        [{"containerPort": port, "name": title} for title, port in ports],
                    ),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "gpu" if cluster.gpus else "cpu",
                        "replicas": 0,
                        "minReplicas": 0,
                        "maxReplicas": cluster.max_workers,
                        "rayStartParams": {},
                        "template": pod("ray-worker", worker),
                    }
                ],
            },
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {SPEC_FILE: spec_text(spec)},
    }
    header = (
        f"# medtune: {study}\n"
        f"# kubectl apply -f THIS; kubectl logs -f job/{name}. Needs KubeRay 1.5.1, the image {cluster.image} with medtune\n"
        f"# in it, and the claim {cluster.claim} with the data. The operator makes the access token, in a Secret.\n"
    )
    return header + yaml.dump_all(
        [config, job], Dumper=_Readable, sort_keys=False, allow_unicode=True, width=100
    )


def cluster_file(
    study: str, cluster: Cluster, *, provider: str = "aws", region: str = "eu-central-1"
) -> str:
    """Return a file for Ray's cluster launcher (`ray up`), as YAML: CPU head, GPU workers, token, shared folder.

    Machine types and the line that mounts the shared folder are the provider's own, and are marked to be filled in.
    """
    name = job_name(cluster_place(study))
    token = "$HOME/.ray/auth_token"
    # The launcher's own ssh carries the token to each node as a file: it never is an argument.
    start = "export RAY_AUTH_MODE=token; ulimit -n 65536; ray start"
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": "m6i.xlarge"}},
        "gpu": {
            "resources": {},
            "min_workers": 0,
            "max_workers": cluster.max_workers,
            "node_config": {"InstanceType": "g6.2xlarge"},
        },
    }
    text = {
        "cluster_name": name,
        "max_workers": cluster.max_workers,
        "idle_timeout_minutes": 10,
        "provider": {"type": provider, "region": region, "use_internal_ips": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": cluster.image,
            "container_name": "medtune",
            "run_options": [
                "--shm-size=8g",
                "--ulimit nofile=65536:65536",
                f"-v {cluster.mount}:{cluster.mount}",
            ],
        },
        "available_node_types": types,
        "head_node_type": "head",
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "initialization_commands": [
            f"mountpoint -q {cluster.mount} || sudo mount {cluster.mount}  # mount the shared folder; edit for your storage"
        ],
        "setup_commands": [f"chmod 600 {token}"],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }
    header = (
        f"# medtune: {study}\n"
        "# ray get-auth-token --generate; ray up -y THIS; ray dashboard THIS &\n"
        "# medtune submit --address http://127.0.0.1:8265 -- run study.yaml --wait-for-resources 900 --out ...\n"
        "# Edit: machine types, region, image, and how the shared folder is mounted.\n"
    )
    return header + yaml.dump(
        text, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=120
    )


def _waiting(spec: StudySpec) -> StudySpec:
    """There are no workers when the driver starts: have it ask for them, and wait."""
    return (
        spec
        if spec.wait_for_resources_s
        else spec.model_copy(update={"wait_for_resources_s": 1800.0})
    )


def _check_seen(spec: StudySpec, study: str, cluster: Cluster) -> None:
    """Raise SpecError for paths that no pod would see."""
    asked = {
        "data": spec.data,
        "pretrained_path": spec.config.get("pretrained_path"),
        "the study": study,
    }
    hidden = [
        f"{what} {path}: no pod sees it; put it below {cluster.mount} (--mount names another folder)"
        for what, path in asked.items()
        if path and not is_url(path) and not Path(path).is_relative_to(cluster.mount)
    ]
    if hidden:
        raise SpecError(hidden)


class _Readable(yaml.SafeDumper):
    """Block text for what has lines, and no references between parts that happen to be equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> Any:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    )


_Readable.add_representer(str, _text)
