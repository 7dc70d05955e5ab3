"""`medtune bench results`: how long a study of many trials takes to load, and how much memory.

The study is made of generated curves (`tune_app.backtest.curves`), every metric of every row filled in, so that its files have
the size of real ones. Each step is measured in a separate interpreter, as a user's would be, from the files alone.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from search_spaces.space import NOT_SEARCHED
from trainables.checkpoints import write_json
from trainables.config import FineTuneConfig, build_config
from trainables.diagnosis import diagnose
from trainables.machine.safe_path import python
from trainables.objective import DEFAULT_OBJECTIVE, objective_value
from tune_app.backtest.curves import Curve
from tune_app.backtest.synthetic import generate_curves
from tune_app.bench.search import machine
from tune_app.study.columns import METRICS
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec

CREATED = 1_780_000_000.0

_STEPS = """
import json, sys, time
from pathlib import Path

def peak_mib():
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage would count its parent's memory before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)

def step(name, work):
    begun, cpu = time.perf_counter(), time.process_time()
    result = work()
    took = {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}
    print(json.dumps({"step": name, **took, "peak_mib": peak_mib()}), flush=True)
    return result

def load_modules():
    import tune_app.report.page, tune_app.results.study
    import optuna.importance, plotly, pyarrow.json

root, page = sys.argv[1:]
step("import", load_modules)
from tune_app.report.page import write_report
from tune_app.results import load_study
study = step("load", lambda: load_study(root))
step("leaderboard", lambda: study.leaderboard(10))
step("importance", lambda: study.importance())
step("report", lambda: write_report(study, page))
held = sum(int(table.memory_usage(deep=True).sum()) for table in (study.trials_full, study.epochs, study.decisions))
assert "torch" not in sys.modules and "ray" not in sys.modules
print(json.dumps({"trials": len(study.trials_full), "epochs": len(study.epochs), "held_mib": held / 2**20}))
"""


def bench_results(
    *, trials: int, epochs: int, folder: Path, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write a study of `trials` full trials of `epochs` epochs into the empty `folder` and measure reading it.

    Returns machine, trials, epochs (rows), bytes on disk, `held_mib` (of the dataframes) and `rows`: step, seconds,
    cpu_s (of them at work: all of them on a machine with nothing else to do) and peak_mib (the process's highest
    resident memory up to the end of the step).
    """
    root = folder / "study"
    say(f"writing {trials} trials of {epochs} epochs")
    write_made_study(root, generate_curves(trials, epochs=epochs), epochs)
    say("reading them in a fresh interpreter")
    done = subprocess.run(
        python("-c", _STEPS, str(root), str(folder / "report.html")),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    *rows, told = (json.loads(line) for line in done.stdout.splitlines())
    return {
        "machine": machine("pandas", "pyarrow"),
        "study_bytes": sum(file.stat().st_size for file in root.rglob("*") if file.is_file()),
        "report_bytes": (folder / "report.html").stat().st_size,
        **told,
        "rows": rows,
    }


def write_made_study(root: Path, curves: list[Curve], epochs: int) -> None:
    """Write curves to `root` as the study of a search that stopped none of them."""
    files = StudyFiles(root)
    names = [name for name in FineTuneConfig.model_fields if name not in NOT_SEARCHED]
    spec = build_spec(
        {"data": "/data/table.csv", "trials": len(curves), "config": {"epochs": epochs}}
    )
    files.root.mkdir(parents=True)
    files.write({"spec": spec.model_dump(mode="json"), "cohort": "made", "created": CREATED})
    rng = np.random.default_rng(0)
    others = [name for name, (dtype, _) in METRICS.items() if dtype == "float64"]
    with files.epochs.open("w", encoding="utf-8") as stream:
        for number, curve in enumerate(curves):
            drawn = curve.config or {}
            config = build_config({"epochs": epochs, **drawn})
            given = {name: value for name, value in drawn.items() if name in names}
            found = diagnose(curve.rows, config)
            write_json(files.trial(curve.trial).config, config.model_dump(mode="json"))
            record = {
                "trial": curve.trial,
                "number": number,
                "variant": None,
                "overrides": given,
                "node": "made",
                "state": "completed",
                "started": CREATED,
                "ended": CREATED + 60.0 * epochs,
                "gpus": 1.0,
                "objective": objective_value(curve.rows, DEFAULT_OBJECTIVE),
                "failures": 0,
                "error": None,
                "verdict": found.verdict,
                "verdict_epoch": found.epoch,
                "reason": None,
                "verdict_summary": found.summary,
                "advice": found.advice,
                "healed_epochs": found.healed_epochs,
            }
            write_json(files.trial(curve.trial).record, record)
            for row in curve.rows:
                filled = dict(zip(others, rng.random(len(others)).tolist(), strict=True))
                filled |= {"frozen_stages": 0, "precision": "fp16"}
                whole = {"trial": curve.trial, "time": CREATED + row["epoch"], **filled, **row}
                stream.write(json.dumps(whole) + "\n")


def results_table_of(result: dict[str, Any]) -> Table:
    """Return the rows of `bench_results` as a Rich table."""
    table = Table()
    for heading in ("step", "seconds", "CPU s", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in result["rows"]:
        table.add_row(
            row["step"], f"{row['seconds']:.2f}", f"{row['cpu_s']:.2f}", f"{row['peak_mib']:.0f}"
        )
    return table


def results_line(result: dict[str, Any]) -> str:
    """Return the measured values and the machine in a line."""
    on = result["machine"]
    return (
        f"{result['trials']} trials, {result['epochs']} epochs: {result['study_bytes'] / 2**20:.0f} MiB on disk, "
        f"{result['held_mib']:.0f} MiB of dataframes, report of {result['report_bytes'] / 2**20:.1f} MiB "
        f"({on['name']}, Python {on['python']}, pandas {on['pandas']}, pyarrow {on['pyarrow']})"
    )
