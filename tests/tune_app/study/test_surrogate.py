"""The search's model: the process against scikit-learn's, the prior, and the choices."""

from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from search_spaces.spaces import SPACES
from tune_app.study import surrogate as model
from tune_app.study.prior import Prior, prior_text, read_prior, shipped_prior
from tune_app.study.surrogate import (
    Axis,
    Surrogate,
    axes_of,
    draw,
    logit,
    observed,
)


def points(count: int, seed: int = 0, space: str = "documented") -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    chosen = SPACES[space]
    return [chosen.sample(lambda p: draw(p, rng), 30) for _ in range(count)]


def test_the_posterior_is_scikit_learns() -> None:
    samples = points(30)
    ours = Surrogate(axes_of(SPACES["documented"]), samples, None)
    columns = [
        axis.scaled([s[axis.name] for s in samples])
        for axis in axes_of(SPACES["documented"])
        if axis.name != "backbone_lr"
    ]
    rates = np.log([s["backbone_lr"] for s in samples])[:, None] / np.log(
        model.HIGH_RATE / model.LOW_RATE
    )
    everything = np.concatenate([rates, *columns], axis=1)
    rate_only = np.full(everything.shape[1], 1e6)
    rate_only[0] = model.RATE_LENGTH
    joint = np.full(everything.shape[1], model.JOINT_LENGTH)
    joint[0] = model.RATE_LENGTH
    kernel = (
        ConstantKernel(model.LEVEL_SD**2)
        + ConstantKernel(model.RATE_SD**2) * RBF(rate_only)
        + ConstantKernel(model.JOINT_SD**2) * RBF(joint)
    )  # fmt: skip
    seen, at = np.arange(20), np.arange(20, 30)
    values = np.random.default_rng(1).normal(1, 0.3, 20)
    noise = np.linspace(0.01, 0.1, 20)
    theirs = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    theirs.fit(everything[seen], values - model.LEVEL)
    mean, covariance = theirs.predict(everything[at], return_cov=True)
    found = ours.posterior(seen, values, noise, at)
    np.testing.assert_allclose(found[0], mean + model.LEVEL, atol=1e-6)
    np.testing.assert_allclose(found[1], covariance, atol=1e-6)


def test_before_anything_has_ended_the_prior_decides() -> None:
    prior = Prior((np.log(1e-5), np.log(1e-4), np.log(1e-3)), (-0.3, 0.3, -0.3), {})
    samples = points(200)
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, prior)
    none = np.array([], dtype=int)
    chosen = [
        surrogate.choose(none, np.array([]), np.array([]), none, np.arange(200), np.random.default_rng(i))
        for i in range(20)
    ]  # fmt: skip
    rates = np.array([samples[i]["backbone_lr"] for i in chosen])
    assert ((rates > 5e-5) & (rates < 2e-4)).all()
    assert len(set(chosen)) > 3  # a draw, not an argument of the maximum


def test_exploration_begins_with_what_has_ended_and_the_cohorts_level_is_no_part_of_it() -> None:
    prior = Prior((np.log(1e-5), np.log(1e-4), np.log(1e-3)), (-0.3, 0.3, -0.3), {})
    samples = points(200)
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, prior)
    expected = model.LEVEL + surrogate.prior_mean
    none, free = np.array([], dtype=int), np.arange(12, 200)

    def chosen(ended: int, process: Surrogate = surrogate) -> list[Any]:
        """By 40 streams, where the trials that ended are worth exactly the expected value."""
        seen = np.arange(ended)
        auc = 1 / (1 + np.exp(-expected[seen]))
        streams = [np.random.default_rng(seed) for seed in range(40)]
        return [process.choose(seen, auc, np.ones(ended), none, free, stream) for stream in streams]

    assert len(set(chosen(0))) < len(set(chosen(1)))
    unknown = Surrogate(axes_of(SPACES["documented"]), samples, prior)
    unknown.covariance = surrogate.covariance + 100.0  # a level that nothing is known of
    assert chosen(0, unknown) == chosen(0)


def test_two_of_the_first_eight_trials_ask_neither_the_prior_nor_the_model() -> None:
    prior = Prior((np.log(2e-5), np.log(5e-4)), (-3.0, 3.0), {})
    samples = points(400)
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, prior)
    rates = np.log([s["backbone_lr"] for s in samples])
    free = np.arange(20, 400)
    middle = np.median(rates[free])

    def above(ended: int, running: int) -> float:
        """Share of 60 draws with a rate over the median."""
        seen, going = np.arange(ended), np.arange(ended, ended + running)
        auc = np.full(ended, 0.75)
        drawn = [
            surrogate.choose(seen, auc, np.ones(ended), going, free, np.random.default_rng(i))
            for i in range(60)
        ]
        return float(np.mean(rates[drawn] > middle))

    for ended, running in ((0, 0), (0, 2), (1, 3), (4, 2), (8, 4)):
        assert above(ended, running) == 1
    for ended, running in ((0, 3), (3, 4), (7, 0)):
        assert 0.3 < above(ended, running) < 0.7


def test_the_process_is_fitted_to_a_bounded_and_reproducible_choice_of_trials() -> None:
    rng = np.random.default_rng(0)
    for count in (0, 1, model.MOST_OBSERVED):
        assert observed(rng.uniform(size=count)).tolist() == list(range(count))
    auc = rng.uniform(0.5, 0.9, size=1000).round(2)  # with ties
    kept = observed(auc)
    assert kept.tolist() == observed(auc.copy()).tolist()
    assert len(set(kept.tolist())) == len(kept) == model.MOST_OBSERVED
    assert (np.diff(kept) > 0).all()
    quarter = model.MOST_OBSERVED // 4
    assert auc[kept].max() == auc.max()
    assert np.sort(auc[kept])[::-1][:quarter].min() >= np.sort(auc)[::-1][quarter - 1]
    assert set(range(1000 - quarter, 1000)) <= set(kept.tolist())
    assert auc[kept].min() == auc.min()


def test_a_prior_that_is_wrong_is_overruled_by_what_ends() -> None:
    prior = Prior((np.log(2e-5), np.log(5e-4)), (0.5, -0.5), {})
    samples = points(200)
    rates = np.log([s["backbone_lr"] for s in samples])
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, prior)
    seen, free = np.arange(24), np.arange(24, 200)
    auc = 0.6 + 0.25 * (rates[seen] - rates.min()) / np.ptp(rates)  # high rates are better in truth
    none = np.array([], dtype=int)
    chosen = [
        surrogate.choose(seen, auc, np.ones(24), none, free, np.random.default_rng(i))
        for i in range(20)
    ]
    assert np.median(rates[chosen]) > np.median(rates[free])


def test_running_trials_are_not_asked_for_again() -> None:
    samples = points(1) * 5 + points(40, seed=1)
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, None)
    _, alone = surrogate.posterior(
        np.array([], dtype=int), np.array([]), np.array([]), np.array([1])
    )
    _, beside = surrogate.posterior(
        np.array([0]), np.array([1.0]), np.array([0.05**2]), np.array([1])
    )
    assert beside[0, 0] < 0.01 < alone[0, 0]


def test_a_stopped_trial_says_less_than_one_that_ended() -> None:
    samples = points(1) * 2
    surrogate = Surrogate(axes_of(SPACES["documented"]), samples, None)
    means = []
    for share in (1.0, 0.3):
        noise = np.array([model.NOISE_SD**2 + model.STOPPED_SD**2 * (1 - share)])
        means.append(
            surrogate.posterior(np.array([0]), logit(np.array([0.6])), noise, np.array([1]))[0][0]
        )
    assert means[0] < means[1] < model.LEVEL


def test_conditional_and_categorical_parameters_have_a_place() -> None:
    axes = axes_of(SPACES["wide"])
    samples = points(50, space="wide")
    surrogate = Surrogate(axes, samples, shipped_prior())
    assert np.linalg.eigvalsh(surrogate.covariance).min() > -1e-9
    assert Axis("loss", choices=("a", "b")).scaled(["b", None]).tolist() == [
        [0.0, model.CHOICE_SD],
        [0.0, 0.0],
    ]
    assert Axis("s", 5, 40, log=True).scaled([5, None, 40]).ravel().tolist() == [0.0, 0.5, 1.0]


def test_draws_are_uniform_on_the_scale_that_is_searched() -> None:
    rng = np.random.default_rng(0)
    parameters = SPACES["wide"].parameters
    drawn: list[Any] = [draw(parameters["backbone_lr"], rng) for _ in range(4000)]
    rates = np.log(drawn)
    ends: tuple[Any, ...] = parameters["backbone_lr"].ends
    low, high = np.log(ends)
    assert low <= rates.min()
    assert rates.max() <= high
    assert np.mean(rates) == pytest.approx((low + high) / 2, abs=0.1)
    assert np.std(rates) == pytest.approx((high - low) / 12**0.5, rel=0.05)
    assert {draw(parameters["freeze_backbone_share"], rng) for _ in range(200)} == {
        0.0,
        0.1,
        0.2,
        0.3,
    }
    assert {draw(parameters["unfreeze_stage_epochs"], rng) for _ in range(200)} == {0, 1, 2, 3}


def test_the_shipped_prior_names_its_source_and_is_best_where_runs_were() -> None:
    prior = shipped_prior()
    assert len(prior.provenance["learned_from"]) >= 4
    lift = prior(np.log([2e-5, 1e-4, 2.5e-4]))
    assert lift[0] < lift[1] < lift[2]
    assert read_prior(prior_text(prior)) == prior
