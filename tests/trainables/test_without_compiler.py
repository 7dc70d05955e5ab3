"""torch's optimisers without its compiler."""

import subprocess
import sys

import pytest
import torch

from trainables import without_compiler

CODE = """
import sys, torch
from trainables import without_compiler
network = torch.nn.Linear(3, 1)
made = getattr(without_compiler, {name!r})(network.parameters(), lr=torch.tensor(0.1), fused=True)
for _ in range(2):
    made.zero_grad(set_to_none=True)
    network(torch.ones(2, 3)).sum().backward()
    made.step()
made.load_state_dict(made.state_dict())
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
compiled = torch.compile(torch.sin, backend="eager")
assert torch.equal(compiled(torch.ones(3)), torch.sin(torch.ones(3)))
assert sys.modules["torch._dynamo"].optimize
made.step()
"""


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_no_compiler_is_loaded_and_one_can_be_afterwards(name: str) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(name=name)], check=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_numbers_are_torchs(name: str) -> None:
    weights = []
    for source in (torch.optim, without_compiler):
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 2)
        made = getattr(source, name)(network.parameters(), lr=0.1, weight_decay=0.01, fused=True)
        for _ in range(5):
            made.zero_grad()
            network(torch.randn(8, 4)).square().mean().backward()
            made.step()
        weights.append(network.weight.detach().clone())
    assert torch.equal(*weights)
