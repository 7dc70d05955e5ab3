"""How many trials share a GPU, and waiting for its memory."""

import re

import pytest

from trainables.ray_trainable import wait_for_device_memory
from tune_app.packing import pick_packing

GIB = 2**30


@pytest.mark.parametrize(
    ("totals", "chosen"),
    [
        ({1: 240.0, 2: 484.0, 4: 618.0, 8: 720.0}, 8),  # facts, section 5: an eager GPU idles two thirds of the time
        ({1: 690.0, 2: 700.0}, 1),  # within 5 %: not worth slower trials
        ({1: 100.0, 2: 90.0}, 1),
        ({1: 100.0, 2: 103.0, 4: 110.0}, 4),
        ({1: 5.0}, 1),
    ],
)
def test_the_smallest_packing_that_none_clearly_beats(totals: dict[int, float], chosen: int) -> None:
    assert pick_packing(totals) == chosen


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no packing"):
        pick_packing({})


def test_a_trial_waits_for_memory_that_is_about_to_be_freed() -> None:
    readings = iter([(10 * GIB, 140 * GIB), (20 * GIB, 140 * GIB), (60 * GIB, 140 * GIB)])
    wait_for_device_memory(0.5, timeout_s=0.5, memory=lambda: next(readings))
    assert next(readings, None) is None


def test_a_trial_gives_up_waiting_with_both_figures() -> None:
    with pytest.raises(
        MemoryError, match=re.escape("10.0 of 140.0 GiB of GPU memory are free, this trial's share is 0.5")
    ):
        wait_for_device_memory(0.5, timeout_s=0.1, memory=lambda: (10 * GIB, 140 * GIB))
