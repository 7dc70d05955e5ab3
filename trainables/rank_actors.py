"""The processes of ranks 1 .. world - 1, started before anything heavy is loaded, and kept for the next trial.

Loading torch and MONAI takes a rank ten seconds and more, and so do CUDA, NCCL and the choice of convolution algorithms.
Started first, ranks load while rank 0 does; started once rank 0 is ready, as their caller in `trainables.ranks` could
only do, they would load after it. Kept, as Tune keeps rank 0's process, they load once for all trials that follow each
other in a placement group.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@dataclass
class Position:
    """How far a rank has come, and since when."""

    epoch: int = 0
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    heartbeat: Callable[[int, int], None] | None = None
    """Is called, too."""

    def reached(self, epoch: int, step: int) -> None:
        self.epoch, self.step, self.since = epoch, step, time.monotonic()
        if self.heartbeat is not None:
            self.heartbeat(epoch, step)


class Rank:
    """One rank's process. A second thread answers `where` while the first trains."""

    def __init__(self) -> None:
        self.position = Position()
        self.begun = 0

    def where(self, run: int = 0) -> tuple[int, int, str]:
        """Epoch and step of this run, 0 and 0 if it is not the run that was started last, and the node."""
        position = (self.position.epoch, self.position.step) if run == self.begun else (0, 0)
        return *position, ray.util.get_node_ip_address()

    def run(
        self,
        follow: Callable[[Any, Any, Mapping[str, Any] | None, Position], None],
        work: Any,
        place: Any,
        resume: Mapping[str, Any] | None,
    ) -> None:
        """Train by `follow`, as the rank at `place`, a `trainables.ranks.Place`, of `work`, a
        `trainables.ranks.RankWork`."""
        from trainables.training_thread import in_training_thread

        self.position, self.begun = Position(), place.run
        in_training_thread(follow, work, place, resume, self.position)


class RankProcesses:
    """Processes of ranks 1 .. world - 1, each in its bundle of the current placement group.

    They serve one run after the other, and end with the last handle to them, or with this process.
    """

    def __init__(self, world: int) -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None, "ranks live in a placement group"
        assert group.bundle_count >= world, "one bundle a rank"
        self.world = world
        self.runs = 0
        """Runs started so far."""
        self.lost = False
        """Whether a rank died, failed or did not come to an end: nothing can run with them again."""
        self.store: Any = None
        """Where the ranks meet, once rank 0 has opened it."""
        self.actors = []
        for rank in range(1, world):
            bundle = group.bundle_specs[rank]
            options = {
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            }
            self.actors.append(ray.remote(Rank).options(max_concurrency=2, **options).remote())
        self.homes = [actor.where.remote() for actor in self.actors]
        """Where each is, by its own first answer."""

    def give_up(self) -> None:
        """End them all."""
        self.lost = True
        for actor in self.actors:
            ray.kill(actor)


_kept: RankProcesses | None = None


def rank_processes(world: int) -> RankProcesses:
    """Return the processes of ranks 1 .. world - 1 that ran this process's last trial, or start them.

    Raises RuntimeError where that trial has lost them: its collectives may still wait for them in this process.
    """
    global _kept
    if _kept is not None and _kept.lost:
        raise RuntimeError(
            "the trial before lost its ranks, and their rank 0 was this process: a new one is needed"
        )
    if _kept is None:
        _kept = RankProcesses(world)
    assert _kept.world == world, f"{world} ranks in a process whose trials have {_kept.world}"
    return _kept
