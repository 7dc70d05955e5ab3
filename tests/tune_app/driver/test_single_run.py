import math

import pytest

from tune_app.driver.single_run import sound_end


@pytest.mark.parametrize(
    ("aucs", "told"),
    [
        ([0.78, 0.64, 0.72], "validation AUC 0.720, the best median of 3 epochs; the weights of epoch 3 of 3 are kept"),
        ([0.6, math.nan, 0.7, 0.9], "validation AUC 0.700, the best median of 3 epochs; the weights of epoch 3 of 4 are kept"),
        ([math.nan, None], "no validation AUC"),
    ],
)  # fmt: skip
def test_a_run_ends_with_the_value_of_the_weights_that_it_keeps(
    aucs: list[float | None], told: str
) -> None:
    """The best single epoch was named, .78 in epoch 1, and `export` then gave .72 for its weights of epoch 3."""
    rows = [{"epoch": epoch, "val_auc": auc} for epoch, auc in enumerate(aucs, start=1)]
    assert told in sound_end(rows)
