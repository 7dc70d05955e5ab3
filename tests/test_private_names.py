"""Private names of Ray that the driver needs. Its bound in pyproject.toml ends before versions without them."""

import inspect
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

NAMES = [
    ("ray", "ray._private.parameter", "RayParams", ["dashboard_agent_listen_port"]),
    ("ray", "ray._private.worker", "_global_node", []),
    (
        "ray",
        "ray._private.worker",
        "connect",
        ["_runtime_env_has_working_dir", "_py_driver_sys_path"],
    ),
    ("ray", "ray._raylet", "AuthenticationTokenLoader", []),
    ("ray", "ray._raylet", "has_async_methods", []),
    (
        "ray",
        "ray.tune.execution.tune_controller",
        "TuneController",
        ["_resetting_trials", "_trial_to_actor", "_started_actors", "_trial_task_failure"],
    ),
    ("ray", "ray.actor", "ActorHandle", ["_actor_id"]),
]


@pytest.mark.parametrize(("package", "module", "name", "words"), NAMES)
def test_private_names_are_there_in_this_version(
    package: str, module: str, name: str, words: list[str]
) -> None:
    version = f"{package} {metadata.version(package)}"
    holder = import_module(module)
    assert hasattr(holder, name), f"{module}.{name} is gone in {version}: lower the upper bound"
    source = inspect.getsource(getattr(holder, name)) if words else ""
    missing = [word for word in words if word not in source]
    assert not missing, f"{module}.{name} has no {missing} in {version}: lower the upper bound"


def test_ray_whose_private_names_are_used_has_an_upper_bound() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = [Requirement(line) for line in tomllib.loads(text)["project"]["dependencies"]]
    (found,) = [one for one in listed if one.name == "ray"]
    assert "<" in {part.operator for part in found.specifier}
    assert found.specifier.contains(metadata.version("ray"))
