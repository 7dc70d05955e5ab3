"""MONAI's ResNet, loaded without packages that MONAI loads only because they are installed.

A part of MONAI comes with all of MONAI, which asks for transformers and CuPy, for networks and transforms of its own
that nothing here uses. Where they are installed, that costs each new process of a trial seconds (two CPU cores, MONAI
1.6.1, transformers 5.24 and CuPy 14.2: 5.4 to 13.5 s to load MONAI with them, 3.3 to 5.1 s without). In a process that
has loaded MONAI before, nothing changes; in one that uses MONAI afterwards, what needs these packages says that they are
missing, unless MONAI was loaded first.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("transformers", "cupy", "cupyx")
"""Packages that MONAI does without."""


@contextmanager
def _kept_out(*names: str) -> Iterator[None]:
    """Let imports of `names` fail as if they were not installed; of those that are loaded already, nothing changes."""
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # "not there", by Python's import system
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _kept_out(*UNUSED):
    from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck

__all__ = ["ResNet", "ResNetBlock", "ResNetBottleneck"]
