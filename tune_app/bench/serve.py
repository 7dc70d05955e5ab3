"""The service under load, measured: viewers of a study whose rows keep coming, and the cost for service and driver.

A real `medtune serve` over a generated study, real connections, and a writer in place of a driver. Measured are the time from
a row's writing to its arrival at a viewer, the service's processor time, and the writer's own pace with and without
viewers. `bench_watched_search` asks the same of a real search: how long it takes alone, and watched.
"""

import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from trainables.checkpoints import write_json
from trainables.machine.safe_path import python
from tune_app.backtest.synthetic import generate_curves
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.rows import read_rows
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

PACE_S = 0.1
"""Seconds between two rows: some ten trials with epochs of a second each."""


def write_generated_study(root: Path, *, trials: int, epochs: int) -> StudyFiles:
    """Write a study of generated curves, all trials completed but the last, which runs; returns its files."""
    files = StudyFiles(root)
    root.mkdir(parents=True)
    spec = build_spec(
        {"data": "/generated/table.csv", "trials": trials, "config": {"epochs": epochs}}
    )
    files.write(
        {"spec": spec.model_dump(mode="json"), "cohort": "generated", "created": time.time()}
    )
    lines = []
    for number, curve in enumerate(generate_curves(trials, epochs=max(epochs, 24), seed=0)):
        name = f"{number:05d}"
        rows = curve.rows[:epochs] if number < trials - 1 else curve.rows[:1]
        for row in rows:
            lines.append(json.dumps({"trial": name, "time": time.time(), "epoch_s": 1.0, **row}))
        state = "completed" if number < trials - 1 else "running"
        record = {
            "trial": name,
            "number": number,
            "overrides": {"s": 5.0 + number % 30},
            "state": state,
        }
        record |= {"started": time.time(), "gpus": 0.0, "failures": 0}
        # with the fields a driver writes at a trial's end, or each would be diagnosed at each reading
        if state == "completed":
            record |= {
                "ended": time.time(),
                "verdict": "healthy",
                "verdict_summary": "nothing found",
                "objective": 0.8,
            }
        write_json(files.trial(name).record, record)
    files.epochs.write_text("\n".join(line.replace("NaN", "null") for line in lines) + "\n")
    files.decisions.write_text("")
    return files


def bench_serve(
    *,
    viewers: int,
    seconds: float,
    trials: int,
    epochs: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return latencies in milliseconds, the service's share of one processor, and the writer's pace, of one run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "studies"
        say(f"writing a study of {trials} trials and {epochs} epochs")
        files = write_generated_study(root / "load", trials=trials, epochs=epochs)
        with _service(root) as (process, url):
            first = _fetch(f"{url}/api/studies/load")
            table = _fetch(f"{url}/api/studies/load/trials")
            curves = _fetch(f"{url}/api/studies/load/curves")
            say("without viewers")
            with FileLock(files.lock):
                alone = asyncio.run(_run(url, files, 0, seconds))
                say(f"with {viewers} viewers")
                before = _processor_s(process.pid)
                started = time.monotonic()
                watched = asyncio.run(_run(url, files, viewers, seconds))
                share = (_processor_s(process.pid) - before) / (time.monotonic() - started)
    latencies = sorted(watched["latencies"])
    return {
        "viewers": viewers,
        "trials": trials,
        "epochs": epochs,
        "first_read_s": first[0],
        "trials_s": table[0],
        "trials_bytes": table[1],
        "curves_s": curves[0],
        "curves_bytes": curves[1],
        "events": len(latencies),
        "expected": watched["written"] * viewers,
        "latency_ms_median": 1000 * statistics.median(latencies) if latencies else None,
        "latency_ms_p99": 1000 * latencies[int(0.99 * (len(latencies) - 1))] if latencies else None,
        "processor_share": share,
        "append_ms_alone": 1000 * statistics.median(alone["appends"]),
        "append_ms_watched": 1000 * statistics.median(watched["appends"]),
    }


SEARCH = {"trials": 2, "epochs": 60, "max-concurrent": 1, "gpus-per-trial": 0, "seed": 0}
SMALL = {"depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 2, "train_auc_volumes": 0}
"""The search that is watched: small trials one at a time, so that every run of it has the same epochs."""


def bench_watched_search(
    *, viewers: int, turns: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the seconds from a real CPU search's first epoch to its last, without a service and with one and `viewers`.

    Alternately, and in the other order every other turn; `rows` are the epochs of each run; runs that differ in
    them are an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = write_cohort(Path(folder) / "cohort", subjects=16, side=(14, 18))
        studies = Path(folder) / "studies"
        studies.mkdir()
        told: dict[str, Any] = {
            "viewers": viewers,
            "alone_s": [],
            "watched_s": [],
            "rows": [],
            "rows_seen": [],
        }
        for turn in range(turns):
            for watched in (turn % 2 == 1, turn % 2 == 0):
                how = "watched" if watched else "alone"
                name = f"{turn}-{how}"
                files = StudyFiles(studies / name)
                places = {"data": table, "out": files.root, "cache": Path(folder) / "cache"}
                command = python("-m", "tune_app.cli", "run")
                command += [f"--{name}={value}" for name, value in (SEARCH | places).items()]
                command += [f"--set={name}={value}" for name, value in SMALL.items()]
                with _service(studies) if watched else nullcontext((None, "")) as (_, url):
                    driver = subprocess.Popen(
                        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
                    if watched:
                        told["rows_seen"] += asyncio.run(_watch(url, name, driver, viewers))
                    if driver.wait() != 0:
                        raise RuntimeError(
                            f"the search {name} ended with exit code {driver.returncode}"
                        )
                first, *_, last = rows = read_rows(files.epochs)
                told[f"{how}_s"].append(last["time"] - first["time"])
                told["rows"].append(len(rows))
                say(f"{name}: {last['time'] - first['time']:.1f} s for {len(rows)} epochs")
    if len(set(told["rows"])) != 1:
        raise RuntimeError(f"the searches differ in epochs and cannot be compared: {told['rows']}")
    told["ratio"] = statistics.median(told["watched_s"]) / statistics.median(told["alone_s"])
    return told


async def _watch(
    url: str, study: str, driver: "subprocess.Popen[bytes]", viewers: int
) -> list[int]:
    """Watch with `viewers` open streams until the driver ends; returns how many rows each of them was sent."""
    seen = [0] * viewers

    async def view(number: int) -> None:
        while True:  # there is no such study before its driver has started it
            async for event, data in _events(url, f"{study}/events"):
                if event == "rows":
                    seen[number] += len(json.loads(data)["rows"])
            await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(view(number)) for number in range(viewers)]
    while driver.poll() is None:
        await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # the last rows are on their way
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _events(url: str, stream: str) -> AsyncIterator[tuple[str, bytes]]:
    """Yield each event that a viewer is sent, and its data: "retry" as the stream begins; none where there is no such study."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    writer.write(f"GET /api/studies/{stream} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    event = ""
    try:
        if b" 200 " not in await reader.readline():
            return
        while line := await reader.readline():
            name, _, content = line.partition(b": ")
            if name == b"event":
                event = content.decode().strip()
            elif name in (b"data", b"retry"):
                yield event if name == b"data" else "retry", content
    finally:
        writer.close()


@contextmanager
def _service(root: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Run `medtune serve` over the studies in `root` for the block; gives its process and URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = python("-m", "tune_app.cli", "serve", str(root), "--port", str(port))
    environment = os.environ | {
        "MEDTUNE_TOKEN": secrets.token_hex(8),
        "MEDTUNE_CACHE": str(root.parent / "cache"),
    }
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _await(f"{url}/api/session", process)
        yield process, url
    finally:
        process.terminate()
        process.wait(30)


def _await(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            _fetch(url)
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError("the service did not start") from None
            time.sleep(0.1)


def _fetch(url: str) -> tuple[float, int]:
    started = time.monotonic()
    with urllib.request.urlopen(url, timeout=300) as answer:
        size = len(answer.read())
    return time.monotonic() - started, size


async def _run(url: str, files: StudyFiles, viewers: int, seconds: float) -> dict[str, Any]:
    """Write a row every PACE_S for so long while `viewers` look on; returns what each of them saw, and when."""
    stream = f"load/events?seen={files.epochs.stat().st_size}"
    latencies: list[float] = []
    written = 0
    last = json.loads(files.epochs.read_text().splitlines()[-1])
    open_now = asyncio.Semaphore(0)

    async def view() -> None:
        async for event, data in _events(url, stream):
            arrived = time.time()
            if event == "retry":
                open_now.release()
            elif event == "rows":
                latencies.extend(arrived - times[row[1]] for row in json.loads(data)["rows"])

    times: dict[int, float] = {}
    tasks = [asyncio.create_task(view()) for _ in range(viewers)]
    for _ in range(viewers):
        await asyncio.wait_for(open_now.acquire(), 120)
    appends = []
    epoch = int(last["epoch"])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        epoch += 1
        written += 1
        times[epoch] = time.time()
        started = time.perf_counter()
        append_line(files.epochs, last | {"epoch": epoch, "time": times[epoch]})
        appends.append(time.perf_counter() - started)
        await asyncio.sleep(PACE_S)
    await asyncio.sleep(3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"latencies": latencies, "appends": appends, "written": written}


def _processor_s(pid: int) -> float:
    """Processor time of a process and those it waited for, in seconds; Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
