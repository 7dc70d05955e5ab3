import http.server
import os
import pickle
import random
import re
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainables.config import DEPTHS
from trainables.network import weights
from trainables.network.model import Classifier, build_network
from trainables.network.weights import (
    OFFICIAL_FILES,
    WeightsError,
    fetch,
    inspect_weights,
    load_pretrained,
    save_medicalnet,
)

README = Path(__file__).parents[3] / "pretrained" / "README.md"


def build(depth: int = 10, **changes: Any) -> Classifier:
    settings = {
        **{"width": 0.125, "geometry": "strided", "head": "cosine", "num_classes": 2},
        **{"in_channels": 1, "dropout": 0.0},
    }
    return build_network(depth=depth, **{**settings, **changes})


def backbone_weights(depth: int = 10, **changes: Any) -> dict[str, torch.Tensor]:
    """A backbone's state dict with its own value in every tensor, BatchNorm statistics and counters included."""
    torch.manual_seed(1)
    state = build(depth, **changes).backbone.state_dict()
    return {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else torch.full_like(tensor, 7)
        for name, tensor in state.items()
    }


def as_released(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


def write(folder: Path, checkpoint: object, name: str = "file.pth", *, legacy: bool = True) -> Path:
    """Legacy is the format of torch before 1.6, in which the released files are."""
    path = folder / name
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_holds(network: Classifier, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def refusal(path: Path, network: Classifier | None = None) -> str:
    """The text of the error on loading `path`, after making sure that the network is as it was."""
    network = network or build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_pretrained(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert str(path) in str(error.value)
    return str(error.value)


# What loads


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("geometry", ["strided", "dilated"])
def test_a_file_of_every_depth_loads_in_full_into_both_geometries(
    tmp_path: Path, depth: int, geometry: str
) -> None:
    width = 1 / 32
    state = backbone_weights(depth, width=width)
    network = build(depth, width=width, geometry=geometry)
    head = network.head.get_parameter("weight").clone()
    report = load_pretrained(network, write(tmp_path, as_released(state)))
    assert_holds(network, state)
    assert torch.equal(network.head.get_parameter("weight"), head)
    assert (report.depth, report.geometry, report.width) == (depth, geometry, width)
    assert report.shortcuts == ("A" if depth in (18, 34) else "B")
    assert report.missing == ("head.weight",)
    assert report.counters == report.ignored == report.unexpected == ()
    assert len(report.loaded) == report.entries == len(state)
    assert report.parameters == sum(
        parameter.numel() for parameter in network.backbone.parameters()
    )


def test_a_released_resnet_50_has_318_entries_and_46_155_072_parameters(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = build(50, width=1.0).backbone.state_dict()
    assert len(names) == 318
    assert len([name for name in names if name.endswith("num_batches_tracked")]) == 53
    state = {
        name: torch.zeros(()).expand(tensor.shape) for name, tensor in names.items()
    }  # a file of a few kB
    report = inspect_weights(write(tmp_path, as_released(state)))
    assert report.parameters == 46_155_072
    assert len(report.loaded) == 318


WRAPPINGS = {
    "released": as_released,
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "backbone": lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()},
    "encoder": lambda state: {
        "state_dict": {f"encoder.{name}": tensor for name, tensor in state.items()}
    },
    **{
        name: lambda state, name=name: {  # type: ignore[misc]
            name: state,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []},
            "epoch": 7,
        }
        for name in ("net", "model", "model_state_dict", "ema", "state_dict_ema")
    },
    "lightning": lambda state: {
        "state_dict": {f"net.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {"lr": 1e-3},
    },
    "student": lambda state: {
        "model": {"state_dict": {f"student.0.{name}": one for name, one in state.items()}}
    },
    "swa": lambda state: {"swa": state, "n_averaged": torch.tensor(3)},
    "nested": lambda state: {
        f"module._orig_mod.backbone.{name}": tensor for name, tensor in state.items()
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [True, False])
def test_every_wrapping_loads_in_full(tmp_path: Path, wrapping: str, legacy: bool) -> None:
    state = backbone_weights()
    network = build()
    report = load_pretrained(network, write(tmp_path, WRAPPINGS[wrapping](state), legacy=legacy))
    assert_holds(network, state)
    assert len(report.loaded) == len(state)


def test_two_networks_in_one_state_dict_are_named(tmp_path: Path) -> None:
    state = backbone_weights()
    both = {f"{name}.{key}": one for name in ("student", "teacher") for key, one in state.items()}
    with pytest.raises(WeightsError, match=r"holds networks under student\., teacher\.: save one"):
        load_pretrained(build(), write(tmp_path, both))


def test_safetensors_load_too(tmp_path: Path) -> None:
    state = backbone_weights(18)
    save_file(state, tmp_path / "file.safetensors")
    network = build(18)
    load_pretrained(network, tmp_path / "file.safetensors")
    assert_holds(network, state)


def test_a_file_without_counters_loads_and_says_so(tmp_path: Path) -> None:
    state = {
        name: tensor
        for name, tensor in backbone_weights().items()
        if not name.endswith("num_batches_tracked")
    }
    network = build()
    report = load_pretrained(network, write(tmp_path, as_released(state)))
    assert len(report.counters) == 12
    assert all(name.endswith(".num_batches_tracked") for name in report.counters)
    assert {*report.loaded, *report.counters, *report.missing} == set(network.state_dict())
    assert network.backbone.bn1.num_batches_tracked == 0
    assert torch.equal(network.backbone.bn1.running_var, state["bn1.running_var"])


def test_heads_for_other_tasks_are_left_out_and_named(tmp_path: Path) -> None:
    state = backbone_weights()
    heads = {
        "conv_seg.0.weight": torch.ones(64, 32, 2, 2, 2),
        "conv_seg.1.running_mean": torch.ones(32),
    }
    heads |= {"fc.weight": torch.ones(400, 64), "fc.bias": torch.full((400,), float("nan"))}
    network = build(head="linear")
    report = load_pretrained(network, write(tmp_path, as_released({**state, **heads})))
    assert_holds(network, state)
    assert report.ignored == tuple(f"module.{name}" for name in heads)
    assert report.missing == ("head.weight", "head.bias")
    assert report.entries == len(report.loaded) + len(report.ignored)
    assert any("4: module.conv_seg.0.weight" in line for line in report.lines())


def test_a_whole_classifier_gives_its_backbone_and_not_its_head(tmp_path: Path) -> None:
    source, network = build(10, geometry="dilated"), build(10)
    head = network.head.get_parameter("weight").clone()
    report = load_pretrained(network, write(tmp_path, source.state_dict(), legacy=False))
    assert_holds(network, source.backbone.state_dict())
    assert torch.equal(network.head.get_parameter("weight"), head)
    assert report.ignored == ("head.weight",)


def test_half_precision_files_are_read_into_float32(tmp_path: Path) -> None:
    state = {
        name: t.half() if t.is_floating_point() else t for name, t in backbone_weights().items()
    }
    network = build()
    load_pretrained(network, write(tmp_path, state))
    assert network.backbone.conv1.weight.dtype == torch.float32
    assert torch.equal(network.backbone.conv1.weight, state["conv1.weight"].float())


def test_more_channels_and_other_widths_load_where_the_run_has_them_too(tmp_path: Path) -> None:
    state = backbone_weights(10, in_channels=3, width=0.3)
    path = write(tmp_path, as_released(state))
    network = build(10, in_channels=3, width=0.3)
    load_pretrained(network, path)
    assert_holds(network, state)
    report = inspect_weights(path)
    assert (report.in_channels, report.geometry) == (3, None)
    assert int(64 * report.width) == 19


# Refused files, with the reason


def test_a_wrong_depth_names_the_depth_the_file_looks_like(tmp_path: Path) -> None:
    path = write(tmp_path, as_released(backbone_weights(18)))
    text = refusal(path, build(50))
    assert (
        "looks like ResNet-18 (basic blocks 2+2+2+2 in layers 1 to 4), the run has depth=50" in text
    )
    assert "set depth=18, or use resnet_50.pth or resnet_50_23dataset.pth" in text
    assert inspect_weights(path).depth == 18


def test_34_and_50_have_as_many_blocks_and_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path, as_released(backbone_weights(34)))
    assert "looks like ResNet-34 (basic blocks 3+4+6+3" in refusal(path, build(50))
    assert inspect_weights(path).depth == 34


def test_a_depth_that_was_never_released_is_said_to_be_none(tmp_path: Path) -> None:
    state = {
        name: tensor
        for name, tensor in backbone_weights(18).items()
        if not name.startswith("layer4.1.")
    }
    path = write(tmp_path, as_released(state))
    assert "looks like no released depth (basic blocks 2+2+2+1" in refusal(path, build(18))
    with pytest.raises(WeightsError, match="no released depth"):
        inspect_weights(path)


def test_a_stem_of_three_channels_is_refused(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, as_released(backbone_weights(10, in_channels=3))))
    assert "stem takes 3 channel(s), the run has in_channels=1: set in_channels=3, or" in text


def test_another_width_is_refused(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, as_released(backbone_weights(10, width=0.25))))
    assert "has width 0.25, the run has width=0.125" in text


def test_biases_in_shortcuts_are_refused(tmp_path: Path) -> None:
    state = backbone_weights()
    for layer in ("layer2", "layer3", "layer4"):
        state[f"{layer}.0.downsample.0.bias"] = torch.zeros(16)
    path = write(tmp_path, as_released(state))
    assert "has a bias in 3 shortcuts (layer2.0.downsample.0.bias" in refusal(path)
    with pytest.raises(WeightsError, match="bias_downsample=False"):
        inspect_weights(path)


@pytest.mark.parametrize(("depth", "has", "wants"), [(18, "B", "A"), (10, "A", "B")])
def test_the_other_kind_of_shortcut_is_refused(
    tmp_path: Path, depth: int, has: str, wants: str
) -> None:
    state = backbone_weights(depth)
    if has == "A":
        state = {name: tensor for name, tensor in state.items() if ".downsample." not in name}
    else:
        state["layer2.0.downsample.0.weight"] = torch.ones(16, 8, 1, 1, 1)
    path = write(tmp_path, as_released(state))
    assert f"has shortcuts {has}, and MedicalNet's ResNet-{depth} {wants}" in refusal(
        path, build(depth)
    )
    with pytest.raises(WeightsError, match=f"shortcut_type='{wants}'"):
        inspect_weights(path)


def test_all_that_is_wrong_with_the_network_is_told_together(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, as_released(backbone_weights(50, in_channels=3, width=0.25))))
    assert [
        found[0]
        for line in text.splitlines()
        if (found := re.search(r"looks like|stem takes|has width|$", line))
    ] == [
        "looks like",
        "stem takes",
        "has width",
    ]


@pytest.mark.parametrize(
    "name", ["conv1.weight", "layer3.0.bn1.running_mean", "layer4.0.conv1.weight"]
)
def test_a_missing_entry_of_the_backbone_ends_the_load(tmp_path: Path, name: str) -> None:
    state = backbone_weights()
    del state[name]
    path = write(tmp_path, as_released(state))
    assert f"lacks 1 entry of the backbone, and only the head may be new: {name}" in refusal(path)
    with pytest.raises(WeightsError, match="lacks"):
        inspect_weights(path)


def test_entries_left_over_shapes_types_and_values_are_told_together(tmp_path: Path) -> None:
    state = backbone_weights()
    state["layer1.0.attention.weight"] = torch.ones(3)
    state["layer2.0.conv2.weight"] = torch.ones(16, 16, 1, 1, 1)
    state["layer3.0.bn2.running_var"][3] = float("inf")
    state["layer4.0.conv1.weight"][0, 0] = float("nan")
    state["bn1.weight"] = torch.ones(8, dtype=torch.int64)
    text = refusal(write(tmp_path, as_released(state)))
    assert "has 1 entry that the network has no place for: module.layer1.0.attention.weight" in text
    assert "layer2.0.conv2.weight (16, 16, 1, 1, 1) instead of (16, 16, 3, 3, 3)" in text
    assert "has no real numbers in 1 entry: bn1.weight torch.int64" in text
    assert (
        "has NaN or infinite values in 2 entries: layer3.0.bn2.running_var, layer4.0.conv1.weight"
        in text
    )
    assert len(text.splitlines()) == 4


def test_a_file_of_which_nothing_matches_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"state_dict": {f"features.{number}.weight": torch.ones(1) for number in range(6)}},
    )
    text = refusal(path)
    assert "has no entry of a ResNet backbone among 6 entries: features.0.weight" in text
    assert "and 2 more" in text


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    state = backbone_weights()
    path = write(
        tmp_path, {**state, **{f"module.{name}": tensor for name, tensor in state.items()}}
    )
    assert "conv1.weight and module.conv1.weight are both conv1.weight" in refusal(path)


def test_weights_of_a_2d_network_are_refused(tmp_path: Path) -> None:
    state = backbone_weights()
    state["conv1.weight"] = torch.ones(8, 1, 7, 7)
    assert "weights of a 2D network; MedicalNet's are 3D" in refusal(write(tmp_path, state))


NO_WEIGHTS = {
    "a list": ([torch.ones(1)], "holds a list, not a dict"),
    "a tensor": (torch.ones(1), "holds a Tensor, not a dict"),
    "no tensors": (
        {"epoch": 1, "metrics": {"auc": 0.9}},
        "no tensors at its top and no 'state_dict'; it holds epoch",
    ),
    "nothing": ({}, "it holds nothing"),
    "a mixture": (
        {"state_dict": {"conv1.weight": torch.ones(1), "step": 3}},
        "has 1 entry without a tensor among its weights: step",
    ),
}


def test_two_networks_under_names_of_their_own_are_refused_with_what_to_save(
    tmp_path: Path,
) -> None:
    state = backbone_weights()
    text = refusal(write(tmp_path, {"model": state, "ema": state}))
    assert "holds weights under model, ema: save the one to start from" in text


def test_a_numpy_number_next_to_the_weights_is_named(tmp_path: Path) -> None:
    checkpoint = {"state_dict": backbone_weights(), "best_auc": np.float64(0.9)}
    text = refusal(write(tmp_path, checkpoint, legacy=False))
    assert "holds a NumPy number, numpy" in text
    assert "save only the weights" in text


def test_flipped_bits_in_the_weights_are_found_by_the_files_own_checksum(tmp_path: Path) -> None:
    """torch loads such a file without a word."""
    path = write(tmp_path, as_released(backbone_weights()), legacy=False)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0x10
    path.write_bytes(bytes(whole))
    assert set(torch.load(path, weights_only=True)) == {"state_dict"}
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, case: str) -> None:
    checkpoint, message = NO_WEIGHTS[case]
    assert message in refusal(write(tmp_path, checkpoint))


NO_CHECKPOINT = {
    "text": (
        b"epoch,auc\n1,0.5\n" * 20,
        "not a checkpoint: neither torch's format nor safetensors",
    ),
    "empty": (b"", "empty file"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "git lfs pull",
    ),
    "page": (
        b"\n<!DOCTYPE html><html><body>Sign in</body></html>" * 9,
        "a web page and not a checkpoint",
    ),
    "pickle": (pickle.dumps({"a": 1}, protocol=0), "not a checkpoint"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, case: str) -> None:
    content, message = NO_CHECKPOINT[case]
    (tmp_path / "file.pth").write_bytes(content)
    assert message in refusal(tmp_path / "file.pth")


def test_the_archive_of_all_files_is_to_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.pth", "w") as archive:
        archive.writestr("pretrain/resnet_50.pth", b"x" * 99)
    assert "a zip archive and not a checkpoint: unpack it (pretrain/resnet_50.pth)" in refusal(
        tmp_path / "all.pth"
    )


@pytest.mark.parametrize("kind", ["legacy", "zip", "safetensors"])
@pytest.mark.parametrize("kept", [0.999, 0.6, 0.05, 0.005])
def test_a_truncated_file_is_refused_as_such(tmp_path: Path, kind: str, kept: float) -> None:
    state, path = backbone_weights(), tmp_path / "resnet_10.pth"
    if kind == "safetensors":
        save_file(state, path)
    else:
        write(tmp_path, as_released(state), path.name, legacy=kind == "legacy")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    text = refusal(path)
    assert (
        f"truncated or damaged, {int(len(whole) * kept):,} bytes of 57,456,599 in the released file"
        in text
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [True, False])
def test_altered_files_never_end_in_another_error(tmp_path: Path, legacy: bool) -> None:
    path = write(
        tmp_path, {"state_dict": {"conv1.weight": torch.ones(2, 1, 1, 1, 1)}}, legacy=legacy
    )
    whole = path.read_bytes()
    chance, network = random.Random(0), build()
    for _ in range(200):
        altered = bytearray(whole)
        for _ in range(chance.randint(1, 12)):
            altered[chance.randrange(min(len(altered), 600))] = chance.randrange(256)
        path.write_bytes(bytes(altered))
        with pytest.raises(
            WeightsError
        ):  # as it stands it is refused too: most of the backbone is missing
            load_pretrained(network, path)


class RunsCode:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.touched}",))


@pytest.mark.parametrize("kind", ["legacy", "zip", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, kind: str
) -> None:
    touched, path = tmp_path / "ran", tmp_path / "file.pth"
    checkpoint = {**as_released(backbone_weights()), "extra": RunsCode(touched)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(checkpoint["extra"], protocol=2))
    else:
        write(tmp_path, checkpoint, legacy=kind == "legacy")
    assert "would run code, so it was not loaded" in refusal(path)
    with pytest.raises(WeightsError, match="would run code"):
        inspect_weights(path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(RunsCode(touched)))
    assert touched.exists()  # the trap itself works


def test_a_folder_is_refused_and_what_is_in_it_named(tmp_path: Path) -> None:
    write(tmp_path, {}, "resnet_50.pth")
    assert "is a folder: name the file in it, resnet_50.pth" in refusal(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, as_released(backbone_weights()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_missing_file_says_which_released_file_to_put_there(tmp_path: Path, depth: int) -> None:
    text = refusal(tmp_path / "weights" / "mine.pth", build(depth, width=1 / 64))
    assert "no such file: put " in text
    names = [name for name, official in OFFICIAL_FILES.items() if official.depth == depth]
    assert len(names) == (2 if depth <= 50 else 1)
    assert " or ".join(names) + " there" in text
    assert f"TencentMedicalNet/MedicalNet-Resnet{depth} on huggingface.co" in text
    assert f"medtune weights fetch resnet_{depth}`" in text


def test_a_missing_released_file_is_asked_for_by_its_own_name(tmp_path: Path) -> None:
    text = refusal(tmp_path / "resnet_50_23dataset.pth", build(10))
    assert "download resnet_50_23dataset.pth (184,885,051 bytes, sha256 ff48a622" in text
    assert "medtune weights fetch resnet_50_23dataset`" in text
    with pytest.raises(WeightsError, match="check the path"):
        inspect_weights(tmp_path / "mine.pth")


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(WeightsError("one\ntwo")))
    assert str(error) == "one\ntwo"


# The report


def test_the_report_is_readable_and_names_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, as_released(backbone_weights(18)), "resnet_18.pth")
    lines = inspect_weights(path).lines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert list(rows) == [
        "file",
        "sha256",
        "origin",
        "network",
        "config",
        "loaded",
        "new",
        "counters",
        "ignored",
        "unexpected",
    ]
    assert rows["file"] == f"{path} ({path.stat().st_size:,} bytes)"
    assert re.fullmatch(r"[0-9a-f]{64}", rows["sha256"])
    assert rows["origin"].startswith("not the released resnet_18.pth, whose sha256 is 38b3a174")
    assert rows["network"] == "ResNet-18, shortcuts A, geometry strided or dilated"
    assert rows["config"] == "depth=18 width=0.125 in_channels=1"
    assert rows["loaded"].startswith("102 of 102 entries, ")
    assert rows["new"] == "head.weight"
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1


def test_a_released_file_is_known_by_its_bytes_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, as_released(backbone_weights()), "renamed.pth")
    report = inspect_weights(path)
    assert report.origin == "none of the released files"
    released = weights.OfficialFile("resnet_10_23dataset.pth", report.size_bytes, report.sha256)
    monkeypatch.setitem(OFFICIAL_FILES, released.name, released)
    assert report.origin == (
        "resnet_10_23dataset.pth of TencentMedicalNet/MedicalNet-Resnet10 (23 datasets), unchanged"
    )


def test_the_readme_lists_every_released_file_as_the_code_knows_it() -> None:
    rows = {
        row.split("|")[1].strip(" `"): row
        for row in README.read_text().splitlines()
        if row.startswith("| `")
    }
    assert list(rows) == list(OFFICIAL_FILES)
    assert len(rows) == 11
    for name, official in OFFICIAL_FILES.items():
        assert official.sha256 in rows[name]
        assert f" {official.depth} " in rows[name]
        assert f" {official.datasets} " in rows[name]
        assert official.repository in rows[name]
        assert official.size_bytes is None or f"{official.size_bytes:,}" in rows[name]


# Writing


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
def test_what_is_saved_is_in_medicalnets_format_and_loads_again(
    tmp_path: Path, geometry: str
) -> None:
    source = build(18, geometry=geometry)
    source.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    path = tmp_path / "new folder" / "resnet_18.pth"
    save_medicalnet(source.backbone, path)
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint) == ["state_dict"]
    assert all(name.startswith("module.") for name in checkpoint["state_dict"])
    assert all(tensor.is_contiguous() for tensor in checkpoint["state_dict"].values())
    network = build(18)
    report = load_pretrained(network, path)
    assert_holds(network, source.backbone.state_dict())
    assert report.counters == report.ignored == ()
    assert [file.name for file in path.parent.iterdir()] == ["resnet_18.pth"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resnet_10.pth"
    path.write_bytes(b"old")

    def full_disk(checkpoint: object, target: IO[bytes]) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left") as told:
        save_medicalnet(build().backbone, path)
    assert told.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Fetching


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[weights.OfficialFile, list[tuple[str, str]]]]:
    """A hub of our own on a local port that serves one file as huggingface.co does; yields that file's official
    entry and the list of requests."""
    path = write(tmp_path, as_released(backbone_weights()), "served")
    content, report = path.read_bytes(), inspect_weights(path)
    official = weights.OfficialFile("resnet_10.pth", len(content), report.sha256)
    monkeypatch.setitem(OFFICIAL_FILES, official.name, official)
    requests = []

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> bool:
            requests.append((self.command, self.path))
            found = self.path == f"/{official.repository}/resolve/main/{official.name}"
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{report.sha256}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return found

        def do_GET(self) -> None:
            if self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield official, requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["resnet10", "resnet_10.pth", "ResNet-10", "medicalnet_resnet10"])
def test_a_file_is_fetched_verified_and_not_fetched_twice(
    tmp_path: Path, hub: tuple[weights.OfficialFile, list[tuple[str, str]]], name: str
) -> None:
    _, requests = hub
    folder = tmp_path / "pretrained"
    path = fetch(name, folder)
    assert path == folder / "resnet_10.pth"
    assert load_pretrained(build(), path).origin.endswith("unchanged")
    assert [file.name for file in folder.iterdir()] == ["resnet_10.pth"]
    assert path.stat().st_mode & stat.S_IRUSR
    seen = len(requests)
    assert seen >= 1
    assert fetch(name, folder) == path
    assert len(requests) == seen


def test_other_bytes_than_the_released_ones_are_not_kept(
    tmp_path: Path,
    hub: tuple[weights.OfficialFile, list[tuple[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    official, _ = hub
    wrong = weights.OfficialFile(official.name, official.size_bytes, "0" * 64)
    monkeypatch.setitem(OFFICIAL_FILES, official.name, wrong)
    with pytest.raises(
        WeightsError, match=r"bytes with sha256 [0-9a-f]{64} arrived .* were not kept"
    ):
        fetch("resnet10", tmp_path / "pretrained")
    assert list((tmp_path / "pretrained").iterdir()) == []


def test_another_file_of_that_name_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "resnet_50.pth").write_bytes(b"mine")
    with pytest.raises(
        WeightsError, match=r"resnet_50\.pth: is there already and is not the released file"
    ):
        fetch("resnet50", tmp_path)
    assert (tmp_path / "resnet_50.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("why", ["offline", "refused"])
def test_without_a_network_it_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", why == "offline")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub client's attempts
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(WeightsError) as error:
        fetch("resnet50_23dataset", tmp_path / "pretrained")
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert "download resnet_50_23dataset.pth (184,885,051 bytes, sha256 ff48a622" in text
    assert "from the repository TencentMedicalNet/MedicalNet-Resnet50 on huggingface.co" in text
    assert text.endswith(f"put it at {tmp_path / 'pretrained' / 'resnet_50_23dataset.pth'}")
    assert list((tmp_path / "pretrained").iterdir()) == []
    assert not caplog.records, "the client's retries are not shown"


@pytest.mark.parametrize("name", ["resnet51", "resnet101_23dataset", "vgg16"])
def test_an_unknown_name_lists_the_released_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        WeightsError, match=rf"'{name}' is none of the released files: resnet_10\.pth, .*resnet_200"
    ):
        fetch(name, tmp_path)
