"""Several ranks: the same numbers as one, and every way a rank can be lost."""

import contextlib
import copy
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.multiprocessing.spawn import start_processes

from trainables import ranks
from trainables.config import FineTuneConfig, build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import prepare_cohort
from trainables.finetune import finetune
from trainables.gradient_sum import GradientSum
from trainables.network.model import Classifier
from trainables.rank_actors import Position, Rank, rank_processes
from trainables.ranks import RankError, RankWork, gang, is_out_of_memory
from trainables.saved_run import open_inputs
from tune_app.synthetic import write_cohort

SETTINGS: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "drw_start_epoch": 2,
    "batch_size": 3,
    "dropout": 0.0,
    "augmentation_strength": 0,
    "flip_axes": "",
    "num_folds": 2,
    "optimizer": "sgd",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Table and prepared cohort."""
    folder = tmp_path_factory.mktemp("ranks")
    table = write_cohort(folder / "c", subjects=16, side=(14, 18))
    config = build_config(SETTINGS)
    return str(table), str(
        prepare_cohort(read_manifest(table), Recipe.from_config(config), folder / "cache")
    )


def run_rank(
    rank: int, world: int, config: FineTuneConfig, table: Path, cohort: str, meeting: str, out: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    gc.collect()
    gc.disable()  # objects in a reference cycle would live until the collector runs, and the next run would not fit a GPU
    last = deque(finetune(config, *open_inputs(config, table, cohort)), maxlen=1).pop()
    torch.save(
        {"rows": last.state()["rows"], "network": last.state()["network"]}, f"{out}/{rank}.pt"
    )
    del last
    left = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), (Classifier, torch.nn.Parameter))
    ]
    assert not left, "an ended run leaves nothing in memory"
    dist.destroy_process_group()


def untimed(row: dict[str, Any]) -> dict[str, str]:
    """The row without what depends on the clock, as text: NaN equals itself then."""
    return {
        key: repr(value) for key, value in row.items() if not key.endswith(("_s", "memory_gib"))
    }


@pytest.mark.parametrize(
    ("world", "subjects"),
    [
        pytest.param(2, 16, id="two"),
        pytest.param(4, 22, id="four", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(8, 70, id="eight", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(
            8,
            16,
            id="more ranks than micro-batches",
            marks=[pytest.mark.slow, pytest.mark.timeout(600)],
        ),
    ],
)
def test_ranks_equal_one_on_the_same_global_batch(
    world: int, subjects: int, tmp_path: Path
) -> None:
    """Micro-batches of 3 over all ranks, and over one with as many accumulation steps: a partial last step included."""
    table = write_cohort(tmp_path / "c", subjects=subjects, side=(14, 18))
    each = 2 if world == 2 else 1
    alone = build_config(SETTINGS | {"gradient_accumulation_steps": each * world})
    shared = build_config(SETTINGS | {"gradient_accumulation_steps": each})
    cohort = str(
        prepare_cohort(read_manifest(table), Recipe.from_config(alone), tmp_path / "cache")
    )
    data, split = open_inputs(alone, table, cohort)
    assert len(split.train) % (3 * each * world), "shards must be uneven"
    assert len(split.val) % world, "the last validation volumes must be padded for some ranks"
    *_, one = finetune(alone, data, split)
    start_processes(
        run_rank,
        (world, shared, table, cohort, str(tmp_path / "meeting"), str(tmp_path)),
        nprocs=world,
        start_method="spawn",
    )
    first, *others = [
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)
    ]
    for other in others:
        assert [untimed(row) for row in other["rows"]] == [untimed(row) for row in first["rows"]], (
            "ranks must agree"
        )
    for name, value in one.state()["network"].items():
        if "num_batches" not in name:  # which counts a rank's own
            torch.testing.assert_close(first["network"][name], value, rtol=1e-4, atol=1e-6)
            assert all(
                torch.equal(first["network"][name], other["network"][name]) for other in others
            )
    for ours, theirs in zip(first["rows"], one.state()["rows"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["grad_norm_max"] == pytest.approx(theirs["grad_norm_max"], rel=1e-2)
        for column in ("val_auc", "val_auc_raw", "val_brier_raw", "val_brier_ema"):
            assert ours[column] == pytest.approx(theirs[column], abs=1e-4), column
        assert (ours["updates"], ours["val_positive"]) == (
            theirs["updates"],
            theirs["val_positive"],
        )


class Branches(torch.nn.Module):
    """Two layers in a row, of which the first may be left out of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (
            torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)
        )
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, *, skip_first: bool = False) -> torch.Tensor:
        return (
            self.second(self.frozen(x) if skip_first else self.first(self.frozen(x))).square().sum()
        )


def sum_gradients(rank: int, world: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for bucket_bytes in (1, 200, 2**20):
        torch.manual_seed(0)
        network = Branches()
        batches = torch.randn(3, world, 2, 4, dtype=torch.float64)  # 3 micro-batches on each rank
        for batch in batches.flatten(0, 1):  # the oracle: one process does it all
            network(batch).backward()
        expected = [parameter.grad for parameter in network.parameters()]
        network.zero_grad()
        summing = GradientSum(network.parameters(), bucket_bytes)
        for number in range(3):
            with summing.over(last=number == 2):
                network(batches[number, rank]).backward()
        torch.testing.assert_close([parameter.grad for parameter in network.parameters()], expected)

        network.zero_grad()
        with (
            pytest.raises(RuntimeError, match="2 trainable parameters got no gradient"),
            summing.over(last=True),
        ):
            network(batches[0, rank], skip_first=True).backward()

        network.zero_grad()
        summing.remove()
        network.frozen.requires_grad_(True)  # a stage thaws: a new sum includes its gradient
        with GradientSum(network.parameters(), bucket_bytes).over(last=True):
            network(batches[0, rank]).backward()
        (mine,) = torch.autograd.grad(network(batches[0, rank]), network.frozen.weight)
        dist.all_reduce(mine)
        torch.testing.assert_close(network.frozen.weight.grad, mine)
    Path(out, f"{rank}.done").touch()
    dist.destroy_process_group()


def test_gradients_are_the_sum_over_ranks_whatever_the_buckets(tmp_path: Path) -> None:
    """Over the last micro-batch only, with frozen parameters left out and thawed ones in."""
    start_processes(
        sum_gradients, (2, str(tmp_path / "meeting"), str(tmp_path)), nprocs=2, start_method="spawn"
    )
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done"]


class Convolutions(torch.nn.Sequential):
    """Convolutions in channels-last memory, a norm between them and a head of an odd size."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv3d(1, 8, 3, bias=False),
            torch.nn.BatchNorm3d(8),
            torch.nn.Conv3d(8, 4, 1, bias=False),
            torch.nn.Flatten(),
            torch.nn.Linear(32, 3),
        )
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def sum_half_gradients(rank: int, world: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    network = Convolutions()
    volumes = torch.randn(world, 2, 1, 4, 4, 4)[rank]
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(network))
    wrapped.register_comm_hook(None, fp16_compress_hook)
    wrapped(
        volumes
    ).square().sum().backward()  # the oracle: its hook divides by the ranks, a power of two
    halves = [gradient_of(parameter).clone() for parameter in wrapped.parameters()]
    del wrapped  # as its group's last owner it would wait, holding the interpreter, for a thread that needs that, too
    gc.collect()
    whole = copy.deepcopy(network)
    with GradientSum(whole.parameters()).over(last=True):
        whole(volumes).square().sum().backward()
    for bucket_bytes in (1, 2**20):
        network.zero_grad()
        summing = GradientSum(network.parameters(), bucket_bytes, convolutions_as=torch.float16)
        with summing.over(last=True):
            network(volumes).square().sum().backward()
        summing.remove()
        rounded = 0
        for ours, half, full in zip(network.parameters(), halves, whole.parameters(), strict=True):
            summed = gradient_of(ours)
            assert summed.dtype == torch.float32
            assert summed.stride() == ours.stride()
            if ours.dim() == 5:
                torch.testing.assert_close(summed, world * half, rtol=0, atol=1e-6)
                rounded += not torch.equal(summed, gradient_of(full))
            else:
                assert torch.equal(summed, gradient_of(full))
        assert rounded == 2
    network.zero_grad()
    with GradientSum(network.parameters(), convolutions_as=torch.float16).over(last=True):
        (network(volumes).square().sum() * (1e6 if rank else 1.0)).backward()
    assert not all(gradient_of(parameter).isfinite().all() for parameter in network.parameters()), (
        "too large: seen on every rank"
    )
    Path(out, f"{rank}.done").touch()
    dist.destroy_process_group()


def test_gradients_of_convolutions_may_travel_as_fp16(tmp_path: Path) -> None:
    """As torch's own fp16 hook adds them up; all others as they are, and each in its parameter's order of memory."""
    start_processes(
        sum_half_gradients,
        (2, str(tmp_path / "meeting"), str(tmp_path)),
        nprocs=2,
        start_method="spawn",
    )
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done"]


def nccl_run(
    rank: int, world: int, config: FineTuneConfig, inputs: tuple[str, str], store: str, out: str
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    options = {
        "init_method": f"file://{store}",
        "rank": rank,
        "world_size": world,
        "device_id": device,
    }
    dist.init_process_group("nccl", **options)  # type: ignore[arg-type]
    data, split = open_inputs(config, *inputs)
    for graphs in (False, True):
        *_, last = finetune(config, data, split, device=device, graphs=graphs)
        state = last.state()
        kept = {
            "rows": state["rows"],
            "network": {name: value.cpu() for name, value in state["network"].items()},
        }
        torch.save(kept, f"{out}/{rank}-{graphs}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one_on_the_same_global_batch_captured_or_not(tmp_path: Path) -> None:
    """Enough steps an epoch for a capture, stages that thaw, a partial last step: float32, so that rounding is small."""
    table = write_cohort(tmp_path / "c", subjects=40, side=(14, 18))
    settings = SETTINGS | {
        "amp": "off",
        "epochs": 4,
        "unfreeze_stage_epochs": 1,
        "freeze_backbone_epochs": 1,
    }
    alone = build_config(settings | {"gradient_accumulation_steps": 2})
    shared = build_config(settings | {"gradient_accumulation_steps": 1, "validation_batch_size": 4})
    inputs = (
        str(table),
        str(prepare_cohort(read_manifest(table), Recipe.from_config(alone), tmp_path / "cache")),
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    *_, one = finetune(alone, *open_inputs(alone, *inputs), device="cuda")
    start_processes(
        nccl_run,
        (2, shared, inputs, str(tmp_path / "meeting"), str(tmp_path)),
        nprocs=2,
        start_method="spawn",
    )
    for graphs in (False, True):
        two = [torch.load(tmp_path / f"{rank}-{graphs}.pt", weights_only=True) for rank in range(2)]
        assert [untimed(row) for row in two[0]["rows"]] == [
            untimed(row) for row in two[1]["rows"]
        ], "ranks must agree"
        for name, value in one.state()["network"].items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(
                    two[0]["network"][name], value.cpu(), rtol=1e-3, atol=1e-5
                )
                assert torch.equal(two[0]["network"][name], two[1]["network"][name])
        for ours, theirs in zip(two[0]["rows"], one.state()["rows"], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            assert ours["frozen_stages"] == theirs["frozen_stages"]


# With Ray --------------------------------------------------------------------------------------------------------------


class Leader:
    """Rank 0 of a gang in an actor, as in a Tune trial."""

    def run(self, work: RankWork, world: int, deadline_s: float, seen: str) -> list[int]:
        epochs = []
        for result in gang(work, world, deadline_s=deadline_s):
            epochs.append(result.epoch)
            Path(seen).write_text(str(result.epoch))
        return epochs


@pytest.fixture
def local_ray() -> Any:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def place_leader(actor: type, world: int) -> Any:
    group = ray.util.placement_group([{"CPU": 1}] * world)
    assert group.wait(60)
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    return ray.remote(actor).options(num_cpus=1, scheduling_strategy=place).remote()


def start_gang(
    inputs: tuple[str, str], seen: Path, world: int, *, epochs: int, deadline_s: float = 300.0
) -> Any:
    leader = place_leader(Leader, world)
    work = RankWork(build_config(SETTINGS | {"epochs": epochs}), *inputs)
    return leader.run.remote(work, world, deadline_s, str(seen))


def rank_processes_running() -> list[psutil.Process]:
    """Processes of the ranks 1 .. world - 1 of this Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ray::Rank" in part for part in process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: Any, what: str, deadline_s: float = 120.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_gang_runs_and_leaves_nothing_behind(
    inputs: tuple[str, str], tmp_path: Path, local_ray: Any
) -> None:
    future = start_gang(inputs, tmp_path / "epoch", 3, epochs=2)
    assert ray.get(future, timeout=200) == [1, 2]
    wait_until(lambda: not rank_processes_running(), "ranks gone")


class Repeated:
    """Rank 0 of several runs, one after the other, in an actor that Tune uses again."""

    def run(
        self, works: list[tuple[RankWork, int | None]], world: int
    ) -> tuple[list[list[str]], list[int]]:
        """Each run's rows, stopped after the given number of epochs, and the number of processes, this one included."""
        rows, seen = [], []
        for work, last in works:
            processes = rank_processes(world)
            seen.append(processes)
            with contextlib.closing(gang(work, world, processes=processes)) as results:  # type: ignore[type-var]
                rows.append(
                    [repr(untimed(result.metrics)) for result in itertools.islice(results, last)]
                )
            assert not processes.lost
        return rows, [len(set(map(id, seen))), torch.distributed.get_world_size()]


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_serve_one_run_after_the_other(inputs: tuple[str, str], local_ray: Any) -> None:
    """After one that was stopped and one that came to its end, with the numbers of ranks that never ran anything else."""
    stopped = RankWork(build_config(SETTINGS | {"epochs": 500, "seed": 1}), *inputs)
    whole = RankWork(
        build_config(SETTINGS | {"head": "cosine", "loss": "focal", "batch_size": 2}), *inputs
    )
    last = RankWork(build_config(SETTINGS | {"epochs": 3}), *inputs)
    leader = place_leader(Repeated, 2)
    rows, (gangs, world) = ray.get(
        leader.run.remote([(stopped, 2), (whole, None), (last, None)], 2), timeout=200
    )
    assert [len(run) for run in rows] == [2, 2, 3]
    assert (gangs, world) == (1, 2)
    assert len(rank_processes_running()) == 1
    ray.kill(leader)
    wait_until(lambda: not rank_processes_running(), "ranks gone with their rank 0")
    fresh, _ = ray.get(place_leader(Repeated, 2).run.remote([(last, None)], 2), timeout=200)
    assert fresh[0] == rows[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "deadline_s", "message"),
    [
        (signal.SIGKILL, 300.0, r"rank 1 on node [\d.]+ died"),
        (signal.SIGSTOP, 5.0, r"rank 1 on node [\d.]+ does not answer"),
    ],
)
def test_a_lost_rank_is_named_and_the_others_are_gone(
    inputs: tuple[str, str],
    tmp_path: Path,
    local_ray: Any,
    blow: int,
    deadline_s: float,
    message: str,
) -> None:
    seen = tmp_path / "epoch"
    future = start_gang(inputs, seen, 2, epochs=5000, deadline_s=deadline_s)
    wait_until(seen.exists, "the first epoch")
    (process,) = rank_processes_running()
    os.kill(process.pid, blow)
    struck = time.monotonic()
    with pytest.raises(RankError, match=message):
        ray.get(future, timeout=120)
    assert time.monotonic() - struck < 60
    wait_until(lambda: not rank_processes_running(), "the other ranks gone", 20)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([(2, 5), (2, 3)], "rank 2 on node n2 hangs in epoch 2 after step 3"),
        ([(2, 5), (3, 0)], "rank 0 on node n0 hangs in epoch 2 after step 4"),
        (
            [(2, 4), (2, 5)],
            "one of rank 0 on node n0, rank 1 on node n1 hangs in epoch 2 after step 4",
        ),
    ],
)
def test_the_rank_that_is_behind_is_named_and_all_of_them_where_none_is(
    others: list[tuple[int, int]], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0, after step 4 of epoch 2, is no more to blame for waiting than the one it waits for."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "n0")
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    actors = [
        SimpleNamespace(where=SimpleNamespace(remote=lambda run, answer=(*at, f"n{rank}"): answer))
        for rank, at in enumerate(others, 1)
    ]
    leader = SimpleNamespace(position=Position(2, 4))
    said = ranks._who_hangs(leader, SimpleNamespace(actors=actors, runs=1), 60.0)  # type: ignore[arg-type]
    assert said == f"{named}: no step ended for 60 s"


def test_a_rank_that_has_not_begun_a_run_does_not_stand_where_the_last_one_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or rank 0, which waits for it in the first epoch, would be the one that is behind."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "n1")
    rank = Rank()
    assert rank.where() == (0, 0, "n1")
    rank.position, rank.begun = Position(4, 12), 1
    assert rank.where(1) == (4, 12, "n1")
    assert rank.where(2) == (0, 0, "n1")


def test_an_error_of_rank_0_while_it_stops_is_told_and_its_process_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU's error may show only when the run is put away: the next trial must not meet it."""

    def epochs(*_: Any) -> Any:
        try:
            yield "an epoch"
        finally:
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr(ranks, "_rank_epochs", epochs)
    monkeypatch.setattr(ranks.log, "propagate", True)
    store: Any = SimpleNamespace(set=lambda *_: None)
    leader = ranks._Leader(None, ranks.Place(0, 1, 1, "here", 0), store, None, None)  # type: ignore[arg-type]
    result: Any = leader.results.get(timeout=10)
    assert result == "an epoch"
    leader.stop()
    assert not ranks._all_ended(leader, [])
    assert "illegal memory access" in caplog.text


@pytest.mark.parametrize("stuck", [True, False])
def test_a_process_whose_rank_0_waits_for_ever_ends_itself(stuck: bool) -> None:
    """As NCCL's thread does when a peer is gone: Python cannot end it, and another thread may not wait for it."""
    script = f"""
import time
from trainables.ranks import _Leader, leave_if_stuck
_Leader.last = _Leader.thread.submit(time.sleep, {600 if stuck else 0.2})
leave_if_stuck(after_s=1)
time.sleep(3)
print("went on")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (
        (-signal.SIGALRM, "") if stuck else (0, "went on\n")
    ), ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        ray.exceptions.OutOfMemoryError("node"),
    ],
)
def test_out_of_memory_is_told_apart_also_as_a_cause(error: BaseException) -> None:
    wrapped = RankError("rank 1 on node x: OutOfMemoryError")
    wrapped.__cause__ = error
    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RankError("rank 1 died"))
    assert not is_out_of_memory(RuntimeError("out of memory, says the text"))
