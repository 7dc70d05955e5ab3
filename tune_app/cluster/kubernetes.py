"""A study as a KubeRay job: the manifest's text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.data.storage import is_url
from tune_app.cluster.submit import SPEC_FILE, cluster_place, entry_arguments, spec_text
from tune_app.study.asked import Asked, AskedAblation, AskedConfirmation
from tune_app.study.errors import SpecError
from tune_app.study.files import job_name
from tune_app.study.spec import StudySpec
from tune_app.study.yaml_text import readable_yaml


@dataclass(frozen=True)
class Cluster:
    """The parts of a cluster made for one study."""

    image: str = "medtune:0.2.0"
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
    retries: int = 0
    """Times the operator starts a new cluster when the job has failed, whatever its exit code was."""


def kuberay_manifest(spec: StudySpec | Asked, study: str, cluster: Cluster) -> str:
    """Return a KubeRay RayJob (KubeRay 1.5.1 or later) and the ConfigMap with the study, as YAML.

    The head has CPUs only and takes no trials, GPU workers come and go with the trials that wait. The operator makes the
    token and its Secret. It cannot distinguish a lost head from a study with failed trials (exit code 3) or an error of the
    user (1), and would start a new cluster for each: so it retries only when asked to; applying the manifest again
    continues the study.
    """
    study = cluster_place(study)
    _check_seen(spec, study, cluster)
    name = job_name(study)
    spec = _waiting(spec)
    job = _ray_job(name, study, cluster)
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
    return header + readable_yaml(config, job)


def _ray_job(name: str, study: str, cluster: Cluster) -> dict[str, Any]:
    """The RayJob: a head of CPUs only, and workers that come and go."""
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
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"medtune {entry_arguments(f'/etc/medtune/{SPEC_FILE}', study)}",
            "backoffLimit": cluster.retries,
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


def _waiting(spec: StudySpec | Asked) -> StudySpec | Asked:
    """There are no workers when the driver starts: have it ask for them, and wait."""
    waits = {"wait_for_resources_s": 1800.0}
    if isinstance(spec, StudySpec):
        return spec if spec.wait_for_resources_s else spec.model_copy(update=waits)
    return spec.model_copy(update={"fields": waits | spec.fields})


def _check_seen(spec: StudySpec | Asked, study: str, cluster: Cluster) -> None:
    """Raise SpecError for paths that no pod would see."""
    asked: dict[str, str | None] = {"the study": study}
    if isinstance(spec, StudySpec | AskedAblation):
        shared = spec.shared if isinstance(spec, StudySpec) else spec.config
        asked |= {"data": spec.data, "pretrained_path": shared.get("pretrained_path")}
    elif isinstance(spec, AskedConfirmation):
        asked["the search"] = spec.search
    else:
        asked["data"] = spec.fields.get("data")
    hidden = [
        f"{what} {path}: no pod sees it; put it below {cluster.mount} (--mount names another folder)"
        for what, path in asked.items()
        if path and not is_url(path) and not Path(path).is_relative_to(cluster.mount)
    ]
    if hidden:
        raise SpecError(hidden)
