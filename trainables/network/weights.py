"""MedicalNet checkpoint files: read, checked and loaded with a report that adds up; fetched; and written.

A released file is `{"state_dict": {"module.conv1.weight": ...}}`: the backbone of a 3D ResNet and no head. Loading
it with the prefix left on and `strict=False` loads nothing without a message, so nothing here is lenient: every entry
of the file and every entry of the network is accounted for, and only the head may be new. Files are read with
`weights_only=True`: one that would run code is refused before it does.
"""

import hashlib
import logging
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainables.checkpoints import DAMAGED, damaged_member, save_state
from trainables.config import FineTuneConfig
from trainables.errors import ProblemsError
from trainables.network.model import (
    BLOCKS,
    PLANES,
    SHORTCUT_A_DEPTHS,
    Classifier,
    build_network,
    configured_network,
)


class WeightsError(ProblemsError):
    """A file of weights that cannot be had, read, or loaded in full. One line a problem, all of them."""


@dataclass(frozen=True)
class OfficialFile:
    """One released MedicalNet file. `size_bytes` is None where only the sha256 is known."""

    name: str
    size_bytes: int | None
    sha256: str

    @property
    def depth(self) -> int:
        return _depth_of(self.name)

    @property
    def datasets(self) -> int:
        """How many data sets it was trained on."""
        return 23 if self.name.endswith("_23dataset.pth") else 8

    @property
    def repository(self) -> str:
        """Name of its repository on huggingface.co."""
        return f"TencentMedicalNet/MedicalNet-Resnet{self.depth}"


def _depth_of(name: str) -> int:
    return int(name.removesuffix(".pth").split("_")[1])


_BYTES = {
    10: 57_456_599,
    18: 131_992_196,
    34: 253_276_232,
    50: 184_885_051,
    101: 341_330_267,
    200: 507_146_295,
}
"""Size of the released files of a depth, where it is known."""

_SHA256 = {
    "resnet_10.pth": "2824951eaef30e115929b89bec72342380b08d14792bda1449974ac849e497c0",
    "resnet_10_23dataset.pth": "afa8055f3e47f4a18239495d92a7abc587902c69c31c743de2b2784653b72605",
    "resnet_18.pth": "38b3a17444c5c18a795355a868e6a2d9ce9318054067f5373d337f55c0f61da3",
    "resnet_18_23dataset.pth": "61224f9317fcce873366deb3703183e92cc47325b726b69691b33536244e10f4",
    "resnet_34.pth": "977a1be79298602fa35980de9c03789229ad36087fb1f4d9bde468aec653c658",
    "resnet_34_23dataset.pth": "3ea7188e396774e4ef95b66e5e90a78273bb33f6e58d3d717bf24f5f1aaeaa28",
    "resnet_50.pth": "5b6189cafbee2f5604a7279b62bc163365aa6a86a377e1dc260a14275cacbd84",
    "resnet_50_23dataset.pth": "ff48a62219073fb977fd3f4ddfb8dc1367f0ec156c8d6f6c37e205bd683a246e",
    "resnet_101.pth": "a26bbcf9b2ad35f048b0fa317234c003f171a4d719760e5c4aff9f793654ebcf",
    "resnet_152.pth": "e96c459f5317ef2cbb898c91575402da2c78b31a31f55c5d28943683fe0626da",
    "resnet_200.pth": "df58525b0276117169782617a379480d2cbc75230e84e152c603bf22a1fabfa8",
}
OFFICIAL_FILES = {
    name: OfficialFile(name, _BYTES.get(_depth_of(name)), sha256)
    for name, sha256 in _SHA256.items()
}
"""Every released file by name, with the size and sha256 that its repository on huggingface.co states."""

PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")
"""What wrappers put before the names of a ResNet's entries: taken off, in any order and number."""

COUNTER = ".num_batches_tracked"
"""End of the name of BatchNorm's count of batches, which files may lack."""

HEADS = ("conv_seg.", "fc.", "head.", "classifier.")
"""Beginnings of the names of a head for some other task: such entries are left out, and reported."""


@dataclass(frozen=True)
class LoadReport:
    """The entries of a file and their destinations. Names of the file's entries as in the file, the network's as in its
    state dict. `loaded` + `ignored` + `unexpected` are all entries of the file; `loaded` + `counters` + `missing` all
    of the network."""

    path: Path
    size_bytes: int
    sha256: str
    depth: int
    width: float
    in_channels: int
    shortcuts: str
    """A (no parameters) or B (a 1x1x1 convolution)."""
    geometry: str | None
    """Geometry of the network it was loaded into; None where none was: the same weights fit both."""
    parameters: int
    """Numbers loaded into parameters; BatchNorm statistics are not counted."""
    entries: int
    """Entries in the file."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Entries of the network that the file does not have and that stay fresh: the head."""
    counters: tuple[str, ...]
    """`num_batches_tracked` entries that the file lacks, set to 0; nothing in a run reads them."""
    ignored: tuple[str, ...]
    """Entries of the file that belong to a head for some other task."""
    unexpected: tuple[str, ...] = ()
    """Empty in every report that was returned: an entry that the network has no place for ends the load."""

    @property
    def origin(self) -> str:
        """Whether the bytes are those of a released file, by sha256."""
        for official in OFFICIAL_FILES.values():
            if official.sha256 == self.sha256:
                return f"{official.name} of {official.repository} ({official.datasets} datasets), unchanged"
        if self.path.name in OFFICIAL_FILES:
            return f"not the released {self.path.name}, whose sha256 is {OFFICIAL_FILES[self.path.name].sha256}"
        return "none of the released files"

    def lines(self) -> list[str]:
        """Return the report as aligned lines of text."""
        geometry = self.geometry or "strided or dilated"
        rows = {
            "file": f"{self.path} ({self.size_bytes:,} bytes)",
            "sha256": self.sha256,
            "origin": self.origin,
            "network": f"ResNet-{self.depth}, shortcuts {self.shortcuts}, geometry {geometry}",
            "config": f"depth={self.depth} width={self.width:g} in_channels={self.in_channels}",
            "loaded": f"{len(self.loaded)} of {self.entries} entries, {self.parameters:,} parameters",
            "new": ", ".join(self.missing),
            "counters": f"{len(self.counters)} absent, set to 0"
            if self.counters
            else "all in the file",
            "ignored": f"{len(self.ignored)}: {', '.join(self.ignored)}"
            if self.ignored
            else "none",
            "unexpected": ", ".join(self.unexpected) or "none",
        }
        return [f"{name:<10}  {text}" for name, text in rows.items()]


def load_pretrained(network: Classifier, path: str | Path) -> LoadReport:
    """Load a MedicalNet file into the backbone of `network`, whose head stays as it is, and return the report.

    Accepts torch's formats and safetensors; entries bare or under `state_dict`, with or without the prefixes of
    wrappers. All is checked before anything is copied: after an error the network is as it was.
    Raises WeightsError: no such file, not a checkpoint, truncated, objects that would run code, wrong depth, width,
    channels or shortcuts, entries missing or left over, other shapes, values that are not finite.
    """
    file = _read(Path(path), network.depth)
    wanted = _Layout.of(
        {name: tensor.shape for name, tensor in network.backbone.state_dict().items()}
    )
    _check_layout(file, wanted)
    report = _account(file, network, network.geometry)
    fresh = {name: torch.zeros((), dtype=torch.long) for name in network.backbone.state_dict()}
    network.backbone.load_state_dict(fresh | file.tensors_of(fresh))
    return report


def pretrained_problems(configs: Iterable[FineTuneConfig]) -> list[str]:
    """Return why checkpoints that runs of `configs` start from do not fill their networks; each network is tried once."""
    problems: dict[str, None] = {}
    tried = set()
    for config in configs:
        network = (config.pretrained_path, config.depth, config.width, config.in_channels)
        if config.pretrained_path is None or network in tried:
            continue
        tried.add(network)
        try:
            load_pretrained(configured_network(config), config.pretrained_path)
        except WeightsError as error:
            problems |= dict.fromkeys(error.problems)
    return list(problems)


def inspect_weights(path: str | Path) -> LoadReport:
    """Return what loading the file would report, for the depth, width and channels that it has itself.

    Raises WeightsError where no network of this project could load it, with the reasons `load_pretrained` gives.
    """
    file = _read(Path(path), None)
    _check_layout(file, None)
    layout = file.layout
    assert layout.depth is not None
    with torch.device("meta"):
        network = build_network(
            depth=layout.depth,
            width=max(layout.planes or PLANES[-1], PLANES[-1] // PLANES[0]) / PLANES[-1],
            geometry="strided",
            head="cosine",
            num_classes=2,
            # Entries that a file lacks altogether are reported one by one
            in_channels=layout.in_channels or 1,
            dropout=0.0,
        )
    return _account(file, network, None)


def save_medicalnet(backbone: nn.Module, path: str | Path) -> None:
    """Write a backbone the way MedicalNet's files are: `{"state_dict": {"module.<name>": tensor}}`.

    The file appears whole or not at all. Missing folders are made.
    """
    path = Path(path)
    state = {
        f"module.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in backbone.state_dict().items()
    }
    save_state(path, {"state_dict": state})


def fetch(name: str, folder: str | Path) -> Path:
    """Download a released file into `folder`, check its sha256, and return its path.

    `name` is a file's name or short for it: `resnet50` (8 datasets), `resnet50_23dataset`. A file that is already there and
    is the released one is not downloaded again. The hub's own variables apply (HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME). Raises
    WeightsError for an unknown name, without a network connection (the message names the file and its place), for other
    bytes than the released ones, of which nothing is kept, and where another file of that name is in the way.
    """
    official = _official_file(name)
    target = Path(folder).expanduser().absolute() / official.name
    if target.exists():
        if target.is_file() and _sha256(target) == official.sha256:
            return target
        raise WeightsError(
            f"{target}: is there already and is not the released file: move it away and fetch again"
        )

    import huggingface_hub  # here, since everything else works without a network
    from huggingface_hub import errors

    # Among its bases is the error of whichever HTTP library this version of the hub's client uses.
    transport: tuple[type, ...] = errors.HfHubHTTPError.__bases__
    failures: tuple[type[BaseException], ...] = (
        errors.EntryNotFoundError,
        OSError,
        RuntimeError,
        *transport,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        try:
            with _quiet("huggingface_hub"):
                arrived = Path(
                    huggingface_hub.hf_hub_download(
                        official.repository, official.name, local_dir=temporary
                    )
                )
        except failures as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"{official.name} could not be fetched ({reason}): {_by_hand(official)}, and put it at {target}"
            ) from error
        sha256 = _sha256(arrived)
        if sha256 != official.sha256:
            raise WeightsError(
                f"{official.name}: {arrived.stat().st_size:,} bytes with sha256 {sha256} arrived from "
                f"{official.repository}, and were not kept: {_by_hand(official)}, and put it at {target}"
            )
        arrived.replace(target)
    return target


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drop the logger's messages below an error: a client without a network connection logs every retry, twice."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True)
class _Layout:
    """A ResNet's layout, inferred from names and shapes of its entries; None for unknown properties."""

    dimensions: int | None
    in_channels: int | None
    planes: int | None  # inside the blocks of layer 4: the finest measure of the width
    bottleneck: bool
    blocks: tuple[int, ...]
    convolved_shortcuts: bool
    shortcut_biases: tuple[str, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size]) -> "_Layout":
        stem = shapes.get("conv1.weight", torch.Size())
        last = shapes.get("layer4.0.conv1.weight", torch.Size())
        return cls(
            dimensions=len(stem) - 2 if len(stem) >= 3 else None,
            in_channels=stem[1] if len(stem) >= 3 else None,
            planes=last[0] if last else None,
            bottleneck=any(name.startswith("layer") and ".conv3." in name for name in shapes),
            blocks=_blocks(shapes),
            convolved_shortcuts=any(".downsample." in name for name in shapes),
            shortcut_biases=tuple(name for name in shapes if name.endswith(".downsample.0.bias")),
        )

    @property
    def kind(self) -> str:
        return "bottleneck" if self.bottleneck else "basic"

    @property
    def depth(self) -> int | None:
        return next(
            (depth for depth, layout in BLOCKS.items() if layout == (self.kind, self.blocks)), None
        )

    @property
    def shortcuts(self) -> str:
        return "B" if self.convolved_shortcuts else "A"

    @property
    def width(self) -> float | None:
        return None if self.planes is None else self.planes / PLANES[-1]


def _blocks(names: Iterable[str]) -> tuple[int, ...]:
    """How many blocks each of the layers 1 to 4 has."""
    blocks: dict[str, set[str]] = {f"layer{number}": set() for number in range(1, 5)}
    for name in names:
        layer, _, rest = name.partition(".")
        if layer in blocks and rest:
            blocks[layer].add(rest.partition(".")[0])
    return tuple(map(len, blocks.values()))


@dataclass(frozen=True)
class _File:
    """A file that could be read: its entries by their name in a ResNet, each with its name in the file."""

    path: Path
    size_bytes: int
    sha256: str
    entries: dict[str, tuple[str, Tensor]]

    @property
    def layout(self) -> _Layout:
        return _Layout.of(
            {
                name: tensor.shape
                for name, (_, tensor) in self.entries.items()
                if not name.startswith(HEADS)
            }
        )

    def tensors_of(self, network: Collection[str]) -> dict[str, Tensor]:
        """The entries that a network with entries of these names has."""
        return {name: tensor for name, (_, tensor) in self.entries.items() if name in network}

    @property
    def heads(self) -> tuple[str, ...]:
        """Names in the file of the entries of a head for some other task."""
        return tuple(file for name, (file, _) in self.entries.items() if name.startswith(HEADS))

    def fail(self, *problems: str) -> NoReturn:
        raise WeightsError(f"{self.path}: {problem}" for problem in problems)


def _read(path: Path, depth: int | None) -> _File:
    """Return the tensors of a file under their names in a ResNet; nothing is known yet of whether they fit."""
    path = path.expanduser()
    if not path.exists():
        raise WeightsError(f"{path.absolute()}: no such file: {_where_from(path, depth)}")
    if not path.is_file():
        inside = sorted(file.name for file in path.glob("*.pth"))
        raise WeightsError(
            f"{path}: is a folder: name the file in it" + (f", {_some(inside)}" if inside else "")
        )
    try:
        sha256 = _sha256(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error

    tensors = _tensors(path)
    prefix = _prefix_of_one(path, tensors)
    entries: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = _without_prefixes(name.removeprefix(prefix))
        if bare in entries:
            raise WeightsError(
                f"{path}: {entries[bare][0]} and {name} are both {bare}: save one network a file"
            )
        entries[bare] = (name, tensor)
    return _File(path, path.stat().st_size, sha256, entries)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under their names in it. Raises WeightsError where it holds anything else."""
    entries = {str(name): value for name, value in _entries(path).items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    others = [name for name in entries if name not in tensors]
    if not tensors:
        raise WeightsError(
            f"{path}: not a checkpoint of weights: no tensors at its top and no 'state_dict'; it holds "
            f"{_some(others) or 'nothing'}"
        )
    if others:
        raise WeightsError(
            f"{path}: has {_count(others)} without a tensor among its weights: {_some(others)}"
        )
    return tensors


def _prefix_of_one(path: Path, names: Iterable[str]) -> str:
    """Return what a training program has put before the names of its network, such as `net.`; empty where it is known or none.

    Raises WeightsError where there are several networks.
    """
    known = set(names)
    if any(_without_prefixes(name) == "conv1.weight" for name in known):
        return ""
    found = sorted(
        name.removesuffix("conv1.weight")
        for name in known
        if name.endswith(".conv1.weight")
        and f"{name.removesuffix('conv1.weight')}layer1.0.conv1.weight" in known
    )
    if len(found) > 1:
        raise WeightsError(
            f"{path}: holds networks under {', '.join(found)}: save one network a file"
        )
    return found[0] if found else ""


_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file begins that torch 1.6 or later wrote, and an earlier one: the released ones are of the earlier."""

_DAMAGED = (*DAMAGED, SafetensorError, struct.error, AssertionError, ArithmeticError, OSError)
"""What reading a file of weights was seen to raise on truncated and on altered files, and its kin."""


def _entries(path: Path) -> Mapping[object, object]:
    """Return the entries of the file's state dict, whatever they are. Runs no code from the file."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path}: empty file: get it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: a git-lfs pointer and not the file: run `git lfs pull`, or get the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path}: a web page and not a checkpoint: get the file itself")

    try:
        checkpoint: object = _load(path, start)
    except _NotACheckpoint as error:
        raise WeightsError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise WeightsError(f"{path}: {_damage(path, start, error)}") from error

    if not isinstance(checkpoint, Mapping):
        raise WeightsError(
            f"{path}: not a checkpoint of weights: holds a {type(checkpoint).__name__}, not a dict"
        )
    return _unwrapped(path, checkpoint)


def _damage(path: Path, start: bytes, error: Exception) -> str:
    """What is wrong with a file that torch could not read."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and found:
        number = "a NumPy number, " if found[1].startswith("numpy") else ""
        return (
            f"holds {number}{found[1]} in addition to tensors: loading that would run code, so it was not loaded; save only the "
            "weights, torch.save({'state_dict': network.state_dict()}, ...), where the file comes from"
        )
    if not (start.startswith((_ZIP, _LEGACY)) or _is_safetensors(start)):
        return "not a checkpoint: neither torch's format nor safetensors"
    official = OFFICIAL_FILES.get(path.name)
    released = ""
    if official and official.size_bytes:
        released = f" of {official.size_bytes:,} in the released file"
    return f"truncated or damaged, {path.stat().st_size:,} bytes{released}: get it again"


def _has_weights(value: object) -> bool:
    """Whether it is a mapping with a tensor that is no single number."""
    return isinstance(value, Mapping) and any(
        isinstance(one, Tensor) and one.dim() for one in value.values()
    )


def _unwrapped(path: Path, checkpoint: Mapping[object, object]) -> Mapping[object, object]:
    """Return the state dict of a checkpoint: at its top, under `state_dict`, or under the only name that has tensors.

    Training programs save it as `net`, `model`, `model_state_dict`, `ema` and so on, next to numbers such as counts.
    """
    if isinstance(wrapped := checkpoint.get("state_dict"), Mapping):
        return wrapped
    if _has_weights(checkpoint):
        return checkpoint
    inside = {
        name: value.get("state_dict", value)
        for name, value in checkpoint.items()
        if isinstance(value, Mapping)
    }
    networks = {name: value for name, value in inside.items() if _has_weights(value)}
    if len(networks) > 1:
        names = list(map(str, networks))
        raise WeightsError(
            f"{path}: holds weights under {', '.join(names)}: save the one to start from, "
            f"torch.save({{'state_dict': torch.load(OLD)['{names[0]}']}}, NEW)"
        )
    return next(iter(networks.values()), checkpoint)


class _NotACheckpoint(Exception):
    pass


def _load(path: Path, start: bytes) -> object:
    if _is_safetensors(start):
        return load_file(path)
    if start.startswith(_ZIP):
        # Its directory is at the end: a truncated one fails here
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        if not any(member.endswith("data.pkl") for member in members):
            inside = [member for member in members if member.endswith((".pth", ".pt"))]
            raise _NotACheckpoint(
                f"a zip archive and not a checkpoint: unpack it ({_some(inside or members)})"
            )
        if (member := damaged_member(path)) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {member}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(start: bytes) -> bool:
    """A header of JSON comes after its length in 8 bytes."""
    return start[8:9] == b"{" and not start.startswith((_ZIP, _LEGACY))


def _require_resnet(file: _File) -> None:
    """Raise WeightsError unless the file has entries of a backbone in three dimensions."""
    if file.layout.dimensions is None and not any(file.layout.blocks):
        names = [original for original, _ in file.entries.values()]
        file.fail(f"has no entry of a ResNet backbone among {_count(names)}: {_some(names)}")
    if file.layout.dimensions not in (None, 3):
        file.fail(f"weights of a {file.layout.dimensions}D network; MedicalNet's are 3D")


def _check_layout(file: _File, wanted: _Layout | None) -> None:
    """Raise WeightsError with the differences of the network as a whole, before entries are compared one by one.

    `wanted` is the run's network; None accepts every depth, width and number of channels.
    """
    _require_resnet(file)
    layout = file.layout
    problems = _block_problems(layout, wanted.depth if wanted else None)
    if wanted and layout.in_channels not in (None, wanted.in_channels):
        problems.append(
            f"its stem takes {layout.in_channels} channel(s), the run has in_channels={wanted.in_channels}: "
            f"set in_channels={layout.in_channels}, or use a file made for {wanted.in_channels} (the released ones: 1)"
        )
    if wanted and layout.width not in (None, wanted.width):
        problems.append(
            f"has width {layout.width:g}, the run has width={wanted.width:g}: "
            f"set width={layout.width:g}, or use another file (the released ones: 1)"
        )
    if problems:
        file.fail(*problems)


def _block_problems(layout: _Layout, run: int | None) -> list[str]:
    """The differences in blocks and shortcuts from the depth of the run, or without one from all that are released."""
    problems = []
    if layout.depth is None or run not in (None, layout.depth):
        blocks = "+".join(map(str, layout.blocks))
        looks = f"ResNet-{layout.depth}" if layout.depth else "no released depth"
        advice = f"set depth={layout.depth}, or " if layout.depth and run else ""
        problems.append(
            f"looks like {looks} ({layout.kind} blocks {blocks} in layers 1 to 4)"
            + (f", the run has depth={run}" if run else "")
            + f": {advice}use {_released_names(run)}"
        )
    elif layout.shortcuts != (expected := "A" if layout.depth in SHORTCUT_A_DEPTHS else "B"):
        problems.append(
            f"has shortcuts {layout.shortcuts}, and MedicalNet's ResNet-{layout.depth} {expected}: "
            f"use {_released_names(layout.depth)}, or a file made with shortcut_type={expected!r}"
        )
    if layout.shortcut_biases:
        problems.append(
            f"has a bias in {len(layout.shortcut_biases)} shortcuts ({_some(layout.shortcut_biases)}), and MedicalNet's "
            "have none: it was made with MONAI's default; use one made with bias_downsample=False"
        )
    return problems


def _account(file: _File, network: Classifier, geometry: str | None) -> LoadReport:
    """Return where each entry of the file would go in `network`; raise WeightsError with all that does not add up."""
    backbone = network.backbone.state_dict()
    loaded = file.tensors_of(backbone)
    absent = [name for name in backbone if name not in loaded]
    counters = [name for name in absent if name.endswith(COUNTER)]
    _check_entries(file, backbone, loaded)

    parameters = file.tensors_of(dict(network.backbone.named_parameters()))
    layout = file.layout
    assert layout.depth is not None
    assert layout.width is not None
    assert layout.in_channels is not None
    report = LoadReport(
        path=file.path.absolute(),
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        depth=layout.depth,
        width=layout.width,
        in_channels=layout.in_channels,
        shortcuts=layout.shortcuts,
        geometry=geometry,
        parameters=sum(map(Tensor.numel, parameters.values())),
        entries=len(file.entries),
        loaded=_below("backbone", loaded),
        missing=_below("head", network.head.state_dict()),
        counters=_below("backbone", counters),
        ignored=file.heads,
    )
    assert len(report.loaded) + len(report.ignored) == report.entries
    assert {*report.loaded, *report.counters, *report.missing} == set(network.state_dict())
    return report


def _below(module: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


def _check_entries(
    file: _File, backbone: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> None:
    """Raise WeightsError with all entries that only one side has, or whose values the network cannot take."""
    found = {
        "lacks {} of the backbone, and only the head may be new": [
            name for name in backbone if name not in loaded and not name.endswith(COUNTER)
        ],
        "has {} that the network has no place for": [
            original
            for name, (original, _) in file.entries.items()
            if name not in backbone and not name.startswith(HEADS)
        ],
    }
    found |= _misfits(loaded, backbone)
    if problems := [f"{what.format(_count(n))}: {_some(n)}" for what, n in found.items() if n]:
        file.fail(*problems)


def _misfits(loaded: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Entries of both sides whose values the network cannot take, by the problem, with `{}` for their number."""
    pairs = {name: (given, backbone[name]) for name, given in loaded.items()}
    return {
        "has another shape than the network in {}": [
            f"{name} {tuple(given.shape)} instead of {tuple(own.shape)}"
            for name, (given, own) in pairs.items()
            if given.shape != own.shape
        ],
        "has no real numbers in {}": [
            f"{name} {given.dtype}"
            for name, (given, own) in pairs.items()
            if own.is_floating_point() and not given.is_floating_point()
        ],
        "has NaN or infinite values in {}": [
            name for name, given in loaded.items() if not torch.isfinite(given).all()
        ],
    }


def _without_prefixes(name: str) -> str:
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(found)
    return name


def _official_file(name: str) -> OfficialFile:
    found = re.fullmatch(
        r"(?:medicalnet[_-]?)?resnet[_-]?(\d+)([_-]?23[_-]?(?:datasets?)?)?(?:\.pth)?", name.lower()
    )
    key = f"resnet_{found[1]}{'_23dataset' if found[2] else ''}.pth" if found else name
    if key not in OFFICIAL_FILES:
        raise WeightsError(f"{name!r} is none of the released files: {', '.join(OFFICIAL_FILES)}")
    return OFFICIAL_FILES[key]


def _released_names(depth: int | None) -> str:
    names = [file.name for file in OFFICIAL_FILES.values() if file.depth == depth]
    return " or ".join(names) if names else "a released file (resnet_10.pth to resnet_200.pth)"


def _where_from(path: Path, depth: int | None) -> str:
    """What to put at `path`: the released file of that name, or the released ones of the run's depth."""
    if path.name in OFFICIAL_FILES:
        official = OFFICIAL_FILES[path.name]
        return f"{_by_hand(official)}, and put it there, or run `medtune weights fetch {path.stem}`"
    files = [file for file in OFFICIAL_FILES.values() if file.depth == depth]
    if not files:
        return "check the path; pretrained/README.md lists the released files"
    return (
        f"put {_released_names(depth)} there, of {files[0].repository} on huggingface.co, "
        f"or run `medtune weights fetch {Path(files[0].name).stem}` and name the fetched file"
    )


def _by_hand(official: OfficialFile) -> str:
    size = f"{official.size_bytes:,} bytes, " if official.size_bytes else ""
    return (
        f"download {official.name} ({size}sha256 {official.sha256}) from the repository "
        f"{official.repository} on huggingface.co"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _count(names: list[str]) -> str:
    return f"{len(names)} entr{'y' if len(names) == 1 else 'ies'}"
