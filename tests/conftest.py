"""Fixtures that several test modules share: real files on disk, and the real data set where there is one."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread for each process of the tests, before torch is loaded: its threads wait by spinning, and where two processes
# share two cores, a small network's step of 20 ms takes 700.
os.environ["OMP_NUM_THREADS"] = "1"

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings
from nibabel.orientations import axcodes2ornt
from object_storage import BUCKET, s3_server

# A busy machine takes any time for an example: no test is about that.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ADRENAL = Path(__file__).parents[2] / "shared" / "data" / "adrenalmnist3d"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for other processes or for a service's threads may be tried once more, and the summary counts it.

    Ray gives a node 30 seconds to start, fixed in its code, and a busy machine misses that. No other test may.
    """
    for item in items:
        waits = any(item.get_closest_marker(name) for name in ("ray", "slow"))
        if waits or item.path.stem.endswith("_browser") or item.path.parent.name == "serve":
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restore the environment after each test: the command line, called within a test, sets variables for its process.

    Tests of other files start processes, and what those find must not depend on which file ran before.
    """
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def adrenal_archive() -> Path:
    """AdrenalMNIST3D at 28 voxels, as MedMNIST publishes it (licence CC BY 4.0; not part of this repository)."""
    archive = ADRENAL / "adrenalmnist3d.npz"
    if not archive.exists():
        pytest.skip(f"{archive} is missing: put MedMNIST's adrenalmnist3d.npz there")
    return archive


@pytest.fixture(autouse=True)
def keep_rays_token_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token saved on this machine is not the tests': a mode once set would hold for every Ray of the process."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """An S3 server; gives the variables that lead there."""
    with s3_server() as leading_there:
        yield leading_there


@pytest.fixture
def bucket(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in the storage for one test, with an empty cache, as on another machine."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "laptop"))
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def write_scan(tmp_path: Path) -> Callable[..., Path]:
    """Write voxels, or noise of a shape, to a NIfTI file below tmp_path with nibabel; returns its path.

    axes: where each stored axis points to, spacing: along the stored axes, in mm.
    """

    def write(
        name: str = "scan.nii.gz",
        voxels: Any = (9, 10, 11),
        *,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        axes: str = "RAS",
        dtype: Any = np.float32,
        seed: int = 0,
        kind: Any = nib.Nifti1Image,
    ) -> Path:
        if isinstance(voxels, tuple):
            voxels = np.random.default_rng(seed).normal(100, 30, voxels)
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        for axis, (world, direction) in enumerate(axcodes2ornt(axes)):
            affine[int(world), axis] = direction * spacing[axis]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(kind(voxels.astype(dtype), affine), path)
        return path

    return write
