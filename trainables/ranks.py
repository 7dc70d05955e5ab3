"""The ranks of one run: this process is rank 0, the others are Ray actors in the other bundles of its placement group.

`gang` looks like `finetune` from outside: it yields rank 0's EpochResults. Rank 0 trains in a thread, so that the
calling thread stays free to notice a rank that died or hangs: a collective waiting for a lost rank can block for ever,
and cannot be interrupted from within. The other ranks are owned by this process: when it is killed, as Tune does to
stop a trial, Ray ends them with it. Where Tune uses the process again, so are they: processes, process group and all of
torch's measurements stay from one trial to the next, and rank 0 signals the others after each epoch whether to continue.
"""

import fcntl
import logging
import os
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainables.checkpoints import TrialFiles
from trainables.config import RULES, FineTuneConfig
from trainables.data.storage import patient
from trainables.finetune import EpochResult, finetune
from trainables.machine.ray_workers import OwnSearchPath
from trainables.machine.safe_path import safe_search
from trainables.machine.this_machine import place_of_sessions, usable_cpus
from trainables.rank_actors import Position, RankProcesses
from trainables.saved_run import open_inputs, saved_run
from trainables.training_thread import KeptThread

log = logging.getLogger("medtune.trial")

START_S = 300.0
"""Seconds the ranks may take from their start to meeting each other: imports, CUDA, the cohort."""
ANSWER_S = 5.0
"""Seconds a healthy rank may take to report its position."""
LEAVE_S = 5
"""Seconds rank 0's process may live on with a thread that waits for a lost rank: its error has been reported by then."""
STOP_S = 30.0
"""Seconds a rank may take to end a run that is over or stopped; where it takes longer, it is ended itself."""
NO_LIMIT = timedelta(days=20)
"""For waits that the gang itself ends, as its deadline names the rank that hangs: what fits 31 bits in milliseconds."""
LEADER = "medtune-rank-0"
GO, STOP = "go", "stop"


class RankError(RuntimeError):
    """A rank that died, failed or hung; the message names rank, node and cause."""


@dataclass(frozen=True)
class RankWork:
    """What each rank runs."""

    config: FineTuneConfig
    table: str
    cohort: str
    gpu: bool = False
    threads: int = 1
    rules: int = RULES
    name: str = ""
    """The run's name in Ray's dashboard."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a device or a node without memory left."""
    kinds = (torch.OutOfMemoryError, ray.exceptions.OutOfMemoryError, MemoryError)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, kinds) or isinstance(getattr(current, "cause", None), kinds):
            return True
        current = current.__cause__
    return False


def gang(
    work: RankWork,
    world: int,
    *,
    processes: RankProcesses | None = None,
    resume: Mapping[str, Any] | None = None,
    deadline_s: float = 1800.0,
    heartbeat: Callable[[int, int], None] | None = None,
) -> Iterator[EpochResult]:
    """Run `work` over `world` ranks; yields rank 0's results, as `finetune` does.

    Call it in a process that lives in bundle 0 of a placement group, whose bundles 1 .. world - 1 are free or hold
    `processes`, those of the other ranks (None: started here). `deadline_s`: longest time without a finished step on rank
    0; `heartbeat` is called for each. Closed between two epochs, or at its end, it leaves all ranks ready for another run.

    Raises RankError, naming rank, node and cause, when a rank dies, fails or makes no progress; `processes` are gone then.
    """
    processes = RankProcesses(world) if processes is None else processes
    if processes.store is None:
        assert not dist.is_initialized(), "this process is rank 0 of other ranks already"
        processes.store = TCPStore(
            ray.util.get_node_ip_address(), 0, world, is_master=True, wait_for_workers=False
        )
    store = processes.store
    processes.runs += 1
    remembered = None if resume is None else ray.put(dict(resume))
    places = [Place(rank, world, processes.runs, store.host, store.port) for rank in range(world)]
    futures = {
        actor.run.options(name=work.name and f"{work.name}, rank {place.rank}").remote(
            follow, work, place, remembered
        ): place.rank
        for actor, place in zip(processes.actors, places[1:], strict=True)
    }
    leader = _Leader(work, places[0], store, resume, heartbeat)
    sound = False
    try:
        yield from _watched(leader, processes, futures, deadline_s)
        sound = True
    except GeneratorExit:
        sound = True
        raise
    finally:
        leader.stop()
        if not (sound and _all_ended(leader, list(futures))):
            processes.give_up()


def _all_ended(leader: "_Leader", futures: list[Any]) -> bool:
    """Wait for the ranks to end their run, which takes no more than putting things away; False when one does not."""
    if wait([leader.running], STOP_S).not_done:
        return False
    if leader.error is not None:  # while it cleaned up: the caller asks for no more results
        log.error(
            "rank 0 failed at the end of its run, its process is not used again: %r", leader.error
        )
        return False
    ended, going = ray.wait(futures, num_returns=len(futures), timeout=STOP_S)
    try:
        ray.get(ended)
    except ray.exceptions.RayError:
        return False
    return not going


def leave_if_stuck(*, after_s: int = LEAVE_S) -> None:
    """Have this process end `after_s` seconds from now if rank 0's run does not end within one second.

    A collective that waits for a lost rank cannot be interrupted, and keeps the process from ending in good order: on two
    H100s NCCL's kernel kept its GPU busy for 18 s after the other rank was killed, until Ray lost its patience. Call it
    where the process has no more work, and its error is on the way. An alarm ends it even where Python runs no more. Not
    sooner: a process that ends while Tune makes it ready for the next trial costs that trial an attempt.
    """
    if _Leader.last is not None and wait([_Leader.last], 1.0).not_done:
        signal.alarm(after_s)


def local_gang_rows(work: RankWork, world: int, files: TrialFiles) -> Iterator[dict[str, Any]]:
    """Run `work` over `world` ranks of this machine, kept in `files`; yields the row of every epoch.

    Starts a local Ray and stops it at the end.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # before, and not only after, it has started
    # Without "local" Ray joins a cluster that has a node on this machine.
    with safe_search():
        ray.init(
            "local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            num_cpus=max(world, usable_cpus()),
            _temp_dir=f"{place_of_sessions()}/ray",
            job_config=OwnSearchPath(),
        )
    try:
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if work.gpu else {})}
        group = ray.util.placement_group([bundle] * world, strategy="PACK")
        if not group.wait(timeout_seconds=60):
            raise RankError(
                f"{world} ranks of {bundle} do not fit this machine: {ray.available_resources()}"
            )
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
        leader = ray.remote(_LocalLeader).options(**options).remote()
        for row in leader.rows.remote(work, world, files):
            yield ray.get(row)
    finally:
        ray.shutdown()


class _LocalLeader:
    def rows(self, work: RankWork, world: int, files: TrialFiles) -> Iterator[dict[str, Any]]:
        yield from saved_run(work.config, files, lambda resume: gang(work, world, resume=resume))


def _watched(
    leader: "_Leader", processes: RankProcesses, futures: dict[Any, int], deadline_s: float
) -> Iterator[EpochResult]:
    pending = dict(futures)
    while True:
        _raise_for_failed(pending, 0)
        try:
            result = leader.results.get(timeout=0.2)
        except queue.Empty:
            waited = time.monotonic() - leader.position.since
            if waited > (deadline_s if leader.position.epoch else max(deadline_s, START_S)):
                raise RankError(_who_hangs(leader, processes, waited)) from None
            continue
        if result is None:
            return
        if isinstance(result, BaseException):
            # A lost peer ends rank 0's collective too: give the peer's own end a moment to arrive, it is more precise.
            _raise_for_failed(pending, ANSWER_S)
            raise RankError(_failed(0, ray.util.get_node_ip_address(), result)) from result
        yield result
        leader.go_on()


def _raise_for_failed(pending: dict[Any, int], timeout_s: float) -> None:
    """Raise RankError for a rank that has failed by now, or does within `timeout_s`; those that ended leave `pending`."""
    ended, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s) if pending else ([], [])
    for future in ended:
        rank = pending.pop(future)
        try:
            ray.get(future)
        except ray.exceptions.RayError as error:
            raise _rank_error(rank, error) from error


def _rank_error(rank: int, error: ray.exceptions.RayError) -> RankError:
    if isinstance(error, ray.exceptions.RayTaskError):
        return RankError(_failed(rank, error.ip, error.cause))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("ip:")), "unknown"
    )
    # Ray's page of guesses
    reason = lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
    return RankError(f"rank {rank} on node {where} died: {reason}")


def _failed(rank: int, node: str, cause: BaseException) -> str:
    """The error of a rank in one line: of several, readers that want one take the last, and would lose the name."""
    return f"rank {rank} on node {node}: {type(cause).__name__}: {' '.join(str(cause).split())}"


def _who_hangs(leader: "_Leader", processes: RankProcesses, waited: float) -> str:
    """Name the rank that is behind the others: the one that does not answer, or has come least far.

    All have reached the same step where one of them hangs in the next, as the others wait for it there: then all are named.
    """
    found = [(leader.position.epoch, leader.position.step, 0, ray.util.get_node_ip_address())]
    for rank, actor in enumerate(processes.actors, start=1):
        try:
            epoch, step, node = ray.get(actor.where.remote(processes.runs), timeout=ANSWER_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            home = _home(processes.homes[rank - 1])
            return f"rank {rank} on node {home} does not answer, and no step ended for {waited:.0f} s: it hangs or is cut off"
        found.append((epoch, step, rank, node))
    epoch, step, *_ = min(found)
    behind = [
        f"rank {rank} on node {node}" for *place, rank, node in found if place == [epoch, step]
    ]
    who = behind[0] if len(behind) == 1 else f"one of {', '.join(behind)}"
    return f"{who} hangs in epoch {epoch} after step {step}: no step ended for {waited:.0f} s"


def _home(answer: Any) -> str:
    """Where a rank was when it had started, by its own first answer."""
    try:
        return str(ray.get(answer, timeout=0)[2])
    except ray.exceptions.RayError:
        return "unknown"


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine whose IPv4 address is `address`, None when none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(asking, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


class _Leader:
    """Rank 0 in a thread of this process; hands over one result at a time and waits for the signal to continue."""

    thread = KeptThread(LEADER)
    last: "Future[None] | None" = None
    """The run that this process began last."""

    def __init__(
        self,
        work: RankWork,
        place: "Place",
        store: TCPStore,
        resume: Mapping[str, Any] | None,
        heartbeat: Callable[[int, int], None] | None,
    ) -> None:
        self.results: queue.Queue[EpochResult | BaseException | None] = queue.Queue()
        self.position = Position(heartbeat=heartbeat)
        self.error: Exception | None = None
        """What ended the run."""
        self._proceed = threading.Semaphore(0)
        self._stopped = False
        self.running = _Leader.last = self.thread.submit(self._train, work, place, store, resume)

    def go_on(self) -> None:
        self.position.since = time.monotonic()  # the caller's time in between does not count
        self._proceed.release()

    def stop(self) -> None:
        self._stopped = True
        self._proceed.release()

    def _train(
        self, work: RankWork, place: "Place", store: TCPStore, resume: Mapping[str, Any] | None
    ) -> None:
        try:
            with closing(_rank_epochs(work, place, lambda: store, resume, self.position)) as epochs:
                for number, result in enumerate(epochs):
                    self.results.put(result)
                    self._proceed.acquire()
                    store.set(place.gate(number), STOP if self._stopped else GO)
                    if self._stopped:
                        return
            self.results.put(None)
        except Exception as error:  # noqa: BLE001  # handed to the calling thread, which raises it
            self.error = error
            self.results.put(error)


@dataclass(frozen=True)
class Place:
    """A rank's place in a run, and the address where it meets the others."""

    rank: int
    world: int
    run: int
    """Which run of these ranks it is."""
    host: str
    port: int
    """Of the store that rank 0 keeps."""

    def gate(self, number: int) -> str:
        """Key under which rank 0 announces what follows epoch `number` of the run, counted from its first here."""
        return f"run {self.run}, after epoch {number}"


def follow(
    work: RankWork, place: Place, resume: Mapping[str, Any] | None, position: Position
) -> None:
    """Train as one of the ranks 1 .. world - 1, to the end or until rank 0 stops; `position` shows its progress."""
    # Apart from the process group's: a connection that waits answers no other request, and NCCL asks its store now and then
    gate = _connection(place)
    with closing(_rank_epochs(work, place, lambda: _connection(place), resume, position)) as epochs:
        for number, _ in enumerate(epochs):
            gate.wait([place.gate(number)], NO_LIMIT)
            if gate.get(place.gate(number)) == STOP.encode():
                return


def _connection(place: Place) -> TCPStore:
    return TCPStore(
        place.host, place.port, place.world, is_master=False, timeout=timedelta(seconds=START_S)
    )


def _rank_epochs(
    work: RankWork,
    place: Place,
    store: Callable[[], TCPStore],
    resume: Mapping[str, Any] | None,
    position: Position,
) -> Generator[EpochResult, None, None]:
    torch.set_num_threads(work.threads)
    device = torch.device("cuda", 0) if work.gpu else torch.device("cpu")
    if work.gpu:
        torch.cuda.set_device(device)
    with patient():
        cohort, split = open_inputs(work.config, work.table, work.cohort)
    if not dist.is_initialized():  # the first run of these ranks, which stay together
        # gloo's default is the address of the host's name: on many machines loopback, which no other node can reach.
        if (name := interface_of(ray.util.get_node_ip_address())) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        dist.init_process_group(
            "nccl" if work.gpu else "gloo",
            store=store(),
            rank=place.rank,
            world_size=place.world,
            timeout=NO_LIMIT,
            device_id=device if work.gpu else None,
        )
    yield from finetune(
        work.config,
        cohort,
        split,
        device=device,
        resume=resume,
        heartbeat=position.reached,
        rules=work.rules,
    )
