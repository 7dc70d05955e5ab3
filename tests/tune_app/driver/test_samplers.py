"""The searcher's samples: those of Optuna's own samplers, and those of the model."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from searches import EPOCHS, MIXED, TINY, make, read, run, suggested

from search_spaces.space import Space
from search_spaces.spaces import SPACES
from trainables.config import build_config
from tune_app.study import surrogate
from tune_app.study.prior import shipped_prior


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("space", [TINY, MIXED], ids=["plain", "conditional"])
def test_tpe_draws_what_optunas_own_sampler_draws(tmp_path: Path, space: Space) -> None:
    searcher = make(tmp_path, space, sampler="tpe", num_trials=40, seed=3)
    rng = random.Random(0)
    for number in range(30):
        searcher.suggest(str(number))
        if number % 7:  # the others stay running: the constant liar sees them
            run(searcher, str(number), [rng.random() for _ in range(rng.choice([2, 4]))])
    trials = searcher.study.trials
    theirs = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([3, 30]).generate_state(1)[0]),
            multivariate=True, constant_liar=True, group=space.conditional,
        ),
    )  # fmt: skip
    theirs.add_trials(trials)
    trial = theirs.ask()
    space.sample(lambda parameter: trial._suggest(parameter.name, parameter.distribution), EPOCHS)
    searcher.suggest("30")
    assert searcher.study.trials[30].params == trial.params


@pytest.mark.parametrize("sampler", ["model", "tpe", "random", "qmc", "gp"])
@pytest.mark.parametrize(
    "space", [TINY, MIXED, SPACES["wide"]], ids=["plain", "conditional", "wide"]
)
def test_every_sampler_draws_valid_configs(tmp_path: Path, sampler: str, space: Space) -> None:
    searcher = make(tmp_path, space, sampler=sampler, num_trials=14)
    for number in range(14):
        build_config(suggested(searcher, str(number))["overrides"])
        run(searcher, str(number), [0.5 + 0.01 * number] * EPOCHS)
    trials = read(tmp_path).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for trial in trials:
        loss = trial.params.get("loss", "ldam")
        assert ("focal_gamma" in trial.params) == (loss == "focal")
        assert ("max_m" in trial.params) == (loss == "ldam" and space is not TINY)
    if space is TINY:
        assert len({trial.params["dropout"] for trial in trials}) == 14


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_seed_repeats_a_search_and_another_does_not(tmp_path: Path, sampler: str) -> None:
    def drawn(folder: str, seed: int) -> list[dict[str, Any]]:
        searcher = make(tmp_path / folder, MIXED, sampler=sampler, seed=seed)
        for number in range(12):
            searcher.suggest(str(number))
            run(searcher, str(number), [0.5 + 0.03 * number] * EPOCHS)
        return [trial.params for trial in searcher.study.trials]

    assert drawn("a", 1) == drawn("b", 1)
    assert drawn("c", 2) != drawn("a2", 1)


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_a_restarted_search_never_draws_the_same_again(tmp_path: Path, sampler: str) -> None:
    for number in range(8):
        searcher = make(tmp_path / "often", sampler=sampler, seed=1)
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5] * EPOCHS)
    searcher = make(tmp_path / "once", sampler=sampler, seed=1)
    for number in range(8):
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5] * EPOCHS)
    often, once = (
        [trial.params for trial in read(tmp_path / name).trials] for name in ("often", "once")
    )
    assert often == once
    assert len({params["dropout"] for params in often}) == 8
    if (
        sampler == "qmc"
    ):  # a scrambled Sobol sequence puts one of the first eight points into each eighth, in each axis
        assert sorted(int(params["dropout"] / 0.1) for params in often) == list(range(8))


def test_the_model_learns_from_trials_that_were_stopped(tmp_path: Path) -> None:
    """Low rates are stopped early with poor values: the next samples avoid them."""
    space = SPACES["documented"]
    searcher = make(tmp_path, space, sampler="model", num_trials=30, seed=1)
    rates = []
    for number in range(30):
        rate = suggested(searcher, str(number))["overrides"]["backbone_lr"]
        rates.append(rate)
        good = rate > 1.5e-4
        run(searcher, str(number), [0.85] * EPOCHS if good else [0.55] * 2)
    assert np.mean(np.array(rates[15:]) > 1.5e-4) > 0.8
    assert np.mean(np.array(rates[:4]) > 1.5e-4) < 0.8


@pytest.mark.parametrize("most", [256, 8])
def test_the_model_asks_for_the_same_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Where it is fitted to all trials that have ended, and where there are more than it is fitted to."""
    monkeypatch.setattr(surrogate, "MOST_OBSERVED", most)
    prior = shipped_prior()
    asked: dict[str, list[Any]] = {}
    for name, restarts in (("whole", ()), ("killed", (4, 9))):
        (tmp_path / name).mkdir()
        searcher = make(tmp_path / name, MIXED, sampler="model", num_trials=14, prior=prior)
        asked[name] = []
        for number in range(14):
            if number in restarts:
                searcher.close()
                searcher = make(tmp_path / name, MIXED, sampler="model", num_trials=14, prior=prior)
            asked[name].append(suggested(searcher, str(number))["overrides"])
            run(searcher, str(number), [0.6 + 0.02 * number] * (EPOCHS if number % 3 else 2))
        searcher.close()
    assert asked["whole"] == asked["killed"]


def test_a_prior_moves_the_first_draws(tmp_path: Path) -> None:
    space = SPACES["documented"]
    rates = {}
    for name, prior in (("with", shipped_prior()), ("without", None)):
        (tmp_path / name).mkdir()
        searcher = make(tmp_path / name, space, sampler="model", prior=prior, num_trials=12)
        rates[name] = [suggested(searcher, str(n))["overrides"]["backbone_lr"] for n in range(12)]
        assert any("prior: false" in note for note in searcher.notes) == (prior is not None)
    assert np.median(rates["with"]) > np.median(rates["without"])
    modelled = [rate for n, rate in enumerate(rates["with"]) if n not in surrogate.UNMODELLED]
    assert min(modelled) > 5e-5
