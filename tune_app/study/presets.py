"""Sizes of a search for the machines that people have: a few fields of a study file, each of them shown."""

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {
        "trials": 12,
        "gpus_per_trial": 0,
        "config": {
            "depth": 10,
            "width": 0.5,
            "volume_shape": 32,
            "epochs": 12,
            "gradient_accumulation_steps": 1,
        },
    },
    "gpu": {
        "trials": 40,
        "gpus_per_trial": "auto",
        "config": {"volume_shape": 64, "epochs": 30},
    },
    "cluster": {
        "trials": 100,
        "gpus_per_trial": 1,
        "wait_for_resources_s": 600,
        "config": {"volume_shape": 96, "epochs": 60},
    },
}
"""laptop: two CPU cores, a coffee break for 100 volumes; gpu: one GPU, an hour or so; cluster: several GPUs."""


def with_preset(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a study file on top of a preset's: given ones win, field by field, config too."""
    preset = PRESETS[name]
    config = {**preset["config"], **(fields.get("config") or {})}
    return {**preset, **fields, "config": config}


def preset_line(name: str) -> str:
    """Return the preset's settings in a line."""
    preset = PRESETS[name]
    given = {key: value for key, value in preset.items() if key != "config"} | preset["config"]
    return f"preset {name}: " + ", ".join(f"{key}={value}" for key, value in given.items())
