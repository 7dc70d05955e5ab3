"""The record of a test: written once, read by table and report."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainables.data.json_files import read_json
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles


def test_file(study: Study) -> Path:
    """test.json of the search that was confirmed; next to the confirmation where the search is gone."""
    search = Path(study.spec.confirms) if study.spec.confirms else study.path
    return StudyFiles(search if search.is_dir() else study.path).test


def read_test_record(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        scored: list[dict[str, Any]] = read_json(path)["scored"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"{path}: damaged ({error}): it is the record of the test scores, restore it"
        ) from None
    return scored


def score_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a record of the test rows in words."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["time"]))
    what = "the winner" if record["winner"] else "no winner was named"
    runs = len(record["runs"])
    lines = [
        f"Test rows ({record['volumes']}: {record['positive']} positive, {record['negative']} negative), scored "
        f"{when} with {record['variant']} ({what}), config {record['config_hash']}:",
        f"  ensemble of {runs} runs: AUC {_shown(record['auc'])} [95 % CI {_shown(record['auc_low'])}, "
        f"{_shown(record['auc_high'])}]",
        f"  single runs: mean AUC {_shown(record['mean_auc'])}, from {_shown(record['lowest_auc'])} to "
        f"{_shown(record['highest_auc'])}",
    ]
    if other := record.get("documented"):
        line = f"  documented settings: AUC {_shown(other['auc'])}; difference {_shown(other['difference'], '+')}"
        if other["low"] is not None:
            line += f" [{other['low']:+.3f}, {other['high']:+.3f}], DeLong p {other['p']:.3f}"
        lines.append(line)
    if record["times"] > 1:
        lines.append(
            f"  This was look number {record['times']} at the test rows: the first one is the honest one."
        )
    return lines


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
