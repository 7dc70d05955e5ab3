"""What users give medtune by mistake, at every entrance: one line that names the input and the remedy, or success.

Each case runs the command line's own entry point. Exit code 1 or 2, no traceback, nothing of a foreign type; the finer
distinctions of each reader have their tests with that reader. Below the table, readers are fed with made-up content.
"""

import gzip
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainables.checkpoints import save_state, write_json
from trainables.config import ConfigError, FineTuneConfig, build_config
from trainables.data.scans import VolumeError, read_scan
from tune_app.cli.app import main
from tune_app.cli.common import parse_settings
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.policy_spec import PolicyError, PolicySpec, read_policy
from tune_app.study.rows import StudyDamageError
from tune_app.study.spec import StudySpec, build_spec
from tune_app.study.yaml_text import YamlError, load_yaml
from tune_app.synthetic import write_cohort

SMALL = ["--set", "volume_shape=16", "--set", "num_folds=2"]


class Case(NamedTuple):
    """One mistake: `make` gets an empty folder and returns the words after `medtune`."""

    name: str
    make: Callable[[Path], list[Any]]
    says: str
    code: int = 1


# Tables ----------------------------------------------------------------------------------------------------------------


def table_of(content: str | bytes, name: str = "table.csv") -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return ["data", "check", path]

    return make


def rows(*lines: str, header: str = "path,label,subject") -> Callable[[Path], list[Any]]:
    """A table of real, good volumes, whose cells are at fault."""

    def make(folder: Path) -> list[Any]:
        for name in "abcd":
            scan(folder / f"{name}.nii.gz", seed=ord(name))
        (folder / "table.csv").write_text("\n".join([header, *lines]) + "\n")
        return ["data", "check", folder / "table.csv", *SMALL]

    return make


def parquet(folder: Path) -> list[Any]:
    pd.DataFrame({"path": ["a.nii"], "label": [0], "subject": ["x"]}).to_parquet(
        folder / "t.parquet"
    )
    content = (folder / "t.parquet").read_bytes()
    (folder / "t.parquet").write_bytes(content[: len(content) // 2])
    return ["data", "check", folder / "t.parquet"]


def missing_labels(folder: Path) -> list[Any]:
    scan(folder / "a.nii.gz")
    pd.DataFrame({"path": ["a.nii.gz"] * 2, "label": [1, None], "subject": ["x", "y"]}).to_parquet(
        folder / "t.parquet"
    )
    return ["data", "check", folder / "t.parquet", *SMALL]


TABLES = [
    Case(
        "no table", lambda folder: ["data", "check", folder / "none.csv"], "none.csv: no such file"
    ),
    Case(
        "a folder for a table",
        lambda folder: ["data", "check", folder],
        "a CSV or Parquet file is needed",
    ),
    Case("an empty table", table_of(""), "empty: a header and rows are needed"),
    Case("a header alone", table_of("path,label,subject\n"), "no rows"),
    Case(
        "a spreadsheet", table_of(b"PK\x03\x04rest"), "looks like a spreadsheet: export it as CSV"
    ),
    Case(
        "UTF-16", table_of("path,label,subject\n".encode("utf-16")), "UTF-16 text: save it as UTF-8"
    ),
    Case(
        "Latin-1",
        table_of("path,label,subject\nmüller.nii,0,a\n".encode("latin-1")),
        "line 2 is not UTF-8",
    ),
    Case("bytes", table_of(b"path,label\0"), "is a binary file"),
    Case("an open quote", table_of('path,label,subject\n"a.nii,0,x\n'), "not a CSV table"),
    Case(
        "semicolons",
        table_of("path;label;subject\na.nii;0;x\n"),
        "Columns must be separated by commas",
    ),
    Case("no subject", table_of("path,label\na.nii,0\n"), "no column 'subject'"),
    Case("a cut Parquet table", parquet, "not a Parquet table"),
    Case("an absent label", missing_labels, "label is missing"),
    Case(
        "a word for a label",
        rows("a.nii.gz,benign,x", "b.nii.gz,1,y"),
        "label 'benign': a whole number from 0",
    ),
    Case(
        "a class too many",
        rows("a.nii.gz,0,x", "b.nii.gz,7,y"),
        "label '7': a whole number from 0 to 1",
    ),
    Case("a file that is not there", rows("a.nii.gz,0,x", "gone.nii.gz,1,y"), "no such file below"),
    Case("one file twice", rows("a.nii.gz,0,x", "a.nii.gz,1,y"), "the same file as row 1"),
    Case(
        "a subject on both sides",
        rows("a.nii.gz,0,x,train", "b.nii.gz,1,x,val", header="path,label,subject,split"),
        "subject 'x' is in train (row 1) and in val (row 2)",
    ),
    Case(
        "another word for a split",
        rows("a.nii.gz,0,x,training", "b.nii.gz,1,y,val", header="path,label,subject,split"),
        "did you mean 'train'?",
    ),
    Case("one class", rows("a.nii.gz,0,x", "b.nii.gz,0,y"), "no row of class 1"),
    Case(
        "too few subjects",
        rows("a.nii.gz,0,x", "b.nii.gz,1,y"),
        "class 0 has 1 subject(s) to spread over the folds",
    ),
    Case(
        "terminal codes in a cell",
        rows("a.nii.gz,\x1b[31m0,x", "b.nii.gz,1,y"),
        "label '\\\\x1b[31m0'",
    ),
]

# Volumes ---------------------------------------------------------------------------------------------------------------


def scan(
    path: Path,
    voxels: Any = (9, 10, 11),
    *,
    kind: Any = nib.Nifti1Image,
    seed: int = 0,
    **header: Any,
) -> Path:
    """Write a volume with nibabel, noise where only a shape is given; `header` sets fields as they are."""
    if isinstance(voxels, tuple):
        voxels = np.random.default_rng(seed).normal(100, 30, voxels).astype(np.float32)
    image = kind(voxels, np.eye(4))
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def volume(write: Callable[[Path], Any], name: str = "bad.nii.gz") -> Callable[[Path], list[Any]]:
    """A table of good volumes and the one that `write` puts at the path it is given."""

    def make(folder: Path) -> list[Any]:
        lines = ["path,label,subject"]
        for i in range(4):
            scan(folder / f"{i}.nii.gz", seed=i + 1)
            lines.append(f"{i}.nii.gz,{i % 2},s{i}")
        write(folder / name)
        (folder / "table.csv").write_text("\n".join([*lines, f"{name},0,s9"]) + "\n")
        return ["data", "check", folder / "table.csv", *SMALL]

    return make


def patched(offset: int, kind: str, *values: Any) -> Callable[[Path], Any]:
    """A good plain file whose header has other values at an offset."""

    def write(path: Path) -> None:
        scan(path.with_suffix(".nii"))
        content = bytearray(path.with_suffix(".nii").read_bytes())
        struct.pack_into(kind, content, offset, *values)
        path.write_bytes(content)

    return write


def without_forms(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The file without qform and sform: a sound sform would make up for a spacing that is none."""

    def write(path: Path) -> None:
        make(path)
        content = bytearray(path.read_bytes())
        struct.pack_into("<2h", content, 252, 0, 0)
        path.write_bytes(content)

    return write


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """A good compressed file with other bytes."""

    def write(path: Path) -> None:
        scan(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def nan_voxels(path: Path) -> None:
    voxels = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    voxels[1, 2, 3] = np.nan
    scan(path, voxels)


def scaled(path: Path) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).normal(0, 1e-3, (9, 9, 9)), np.eye(4))
    image.set_data_dtype(np.int16)
    nib.save(image, path)


def big_endian(path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    data = np.arange(9 * 9 * 9, dtype=">i2").reshape(9, 9, 9)
    nib.save(nib.Nifti1Image(data, np.eye(4), header), path)


def gigabytes_of_zeros(path: Path) -> None:
    """A file of kilobytes that, decompressed, continues for 70 MiB behind its last voxel."""
    scan(path.with_suffix(".nii"))
    path.write_bytes(
        gzip.compress(path.with_suffix(".nii").read_bytes() + bytes(70 * 2**20), compresslevel=1)
    )


VOLUMES = [
    Case("no bytes", volume(lambda path: path.write_bytes(b"")), "empty: no bytes; copy it again"),
    Case("text", volume(lambda path: path.write_text("hello " * 200)), "not a NIfTI file"),
    Case(
        "half a gzip",
        volume(changed(lambda content: content[: len(content) // 2])),
        "its gzip stream ends early",
    ),
    Case(
        "a gzip with other bytes",
        volume(changed(lambda c: c[:60] + bytes(40) + c[100:])),
        "damaged gzip",
    ),
    Case("a wrong checksum", volume(changed(lambda c: c[:-8] + bytes(4) + c[-4:])), "damaged gzip"),
    Case("a loop of links", volume(loop), "Too many levels of symbolic links"),
    Case(
        "a link to nothing",
        volume(lambda path: path.symlink_to("nowhere")),
        "a link to a file that is not here",
    ),
    Case(
        "a folder", volume(lambda path: path.mkdir()), "a folder, a .nii or .nii.gz file is needed"
    ),
    Case("a pipe", volume(lambda path: os.mkfifo(path)), "a pipe or device"),
    Case(
        "a header of terabytes",
        volume(patched(40, "<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)),
        "119.2 TiB",
    ),
    Case(
        "no voxels",
        volume(patched(40, "<8h", 3, 0, 9, 9, 1, 1, 1, 1)),
        "of at least one voxel are allowed",
    ),
    Case("an image", volume(patched(40, "<8h", 2, 9, 110, 1, 1, 1, 1, 1)), "not an image"),
    Case(
        "five dimensions",
        volume(lambda path: scan(path, (8, 8, 8, 2, 2))),
        "three dimensions, or three and channels",
    ),
    Case(
        "two channels", volume(lambda path: scan(path, (8, 8, 8, 2))), "2 channel(s), in_channels=1"
    ),
    Case(
        "complex numbers", volume(patched(70, "<h", 32)), "voxels must be integers or real numbers"
    ),
    Case("colours", volume(patched(70, "<h", 128)), "datatype code 128"),
    Case("half of a pair", volume(patched(344, "4s", b"ni1\0")), "half of a .hdr and .img pair"),
    Case("voxels before the file", volume(patched(108, "<f", -5.0)), "vox_offset -5"),
    Case(
        "a spacing of zero",
        volume(without_forms(patched(76, "<4f", 1.0, 0.0, 1.0, 1.0))),
        "every value must be finite and > 0",
    ),
    Case(
        "a spacing of NaN",
        volume(without_forms(patched(76, "<4f", 1.0, 1.0, float("nan"), 1.0))),
        "spacing (1, nan, 1) mm",
    ),
    Case("a NaN", volume(nan_voxels), "1 of 512 voxels are not finite in float32"),
    Case(
        "one value",
        volume(lambda path: scan(path, np.ones((8, 8, 8), np.float32))),
        "constant: every voxel is 1",
    ),
    Case("too few bytes", volume(patched(40, "<8h", 3, 9, 10, 12, 1, 1, 1, 1)), "truncated"),
    Case("endless zeros behind", volume(gigabytes_of_zeros), "continues for more than 64 MiB"),
    Case(
        "NIfTI-2",
        volume(lambda path: scan(path, kind=nib.Nifti2Image)),
        "5 volumes of 5 subjects",
        0,
    ),
    Case("big-endian", volume(big_endian), "5 volumes of 5 subjects", 0),
    Case(
        "a fourth dimension of one",
        volume(lambda path: scan(path, (8, 8, 8, 1))),
        "5 volumes of 5 subjects",
        0,
    ),
    Case("scaled integers", volume(scaled), "5 volumes of 5 subjects", 0),
    Case(
        "gzip by another name",
        volume(lambda p: scan(p.with_suffix(".nii.gz")).rename(p), "bad.nii"),
        "5 volumes",
        0,
    ),
]

# Checkpoints and models ------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/medtune-was-here",)


def weights(write: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        write(folder / "resnet_50.pth")
        return ["weights", "check", folder / "resnet_50.pth"]

    return make


def cut_checkpoint(path: Path) -> None:
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(64, 1, 7, 7, 7)}}, path)
    path.write_bytes(path.read_bytes()[:5000])


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../escape.pth", b"x")


def resumed_from(write: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
    """`medtune train` into a folder that holds a checkpoint already."""

    def make(folder: Path) -> list[Any]:
        table = write_cohort(folder / "cohort", subjects=8, side=(12, 14))
        write(folder / "run" / "checkpoint.pt")
        small = [*SMALL, "--set", "depth=10", "--set", "width=0.125", "--epochs", 1, "--no-gpu"]
        return [
            "train",
            "--data",
            table,
            "--out",
            folder / "run",
            "--cache",
            folder / "cache",
            *small,
        ]

    return make


def written(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def saved_list(path: Path) -> None:
    path.parent.mkdir(parents=True)
    torch.save([1], path)


def model(change: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        (folder / "model").mkdir()
        change(folder / "model")
        scan(folder / "a.nii.gz")
        return ["predict", folder / "model", folder / "a.nii.gz", "--device", "cpu"]

    return make


CHECKPOINTS = [
    Case("no checkpoint", lambda folder: ["weights", "check", folder / "none.pth"], "no such file"),
    Case(
        "a folder for a checkpoint",
        lambda folder: ["weights", "check", folder],
        "is a folder: name the file in it",
    ),
    Case(
        "an empty checkpoint",
        weights(lambda path: path.write_bytes(b"")),
        "empty file: get it again",
    ),
    Case(
        "a web page",
        weights(lambda path: path.write_text("<!DOCTYPE html>")),
        "a web page and not a checkpoint",
    ),
    Case(
        "a git-lfs pointer",
        weights(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1")),
        "git lfs pull",
    ),
    Case("a cut checkpoint", weights(cut_checkpoint), "truncated or damaged"),
    Case("an archive", weights(archive), "a zip archive and not a checkpoint"),
    Case(
        "a pickle that runs code", weights(lambda p: torch.save({"x": Bomb()}, p)), "would run code"
    ),
    Case("a plain pickle", weights(lambda p: p.write_bytes(pickle.dumps(Bomb()))), "resnet_50.pth"),
    Case("no weights in it", weights(lambda p: torch.save({"a": 1}, p)), "no tensors at its top"),
    Case(
        "a network in 2D",
        weights(lambda p: torch.save({"conv1.weight": torch.zeros(64, 1, 7, 7)}, p)),
        "2D network",
    ),
    Case(
        "a damaged checkpoint to go on from",
        resumed_from(written(b"PK\x03\x04")),
        "remove it to start again",
    ),
    Case("an empty one", resumed_from(written(b"")), "remove it to start again"),
    Case(
        "one that runs code",
        resumed_from(written(pickle.dumps(Bomb()))),
        "remove it to start again",
    ),
    Case(
        "one of another version",
        resumed_from(lambda p: save_state(p, {"format": 99, "rows": []})),
        "checkpoint format 99",
    ),
    Case(
        "one that holds a list",
        resumed_from(saved_list),
        "remove it to start again",
    ),
    Case("no model", lambda folder: ["predict", folder / "none", folder], "none"),
    Case("an empty folder for a model", model(lambda folder: None), "model"),
    Case(
        "a model of another version",
        model(lambda folder: write_json(folder / "model.json", {"format": 99})),
        "no exported model here",
    ),
    Case(
        "a damaged model",
        model(lambda folder: (folder / "SHA256SUMS").write_text("{")),
        "SHA256SUMS",
    ),
]

# Study files, policies, command lines ----------------------------------------------------------------------------------

BOMB = "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMB = f"a: &a [x, x, x, x, x, x, x, x, x]\n{BOMB}"
"""Nine to the ninth words in 300 bytes: harmless until it is printed."""


def study_file(content: str | bytes) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        (folder / "study.yaml").write_bytes(
            content.encode() if isinstance(content, str) else content
        )
        return ["run", folder / "study.yaml", "--out", folder / "study"]

    return make


def policy_file(content: str) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        (folder / "policy.yaml").write_text(content)
        return ["backtest", "--generate", 3, "--epochs", 24, "--policy", folder / "policy.yaml"]

    return make


def words(*given: Any) -> Callable[[Path], list[Any]]:
    return lambda folder: [str(word).replace("FOLDER", str(folder)) for word in given]


def a_file(*given: Any) -> Callable[[Path], list[Any]]:
    """A command line that names FOLDER/file, which is a file where none should be."""

    def make(folder: Path) -> list[Any]:
        (folder / "file").write_text("mine")
        return words(*given)(folder)

    return make


STUDY_FILES = [
    Case(
        "no study file",
        lambda folder: ["run", folder / "none.yaml"],
        "no such study file; `medtune init` writes one",
    ),
    Case("not YAML", study_file("data: [1, 2\n"), "not YAML"),
    Case("tabs", study_file("config:\n\tepochs: 3\n"), "not YAML"),
    Case(
        "a list",
        study_file("- data\n"),
        "a study file is a mapping of fields to values, this is a list",
    ),
    Case("nothing", study_file(""), "this is a NoneType"),
    Case("bytes that are no text", study_file(b"\xff\xfe\x00data"), "study.yaml"),
    Case(
        "a tag that would run code",
        study_file("data: !!python/object/apply:os.system ['true']\n"),
        "not YAML",
    ),
    Case("an impossible date", study_file("data: 2024-13-45\n"), "not YAML"),
    Case("a number of 5000 digits", study_file(f"data: t.csv\nseed: {'9' * 5000}\n"), "study.yaml"),
    Case("brackets without end", study_file("data: " + "[" * 5000), "study.yaml"),
    Case(
        "a bomb for a number",
        study_file(f"{BOMB}data: t.csv\ntrials: *i\n"),
        "more than 100000 values",
    ),
    Case(
        "a bomb for a hyperparameter",
        study_file(f"{BOMB}data: t.csv\nconfig: {{epochs: *i}}\n"),
        "more than 100000 values",
    ),
    Case(
        "unknown fields",
        study_file("data: t.csv\ntrails: 3\n"),
        "unknown field 'trails'; did you mean 'trials'?",
    ),
    Case(
        "a place to write to",
        study_file("data: t.csv\nout: ../../elsewhere\n"),
        "unknown field 'out'",
    ),
    Case("a number for a name", study_file("data: t.csv\n3: 4\n"), "unknown field 3"),
    Case("a config that is a list", study_file("data: t.csv\nconfig: [1]\n"), "config"),
    Case("numbers for hyperparameters", study_file("data: t.csv\nconfig: {1: 2}\n"), "config.1"),
    Case("no data", study_file("trials: 3\n"), "name the table of volumes", 2),
    Case("a number for the data", study_file("data: 3\n"), "data: "),
    Case(
        "negative epochs",
        study_file("data: t.csv\nconfig: {epochs: -1}\n"),
        "epochs=-1: input should be greater",
    ),
    Case(
        "an infinite rate",
        study_file("data: t.csv\nconfig: {backbone_lr: .inf}\n"),
        "backbone_lr=inf",
    ),
    Case(
        "an unknown space",
        study_file("data: t.csv\nspace: documentd\n"),
        "did you mean 'documented'",
    ),
    Case("an unknown policy", study_file("data: t.csv\npolicy: {halvng: no}\n"), "policy.halvng"),
    Case("a budget of nothing", study_file("data: t.csv\ndisk_budget_gib: 0\n"), "disk_budget_gib"),
    Case(
        "no policy file",
        words("backtest", "--generate", 3, "--policy", "FOLDER/none.yaml"),
        "none.yaml",
    ),
    Case("a policy that is a word", policy_file("halving\n"), "a policy is a mapping"),
    Case("an unknown field of a policy", policy_file("halvng: no\n"), "halvng"),
    Case(
        "an impossible value of a policy",
        policy_file("reduction_factor: 0.5\n"),
        "reduction_factor",
    ),
    Case("a date in a policy", policy_file("grace_epochs: 2024-13-45\n"), "policy.yaml"),
    Case("brackets without end in a policy", policy_file("[" * 5000), "policy.yaml"),
]

COMMANDS = [
    Case("an unknown command", words("rnu"), "No such command 'rnu'", 2),
    Case("an unknown option", words("run", "--trails", 3), "No such option", 2),
    Case(
        "a word for a number",
        words("run", "--data", "t.csv", "--trials", "many"),
        "Input should be",
        2,
    ),
    Case("a setting without a value", words("config", "--set", "s"), "write NAME=VALUE"),
    Case("a date for a hyperparameter", words("config", "--set", "s=2024-13-45"), "s='2024-13-45'"),
    Case("a tag for a hyperparameter", words("config", "--set", "s=!!python/name:os.system"), "s="),
    Case(
        "a former name", words("config", "--set", "learning_rate=1"), "did you mean 'backbone_lr'?"
    ),
    Case(
        "two that do not go together",
        words("config", "--set", "fold=7"),
        "fold=7: there are folds 0 to 4",
    ),
    Case(
        "a negative budget",
        words("run", "--data", "t.csv", "--disk-budget", "-1"),
        "disk_budget_gib",
    ),
    Case("an unknown logger", words("run", "--data", "t.csv", "--log", "wandb"), "log"),
    Case("a file for the study", a_file("run", "--data", "t.csv", "--out", "FOLDER/file"), "file"),
    Case(
        "a study below a file",
        a_file("run", "--data", "t.csv", "--out", "FOLDER/file/study"),
        "file",
    ),
    Case("no study to resume", words("resume", "FOLDER/none"), "no study here"),
    Case("no study to report on", words("report", "FOLDER/none"), "no study here"),
    Case(
        "no study to export",
        words("export", "FOLDER/none", "--out", "FOLDER/model"),
        "no study here",
    ),
    Case("no study to confirm", words("confirm", "FOLDER/none"), "no study here"),
    Case("no earlier study", words("backtest", "FOLDER/none"), "none"),
    Case("no sizes", words("bench", "train", "--sizes", "big"), "--sizes 'big'", 2),
    Case("no batches", words("bench", "train", "--batches", "6by2"), "6by2"),
    Case(
        "no geometry",
        words("bench", "train", "--sizes", 16, "--geometries", "round", "--depth", 10),
        "round",
    ),
    Case("a study file that is there", a_file("init", "FOLDER/file"), "--force writes over it"),
    Case("unknown variants", words("ablate", "--data", "t.csv", "--variants", "every"), "every"),
    Case(
        "no archive",
        a_file("data", "import", "FOLDER/file", "FOLDER/out"),
        "not a MedMNIST archive",
    ),
    Case("a name of a thousand letters", words("results", "FOLDER/" + "x" * 1000), "x" * 50),
]

# Study folders ---------------------------------------------------------------------------------------------------------


def study(change: Callable[[StudyFiles], Any], *command: str) -> Callable[[Path], list[Any]]:
    """A small study of one trial, changed; and the command to run on it."""

    def make(folder: Path) -> list[Any]:
        files = StudyFiles(folder / "study")
        spec = build_spec({"data": str(folder / "t.csv"), "trials": 2, "config": {"epochs": 3}})
        files.write({"spec": spec.model_dump(mode="json"), "cohort": "c", "created": 1.0})
        record = {
            "trial": "00000",
            "number": 0,
            "overrides": {},
            "state": "running",
            "started": 1.0,
            "failures": 0,
        }
        write_json(files.trial("00000").record, record)
        lines = [
            {"trial": "00000", "time": 2.0, "epoch": epoch, "val_auc": 0.6} for epoch in (1, 2)
        ]
        files.epochs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        change(files)
        return [*(command or ("results",)), folder / "study"]

    return make


def spec_field(name: str, value: Any) -> Callable[[StudyFiles], Any]:
    def change(files: StudyFiles) -> None:
        content = json.loads(files.spec.read_text())
        (content["spec"] if name != "format" else content)[name] = value
        files.spec.write_text(json.dumps(content))

    return change


def appended(name: str, content: str) -> Callable[[StudyFiles], Any]:
    def change(files: StudyFiles) -> None:
        with (files.root / name).open("a") as file:
            file.write(content)

    return change


def replaced(name: str, content: str) -> Callable[[StudyFiles], Any]:
    return lambda files: (files.root / name).write_text(content)


STUDIES = [
    Case(
        "a study of a later format",
        study(spec_field("format", 3)),
        "format 3, this version reads 1 and 2",
    ),
    Case("a field of a later version", study(spec_field("warp", 9)), "unknown field 'warp'"),
    Case(
        "a damaged study.json",
        study(replaced("study.json", '{"format": 1')),
        "damaged or not a study",
    ),
    Case("an empty study.json", study(replaced("study.json", "")), "damaged or not a study"),
    Case("a list for study.json", study(replaced("study.json", "[]")), "damaged or not a study"),
    Case(
        "a study.json without a spec", study(replaced("study.json", '{"format": 1}')), "study.json"
    ),
    Case(
        "a text for the spec",
        study(replaced("study.json", '{"format": 1, "spec": "x"}')),
        "study.json",
    ),
    Case("brackets in study.json", study(replaced("study.json", "[" * 100_000)), "study.json"),
    Case(
        "a cut last row",
        study(appended("epochs.jsonl", '{"trial": "00000", "epo')),
        "last line unfinished",
        0,
    ),
    Case(
        "a cut last row to report",
        study(appended("epochs.jsonl", '{"trial"'), "report"),
        "report.html",
        0,
    ),
    Case(
        "a cut row in the middle",
        study(appended("epochs.jsonl", '{"tri\n{"trial": "00000", "epoch": 3}\n')),
        ":3: not a JSON row",
    ),
    Case(
        "a row of zeros", study(appended("epochs.jsonl", "\0" * 100 + "\n")), ":3: not a JSON row"
    ),
    Case(
        "an epoch twice",
        study(appended("epochs.jsonl", '{"trial": "00000", "epoch": 2}\n')),
        "epoch 2 again",
    ),
    Case(
        "a trial with a path for a name",
        study(appended("epochs.jsonl", '{"trial": "../../x", "epoch": 1}\n')),
        "must be the id",
    ),
    Case(
        "damage left out on request",
        study(appended("epochs.jsonl", "x\n"), "results", "--skip-damage"),
        "skipped as damaged",
        0,
    ),
    Case("a damaged decision", study(appended("decisions.jsonl", "x\n")), "decisions.jsonl:1"),
    Case(
        "a damaged trial", study(replaced("trials/00000/trial.json", "{")), "trial.json: not JSON"
    ),
    Case(
        "a trial of another name",
        study(replaced("trials/00000/trial.json", '{"trial": "7", "state": "running"}')),
        "names trial",
    ),
    Case(
        "an unknown filter", study(lambda files: None, "results", "--where", "speed > 3"), "speed"
    ),
    Case(
        "code for a filter",
        study(lambda files: None, "results", "--where", "__import__('os').getcwd() == 1"),
        "import",
    ),
    Case("an unknown column", study(lambda files: None, "results", "--columns", "speed"), "speed"),
    Case(
        "a damaged study to resume",
        study(replaced("study.json", "{"), "resume"),
        "damaged or not a study",
    ),
    Case(
        "no trial to export",
        study(lambda files: None, "export", "--trial", "77", "--out", "m"),
        "77",
    ),
]

CASES = [*TABLES, *VOLUMES, *CHECKPOINTS, *STUDY_FILES, *COMMANDS, *STUDIES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_ends_in_a_line_that_helps(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(case.make(tmp_path), tmp_path, monkeypatch, capsys)
    assert (code, "Traceback" in said) == (case.code, False), said
    assert case.says in said
    assert "\x1b[31m" not in said
    assert not Path("/tmp/medtune-was-here").exists()


def run(
    words: list[Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    """Exit code and output of `medtune WORDS`; an exception that reaches the user is raised."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MEDTUNE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", ["medtune", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    code = ended.value.code or 0
    return code if isinstance(code, int) else 1, captured.out + captured.err


# Made-up content -------------------------------------------------------------------------------------------------------

fuzzed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.just("9" * 400),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
"""Whatever YAML or JSON may hold."""

yaml_like = st.text(
    alphabet="abc:-[]{}&*!|>#,'\"%@? \n\t0123456789.eE~<=\\\x00\u2028é", max_size=200
)


@fuzzed
@given(text=yaml_like | st.text(max_size=100))
def test_any_text_is_yaml_or_told(text: str) -> None:
    with suppress(YamlError):
        load_yaml(text)
    with suppress(ConfigError):
        build_config(parse_settings([f"s={text}", text]))


@fuzzed
@given(
    fields=st.dictionaries(
        st.sampled_from(sorted(StudySpec.model_fields)) | st.text(max_size=8), values, max_size=5
    ),
    config=st.dictionaries(
        st.sampled_from(sorted(FineTuneConfig.model_fields)) | st.text(max_size=8),
        values,
        max_size=5,
    ),
)
def test_any_fields_are_a_study_or_told(fields: dict[str, Any], config: dict[str, Any]) -> None:
    with suppress(SpecError):
        build_spec({"data": "t.csv", **fields})
    with suppress(SpecError):
        build_spec({"data": "t.csv", "config": config})
    with suppress(ConfigError):
        build_config(config)


@fuzzed
@given(
    config=st.dictionaries(
        st.sampled_from(sorted(PolicySpec.model_fields)) | st.text(max_size=8), values, max_size=5
    )
)
def test_any_policy_is_one_or_told(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    with suppress(PolicyError):
        read_policy(path)


row = st.fixed_dictionaries(
    {},
    optional={
        "trial": st.just("00000") | values,
        "epoch": st.integers(1, 4) | values,
        "time": st.floats(0, 1e9) | values,
        "val_auc": st.floats(0, 1) | values,
        "precision": values,
        "drw_active": values,
        "made up": values,
    },
)


@settings(fuzzed, max_examples=20)
@given(
    lines=st.lists(row.map(json.dumps) | st.text(max_size=40), max_size=6),
    end=st.sampled_from(["", "\n"]),
)
def test_any_lines_are_rows_or_told(tmp_path: Path, lines: list[str], end: str) -> None:
    root = study(lambda files: None)(tmp_path)[-1]
    for name in ("epochs.jsonl", "decisions.jsonl"):
        (root / name).write_text("\n".join(lines) + end, encoding="utf-8", errors="replace")
    with suppress(StudyDamageError):
        load_study(root)
    load_study(root, on_damage="skip")


@settings(fuzzed, max_examples=20)
@given(
    content=st.dictionaries(
        st.sampled_from(["trial", "state", "overrides", "started", "number"]), values, max_size=5
    )
)
def test_any_record_is_a_trial_or_told(tmp_path: Path, content: dict[str, Any]) -> None:
    root = study(replaced("trials/00000/trial.json", json.dumps(content)))(tmp_path)[-1]
    with suppress(StudyDamageError):
        load_study(root)
    load_study(root, on_damage="skip")


@settings(fuzzed, max_examples=150)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from([*range(0, 4), *range(40, 120), *range(252, 350)]), st.integers(0, 255)
        ),
        max_size=6,
    ),
    zipped=st.booleans(),
)
def test_any_header_is_a_volume_or_told_and_takes_no_more_memory_than_its_file(
    tmp_path: Path, changes: list[tuple[int, int]], zipped: bool
) -> None:
    path = tmp_path / "a.nii"
    content = bytearray(scan(path).read_bytes())
    for offset, value in changes:
        content[offset] = value
    path.write_bytes(gzip.compress(bytes(content), 1) if zipped else bytes(content))
    tracemalloc.start()
    with suppress(VolumeError):
        read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
