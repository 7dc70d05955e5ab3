"""Batches of a cohort on a device: where its volumes fit they stay there, also from one trial of a process to the next.

Read from the prepared file, copied and sent, 1,286 volumes of 64 voxels (674 MB) take more than a second, as long as an
epoch or two; and trials of a study use the same rows, whichever fold validates.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables.data.volumes import Cohort

RESIDENT_SHARE = 0.4
"""Of the free device memory: the rest is for the networks, their gradients and activations."""


@dataclass(frozen=True)
class Resident:
    """Rows of a cohort on a device: volumes (N, C, D, H, W) float16, labels (N,) int64."""

    volumes: Tensor
    labels: Tensor


_kept: dict[tuple[object, ...], Resident] = {}
"""The rows that were put on a device last, at most one set."""


class Volumes:
    """Batches (B, C, D, H, W) float32 of a cohort on a device; the rows in use stay there when they fit."""

    def __init__(self, cohort: Cohort, rows: np.ndarray, device: torch.device) -> None:
        self.cohort, self.device = cohort, device
        self.resident: Resident | None = None
        if device.type == "cuda":
            unique = np.unique(rows)
            self.resident = rows_on_device(cohort, unique, device)
            self.position = np.full(len(cohort.labels), -1)
            self.position[unique] = np.arange(len(unique))

    def resident_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes and labels at places in the resident cohort that only the device knows."""
        assert self.resident is not None
        volumes = (
            self.resident.volumes[index].float().contiguous(memory_format=torch.channels_last_3d)
        )
        return volumes, self.resident.labels[index]

    def batch(self, rows: np.ndarray) -> Tensor:
        """Return the volumes of `rows`, in their order."""
        if self.resident is not None:
            return self.resident_batch(
                torch.from_numpy(self.position[rows]).to(self.device, non_blocking=True)
            )[0]
        # Sorted reads are sequential reads of the file; the order is put back in memory.
        order = np.argsort(rows, kind="stable")
        block = np.empty(
            (len(rows), *self.cohort.volumes.shape[1:]), dtype=self.cohort.volumes.dtype
        )
        block[order] = self.cohort.volumes[rows[order]]
        volumes = torch.from_numpy(block)
        if self.device.type != "cuda":
            return volumes.float()
        volumes = volumes.pin_memory().to(self.device, non_blocking=True)
        return volumes.float().contiguous(memory_format=torch.channels_last_3d)


def rows_on_device(cohort: Cohort, rows: np.ndarray, device: torch.device) -> Resident | None:
    """Return `rows` (ascending) of the cohort on the device: those of the run before if they are the same, else a new copy.

    None where they would take more than `RESIDENT_SHARE` of the free memory. Rows kept before are then dropped, as they
    are when others are put there: of a cohort that is no file, or that was written again, nothing counts as the same.
    """
    key = _identity(cohort, rows, device)
    if key in _kept:
        return _kept[key]
    if _kept:
        _kept.clear()
        torch.cuda.empty_cache()  # or the next measurement would count it as taken
    size = cohort.volumes[0].nbytes * len(rows)
    if device.type == "cuda" and size > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return None
    volumes = torch.from_numpy(np.ascontiguousarray(cohort.volumes[rows])).to(device)
    resident = Resident(volumes, torch.from_numpy(np.asarray(cohort.labels)[rows]).to(device))
    if key is not None:
        _kept[key] = resident
    return resident


def _identity(cohort: Cohort, rows: np.ndarray, device: torch.device) -> tuple[object, ...] | None:
    """A key that is equal only for the same rows of the same file on the same device; None for volumes in memory."""
    name = getattr(cohort.volumes, "filename", None)
    if name is None:
        return None
    found = Path(name).stat()
    file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return *file, rows.tobytes(), np.asarray(cohort.labels)[rows].tobytes(), str(device)
