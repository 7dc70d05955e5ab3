"""`medtune bench faults`: the effect of a fault in one process on those that share its GPU under CUDA MPS.

For each fault, processes start that multiply matrices on the GPU under MPS and report several times a second. Then one
of them is killed, runs out of memory or faults in a kernel, or the daemon or its server is killed. The record
states how each neighbour fared, whether a new process can join afterwards, and which processes remain at the end.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from trainables import mps
from tune_app.bench.search import machine
from tune_app.bench.share import started
from tune_app.bench.train import BenchError

FAULTS = ("killed", "out of memory", "kernel fault", "server killed", "daemon killed")
"""killed: SIGKILL in the middle of its kernels; kernel fault: an index out of bounds, which a kernel asserts."""
WATCHED_S = 15.0
"""Seconds after a fault in which a neighbour must report, or counts as hanging."""
SETTLED_S = 3.0
"""Seconds after a fault from which a report shows that a neighbour continues."""
START_S = 180.0
"""Seconds that a process may take to load torch and to join."""

Order = Literal["work", "out of memory", "kernel fault"]


def bench_faults(
    *,
    faults: Iterable[str] = FAULTS,
    neighbours: int = 2,
    device: str = "cuda",
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "rows"}: for each fault the outcome of the victim, of each neighbour (with the seconds until it
    showed) and of a process that joins afterwards, and everything left behind.

    Raises BenchError where MPS is not possible.
    """
    asked = list(faults)
    if unknown := sorted(set(asked) - set(FAULTS)):
        raise BenchError(f"faults {', '.join(unknown)}: there are {', '.join(FAULTS)}")
    rows: list[dict[str, Any]] = []
    result = {"machine": machine("torch"), "rows": rows}
    for fault in asked:
        row = _one_fault(fault, neighbours, device)
        rows.append(row)
        told = "; ".join(
            f"{one['state']} after {one['after_s']:.1f} s" for one in row["neighbours"]
        )
        say(
            f"{fault}: neighbours {told}; a new process: {row['new']}; left: {row['left'] or 'nothing'}"
        )
        record(result)
    return result


class _Client:
    """A process on the GPU, and its last report."""

    def __init__(self, device: str) -> None:
        self.process, self.end = started(_work, device)
        self.pipes = ""
        self.error: str | None = None
        self.reported = 0.0
        self.ended: float | None = None

    def begin(self) -> None:
        """Wait for its first report."""
        if not self.end.poll(START_S):
            raise BenchError(f"a process did not begin within {START_S:.0f} s")
        kind, self.pipes = self._receive()
        if kind != "own" and kind != "existing":
            raise BenchError(f"MPS is not possible: {self.pipes}")
        while self.reported == 0.0 and self.ended is None:
            self.look(START_S)

    def look(self, wait_s: float = 0.0) -> None:
        """Take in its reports."""
        while self.ended is None and self.end.poll(wait_s):
            kind, told = self._receive()
            if kind == "step":
                self.reported = float(told)
                wait_s = 0.0
            elif kind in ("error", "end"):
                self.error, self.ended = self.error or (told or None), time.time()

    def order(self, order: Order) -> None:
        self.end.send(order)

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.end.close()

    def _receive(self) -> tuple[str, str]:
        try:
            kind, told = self.end.recv()
        except (EOFError, ConnectionResetError):
            return "end", ""
        return kind, told


def _one_fault(fault: str, neighbours: int, device: str) -> dict[str, Any]:
    clients = [_Client(device) for _ in range(neighbours + 1)]
    try:
        for client in clients:
            client.begin()
        victim, *others = clients
        began = time.time()
        _inflict(fault, victim)
        while time.time() < began + WATCHED_S and any(
            one.ended is None and one.reported < began + SETTLED_S for one in clients
        ):
            for client in clients:
                client.look(0.05)
        seen = [_state(one, began) for one in others]
        of_victim = _state(victim, began)
        new = _joins_afterwards(device, clients)
    finally:
        for client in clients:
            client.stop()
    return {
        "fault": fault,
        "victim": of_victim,
        "neighbours": seen,
        "new": new,
        "left": _left_behind(),
    }


def _inflict(fault: str, victim: _Client) -> None:
    pipes = Path(victim.pipes)
    if fault == "killed":
        victim.process.kill()
    elif fault == "server killed":
        for server in mps.servers(pipes):
            os.kill(server, signal.SIGKILL)
    elif fault == "daemon killed":
        os.kill(int((pipes / "nvidia-cuda-mps-control.pid").read_text()), signal.SIGKILL)
    else:
        victim.order("out of memory" if fault == "out of memory" else "kernel fault")


def _state(client: _Client, began: float) -> dict[str, Any]:
    if client.ended is not None:
        state, at = "failed" if client.error else "ended", client.ended
    elif client.reported >= began + SETTLED_S:
        state, at = "continues", client.reported
    else:
        state, at = "hangs", time.time()
    return {"state": state, "after_s": at - began, "error": client.error}


def _joins_afterwards(device: str, clients: list[_Client]) -> str:
    """How a process fares that joins after the fault, when those that failed have ended, as trials' processes do."""
    for client in clients:
        if client.ended is not None:
            client.process.kill()
            client.process.join(10)
    began = time.time()
    new = _Client(device)
    try:
        new.begin()
        if new.error is not None:
            return f"fails: {new.error}"
        return f"works after {time.time() - began:.1f} s"
    except BenchError as error:
        return str(error)
    finally:
        new.stop()


def _left_behind() -> list[str]:
    """The processes that our daemon has left, some seconds after the last process that used it."""
    deadline = time.time() + 20.0
    while (left := mps.leftovers()) and time.time() < deadline:
        time.sleep(0.1)
    return left


def _work(device: str, parent: Connection) -> None:
    standing = mps.join("auto")
    pipes = os.environ.get(mps.PIPES, mps.DEFAULT_PIPES)
    parent.send((standing.kind, standing.reason if standing.kind == "turns" else pipes))
    import torch

    torch.set_num_threads(1)
    try:
        a = torch.randn(4096 if device == "cuda" else 64, device=device).repeat(2, 1)
        a = a.T @ a
        while True:
            for _ in range(20):
                a = torch.tanh(a @ a)
            float(a.sum())  # waits for the GPU
            parent.send(("step", str(time.time())))
            if parent.poll():
                _fail(parent.recv(), a)
                parent.send(("step", str(time.time())))
    except RuntimeError as error:
        parent.send(("error", f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _fail(order: Order, a: Any) -> None:
    import torch

    if order == "out of memory":
        try:
            kept = []
            while True:
                kept.append(torch.empty(2**34, dtype=torch.uint8, device=a.device))
        except torch.OutOfMemoryError:
            del kept
            torch.cuda.empty_cache()
    elif order == "kernel fault":
        a[torch.full((4,), 10**9, device=a.device)].sum().item()


def faults_table(result: dict[str, Any]) -> Table:
    """Return the outcome of the neighbours as a Rich table."""
    table = Table(title=f"under CUDA MPS, torch {result['machine']['torch']}", box=None)
    for name in ("fault", "victim", "neighbours", "a new process", "left behind"):
        table.add_column(name)
    for row in result["rows"]:
        of = [
            f"{one['state']} ({one['after_s']:.1f} s)"
            + (f" {one['error']}" if one["error"] else "")
            for one in (row["victim"], *row["neighbours"])
        ]
        left = ", ".join(row["left"]) or "nothing"
        table.add_row(row["fault"], of[0], "\n".join(of[1:]), row["new"], left)
    return table
