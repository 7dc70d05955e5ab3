"""Modules that loading the network also loads."""

import subprocess
import sys
from pathlib import Path

from trainables.network.monai_resnet import UNUSED


def found_by(code: str, folder: Path) -> set[str]:
    """Return which of the packages kept out, all of which are installed in `folder`, a new process has loaded."""
    for name in UNUSED:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            "from pathlib import Path\nPath(__file__).with_name('loaded').touch()\n"
        )
    start = f"import sys; sys.path.insert(0, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", f"{start}; {code}"], check=True)
    return {name for name in UNUSED if (folder / name / "loaded").exists()}


def test_the_network_loads_no_package_that_monai_does_without(tmp_path: Path) -> None:
    assert found_by("import monai", tmp_path / "alone") == set(UNUSED), (
        "else there is nothing to keep out"
    )
    assert found_by("import trainables.network.model", tmp_path / "ours") == set()


def test_monai_is_whole_for_whoever_imports_it_afterwards() -> None:
    code = """
import sys
import trainables.network.model as ours
assert not [name for name in sys.modules if name.partition(".")[0] == "monai"]
assert "scipy.signal" not in sys.modules
import monai, torch
from monai.networks.nets import resnet10
whole = resnet10(spatial_dims=3, n_input_channels=1, num_classes=2)
part = ours.ResNet(ours.ResNetBlock, [1, 1, 1, 1], [64, 128, 256, 512], n_input_channels=1, num_classes=2)
assert type(whole) is not type(part) and monai.transforms.Compose
part.load_state_dict(whole.state_dict())
volumes = torch.randn(2, 1, 16, 16, 16)
assert torch.equal(whole.eval()(volumes), part.eval()(volumes))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_monai_that_cannot_be_loaded_in_parts_is_loaded_whole(tmp_path: Path) -> None:
    code = """
import importlib, sys
import trainables.network as package
real = importlib.import_module
def refuse(name, *rest):
    module = real(name, *rest)
    if name.startswith("monai.networks.nets") and not hasattr(sys.modules["monai"], "transforms"):
        raise ImportError("needs all of MONAI")
    return module
importlib.import_module = refuse
from trainables.network.monai_resnet import ResNet
import monai
assert monai.networks.nets.ResNet is ResNet
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_packages_can_be_loaded_afterwards_and_are_left_alone_if_they_were_before(
    tmp_path: Path,
) -> None:
    every = ", ".join(UNUSED)
    assert found_by(f"import trainables.network.model, {every}", tmp_path / "after") == set(UNUSED)
    code = f"import {every}, trainables.network.model; assert all(sys.modules[name] for name in {UNUSED!r})"
    assert found_by(code, tmp_path / "before") == set(UNUSED)
