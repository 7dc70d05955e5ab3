"""How trials that share a GPU share it, settled and printed before the first of them starts."""

from contextlib import ExitStack
from typing import Self

import ray

from trainables import mps

ANSWER_S = 120.0
"""Seconds that a node may take to start a process that answers."""


class GpuSharing:
    """Keeps the MPS daemons of this machine's GPUs for a study while the block runs; on a cluster, trials keep those of
    their nodes.

    `local`: the study's Ray is this machine's own. Nothing is started before `standing` is asked for.
    """

    def __init__(self, mode: mps.Mode, *, local: bool) -> None:
        self.mode, self.local = mode, local
        self._holding = ExitStack()
        self._standing: mps.Standing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def standing(self, gpus_per_rank: float) -> mps.Standing | None:
        """Return how trials with this share of a GPU use it, None where they share none. Raises MpsError for mode `on`."""
        if not 0 < gpus_per_rank < 1:
            return None
        if self._standing is None:
            if self.local:
                self._standing = self._holding.enter_context(mps.held(self.mode))
            else:
                probe = ray.remote(num_cpus=0, num_gpus=gpus_per_rank, max_retries=0)(_standing)
                self._standing = ray.get(probe.remote(self.mode), timeout=ANSWER_S)
                mps.require(self.mode, self._standing)
        return self._standing


def _standing(mode: mps.Mode) -> mps.Standing:
    return mps.join("off" if mode == "off" else "auto")
