"""MONAI's ResNet, loaded without the rest of MONAI.

A part of MONAI comes with all of MONAI: networks, transforms, losses and metrics that a trial does not use, and packages
that MONAI loads only because they are installed (transformers, CuPy, SciPy's signal processing). On two busy CPU cores all
of it takes 2.6 s of a process that loads for 9 s, the ResNet and its dependencies 0.5 s (`python -X importtime`, MONAI
1.6.1; more on a machine where transformers and CuPy are installed). So its modules are loaded below packages without
contents, and forgotten afterwards: a later import of MONAI in the process gets it whole, and the classes here stay the
ones of this module. In a process that has loaded MONAI before, and with a version of MONAI that cannot be loaded in parts,
the ResNet is imported as usual.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from trainables import installed_version

UNUSED = ("transformers", "cupy", "cupyx")
"""Packages that MONAI does without."""

HOLLOW = ("", ".apps", ".networks", ".networks.blocks", ".networks.layers", ".networks.nets")
"""Packages below MONAI of which the ResNet needs single modules."""

RESNET = "monai.networks.nets.resnet"


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


def _resnet() -> Any:
    """The module of MONAI's ResNet."""
    with _kept_out(*UNUSED):
        if "monai" not in sys.modules:
            try:
                return _in_parts()
            except ImportError:  # another version needs more of itself
                _forget()
        return importlib.import_module(RESNET)


def _in_parts() -> Any:
    found = importlib.util.find_spec("monai")
    if found is None or not found.submodule_search_locations:
        raise ImportError("no package monai", name="monai")
    for package in HOLLOW:
        module = ModuleType(f"monai{package}")
        module.__path__ = [
            place + package.replace(".", "/") for place in found.submodule_search_locations
        ]
        module.__dict__["__version__"] = installed_version("monai") or "0"
        sys.modules[module.__name__] = module
    resnet = importlib.import_module(RESNET)
    _forget()
    return resnet


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        del sys.modules[name]


_module = _resnet()
ResNet, ResNetBlock, ResNetBottleneck = (
    _module.ResNet,
    _module.ResNetBlock,
    _module.ResNetBottleneck,
)

__all__ = ["ResNet", "ResNetBlock", "ResNetBottleneck"]
