"""The searcher's records, as Optuna reads them back, its warm starts, and the searcher under Ray."""

import math
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.concurrency_limiter import ConcurrencyLimiter
from searches import EPOCHS, MIXED, TINY, left_running, make, read, row, run, suggested

from search_spaces.fixes import all_fixes, baseline
from search_spaces.space import SpaceError
from search_spaces.spaces import SPACES
from search_spaces.written import space_from
from trainables.config import build_config
from trainables.objective import objective_value
from tune_app.driver.optuna_database import SearchError
from tune_app.driver.searcher import trial_name


def test_optuna_reads_each_end_as_what_it_was(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    curves = {
        "complete": [0.6, 0.7, 0.9, 0.7],
        "stopped": [0.6, 0.5],
        "failed": [0.6],
        "diverged": [0.7, math.nan, math.nan],
        "never a score": [math.nan] * 4,
        "infinite": [math.inf, 0.6, 0.5, 0.6],
        "gone before it began": [],
    }
    handed_out = {name: suggested(searcher, name) for name in curves}
    for name, values in curves.items():
        run(searcher, name, values, **({"error": True} if name == "failed" else {}))

    trials = dict(zip(curves, read(tmp_path).trials, strict=True))
    states = {name: trial.state.name for name, trial in trials.items()}
    assert states == {
        "complete": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "diverged": "PRUNED", "never a score": "PRUNED",
        "infinite": "COMPLETE", "gone before it began": "PRUNED",
    }  # fmt: skip
    assert (
        trials["complete"].value
        == objective_value([row(e, v) for e, v in enumerate(curves["complete"], 1)])
        == 0.7
    )
    assert trials["complete"].intermediate_values == {1: 0.6, 2: 0.7, 3: 0.9, 4: 0.7}
    assert trials["stopped"].intermediate_values == {1: 0.6, 2: 0.5}
    assert trials["diverged"].intermediate_values == {1: 0.7}
    assert trials["infinite"].intermediate_values == {2: 0.6, 3: 0.5, 4: 0.6}
    assert trials["never a score"].values is None
    assert (
        trials["never a score"].user_attrs["reason"] == "no finite val_auc to go by after 4 epochs"
    )
    assert trials["failed"].user_attrs["reason"] == "the trial ended with an error"
    for number, name in enumerate(curves):
        assert handed_out[name] == {
            "trial": trial_name(number),
            "overrides": trials[name].user_attrs["overrides"],
        }
        assert (
            TINY.sample_to_overrides(trials[name].params, EPOCHS) == handed_out[name]["overrides"]
        )
        assert build_config(handed_out[name]["overrides"]).epochs == EPOCHS
    assert len(read(tmp_path).trials_dataframe()) == len(curves)


def test_memory_and_database_hold_the_same_study(tmp_path: Path) -> None:
    searcher = make(tmp_path, MIXED)
    for number in range(12):
        searcher.suggest(str(number))
        run(
            searcher,
            str(number),
            [0.5 + number / 100] * (4 if number % 3 else 2),
            error=number == 5,
        )
    in_memory, on_disk = searcher.study.trials, read(tmp_path).trials
    assert len(in_memory) == len(on_disk) == 12
    for ours, theirs in zip(in_memory, on_disk, strict=True):
        for name in ("number", "state", "values", "params", "distributions", "intermediate_values"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_an_epoch_counts_once_and_a_trial_ends_once(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", row(1, 0.6))
    searcher.on_trial_result("a", row(2, 0.7))
    searcher.on_trial_result(
        "a", row(1, 0.1)
    )  # restarted from its checkpoint, it reports again what may be lost
    searcher.on_trial_result("a", {"pid": 1})
    searcher.on_trial_result("a", {"epoch": 0, "val_auc": 0.9})
    for epoch in (3, 4):
        searcher.on_trial_result("a", row(epoch, 0.8))
    searcher.on_trial_complete("a", row(4, 0.3))
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_result("a", row(5, 0.9))
    (trial,) = read(tmp_path).trials
    assert trial.state == TrialState.COMPLETE
    assert trial.intermediate_values == {1: 0.6, 2: 0.7, 3: 0.8, 4: 0.8}


def test_reasons_are_kept_with_the_trial(tmp_path: Path) -> None:
    searcher = make(tmp_path, failure="fatal")
    for name in "abc":
        searcher.suggest(name)
    searcher.note(0, "collapsed at epoch 2")
    run(searcher, "a", [0.8, 0.5])
    searcher.on_trial_complete("b", {"epoch": 0, "fatal": "out of memory"})
    run(searcher, "c", [0.8, 0.9, 0.9, 0.9])
    collapsed, fatal, fine = read(tmp_path).trials
    assert (collapsed.state, collapsed.user_attrs["reason"]) == (
        TrialState.PRUNED,
        "collapsed at epoch 2",
    )
    assert (fatal.state, fatal.user_attrs["reason"]) == (TrialState.FAIL, "out of memory")
    assert fatal.intermediate_values == {}
    assert "reason" not in fine.user_attrs


def test_the_study_ends_at_its_number_of_trials_failed_ones_included(tmp_path: Path) -> None:
    searcher = make(tmp_path, num_trials=3)
    for name in "abc":
        searcher.suggest(name)
        run(searcher, name, [0.5], error=True)
    assert searcher.suggest("d") == Searcher.FINISHED
    assert make(tmp_path, num_trials=3).suggest("e") == Searcher.FINISHED
    more = make(tmp_path, num_trials=4)
    assert suggested(more, "e")["trial"] == "00003", (
        "more trials may be asked for later; failed ones are not tried again"
    )
    assert more.suggest("f") == Searcher.FINISHED


def test_a_failed_trial_may_be_tried_again(tmp_path: Path) -> None:
    first = make(tmp_path, num_trials=3)
    suggested = [first.suggest(name) for name in "abc"]
    run(first, "a", [0.6, 0.7], error=True)
    run(first, "b", [0.5] * EPOCHS)
    run(first, "c", [0.4], error=True)
    first.close()

    killed = make(
        tmp_path, num_trials=3, retry=[0]
    )  # before it could write to the record that trial 0 continues
    killed.close()
    settling = make(tmp_path, num_trials=3)
    settling.settle(0, "failed", None, [row(1, 0.6), row(2, 0.7)], reason="lost its node")
    settling.close()
    assert [trial.state.name for trial in read(tmp_path).trials] == ["FAIL", "COMPLETE", "FAIL"]
    assert read(tmp_path).trials[0].user_attrs["reason"] == "lost its node"

    second = make(tmp_path, num_trials=3, retry=[0, 1])  # one that has not failed stays as it is
    assert left_running(second) == [0]
    assert second.failed() == {2: "the trial ended with an error"}
    running = read(tmp_path).trials[0]
    assert (running.state.name, running.datetime_complete) == ("RUNNING", None)
    assert "reason" not in running.user_attrs
    assert running.intermediate_values == {1: 0.6, 2: 0.7}
    assert second.suggest("d") == suggested[0]
    assert second.suggest("e") == Searcher.FINISHED
    run(second, "d", [0.6, 0.7, 0.8, 0.9])
    trial = read(tmp_path).trials[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.value == objective_value(
        [row(e, v) for e, v in enumerate([0.6, 0.7, 0.8, 0.9], 1)]
    )
    assert second.study.trials[0].state == TrialState.COMPLETE


def test_warm_starts_are_asked_for_once_ever(tmp_path: Path) -> None:
    space = SPACES["collapse"]
    first = make(tmp_path, space, warm_start=None, epochs=60)
    before = suggested(first, "a")
    assert build_config(before["overrides"]) == build_config(baseline())
    # Killed here: `before` is running, `after` was never asked for.
    second = make(tmp_path, space, warm_start=None, epochs=60)
    assert second.suggest("a") == before
    second.suggest("b")
    third = make(tmp_path, space, warm_start=None, epochs=60)
    for name in "abcd":
        third.suggest(name)
    points = [trial.user_attrs.get("point") for trial in read(tmp_path).trials]
    assert points == ["before", "after", None, None]
    assert third.warm_start_left_out == {"defaults": ["the same point as 'after' in this space"]}


def test_warm_starts_are_the_documented_settings_by_default(tmp_path: Path) -> None:
    searcher = make(tmp_path, SPACES["documented"], warm_start=None, epochs=60)
    before, after, drawn = (suggested(searcher, name)["overrides"] for name in "abc")
    assert {
        **baseline(),
        "head": "cosine",
        "ema_warmup": True,
        "ema_buffers": "averaged",
    }.items() >= {key: value for key, value in before.items() if key != "epochs"}.items()
    assert build_config(after) == build_config(all_fixes())
    assert drawn != after


def test_a_warm_start_asked_for_by_name_must_lie_in_the_space(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"warm start 'before': max_m=0.3 is not in 0.15 to 0.25"):
        make(tmp_path, SPACES["narrow"], warm_start=["before"])
    assert make(tmp_path, SPACES["narrow"], warm_start=None).warm_start_left_out["before"]


def test_a_space_that_does_not_fit_the_length_is_refused(tmp_path: Path) -> None:
    space = space_from({"search": {"freeze_backbone_epochs": {"low": 0, "high": 20}}})
    with pytest.raises(SpaceError, match="freeze_backbone_epochs=20 must be at most epochs=4"):
        make(tmp_path, space)
    with pytest.raises(
        SearchError, match="unknown sampler 'cmaes': one of model, tpe, random, qmc, gp"
    ):
        make(tmp_path, sampler="cmaes")


def test_optuna_says_nothing_on_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    searcher = make(tmp_path, MIXED, sampler="gp")
    for number in range(12):
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5 + number / 100] * EPOCHS)
    assert capfd.readouterr() == ("", "")


def test_tune_can_pickle_and_limit_it(tmp_path: Path) -> None:
    searcher = make(tmp_path, objective=lambda rows: rows[-1]["val_auc"])
    ray.cloudpickle.dumps(searcher)
    limited = ConcurrencyLimiter(searcher, max_concurrent=1)
    assert limited.suggest("a")["trial"] == "00000"
    assert limited.suggest("b") is None
    limited.on_trial_complete("a", row(EPOCHS, 0.5))
    assert limited.suggest("b")["trial"] == "00001"
    limited.searcher.save_to_dir(str(tmp_path))
    assert not list(tmp_path.glob("searcher-state*"))


@pytest.mark.ray
@pytest.mark.slow
def test_ray_runs_a_search_with_stopped_and_failed_trials_and_resumes_it(tmp_path: Path) -> None:
    from ray import tune

    def train(config: dict[str, Any]) -> None:
        number = int(config["trial"])
        for epoch in range(1, EPOCHS + 1):
            if number == 3 and epoch == 2:
                raise RuntimeError("out of luck")
            tune.report(
                {"epoch": epoch, "val_auc": math.nan if number == 2 else 0.5 + number / 100}
            )

    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    try:
        for session, num_trials in enumerate((4, 6)):
            searcher = make(tmp_path, MIXED, num_trials=num_trials)
            tuner = tune.Tuner(
                tune.with_resources(train, {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=searcher, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name=f"session-{session}", storage_path=str(tmp_path / "ray"), verbose=0,
                    stop=lambda name, result: result["epoch"] == 2 and abs(result["val_auc"] - 0.51) < 1e-9,
                ),
            )  # fmt: skip
            tuner.fit()
            searcher.close()
    finally:
        ray.shutdown()
    trials = read(tmp_path).trials
    assert [trial.state.name for trial in trials] == [
        "COMPLETE",
        "PRUNED",
        "PRUNED",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
    ]
    assert trials[1].intermediate_values == {1: 0.51, 2: 0.51}
    assert [trial.value for trial in trials[4:]] == [0.54, 0.55]
