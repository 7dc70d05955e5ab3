"""The resources that a trial asks for, and how many trials run at a time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from tune_app.study.errors import SpecError
from tune_app.study.spec import StudySpec

ACCELERATOR = "accelerator_type:"
"""How Ray names the resource that a node has for its kind of GPU."""


def await_resources(spec: StudySpec, notes: Any) -> tuple["Plan", dict[str, float]]:
    """Return the plan, and what Ray has. On a cluster that scales itself up, ask for a trial's bundles and wait."""
    deadline = time.monotonic() + spec.wait_for_resources_s
    asked = False
    while True:
        resources = dict(ray.cluster_resources())
        try:
            return plan_resources(spec, resources), resources
        except SpecError as error:
            if time.monotonic() >= deadline:
                raise
            if not asked:
                request_resources(bundles=trial_bundle(spec, has_gpu=True))
                notes.print(
                    f"waiting up to {spec.wait_for_resources_s:.0f} s for resources: {error}",
                    soft_wrap=True,
                )
                asked = True
            time.sleep(min(5.0, spec.wait_for_resources_s / 10))


@dataclass(frozen=True)
class Plan:
    """What one trial takes, and how many run at a time."""

    ranks: int
    cpus_per_rank: int
    gpus_per_rank: float
    concurrent: int
    bundles: list[dict[str, float]]
    """What each rank takes, by Ray's names."""

    @property
    def text(self) -> str:
        what = _taken(self.cpus_per_rank * self.ranks, self.gpus_per_rank * self.ranks)
        over = f" over {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.concurrent} trials at a time, each with {what}{over}"


def _taken(cpus: int, gpus: float) -> str:
    return f"{cpus} CPU" + (f" and {gpus:g} GPU" if gpus else "")


def plan_lines(plan: Plan, shared: str) -> list[str]:
    """Return the lines that show the plan; `shared` states how GPUs are shared. Where trials have to wait, that too."""
    busy = busy_text(plan, ray.available_resources())
    return [f"{plan.text}{shared}", *([busy] if busy is not None else [])]


def busy_text(plan: Plan, free: Mapping[str, float]) -> str | None:
    """Return a line where the `free` resources (Ray's names) hold no trial, as others use the rest; None where they do."""
    wanted = {"CPU": float(plan.cpus_per_rank * plan.ranks), "GPU": plan.gpus_per_rank * plan.ranks}
    short = [
        f"{free.get(name, 0.0):g} {name} of {amount:g}"
        for name, amount in wanted.items()
        if free.get(name, 0.0) < amount - 1e-6
    ]
    if not short:
        return None
    return (
        f"waiting: other studies or jobs use the cluster, free for a trial are {', '.join(short)}; "
        "trials start as soon as there is room"
    )


def trial_bundle(spec: StudySpec, *, has_gpu: bool) -> list[dict[str, float]]:
    """Return what each rank of a trial takes, one entry a rank; a pure function.

    Raises SpecError when GPUs and ranks do not go together.
    """
    asked = spec.gpus_per_trial
    assert asked != "auto", "measured before planning"
    wanted = float(has_gpu) if asked is None else asked
    ranks = spec.ranks or max(1, int(wanted))
    if wanted > 1 and int(wanted) != ranks:
        raise SpecError(
            f"gpus_per_trial={wanted:g} over {ranks} ranks: each rank has one GPU, so give as many of both"
        )
    if 0 < wanted <= 1 and ranks > 1:
        raise SpecError(
            f"ranks={ranks} with gpus_per_trial={wanted:g}: each rank needs its own GPU"
        )
    gpus = min(1.0, wanted)
    bundle = {"CPU": float(spec.cpus_per_rank), **({"GPU": gpus} if gpus else {})}
    if spec.accelerator_type is not None:
        bundle[ACCELERATOR + spec.accelerator_type] = (
            0.001  # as Ray does it: a node has 1 of its kind
        )
    return [bundle] * ranks


def plan_resources(spec: StudySpec, resources: Mapping[str, float]) -> Plan:
    """Return what trials take of a cluster with `resources` (Ray's names); a pure function.

    Raises SpecError when not even one trial fits: Ray would wait for ever without a word.
    """
    kinds = sorted(
        name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)
    )
    if spec.accelerator_type is not None and spec.accelerator_type not in kinds:
        there = ", ".join(kinds) or "none that Ray has a name for"
        raise SpecError(
            f"accelerator_type={spec.accelerator_type!r}: Ray has {there}: choose one, or leave it out"
        )
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    bundles = trial_bundle(spec, has_gpu=gpus > 0)
    ranks, per_rank = len(bundles), bundles[0].get("GPU", 0.0)
    fits = [cpus // (spec.cpus_per_rank * ranks)]
    if per_rank:
        # Shares of one GPU do not add up over several: each GPU holds floor(1 / share) trials.
        fits.append(gpus // ranks if per_rank == 1 else int(gpus) * (1 // per_rank))
    if min(fits) < 1:
        need = _taken(spec.cpus_per_rank * ranks, per_rank * ranks)
        raise SpecError(
            f"a trial takes {need}, all of Ray has {cpus:g} CPU and {gpus:g} GPU: ask for less, or add a node"
        )
    most = int(min(fits))
    concurrent = min(most, spec.max_concurrent or most, spec.num_trials)
    return Plan(ranks, spec.cpus_per_rank, per_rank, concurrent, bundles)
