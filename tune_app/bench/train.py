"""`medtune bench`: how fast volumes are read (`data`), and how fast they are trained on (`train`).

`train`: whole training steps of a plain loop and of ours, side by side in one process.

The plain loop is that of `tune_app.bench.plain_loop`, on volumes decoded once and kept in memory (as MONAI's CacheDataset keeps
them) behind a DataLoader. `plain` runs *without* augmentation, and with the faster of 0 and 4 loader workers: augmentation
could only slow it down. `plain_augmented` has MONAI's transforms of the same kinds in 8 workers. Ours is `finetune`
itself with everything it does; `unaugmented` is it doing what `plain` does, and `deterministic` is it with
`deterministic=True`. Random volumes; scores mean nothing.
"""

import functools
import gc
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Compose
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainables import installed_version
from trainables.config import FineTuneConfig, build_config
from trainables.data.folds import Split
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort, open_cohort, prepare_cohort
from trainables.finetune import Run, peak_memory_gib
from trainables.network.model import configured_network
from tune_app.bench.plain_loop import PlainRun, monai_augmentation, monai_preparation
from tune_app.driver.warm_up import cohort_in_memory
from tune_app.synthetic import write_cohort

DISTINCT = 32
"""Different volumes in the cohort; the rest repeats them, which costs the same to read."""

WORKERS = {"plain": (0, 4), "plain_augmented": (8,)}
"""Workers of the loader that are tried on a GPU; the fastest counts. On a CPU there is none."""


class BenchError(ValueError):
    """A measurement that was asked for in a way that cannot be."""


def bench_train(
    *,
    sizes: Iterable[int],
    geometries: Iterable[str],
    batches: Iterable[tuple[int, int]],
    device: str,
    depth: int = 50,
    width: float = 1.0,
    steps: int = 24,
    variants: Iterable[str] = ("plain", "eager", "ours"),
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine": ..., "rows": [...]}: one row for each size, geometry, batch and variant.

    `batches`: (batch size, accumulation steps). variants: `plain`; `plain_augmented`; `eager`, ours without CUDA graphs;
    `unaugmented` and `deterministic`, ours with other settings; `ours`. A row has
    volumes_per_s, ms_per_step (medians over whole epochs of `steps` steps), gpu_ms_per_step (time with a kernel running,
    by the profiler), gpu_busy (its share), peak_memory_gib, tflops, speedup (over plain), kernels (the longest, ms a step).
    `record` is given the result so far after each row, `say` a line about it.
    """
    variants = list(variants)
    if unknown := set(variants) - set(_VARIANTS):
        raise BenchError(f"variants {', '.join(sorted(unknown))}: there are {', '.join(_VARIANTS)}")
    place = torch.device(device)
    machine = machine_facts(place)
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine,
        "steps_per_epoch": steps,
        "depth": depth,
        "width": width,
        "rows": rows,
    }
    for size, geometry, (batch, accumulation) in itertools.product(sizes, geometries, batches):
        config = bench_config(
            size, batch, accumulation, depth=depth, width=width, geometry=geometry
        )
        cohort, split = made_cohort(config, steps * batch * accumulation)
        gflop = 3 * forward_flop(config) / 1e9
        plain = None
        for variant in variants:
            measured = _VARIANTS[variant](config, cohort, split, place)
            row: dict[str, Any] = {
                "size": size,
                "geometry": geometry,
                "batch": f"{batch}x{accumulation}",
                "variant": variant,
                "volumes_per_step": batch * accumulation,
                **measured,
                "gflop_per_volume": gflop,
                "tflops": measured["volumes_per_s"] * gflop / 1e3,
            }
            plain = row if variant == "plain" else plain
            row["speedup"] = (
                None if plain is None else row["volumes_per_s"] / plain["volumes_per_s"]
            )
            if machine["matmul_tflops"]:
                row["share_of_matmul"] = row["tflops"] / machine["matmul_tflops"]
            rows.append(row)
            say(
                f"{size} {geometry} {row['batch']} {variant}: {row['volumes_per_s']:.0f} volumes/s, "
                f"{row['ms_per_step']:.1f} ms a step"
            )
            record(result)
            gc.collect()
            if place.type == "cuda":
                torch.cuda.empty_cache()
    return result


def bench_config(size: int, batch: int, accumulation: int, **others: Any) -> FineTuneConfig:
    """Return the configuration that is measured: nothing is scored but the validation volumes, and no schedule ends."""
    return build_config(
        {
            **others,
            "volume_shape": size,
            "batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "epochs": 1000,
            "drw_start_epoch": 2,
            "train_auc_volumes": 0,
        }
    )


def parse_batches(text: str) -> list[tuple[int, int]]:
    """`"6x2,24"` -> `[(6, 2), (24, 1)]`. Raises BenchError for anything else."""
    parsed = []
    for part in text.split(","):
        batch, _, accumulation = part.strip().partition("x")
        if not batch.isdigit() or not (accumulation or "1").isdigit():
            raise BenchError(
                f"batch {part!r}: write BATCHxACCUMULATION, such as 6x2, or a batch size"
            )
        parsed.append((int(batch), int(accumulation or 1)))
    return parsed


HEADINGS = (
    *("voxels", "geometry", "batch", "variant", "volumes\nper s", "ms per\nstep"),
    *("GPU\nbusy", "peak\nGiB", "TFLOP\nper s", "x\nplain"),
)


def result_table(result: dict[str, Any]) -> Table:
    """Return the rows as a Rich table."""
    title = f"{result['machine']['name']}, torch {result['machine']['torch']}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # 80 columns hold all of it
    for name in HEADINGS:
        table.add_column(name, justify="left" if name in ("geometry", "variant") else "right")
    for row in result["rows"]:
        table.add_row(*_cells(row))
    return table


def markdown_table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, for a README."""
    lines = [
        "| voxels | geometry | batch | variant | volumes/s | ms/step | GPU busy | peak GiB | TFLOP/s | x plain |",
        "|--:|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["size"]),
        row["geometry"],
        row["batch"],
        row["variant"],
        f"{row['volumes_per_s']:.3g}"
        if row["volumes_per_s"] < 100
        else f"{row['volumes_per_s']:.0f}",
        f"{row['ms_per_step']:.1f}",
        "" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}",
        f"{row['peak_memory_gib']:.1f}",
        f"{row['tflops']:.3g}",
        "" if row["speedup"] is None else f"{row['speedup']:.1f}",
    ]


def forward_flop(config: FineTuneConfig) -> float:
    """Floating-point operations of all convolutions for one volume, forward; backward takes twice as many."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv3d)
        total += 2 * output[0].numel() * module.in_channels * math.prod(module.kernel_size)

    with torch.device("meta"), torch.no_grad():
        network = configured_network(config).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(count)
        network(torch.empty(1, config.in_channels, *config.volume_shape))
    return float(total)


def bench_data(
    *, size: int, subjects: int, folder: Path, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return {"machine": ..., "rows": [...]}: volumes a second of reading one cohort in four ways, each in one process.

    `decode`: MONAI reads, turns, resizes and normalises each file, as a loader without a cache does in every epoch.
    `persistent_first`, `persistent_again`: MONAI's PersistentDataset, filling its folder and reading from it. `prepare`,
    `prepared`: our prepared cohort, made once (with all cores), and read in random order. Compressed NIfTI of about `size`
    voxels a side, one to three a subject, written below `folder`; the files are in the page cache for all alike.
    """
    table = write_cohort(
        folder / "cohort", subjects=subjects, side=(size - size // 8, size + size // 8)
    )
    manifest = read_manifest(table)
    items = [{"image": path} for path in manifest.rows["path"]]
    usual = monai_preparation((size,) * 3)
    rows = []

    def measure(way: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        rows.append({"way": way, "volumes_per_s": len(items) / seconds, "seconds": seconds})
        say(f"{way}: {len(items) / seconds:.3g} volumes/s")

    plain = Compose(usual)
    measure("decode", lambda: [plain(item) for item in items])
    persistent = PersistentDataset(items, usual, cache_dir=folder / "persistent")
    measure("persistent_first", lambda: [persistent[i] for i in range(len(items))])
    measure("persistent_again", lambda: [persistent[i] for i in range(len(items))])
    recipe = Recipe.from_config(build_config({"volume_shape": size}))
    measure("prepare", lambda: prepare_cohort(manifest, recipe, folder / "prepared"))
    cohort = open_cohort(prepare_cohort(manifest, recipe, folder / "prepared"))
    order = np.random.default_rng(0).permutation(len(items))
    measure(
        "prepared", lambda: [torch.from_numpy(np.array(cohort.volumes[i])).float() for i in order]
    )
    return {
        "machine": machine_facts(torch.device("cpu")),
        "size": size,
        "volumes": len(items),
        "rows": rows,
    }


def data_table(result: dict[str, Any]) -> Table:
    """Return the rows of `bench_data` as a Rich table."""
    table = Table(title=f"{result['volumes']} volumes of {result['size']} voxels a side")
    table.add_column("way")
    table.add_column("volumes/s", justify="right")
    for row in result["rows"]:
        table.add_row(row["way"], f"{row['volumes_per_s']:.3g}")
    return table


# Ours ------------------------------------------------------------------------------------------------------------------


def _ours(
    config: FineTuneConfig,
    cohort: Cohort,
    split: Split,
    device: torch.device,
    *,
    graphs: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Measure `finetune` with `changes` of the configuration; a deterministic run leaves out graphs itself."""
    config = config.model_copy(update=changes)
    _reset_peak(device)
    started = time.perf_counter()
    run = Run(config, cohort, split, device, graphs=graphs)
    first = run.train_one_epoch(None)
    started_up = time.perf_counter() - started
    epochs = [run.train_one_epoch(None) for _ in range(3)]
    peak = epochs[-1]["peak_memory_gib"]
    rate = statistics.median(row["volumes_per_s"] for row in epochs)
    profile = _profile(run.train_part, run.schedule.steps_per_epoch, device)
    return {
        **_rates(rate, config, profile),
        "peak_memory_gib": peak,
        "start_up_s": started_up,
        "first_epoch_s": first["epoch_s"],
        "validation_volumes_per_s": 2 * len(split.val) / epochs[-1]["validation_s"],
        "micro_batches_at_once": run.step.at_once,
        "precision": run.step.precision.name,
    }


def _deterministic(*inputs: Any) -> dict[str, Any]:
    try:
        return _ours(*inputs, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)


# The plain loop --------------------------------------------------------------------------------------------------------


class _InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded float32 volumes in a list, as MONAI's CacheDataset holds them, and its random transforms."""

    def __init__(
        self, cohort: Cohort, rows: np.ndarray, transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.transform = transform
        distinct = {int(row) % DISTINCT for row in rows}
        tensors = {
            row: torch.from_numpy(cohort.volumes[row].astype(np.float32)) for row in distinct
        }
        self.items = [(tensors[int(row) % DISTINCT], int(cohort.labels[row])) for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        volume, label = self.items[index]
        return volume if self.transform is None else self.transform(volume), label


def _plain(
    config: FineTuneConfig,
    cohort: Cohort,
    split: Split,
    device: torch.device,
    *,
    augmented: bool = False,
) -> dict[str, Any]:
    _reset_peak(device)
    run = PlainRun(config, np.bincount(cohort.labels[split.train]), device, total_updates=100_000)
    half = device.type == "cuda"
    dataset = _InMemory(
        cohort, split.train, monai_augmentation(config.flip_axes) if augmented else None
    )

    def epoch(loader: Iterable[Any]) -> None:
        run.train_epoch(loader, epoch=1)

    best, best_loader, best_workers = 0.0, None, 0
    for workers in WORKERS["plain_augmented" if augmented else "plain"] if half else (0,):
        loader = DataLoader(
            dataset, config.batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=half,
            persistent_workers=workers > 0,
        )  # fmt: skip
        epoch(loader)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            epoch(loader)
            times.append(time.perf_counter() - started)
        rate = len(dataset) / min(times)
        if rate > best:
            best, best_loader, best_workers = rate, loader, workers
    assert best_loader is not None
    peak = peak_memory_gib(device)
    profile = _profile(lambda: epoch(best_loader), len(dataset) // _step_size(config), device)
    return {
        **_rates(best, config, profile),
        "peak_memory_gib": peak,
        "loader_workers": best_workers,
        "precision": "fp16" if half else "float32",
    }


_VARIANTS: dict[str, Callable[[FineTuneConfig, Cohort, Split, torch.device], dict[str, Any]]] = {
    "plain": _plain,
    "plain_augmented": functools.partial(_plain, augmented=True),
    "eager": functools.partial(_ours, graphs=False),
    "ours": _ours,
    "unaugmented": functools.partial(_ours, augmentation_strength=0.0, flip_axes=""),
    "deterministic": _deterministic,
}


# Measuring -------------------------------------------------------------------------------------------------------------


def made_cohort(config: FineTuneConfig, train: int) -> tuple[Cohort, Split]:
    rng = np.random.default_rng(0)
    val = 2 * config.validation_batch_size
    distinct = rng.standard_normal(
        (DISTINCT, config.in_channels, *config.volume_shape), dtype=np.float32
    )
    volumes = np.resize(distinct.astype(np.float16), (train + val, *distinct.shape[1:]))
    labels = (np.arange(train + val) % 5 == 0).astype(np.int64)
    return cohort_in_memory(volumes, labels, config, train)


def _step_size(config: FineTuneConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps


def _rates(volumes_per_s: float, config: FineTuneConfig, profile: dict[str, Any]) -> dict[str, Any]:
    ms = 1e3 * _step_size(config) / volumes_per_s
    busy = profile["gpu_ms_per_step"]
    share = None if busy is None else min(1.0, busy / ms)
    return {"volumes_per_s": volumes_per_s, "ms_per_step": ms, "gpu_busy": share, **profile}


def _profile(epoch: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Time a step in which at least one kernel runs; the profiler slows the host, not the kernels."""
    if device.type != "cuda":
        return {"gpu_ms_per_step": None, "kernels": {}}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        epoch()
        _wait(device)
    spans: list[tuple[int, int]] = []
    by_name: dict[str, float] = {}
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" in str(event.device_type()) and event.duration_ns() > 0:
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()] = (
                by_name.get(event.name(), 0.0) + event.duration_ns() / 1e6 / steps
            )
    busy, end = 0, 0
    for start, stop in sorted(spans):
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:25]
    return {
        "gpu_ms_per_step": busy / 1e6 / steps,
        "kernels": {name[:110]: round(ms, 4) for name, ms in longest},
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def machine_facts(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "monai": installed_version("monai"),
        "python": platform.python_version(),
        "matmul_tflops": None,
        "copy_tb_per_s": None,
    }
    if device.type == "cuda":
        machine["name"] = torch.cuda.get_device_name(device)
        machine["cuda"], machine["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        machine["matmul_tflops"] = 2 * 8192**3 / _seconds(lambda: a @ b, device) / 1e12
        x = torch.randn(2**30, device=device)
        y = torch.empty_like(x)
        machine["copy_tb_per_s"] = 2 * x.nbytes / _seconds(lambda: y.copy_(x), device) / 1e12
    return machine


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(8):
        _wait(device)
        started = time.perf_counter()
        for _ in range(5):
            work()
        _wait(device)
        times.append((time.perf_counter() - started) / 5)
    return statistics.median(times[2:])
