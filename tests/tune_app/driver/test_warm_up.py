"""The kernels that a driver has compiled in a second process."""

import os
from pathlib import Path

import pytest
from fake_gpu import environment, write_programs

from trainables.config import build_config
from trainables.kernel_cache import FOLDERS, keep_kernels, kernel_folder
from tune_app.driver.warm_up import WarmUp, warm_mark, warm_up

SMALL = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "batch_size": 2,
    "validation_batch_size": 4,
}


def test_a_warm_up_trains_and_validates_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainables import finetune as module

    seen: list[dict[str, object]] = []
    whole = module.finetune

    def watched(*arguments: object, **options: object) -> object:
        for result in whole(*arguments, **options):  # type: ignore[arg-type]
            seen.append(result.metrics)
            yield result

    monkeypatch.setattr(module, "finetune", watched)
    warm_up(build_config({**SMALL, "epochs": 50, "amp": "off"}), device="cpu")
    [metrics] = seen
    assert metrics["updates"] == 5
    assert metrics["val_positive"] == metrics["val_negative"] == 2


def test_no_process_starts_without_a_gpu_or_where_all_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(SMALL)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with WarmUp(config, tmp_path, "off") as idle:
        assert idle._process is None
    for name, value in environment(write_programs(tmp_path / "bin"), tmp_path / "t").items():
        monkeypatch.setenv(name, value)
    with WarmUp(config, tmp_path, "off") as busy:
        assert busy._process is not None
    assert busy._process.poll() is not None, "it does not outlive its study"
    mark = warm_mark(config, tmp_path, "NVIDIA H200")
    mark.parent.mkdir(parents=True)
    mark.touch()
    with WarmUp(config, tmp_path, "off") as known:
        assert known._process is None


def test_a_mark_holds_for_what_costs_the_same() -> None:
    config = build_config(SMALL)
    mark = warm_mark(config, Path("c"), "NVIDIA H200")
    assert warm_mark(build_config({**SMALL, "seed": 3, "s": 9}), Path("c"), "NVIDIA H200") == mark
    assert warm_mark(build_config({**SMALL, "batch_size": 3}), Path("c"), "NVIDIA H200") != mark
    assert warm_mark(config, Path("c"), "NVIDIA A100") != mark


def test_kernels_are_kept_in_the_cache_unless_the_user_has_a_place_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FOLDERS:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_CACHE_PATH", "/mine")
    keep_kernels(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == str(kernel_folder(tmp_path) / "triton")
    assert os.environ["CUDA_CACHE_PATH"] == "/mine"
    assert "torch-2" in kernel_folder(tmp_path).name
