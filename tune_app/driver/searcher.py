"""An Optuna study behind Ray Tune's Searcher: the sampler looks at memory, the record is a database that survives.

Ray's own `OptunaSearch` reports stopped trials as complete, leaves NaN trials running for ever and queues its first
points again at each start. Here a stopped trial is pruned, a failed one failed, and the database alone holds the trials
that have been asked for, so that a killed search is taken up by opening it again:

- A trial is in the database before Ray hears of it, with its parameters, in one transaction.
- The sampler's draw for trial n depends on the seed, n and the trials it knows, never on how often the search was
  started: each trial has its own random stream.
- Each change goes to an in-memory study first, which the sampler reads, and to the database at once.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from search_spaces.space import Parameter, Sample, Space, SpaceError
from search_spaces.spaces import warm_start_points
from trainables.config import ConfigError, Scalar, build_config
from trainables.objective import as_number
from tune_app.driver.optuna_database import (
    REASON,
    SEARCH,
    STUDY_NAME,
    Database,
    SearchError,
    quiet_optuna,
    source_of,
    sqlite_url,
)
from tune_app.study.files import OPTUNA_STUDY, StudyFiles
from tune_app.study.prior import Prior
from tune_app.study.surrogate import (
    CANDIDATES,
    RATE,
    Surrogate,
    axes_of,
    draw,
    observed,
)

SamplerName = Literal["model", "tpe", "random", "qmc", "gp"]
"""model: medtune's own, `tune_app.study.surrogate`; it learns from trials that were stopped, too, and starts from a
prior. The others are Optuna's. tpe: multivariate, with running trials counted as bad (constant liar); qmc: scrambled Sobol sequence; gp: Gaussian
process, which learns from completed trials only and draws conditional parameters at random."""

EndState = Literal["completed", "stopped", "failed"]
"""How a trial ended: at its last epoch, before it, or with an error."""

Row = Mapping[str, Any]
"""One epoch of one trial: `epoch`, counted from 1, and the metrics."""


_OVERRIDES = "overrides"  # trial attribute: the config overrides its parameters became
CHANCE = 0.5
"""AUC of a network that has learned nothing."""

_POINT = "point"  # trial attribute: name of the setting it was asked for by
_FROM = "from"  # trial attribute: earlier study and number it was taken over from
_TAKEN_OVER = "taken over"  # study attribute: earlier studies already taken over
_STREAM = "stream"  # trial attribute: the attributes that the sampler keeps with the study, as of this trial


class TakenOver(NamedTuple):
    """Counts of the trials of earlier studies that this start took over or left out."""

    added: int
    left_out: dict[str, int]
    """Reasons, each with the number of earlier trials it kept out."""

    def lines(self) -> list[str]:
        """Return the note for the user; none where there were no earlier trials."""
        if not self.added and not self.left_out:
            return []
        left_out = ", ".join(f"{count} ({reason})" for reason, count in self.left_out.items())
        more = f"; left out: {left_out}" if left_out else ""
        return [f"the sampler starts from {self.added} trials of earlier studies{more}"]


class OptunaSearcher(Searcher):  # type: ignore[misc]  # Ray's class is untyped
    """Gives Ray Tune the next trial of an Optuna study, and reports its end to the study.

    `suggest` returns {"trial": "00007", "overrides": {...}}: the Optuna number as the trial's name, and everything the
    run's config differs from the defaults in. Trials that a killed search left running come first, under the same name
    and with the same overrides; then the settings of `warm_start` that were never asked for (names of
    `search_spaces.spaces.WARM_STARTS`; None: all that are in the space); then the sampler's draws, until the study
    has `num_trials` trials. Failed trials count, and are not asked for again unless `retry` names them: those are then
    as a killed search would have left them. Trials of `warm_start_from` are known to the sampler, and do not count.

    `objective` takes a trial's rows, one an epoch, in order, and returns the trial's value: larger is better, and a
    value that is not finite is no score. `metric` is the column it is computed from, shown epoch by epoch. A result
    with the column `failure` marks the trial as failed, and holds the reason. `rows` holds the rows recorded by earlier
    sessions, by trial number; those of trials left running are read. `identity` holds all that values depend
    on in addition to the overrides, such as the cohort and the objective: a study of another identity, space or length is
    refused.
    `prior` is the model's knowledge before anything has run; None: no knowledge.
    `ended`: trials that have ended by the rows, which are the truth: others that the database calls complete or pruned are
    reopened (None: the database is believed). `storage` is the path of a SQLite file or an Optuna storage URL, `study_name`
    the study's name in it. One process at a time may have a study open.

    Raises SpaceError if some sample of the space would be no valid config or a named warm start lies outside it, and
    SearchError if the study cannot be opened, is another search's, or an earlier study is not there.
    """

    def __init__(
        self,
        space: Space,
        *,
        epochs: int,
        num_trials: int,
        objective: Callable[[Sequence[Row]], float],
        storage: str | Path,
        metric: str = "val_auc",
        sampler: SamplerName = "model",
        prior: Prior | None = None,
        seed: int = 0,
        warm_start: Sequence[str] | None = None,
        warm_start_from: Sequence[str | Path] = (),
        rows: Mapping[int, Sequence[Row]] | None = None,
        identity: Mapping[str, Scalar] | None = None,
        failure: str | None = None,
        retry: Collection[int] = (),
        ended: Collection[int] | None = None,
        study_name: str = STUDY_NAME,
    ) -> None:
        super().__init__(metric=metric, mode="max")
        if sampler not in get_args(SamplerName):
            raise SearchError(
                f"unknown sampler {sampler!r}: one of {', '.join(get_args(SamplerName))}"
            )
        if problems := space.problems(epochs):
            raise SpaceError(problems)
        points, self.warm_start_left_out = warm_start_points(space, epochs, warm_start)
        if warm_start is not None and self.warm_start_left_out:
            raise SpaceError(
                [
                    f"warm start {name!r}: {'; '.join(why)}"
                    for name, why in self.warm_start_left_out.items()
                ]
            )
        self._space = space
        self._epochs = epochs
        self._num_trials = num_trials
        self._objective = objective
        self._sampler_name = sampler
        self._prior = prior
        self._seed = seed
        self._identity = dict(identity or {})
        self._column = metric
        self._failure = failure

        self._memory = InMemoryStorage()
        with quiet_optuna():
            self._memory_study = self._memory.create_new_study(
                [StudyDirection.MAXIMIZE], STUDY_NAME
            )
            self._study = optuna.load_study(study_name=STUDY_NAME, storage=self._memory)
        self._numbers: dict[str, int] = {}  # Ray's trial ids
        self._rows: dict[int, dict[int, Row]] = {}  # of running trials, by epoch
        self._reasons: dict[int, str] = {}
        self._own = 0
        self._left: deque[int] = deque()
        self._database = Database(
            sqlite_url(storage) if isinstance(storage, Path) else storage, study_name
        )
        self.reopened: list[int] = []
        """Trials that only the database calls ended."""
        try:
            self._claim()
            if (shown := self._identity.get("objective")) is not None:
                folder = storage.absolute().parent.name if isinstance(storage, Path) else None
                self._database.describe(folder, str(shown))
            self._load(rows or {}, retry, ended)
            self.taken_over = self._take_over(warm_start_from)
        except BaseException:
            self.close()
            raise
        asked = {trial.user_attrs.get(_POINT) for trial in self._trials()}
        self._points = deque((name, sample) for name, sample in points.items() if name not in asked)

    # ---- what Ray calls ----

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial, or FINISHED when there are `num_trials`."""
        if self._left:
            number = self._left.popleft()
        elif self._own < self._num_trials:
            number = self._ask()
        else:
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = number
        return {
            "trial": trial_name(number),
            "overrides": dict(self._trial(number).user_attrs[_OVERRIDES]),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the epoch, the first time it is reported."""
        self._keep(self._numbers[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report to the study, once, how the trial ended.

        An error is a failure. A trial that reached the last epoch is complete, with the objective's value; any other
        was stopped and is pruned, as is one without a finite value.
        """
        number = self._numbers[trial_id]
        if self._trial(number).state.is_finished():
            return  # a finished trial's process may still go wrong on its way out
        state: EndState | None = "failed" if error else None
        if result is not None:
            self._keep(
                number, result
            )  # Ray does not pass on the result that a trial was stopped at
            if self._failure is not None and result.get(self._failure) is not None:
                self.note(number, str(result[self._failure]))
                state = "failed"
        self._finish(number, state)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept Tune's settings unread: space and metric are this searcher's own."""
        return True

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Write nothing: the database is the only state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments at each start, and nothing is read back from that

    # ---- called by the study's driver ----

    @property
    def notes(self) -> list[str]:
        """Notes for the user on how this search starts: points that are not tried, earlier trials taken over."""
        told: list[str] = []
        if not self._database.found:  # at the first start only
            told = [
                f"warm start {name!r} is not tried, it lies outside the space: {'; '.join(why)}"
                for name, why in self.warm_start_left_out.items()
                if not any(reason.startswith("the same point as") for reason in why)
            ]
            if self._sampler_name == "model" and self._prior is not None:
                told.append(
                    f"{RATE} is drawn with a prior from recorded runs of other cohorts; "
                    "`prior: false` in the study file draws without"
                )
        return told + self.taken_over.lines()

    @property
    def study(self) -> optuna.Study:
        """The study as the sampler sees it; for looking only."""
        return self._study

    def note(self, number: int, reason: str) -> None:
        """Keep why a trial is being stopped or has failed; written with its end, as the trial attribute `reason`."""
        self._reasons[number] = reason

    def failed(self) -> dict[int, str]:
        """Return why each trial failed, of those that the study knows to have failed."""
        return {
            trial.number: str(trial.user_attrs.get(REASON, ""))
            for trial in self._trials()
            if trial.state == TrialState.FAIL
        }

    def settle(
        self,
        number: int,
        state: EndState,
        value: float | None = None,
        rows: Sequence[Row] = (),
        *,
        reason: str | None = None,
    ) -> None:
        """End a trial that is recorded as ended, where the driver was killed before it could report that to the study.

        Does nothing to a trial the study knows to have ended. `value` is the value of a completed trial; `rows` are all
        its rows. Raises SearchError for a trial the study does not have.
        """
        if number >= self._memory.get_n_trials(self._memory_study):
            raise SearchError(
                f"{self._database.name} has no trial {trial_name(number)}, which is recorded as {state}: this is not the "
                "database the study was run with; put it back, or start a new study"
            )
        if self._trial(number).state.is_finished():
            return
        if number not in self._left:
            raise SearchError(
                f"trial {trial_name(number)} runs in this session: it cannot be settled from outside"
            )
        self._left.remove(number)
        if reason is not None:
            self.note(number, reason)
        for row in rows:
            self._keep(number, row)
        self._finish(number, state, value)

    def close(self) -> None:
        """Release the database and leave a SQLite study as one plain file."""
        self._database.close()

    # ---- inside ----

    def _ask(self) -> int:
        """Create the next trial, in memory and in the database; returns its number."""
        before = dict(self._memory.get_study_system_attrs(self._memory_study))
        attrs: dict[str, Any] = {}
        number = int(self._memory.get_n_trials(self._memory_study))
        if self._points:
            attrs[_POINT], sample = self._points.popleft()
            self._memory.create_new_trial(self._memory_study, self._running(sample))
        elif self._sampler_name == "model":
            sample = self._modelled(number)
            self._memory.create_new_trial(self._memory_study, self._running(sample))
        else:
            with quiet_optuna():
                self._study.sampler = self._sampler(number)
            trial = self._study.ask()
            sample = self._space.sample(lambda parameter: _suggest(trial, parameter), self._epochs)
        attrs[_OVERRIDES] = self._space.sample_to_overrides(sample, self._epochs)
        memory_id = self._memory_id(number)
        for key, value in attrs.items():
            self._memory.set_trial_user_attr(memory_id, key, value)
        after = self._memory.get_study_system_attrs(self._memory_study)
        stream = {key: value for key, value in after.items() if before.get(key) != value}
        drawn = self._memory.get_trial(memory_id)
        self._database.create(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=drawn.params,
                distributions=drawn.distributions,
                user_attrs=attrs,
                system_attrs=drawn.system_attrs | ({_STREAM: stream} if stream else {}),
            ),
            number,
        )
        self._own += 1
        self._rows[number] = {}
        return number

    def _running(self, sample: Sample) -> FrozenTrial:
        distributions = {name: self._space.parameters[name].distribution for name in sample}
        return optuna.trial.create_trial(
            state=TrialState.RUNNING, params=sample, distributions=distributions
        )

    def _modelled(self, number: int) -> Sample:
        """Return the model's choice for trial `number`, which has its own random stream."""
        known = [trial for trial in self._trials() if trial.state != TrialState.FAIL]
        ended = [trial for trial in known if trial.state.is_finished()]
        running = [trial for trial in known if not trial.state.is_finished()]
        rng = np.random.default_rng([self._seed, number])
        values, shares = np.array([self._worth(trial) for trial in ended]).reshape(-1, 2).T.copy()
        fitted = observed(values)
        ended = [ended[place] for place in fitted]
        suggest = partial(draw, rng=rng)
        candidates = [self._space.sample(suggest, self._epochs) for _ in range(CANDIDATES)]
        samples = [*(trial.params for trial in (*ended, *running)), *candidates]
        surrogate = Surrogate(axes_of(self._space), samples, self._prior)
        places = np.arange(len(samples))
        begin = len(ended) + len(running)
        chosen = surrogate.choose(
            places[: len(ended)],
            values[fitted],
            shares[fitted],
            places[len(ended) : begin],
            places[begin:],
            rng,
        )
        return candidates[chosen - begin]

    def _worth(self, trial: FrozenTrial) -> tuple[float, float]:
        """Return the objective of a trial that has ended, and the share of its epochs that it trained.

        One without any finite value has learned nothing: it counts as chance.
        """
        if trial.state == TrialState.COMPLETE:
            return float(trial.value), 1.0
        rows = [{"epoch": e, self._column: v} for e, v in sorted(trial.intermediate_values.items())]
        value = _finite(self._objective(rows)) if rows else None
        share = max(trial.intermediate_values, default=0) / self._epochs
        return CHANCE if value is None else value, min(share, 1.0)

    def _sampler(self, number: int) -> BaseSampler:
        """A sampler for one trial, with a random stream for this trial: a restarted search makes the same
        draw for it, and a different one for every other trial."""
        stream = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._sampler_name == "random":
            return RandomSampler(seed=stream)
        if self._sampler_name == "tpe":
            sampler = TPESampler(
                seed=stream, multivariate=True, constant_liar=True, group=self._space.conditional
            )
            if self._space.conditional:
                return sampler  # groups come from which parameters occurred together
        else:
            other = {
                "independent_sampler": RandomSampler(seed=stream),
                "warn_independent_sampling": False,
            }
            if self._sampler_name == "qmc":
                sampler = QMCSampler(
                    seed=self._seed, scramble=True, **other
                )  # one sequence for the whole study
            else:
                sampler = GPSampler(seed=stream, **other)
        # The space is known; Optuna would look for it in all trials each time, and draw the first ones without it.
        space = {name: d for name, d in sorted(self._space.unconditional.items()) if not d.single()}
        sampler.infer_relative_search_space = lambda study, trial: dict(space)
        return sampler

    def _keep(self, number: int, row: Row) -> None:
        """Record an epoch. A restarted trial reports epochs again: the first report counts, decisions rest on it."""
        epoch = row.get("epoch")
        rows = self._rows.get(number)
        if epoch is None or epoch < 1 or rows is None or epoch in rows:
            return
        rows[epoch] = row
        value = _finite(row.get(self._column))
        if value is not None and epoch not in self._trial(number).intermediate_values:
            self._memory.set_trial_intermediate_value(self._memory_id(number), epoch, value)
            self._database.report(number, epoch, value)

    def _finish(self, number: int, ended: EndState | None, value: float | None = None) -> None:
        """Record the end in memory and database. Without `ended`, whether the trial is complete is read off its rows."""
        rows = self._rows.pop(number)
        for epoch, known in self._trial(number).intermediate_values.items():
            rows.setdefault(
                epoch, {"epoch": epoch, self._column: known}
            )  # lines lost to a power cut
        ordered = [row for _, row in sorted(rows.items())]
        reason = self._reasons.pop(number, None)
        if ended is None:
            ended = "completed" if max(rows, default=0) >= self._epochs else "stopped"
        if ended == "completed":
            value = _finite(value if value is not None else self._objective(ordered))
        if ended == "failed":
            state, reason = TrialState.FAIL, reason or "the trial ended with an error"
        elif ended == "completed" and value is not None:
            state = TrialState.COMPLETE
        else:
            state = TrialState.PRUNED
            if ended == "completed":
                reason = reason or f"no finite {self._column} to go by after {len(rows)} epochs"
        told = self._study.tell(
            number, value if state == TrialState.COMPLETE else None, state=state
        )
        # of an end that a killed driver began to write
        if REASON in self._trial(number).user_attrs:
            reason = reason or ""
        self._database.finish(number, state, told.value, reason)

    def _load(
        self,
        rows: Mapping[int, Sequence[Row]],
        retry: Collection[int],
        ended: Collection[int] | None,
    ) -> None:
        """Fill memory from the database, and take up trials that a killed search left, and those to be tried again."""
        found = self._database.found
        if [trial for trial in found if self._reopen(trial, rows, retry, ended)]:
            self._database.rewrite()
        for trial in found:
            if trial.state == TrialState.WAITING:
                raise SearchError(
                    f"{self._database.name}: trial {trial.number} was queued by another program; this search queues its "
                    "warm starts itself: start a new study"
                )
            self._memory.create_new_trial(self._memory_study, trial)
            for key, value in trial.system_attrs.get(_STREAM, {}).items():
                self._memory.set_study_system_attr(self._memory_study, key, value)
            self._own += _FROM not in trial.user_attrs
            if trial.state == TrialState.RUNNING:
                self._left.append(trial.number)
                self._rows[trial.number] = {}
        for number in list(self._left):
            for row in rows.get(number, ()):
                self._keep(number, row)

    def _reopen(
        self,
        trial: FrozenTrial,
        rows: Mapping[int, Sequence[Row]],
        retry: Collection[int],
        ended: Collection[int] | None,
    ) -> bool:
        """Whether the trial has ended by the database alone, or is to be tried again; it is then made a running one."""
        if trial.number in retry and trial.state == TrialState.FAIL:
            last = self._epochs
        elif ended is not None and trial.number not in ended and _has_value_of_its_own(trial):
            last = max((int(row["epoch"]) for row in rows.get(trial.number, ())), default=0)
            self.reopened.append(trial.number)
        else:
            return False
        trial.state, trial.datetime_complete, trial.value = TrialState.RUNNING, None, None
        trial.user_attrs.pop(REASON, None)
        trial.intermediate_values = {
            epoch: value for epoch, value in trial.intermediate_values.items() if epoch <= last
        }
        return True

    def _claim(self) -> None:
        """Mark a new study as this search's; refuse another search's."""
        search = {
            "space": self._space.to_mapping(),
            "epochs": self._epochs,
            "identity": self._identity,
        }
        search = json.loads(json.dumps(search))  # as it reads back: tuples are lists there
        found = self._database.attrs.get(SEARCH)
        if found is None and not self._database.found:
            self._database.set_attr(SEARCH, search)
        else:
            parts = [
                part
                for part in search
                if not isinstance(found, Mapping)
                or _without_words(found.get(part)) != _without_words(search[part])
            ]
            if not parts:
                return
            raise SearchError(
                f"{self._database.name} holds the trials of another search: {', '.join(parts)} differ. Values of the "
                "two would be mixed: choose a new folder, and `--warm-start-from` this one to use what fits"
            )

    def _take_over(self, studies: Sequence[str | Path]) -> TakenOver:
        """Add the finished trials of earlier studies, each study once, so that the sampler starts from their results.

        A study is named by its folder, or by its storage URL. Its trial is taken over if it could have been a trial of
        this study: of the same identity and length, equal in everything the space holds, and inside every range. Its
        value goes with it, and the last epoch's if it was pruned; the curve stays where it is.
        """
        done = list(self._database.attrs.get(_TAKEN_OVER, ()))
        known = {trial.user_attrs.get(_FROM) for trial in self._trials()}
        added = 0
        left_out: Counter[str] = Counter()
        for study in studies:
            url, name = _storage_of(study)
            if name is not None and source_of(url, name) in done:
                continue  # it may be gone by now
            earlier = Database(url, name, own=False)
            earlier.close()
            source = earlier.source
            if source == self._database.source:
                raise SearchError(f"{study}: a study cannot be warm-started from itself")
            if source in done:
                continue
            for trial, reason in self._earlier_trials(earlier):
                if reason is not None:
                    left_out[reason] += 1
                elif trial.user_attrs[_FROM] not in known:  # a killed start may have added some
                    number = self._memory.get_n_trials(self._memory_study)
                    self._memory.create_new_trial(self._memory_study, trial)
                    self._database.create(trial, number)
                    added += 1
            done.append(source)
            self._database.set_attr(_TAKEN_OVER, done)
        return TakenOver(added, left_out)

    def _earlier_trials(self, earlier: "Database") -> Iterator[tuple[FrozenTrial, str | None]]:
        """The finished trials of an earlier study as they would be stored in this one, or the reason they cannot."""
        identity = earlier.attrs.get(SEARCH, {}).get("identity", {})
        differing = sorted(
            key
            for key in {*identity, *self._identity}
            if identity.get(key) != self._identity.get(key)
        )
        for trial in earlier.found:
            if not _has_value_of_its_own(trial):
                continue  # what that study took over itself belongs to the study it came from
            if differing:
                yield trial, f"another {' and '.join(differing)}"
                continue
            if trial.value is None:
                yield trial, "no finite value"
                continue
            sample, reason = self._sample_of(trial.user_attrs[_OVERRIDES])
            if sample is None:
                yield trial, reason
                continue
            pruned = trial.state == TrialState.PRUNED
            last = {trial.last_step: trial.intermediate_values[trial.last_step]} if pruned else {}
            yield (
                optuna.trial.create_trial(
                    state=trial.state,
                    value=trial.value,
                    params=sample,
                    distributions={key: self._space.parameters[key].distribution for key in sample},
                    user_attrs={
                        _FROM: f"{earlier.source}#{trial.number}",
                        _OVERRIDES: self._space.sample_to_overrides(sample, self._epochs),
                    },
                    intermediate_values=last,
                ),
                None,
            )

    def _sample_of(self, overrides: Mapping[str, Any]) -> tuple[Sample | None, str]:
        try:
            config = build_config(overrides).model_dump()
        except ConfigError as error:
            return None, error.problems[0]  # another version's
        sample, reasons = self._space.overrides_to_sample(config, self._epochs)
        return sample, "; ".join(reasons)

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._memory.get_all_trials(self._memory_study, deepcopy=False)
        return trials

    def _trial(self, number: int) -> FrozenTrial:
        trial: FrozenTrial = self._memory.get_trial(self._memory_id(number))
        return trial

    def _memory_id(self, number: int) -> int:
        return int(self._memory.get_trial_id_from_study_id_trial_number(self._memory_study, number))


def _storage_of(study: str | Path) -> tuple[str, str | None]:
    """The storage URL of an earlier study, named by folder or by URL, and its name there; None: the only one there."""
    if "://" in str(study):
        return str(study), None
    files = StudyFiles(Path(study))
    written = files.read() if files.spec.is_file() else {}
    storage = written.get("spec", {}).get("storage") or sqlite_url(files.database)
    return str(storage), str(written.get(OPTUNA_STUDY) or STUDY_NAME)


def trial_name(number: int) -> str:
    """Return a trial's name, which is also its folder's: `00007`."""
    return f"{number:05d}"


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Scalar:
    distribution = parameter.distribution
    value: Scalar
    if isinstance(distribution, CategoricalDistribution):
        value = trial.suggest_categorical(parameter.name, distribution.choices)
    else:
        whole = isinstance(distribution, IntDistribution)
        value = (trial.suggest_int if whole else trial.suggest_float)(
            parameter.name,
            distribution.low,
            distribution.high,
            step=distribution.step,
            log=distribution.log,
        )
    return value


def _has_value_of_its_own(trial: FrozenTrial) -> bool:
    """Whether a trial was completed or stopped in its study, which did not take it over from another one."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and _FROM not in trial.user_attrs


def _finite(value: Any) -> float | None:
    """The number, or None for a value that is no score: NaN, infinities, null and everything that is no number."""
    number = as_number(value)
    return number if math.isfinite(number) else None


def _without_words(part: Any) -> Any:
    """A part of a search without the texts of its space, which another version words otherwise."""
    if isinstance(part, Mapping):
        return {
            name: _without_words(value)
            for name, value in part.items()
            if name not in ("title", "notes", "why")
        }
    return part
