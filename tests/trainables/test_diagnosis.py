import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainables.config import FineTuneConfig, build_config
from trainables.diagnosis import (
    HEALTHY,
    VERDICTS,
    RunMonitor,
    auc_low,
    diagnose,
    expected_error,
    trial_verdict,
)


def run(
    raw: Sequence[float | None],
    ema: Sequence[float | None] | None = None,
    *,
    positive: int = 50,
    negative: int = 200,
    **columns: Any,
) -> list[dict[str, Any]]:
    """Rows of a run: raw and averaged AUC by epoch (None: not finite) with their Hanley-McNeil intervals."""
    rows = []
    for index, (r, e) in enumerate(zip(raw, ema or raw, strict=True)):
        row: dict[str, Any] = {
            "epoch": index + 1,
            "updates": 99 * (index + 1),
            "skipped_updates": 0,
            "train_loss": 1.0,
        }
        row |= {"val_positive": positive, "val_negative": negative}
        for name, auc in (("val_auc_raw", r), ("val_auc_ema", e), ("val_auc", e)):
            row |= {name: auc, f"{name}_low": None, f"{name}_high": None}
            if auc is not None:
                half = 1.96 * expected_error(auc, positive, negative)
                row |= {f"{name}_low": auc - half, f"{name}_high": auc + half}
        for name, values in columns.items():
            row[name] = values[index] if isinstance(values, list) else values
        rows.append(row)
    return rows


def bare(values: Sequence[float | None]) -> list[dict[str, Any]]:
    """Rows as an outside curve may have them: nothing but the epoch and one AUC."""
    return [{"epoch": epoch, "val_auc": value} for epoch, value in enumerate(values, start=1)]


RISE = [0.6, 0.68, 0.74, 0.78, 0.8, 0.82, 0.83, 0.84, 0.84, 0.85, 0.85, 0.84]
LOW = [0.55, 0.52, 0.5, 0.51, 0.52]


def test_a_run_that_rises_and_stays_has_no_fault_and_neither_has_one_without_rows() -> None:
    assert diagnose(run(RISE)).verdict == "no_fault"
    assert diagnose([]).verdict == "no_fault"
    assert diagnose(run(RISE)).epoch is None
    assert diagnose(run(RISE)).advice == ""


@pytest.mark.parametrize("rows", [run, bare])
def test_a_lasting_drop_is_a_collapse_after_three_epochs_and_not_before(
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    for length, verdict in ((1, "no_fault"), (2, "no_fault"), (3, "collapsed"), (5, "collapsed")):
        found = diagnose(rows(RISE + LOW[:length]), {"drw_start_epoch": 60})
        assert found.verdict == verdict
    assert found.epoch == 13
    assert found.evidence["best_auc"] == 0.85
    assert found.evidence["auc"] == 0.52
    assert "0.850" in found.summary
    assert "epoch 13" in found.summary
    assert "backbone_lr=5e-05" in found.advice
    assert found.settled


def test_a_fall_that_healed_is_told_for_ever_and_one_that_was_never_confirmed_is_not() -> None:
    """Averages of the document's settings were no number for twenty epochs, came back, and the runs were called sound."""
    raw, lost = [*RISE] + [0.85] * 18, [None] * 5
    ema = RISE + lost + [0.85] * 4 + [0.4, 0.4, 0.4] + [0.85] * 6
    during = diagnose(run(raw[:17], ema[:17]), {"ema_buffers": "copied"})
    assert (during.verdict, during.healed, during.healed_epochs) == ("ema_lag", (), 0)
    after = diagnose(run(raw, ema), {"ema_buffers": "copied"})
    assert after.verdict == "no_fault"
    assert [(fall.verdict, fall.first, fall.last) for fall in after.healed] == [
        ("ema_lag", 13, 17),
        ("ema_lag", 22, 24),
    ]
    assert after.healed_epochs == 8
    assert after.summary == "nothing found; healed: ema_lag in epochs 13 to 17, 22 to 24"
    assert after.advice == during.advice == "set ema_buffers=averaged, ema_decay=0.98"
    dip = diagnose(run(raw, RISE + [None, None] + [0.85] * 16))
    assert (dip.verdict, dip.healed, dip.advice) == ("no_fault", (), "")


def test_an_average_on_its_way_back_to_a_sound_network_is_still_the_one_that_lagged() -> None:
    """As measured: the average was no number for 23 epochs, and then steadily at .77 while the network was at .83.

    Called a collapse of the run by then, and for ever after, it advised a smaller learning rate.
    """
    raw = RISE + [0.84, 0.85] * 4 + [0.81] + [0.84, 0.83] * 4
    ema = RISE + [None] * 8 + [0.772] * 4 + [0.78, 0.8, 0.82, 0.83, 0.84]
    config = {"ema_buffers": "copied", "ema_warmup": False, "ema_decay": 0.999}
    monitor = RunMonitor(config)
    found = [monitor.update(row) for row in run(raw, ema)]
    lost = [one for one in found if one.verdict != "no_fault"]
    assert {one.verdict for one in lost} == {"ema_lag"}
    back = found[20]
    assert (back.verdict, back.epoch, back.settled) == ("ema_lag", 13, True)
    assert "on the way back: 0.772 against 0.810" in back.summary
    assert "the raw network is sound" in back.summary
    assert (
        back.advice
        == found[-1].advice
        == "set ema_buffers=averaged, ema_warmup=true, ema_decay=0.995"
    )
    assert [(fall.verdict, fall.first) for fall in found[-1].healed] == [("ema_lag", 13)]


def test_a_network_that_falls_after_its_average_has_collapsed() -> None:
    raw = RISE + [0.84] * 5 + [0.55] * 6
    ema = RISE + [None] * 5 + [0.55] * 6
    monitor = RunMonitor({"drw_start_epoch": 60})
    found = [monitor.update(row) for row in run(raw, ema)]
    assert [one.verdict for one in (found[16], found[17], found[-1])] == [
        "ema_lag",
        "collapsed",
        "collapsed",
    ]


@pytest.mark.parametrize(("lagging", "name"), [(3, "collapsed"), (6, "ema_lag")])
def test_a_fall_has_the_name_it_had_for_the_longest_time(lagging: int, name: str) -> None:
    """The average is lost first, which is detected from the third epoch on, and then the network for two."""
    raw = RISE + [0.84] * lagging + [0.55] * 2 + [0.85] * 12
    ema = RISE + [None] * lagging + [0.55] * 2 + [0.85] * 12
    found = diagnose(run(raw, ema), {"drw_start_epoch": 60})
    assert found.verdict == "no_fault"
    assert [(fall.verdict, fall.first, fall.last) for fall in found.healed] == [
        (name, 13, 14 + lagging)
    ]


def test_no_epoch_is_in_two_falls() -> None:
    """A lag may be settled, open for three epochs in which the average nearly catches up, and settled again."""
    ema = RISE + [None] * 4 + [0.72] * 3 + [None] * 3 + [0.84] * 4
    (fall,) = diagnose(run(RISE + [0.84] * 14, ema)).healed
    assert (fall.verdict, fall.first, fall.last, fall.epochs) == ("ema_lag", 13, 22, 10)


def test_many_falls_that_healed_are_counted_and_the_last_ones_named() -> None:
    found = diagnose(run([0.85] * 42, ([0.85] * 3 + [None] * 3) * 7))
    assert found.verdict == "ema_lag", "the seventh has not healed yet"
    assert [fall.first for fall in found.healed] == [4, 10, 16, 22, 28, 34]
    assert found.summary.endswith(
        "; healed: ema_lag in epochs 16 to 18, 22 to 24, 28 to 30, 34 to 36, 2 times before"
    )


@pytest.mark.parametrize("dip", [[0.4], [0.45, 0.5]], ids=["one epoch", "two epochs"])
@pytest.mark.parametrize("rows", [run, bare])
def test_dips_that_recover_are_no_collapse_at_any_moment(
    rows: Callable[..., list[dict[str, Any]]], dip: list[float]
) -> None:
    monitor = RunMonitor({})
    for row in rows([*RISE, *dip, 0.84, 0.85, *dip, 0.85, 0.85, *dip, 0.84]):
        assert monitor.update(row).verdict == "no_fault"


def test_the_dips_measured_on_a_real_run_are_none() -> None:
    # facts 1: raw AUC .877 -> .580 -> .905 over three evaluations
    assert diagnose(bare([0.7, 0.8, 0.85, 0.86, 0.877, 0.58, 0.905, 0.89])).verdict == "no_fault"


def test_a_fall_that_is_being_regained_is_waited_for() -> None:
    # re-weighting costs AUC first; half of it is back each epoch
    back = [0.55, 0.7, 0.775, 0.81, 0.83, 0.84]
    monitor = RunMonitor({})
    assert {monitor.update(row).verdict for row in run(RISE + back)} == {"no_fault"}


def test_one_noisy_epoch_does_not_hide_a_collapse() -> None:
    found = diagnose(run([*RISE, 0.55, 0.52, 0.66, 0.5, 0.53, 0.52]))
    assert found.verdict == "collapsed"


def test_the_documented_collapse_is_called_on_a_large_fold_and_not_on_a_tiny_one() -> None:
    curve = [0.55, 0.62, 0.66, 0.69, 0.71, 0.72, 0.72, 0.66, 0.6, 0.55, 0.52, 0.51, 0.51, 0.51]
    assert diagnose(run(curve, positive=50, negative=200)).verdict == "collapsed"
    found = diagnose(run(curve, positive=4, negative=36))
    assert found.verdict not in ("collapsed", "collapsed_after_drw")


def test_a_drop_within_the_noise_of_a_small_fold_is_too_noisy_to_call() -> None:
    wavering = [0.6, 0.7, 0.78, 0.84, 0.9, 0.91, 0.9, 0.74, 0.76, 0.73, 0.75, 0.74, 0.76, 0.73]
    found = diagnose(run(wavering, positive=6, negative=20), {})
    assert found.verdict == "too_noisy"
    assert found.epoch == 8
    assert float(found.evidence["drop"]) < float(found.evidence["noise"])
    assert "6 positive and 20 negative" in found.summary
    assert diagnose(run(wavering, positive=100, negative=400), {}).verdict == "collapsed"


def test_a_fold_without_one_class_is_named_and_not_called_non_finite() -> None:
    found = diagnose(run([None] * 4, positive=0, negative=40))
    assert found.verdict == "too_noisy"
    assert "lacks a class" in found.summary


def test_the_collapse_of_the_average_alone_is_a_lag_with_both_values() -> None:
    raw = [*RISE, *[0.85] * 4]
    found = diagnose(
        run(raw, RISE + LOW[:4]), {"ema_decay": 0.999, "ema_buffers": "copied", "ema_warmup": False}
    )
    assert (found.verdict, found.epoch, found.settled) == ("ema_lag", 13, True)
    assert found.evidence["auc_raw"] == 0.85
    assert found.evidence["auc_ema"] == 0.51
    for change in ("ema_buffers=averaged", "ema_warmup=true", "ema_decay=0.995"):
        assert change in found.advice


def test_an_average_that_overflows_while_the_raw_network_is_sound_is_a_lag_not_a_broken_run() -> (
    None
):
    # facts 1: EMA .999 with copied buffers was NaN from epoch 10 to 30, raw .75 to .89
    found = diagnose(
        run([*RISE, *[0.85] * 3], [0.48, 0.6, 0.66, 0.7, 0.73, 0.76, 0.77, 0.78, 0.78, *[None] * 6])
    )
    assert found.verdict == "ema_lag"
    assert found.epoch == 10
    assert found.evidence["auc_ema"] == "not finite"


def test_an_average_without_warm_up_is_named_early_and_settled_only_when_it_does_not_catch_up() -> (
    None
):
    config = {"epochs": 60, "ema_decay": 0.999, "ema_warmup": False}
    monitor = RunMonitor(config)
    verdicts = [monitor.update(row) for row in run([0.85] * 30, [0.5] * 30)]
    assert [found.verdict for found in verdicts[:5]] == ["no_fault"] * 4 + ["ema_lag"]
    assert not verdicts[4].settled
    assert "may still catch up" in verdicts[4].summary
    assert [found.settled for found in verdicts].index(False) == 4
    assert verdicts[-1].settled
    assert verdicts[-1].evidence["initial_weight"] == pytest.approx(0.999 ** (99 * 30), abs=1e-4)
    # facts 1: at chance until epoch 10, then there
    late = run([0.9] * 30, [0.5] * 10 + [0.6, 0.7, 0.8] + [0.88] * 17)
    assert diagnose(late, config).verdict == "no_fault"


def test_a_warming_average_is_given_its_first_epochs() -> None:
    assert diagnose(run([0.7, 0.8, 0.85, 0.86], [0.5, 0.65, 0.84, 0.86])).verdict == "no_fault"


def test_a_collapse_after_the_class_weights_began_is_put_down_to_them() -> None:
    drw = [False] * 12 + [True] * 5
    found = diagnose(run(RISE + LOW, drw_active=drw), {"epochs": 60, "drw_start_epoch": 13})
    assert found.verdict == "collapsed_after_drw"
    assert found.evidence["drw_start_epoch"] == 13
    assert "drw_start_epoch=48" in found.advice
    assert "drw_beta=0.99" in found.advice
    # Taken from the config where the rows do not state it, and not reported when it began long before
    assert diagnose(run(RISE + LOW), {"drw_start_epoch": 13}).verdict == "collapsed_after_drw"
    assert diagnose(run(RISE + LOW), {"drw_start_epoch": 3}).verdict == "collapsed"
    assert diagnose(run(RISE + LOW, drw_active=True), {"drw_start_epoch": 1}).verdict == "collapsed"


def test_scores_that_are_not_finite_twice_end_a_run_and_once_do_not() -> None:
    assert diagnose(run([*RISE, None])).verdict == "no_fault"
    assert diagnose(run([*RISE, None, 0.85])).verdict == "no_fault"
    found = diagnose(run([*RISE, None, None]))
    assert (found.verdict, found.epoch) == ("non_finite", 13)
    assert "amp=bf16" in found.advice
    assert diagnose(bare([0.6, 0.7, math.nan, math.nan])).verdict == "non_finite"


def test_scores_and_loss_that_are_not_finite_end_a_run_at_once() -> None:
    found = diagnose(run([*RISE, None], train_loss=[1.0] * 12 + [None]))
    assert (found.verdict, found.epoch) == ("non_finite", 13)


def test_a_run_whose_every_update_is_skipped_is_broken_though_its_scores_are_finite() -> None:
    rows = run([0.5] * 4, updates=[5, 5, 5, 5], skipped_updates=[3, 99, 99, 99])
    assert diagnose(rows[:1]).verdict == "no_fault"
    found = diagnose(rows)
    assert (found.verdict, found.epoch, found.evidence["skipped_updates"]) == ("non_finite", 2, 99)


@pytest.mark.parametrize(
    "columns",
    [
        {"val_auc_probability_ema": 0.6},
        {"val_tied_raw": 0.8, "val_tied_ema": 0.0},
    ],
    ids=["probabilities rank otherwise", "scores are tied"],
)
def test_saturated_scores_are_told_by_probabilities_and_ties(columns: dict[str, Any]) -> None:
    found = diagnose(run(RISE, **columns), {"head": "linear", "s": 20})
    assert (found.verdict, found.epoch) == ("saturated", 1 if "val_tied_raw" in columns else 2)
    assert "head=cosine" in found.advice
    assert "s=15" in found.advice


def test_chance_level_is_a_finding_after_a_quarter_of_the_epochs_and_settled_after_half() -> None:
    monitor = RunMonitor({"epochs": 60})
    found = [monitor.update(row) for row in run([0.52, 0.5, 0.53, 0.51] * 10, train_auc=0.55)]
    assert [entry.verdict for entry in found].index("never_learned") == 14
    assert not found[20].settled
    assert found[30].settled
    assert "backbone_lr=0.0003" in found[30].advice
    assert "pretrained_path" in found[30].advice


def test_freezing_and_warm_up_hold_back_the_finding_that_nothing_was_learned() -> None:
    rows = run([0.52, 0.5, 0.53, 0.51] * 4)
    assert diagnose(rows, {"epochs": 60}).verdict == "never_learned"
    assert (
        diagnose(rows, {"epochs": 60, "freeze_backbone_epochs": 5, "warmup_epochs": 2.5}).verdict
        == "no_fault"
    )


def test_a_small_fold_does_not_allow_to_say_that_nothing_was_learned() -> None:
    assert diagnose(run([0.52, 0.5, 0.53, 0.51] * 5, positive=3, negative=20)).verdict == "no_fault"


def test_training_far_ahead_of_a_validation_that_stands_still_is_a_gap() -> None:
    flat = [0.6, 0.65, 0.7, 0.72, *[0.71, 0.7, 0.71] * 4]
    found = diagnose(run(flat, train_auc=[0.6, 0.7, 0.8, 0.9, *[0.99] * 12]), {})
    assert found.verdict == "train_validation_gap"
    assert found.evidence["train_auc"] == 0.99
    assert "dropout=0.5" in found.advice
    rising = [0.6 + 0.012 * epoch for epoch in range(16)]
    assert diagnose(run(rising, train_auc=0.99)).verdict == "no_fault"


def test_a_loss_spike_is_told_until_the_loss_has_been_calm_again() -> None:
    losses = [1.0, 0.9, 0.8, 0.8, 4.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    monitor = RunMonitor({})
    found = [monitor.update(row) for row in run(RISE, train_loss=losses)]
    assert [entry.verdict for entry in found] == ["no_fault"] * 4 + ["loss_spike"] * 5 + [
        "no_fault"
    ] * 3
    assert (found[4].epoch, found[4].evidence) == (5, {"loss": 4.0, "usual_loss": 0.9})


def test_the_change_of_scale_at_the_start_of_class_weights_is_no_loss_spike() -> None:
    losses = [0.2] * 6 + [1.0] * 6
    drw = [False] * 6 + [True] * 6
    assert diagnose(run(RISE, train_loss=losses, drw_active=drw)).verdict == "no_fault"
    assert diagnose(run(RISE, train_loss=losses, drw_active=False)).verdict == "loss_spike"


def test_overrides_and_the_whole_config_give_the_same_diagnosis() -> None:
    overrides = {"epochs": 30, "drw_start_epoch": 13, "s": 20.0}
    rows = run(RISE + LOW)
    assert diagnose(rows, overrides) == diagnose(rows, build_config(overrides))


def test_advice_names_hyperparameters_that_exist_with_values_they_may_have() -> None:
    """Every `name=value` of every advice builds a config; placeholders in angle brackets aside."""
    before = {
        "ema_decay": 0.999,
        "ema_warmup": False,
        "ema_buffers": "copied",
        "max_m": 0.3,
        "s": 20.0,
        "head": "linear",
    }
    before |= {"grad_clip": 0.0, "drw_start_epoch": 13}
    cases = [
        run(RISE + LOW),
        run([*RISE, *[0.85] * 5], RISE + LOW),
        run([*RISE, None, None]),
        run(RISE, val_tied_ema=0.9),
        run([0.5] * 20),
        run([*[0.7] * 12], train_auc=0.99),
        run(RISE, train_loss=[1.0] * 11 + [9.0]),
        run([0.6, 0.8, *[0.9] * 4, *[0.75] * 6], positive=6, negative=20),
    ]
    seen = set()
    for rows in cases:
        for config in (before, {}):
            found = diagnose(rows, config)
            seen.add(found.verdict)
            changes = dict(
                part.split("=", 1)
                for part in found.advice.rpartition("set ")[2].split("; ")[0].split(", ")
                if "=" in part
            )
            assert changes
            for name, value in changes.items():
                assert name in FineTuneConfig.model_fields
                if not value.startswith("<"):
                    build_config({**config, name: _parse(value.split(" ")[0])})
    assert seen >= set(VERDICTS) - {"no_fault", "collapsed"}


def _parse(text: str) -> int | float | bool | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)


def test_hanley_mcneil_gives_the_published_errors() -> None:
    # facts 1: standard error of an AUC of .72 at these class counts
    for positive, negative, error in (
        (4, 36, 0.151),
        (10, 30, 0.101),
        (20, 80, 0.069),
        (50, 200, 0.044),
    ):
        assert expected_error(0.72, positive, negative) == pytest.approx(error, abs=6e-4)
    assert expected_error(1.0, 20, 80) > 0.005


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"val_auc": st.none() | st.floats(0, 1)},
            optional={
                name: st.none() | st.floats(0, 1) | st.just(math.nan)
                for name in ("val_auc_raw", "val_auc_ema", "val_auc_low", "val_auc_high", "train_auc", "train_loss",
                             "val_tied_raw", "val_auc_probability_ema")
            }
            | {"val_positive": st.integers(0, 40), "val_negative": st.integers(0, 40), "drw_active": st.booleans(),
               "updates": st.integers(0, 9), "skipped_updates": st.integers(0, 3)},
        ),
        max_size=30,
    )
)  # fmt: skip
@example([{"val_auc": auc} for auc in (None, 1.0, 0.75, None, None, None, 0.6875)])
def test_no_row_however_sparse_breaks_the_diagnosis(rows: list[dict[str, Any]]) -> None:
    for epoch, row in enumerate(rows, start=1):
        row["epoch"] = epoch
    found = diagnose(rows, None)
    assert found.verdict in VERDICTS
    assert (found.epoch is None) == (found.verdict == "no_fault")
    assert all(
        not isinstance(value, float) or math.isfinite(value) for value in found.evidence.values()
    )
    assert "inf" not in found.summary.split()


def test_a_diagnosis_follows_from_the_rows_alone_and_each_epoch_costs_the_same() -> None:
    rng = random.Random(0)
    rows = run([min(max(rng.gauss(0.75, 0.1), 0), 1) for _ in range(60)])
    monitor = RunMonitor({})
    for index, row in enumerate(rows, start=1):
        assert monitor.update(row) == diagnose(rows[:index], {})


@pytest.mark.parametrize(("epochs", "settled"), [(12, True), (200, False)])
def test_a_lag_is_settled_at_once_when_the_run_has_no_time_to_catch_up(
    epochs: int, settled: bool
) -> None:
    """Decay .999 at 14 updates an epoch leaves 84 % of the initial weights after 12 epochs, and 6 % after 200."""
    config = build_config(
        {"epochs": epochs, "ema_decay": 0.999, "ema_warmup": False, "ema_buffers": "copied"}
    )
    rows = [
        {
            "epoch": epoch,
            "updates": 14 * epoch,
            "val_auc": 0.5,
            "val_auc_ema": 0.5,
            "val_auc_raw": 0.95,
        }
        | {"val_positive": 30, "val_negative": 60}
        for epoch in range(1, 7)
    ]
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "ema_lag"
    assert diagnosis.settled is settled


@pytest.mark.parametrize("found", ["no_fault", "healthy"])  # healthy: as version 0.1 wrote it
@pytest.mark.parametrize(
    ("state", "low", "verdict"),
    [
        ("completed", 0.61, "healthy"),
        ("completed", 0.5, "no_fault"),
        ("completed", 0.22, "no_fault"),
        ("completed", math.nan, "no_fault"),
        ("stopped", 0.7, "no_fault"),
        ("running", 0.7, "no_fault"),
        ("failed", 0.7, "no_fault"),
    ],
)
def test_healthy_is_a_completed_trial_above_chance_without_a_fault(
    found: str, state: str, low: float, verdict: str
) -> None:
    assert trial_verdict(found, state, low) == verdict
    assert trial_verdict("ema_lag", state, low) == "ema_lag"


def test_the_lower_end_of_an_auc_is_the_recorded_one_or_follows_from_the_counts() -> None:
    row = {"epoch": 1, "val_auc": 0.7, "val_auc_low": 0.58, "val_auc_high": 0.8}
    assert auc_low(row, "ema") == 0.58
    assert math.isnan(auc_low(row, "raw"))
    counted = {"epoch": 1, "val_auc_raw": 0.7, "val_positive": 20, "val_negative": 80}
    assert auc_low(counted, "raw") == pytest.approx(0.7 - 1.96 * expected_error(0.7, 20, 80))
    assert math.isnan(auc_low({}, "ema"))


def test_the_document_lists_every_verdict() -> None:
    text = (Path(__file__).parents[2] / "docs" / "stopping.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", text.split("## Verdicts")[1].split("## ")[0], re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == {*VERDICTS, HEALTHY}
