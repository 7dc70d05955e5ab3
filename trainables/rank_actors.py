"""The processes of ranks 1 .. world - 1, started before anything heavy is loaded.

Loading torch and MONAI takes a rank ten seconds and more where files are cold. Started first, ranks load while rank 0
does; started once rank 0 is ready, as their caller in `trainables.ranks` could only do, they would load after it.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class _Rank:
    """One rank's process. A second thread answers `where` while the first trains."""

    def __init__(self) -> None:
        from trainables.ranks import Position

        self.position = Position()

    def where(self) -> tuple[int, int, str]:
        return self.position.epoch, self.position.step, ray.util.get_node_ip_address()

    def run(self, work: Any, rank: int, world: int, host: str, port: int, resume: Mapping[str, Any] | None) -> None:
        """Train as rank `rank` of `work`, a `trainables.ranks.RankWork`; rank 0 keeps the store at host and port."""
        from trainables.ranks import follow

        follow(work, rank, world, host, port, resume, self.position)


def start_rank_actors(world: int, group: PlacementGroup | None = None) -> list[Any]:
    """Start the processes of ranks 1 .. world - 1, each in its bundle of `group` (default: the current placement group).

    They end with the last handle to them, or with this process.
    """
    group = group or ray.util.get_current_placement_group()
    assert group is not None, "ranks live in a placement group"
    assert group.bundle_count >= world, "one bundle a rank"
    actors = []
    for rank in range(1, world):
        bundle = group.bundle_specs[rank]
        options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        }
        actors.append(ray.remote(_Rank).options(max_concurrency=2, **options).remote())
    return actors
