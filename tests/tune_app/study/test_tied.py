"""Which runs are deployed together with the best."""

import numpy as np
import pytest

from tune_app.study.tied import TIED_AUC, TIED_RUNS, nearly_tied


@pytest.mark.parametrize(
    ("values", "positions"),
    [
        ([], []),
        ([np.nan], []),
        ([0.8], [0]),
        ([0.8, 0.9, np.nan, 0.89], [1, 3]),
        ([0.9, 0.8, 0.7], [0]),
        ([0.85, 0.85], [0, 1]),
        ([0.5, 0.8, 0.81, 0.805, 0.8, 0.8, 0.8], [2, 3, 1, 4, 5]),
        ([-np.inf, 0.8], [1]),
    ],
)
def test_the_best_and_what_is_close_behind_it_are_taken_best_first(
    values: list[float], positions: list[int]
) -> None:
    assert nearly_tied(np.array(values, dtype=float)).tolist() == positions


def test_the_margin_and_the_number_are_those_that_the_document_states() -> None:
    assert (TIED_AUC, TIED_RUNS) == (0.02, 5)
    assert len(nearly_tied(np.full(20, 0.8))) == TIED_RUNS
