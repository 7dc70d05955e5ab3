"""torch's optimisers without torch's compiler, which they load only to exclude themselves from compilation.

`torch._dynamo`, and with it `torch._inductor`, SymPy and more, is a third of the loading time of a trial's process (2.1 of
9 s on two busy CPU cores, `python -X importtime`, torch 2.13), and nothing here is compiled by it. Loaded at an optimiser's
first use, it would also keep in a circle the frames of the run that is in it, and with them the run's memory.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


def _unchanged(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
    return function


def _stand_in() -> ModuleType:
    module = ModuleType(NAME)
    module.__dict__.update(disable=_unchanged, graph_break=lambda: None)
    return module


_module = _stand_in()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let an optimiser be made, or take a step, inside; where the compiler is loaded already, nothing changes.

    Not for code that compiles anything.
    """
    if NAME in sys.modules:
        yield
        return
    sys.modules[NAME] = _module
    try:
        yield
    finally:
        del sys.modules[NAME]


class _Apart:
    """Methods of an optimiser that would load the compiler."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with without_compiler():
            super().__init__(*arguments, **options)

    def step(self, *arguments: Any, **options: Any) -> Any:
        with without_compiler():
            return super().step(*arguments, **options)  # type: ignore[misc]

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        with without_compiler():
            super().zero_grad(*arguments, **options)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        with without_compiler():
            state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
            return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with without_compiler():
            super().load_state_dict(state_dict)  # type: ignore[misc]


class Adam(_Apart, torch.optim.Adam):
    """torch's Adam."""


class AdamW(_Apart, torch.optim.AdamW):
    """torch's AdamW."""


class SGD(_Apart, torch.optim.SGD):
    """torch's SGD."""
