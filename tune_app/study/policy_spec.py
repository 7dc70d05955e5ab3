"""When trials are stopped early, as users write it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainables.config import problem_lines
from trainables.diagnosis import VERDICTS, Verdict, run_verdict
from trainables.errors import ProblemsError
from trainables.objective import Reduction
from tune_app.study.yaml_text import YamlError, load_yaml

VerdictAction = Literal["stop", "warn", "ignore"]
"""stop: end the trial once the diagnosis is settled; warn: report it and continue; ignore: report nothing."""


DEFAULT_ACTIONS: dict[Verdict, VerdictAction] = {
    "no_fault": "ignore",
    "non_finite": "stop",
    "ema_lag": "stop",
    "collapsed_after_drw": "stop",
    "collapsed": "stop",
    "saturated": "warn",  # the ranking, and with it the AUC from logits, is intact
    "never_learned": "warn",  # late bloomers look like it; halving ends those that stay
    "train_validation_gap": "warn",
    "loss_spike": "warn",
    "too_noisy": "warn",
}


COMPARED: dict[str, Reduction] = {
    "current": "last",
    "best": "best",
    "smoothed": "smoothed",
    "best_median3": "best_median3",
}
"""The values a rung may compare, by name, and the objective's reduction that each is."""


FIRST_COMPARABLE = 3
"""Epoch of the first rung at the earliest, unless the policy sets another.

From here on a median of three exists. Before, AUCs do not predict the end of a run: of 37 whole runs of 12 epochs of space
`documented` (AdrenalMNIST3D, 28 voxels, ResNet-50 from scratch) the rank correlation of the best median with the final one
is .03, -.12, .26, .41, .57, .75 after epochs 1 to 6. Searches of 100 epochs, one trial at a time, replayed over these runs in 150
random orders, find .794 with a first rung at epoch 1, .805 at 2 or 3, .808 at 4, .802 without rungs (150 epochs: .800,
.813, .817, .816 and .810).
"""


class PolicySpec(BaseModel):
    """When trials are stopped early; `policy` in the study file.

    The defaults were chosen on recorded curves of real runs (`medtune bench strategies`, docs/results.md): one
    rung after a third of a run, which the best third passes, and no trial is exempt from it. The rung waits for four
    arrivals: a rung that judged the second and third stopped good trials of space `wide`. Earlier rungs lost on the
    table where AUCs predict little before epoch 8; a guard after the start of the class weights, finalists and known
    settings run first gained nothing on any table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    halving: bool = True
    """Asynchronous successive halving (ASHA); without it only the diagnosis stops trials."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epoch of the first rung. None: `first_rung_share` of the epochs, and at least 3: before that no median can be
    compared."""
    first_rung_share: float = Field(1 / 3, gt=0, le=1)
    """Share of a whole run before the first rung, where `grace_epochs` is not set."""
    reduction_factor: float = Field(3.0, gt=1, le=100)
    """The best 1/reduction_factor of the trials pass a rung, and rungs are at the first one times its powers."""
    judge_from: int = Field(4, ge=0)
    """A rung stops no trial before this many have arrived at it, the trial itself included."""
    compared: Literal["current", "best", "smoothed", "best_median3"] = "best_median3"
    """The value a rung compares: the epoch's own AUC, the best so far, the median of the last 3, or the best such median."""
    drw_guard_epochs: int = Field(0, ge=0)
    """Epochs from a trial's DRW start on in which it meets no rung: re-weighting costs AUC first. The rung is held after
    them."""
    finalists: int = Field(0, ge=0)
    """This many trials, the best so far by the compared value, pass every rung and train to the end."""
    max_epochs: int | None = Field(None, ge=1)
    """Trials end here even if their own `epochs` is larger. None: no limit but their own."""
    actions: dict[Verdict, VerdictAction] = Field(default_factory=lambda: dict(DEFAULT_ACTIONS))
    """Per verdict: stop, warn or ignore; the defaults hold for verdicts not named."""

    @field_validator("actions", mode="before")
    @classmethod
    def _present_names(cls, value: Any) -> Any:
        """Take the names of studies and policy files of earlier versions."""
        if not isinstance(value, dict):
            return value
        return {
            run_verdict(name) if isinstance(name, str) else name: action
            for name, action in value.items()
        }

    @field_validator("actions")
    @classmethod
    def _complete(cls, value: dict[Verdict, VerdictAction]) -> dict[Verdict, VerdictAction]:
        if value.get("no_fault", "ignore") == "stop":
            raise ValueError("no_fault=stop would end every trial: warn or ignore")
        return {**DEFAULT_ACTIONS, **value}


class PolicyError(ProblemsError):
    """A policy file that cannot be used; `problems` holds one line a violation."""


def watching_only(policy: PolicySpec) -> PolicySpec:
    """Return the policy that diagnoses and warns but stops nothing: variants are compared on whole runs."""
    return policy.model_copy(
        update={
            "halving": False,
            "actions": {
                verdict: "warn" if action == "stop" else action
                for verdict, action in policy.actions.items()
            },
        }
    )


def read_policy(path: Path) -> PolicySpec:
    """Return the policy of a YAML file with the fields of PolicySpec. Raises PolicyError with every violation."""
    try:
        fields = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise PolicyError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(fields, dict):
        raise PolicyError(
            f"{path}: a policy is a mapping of fields to values, such as `halving: false`"
        )
    try:
        return PolicySpec(**{str(name): value for name, value in fields.items()})
    except ValidationError as error:
        raise PolicyError(
            [f"{path}: {line}" for line in problem_lines(error.errors(include_url=False))]
        ) from None


RAY_ASHA = PolicySpec(
    grace_epochs=1,
    reduction_factor=4,
    compared="current",
    judge_from=0,
    drw_guard_epochs=0,
    finalists=0,
    actions=dict.fromkeys(VERDICTS, "ignore"),
)
"""Our additions switched off: Ray's `ASHAScheduler` with the settings it is shipped with."""


POLICIES: dict[str, PolicySpec] = {
    "medtune": PolicySpec(),
    "ray_asha": RAY_ASHA,
    "diagnosis": PolicySpec(halving=False),
    "none": PolicySpec(halving=False, actions=dict.fromkeys(VERDICTS, "ignore")),
}
"""Policies that a study file may name: medtune's own, Ray's `ASHAScheduler` as shipped, stops by the diagnosis alone,
and no stops at all."""

FORMER_DEFAULTS = {
    "first_rung_share": 0.1,
    "reduction_factor": 2.0,
    "judge_from": 0,
    "drw_guard_epochs": 5,
    "finalists": 3,
}
"""Values by which a study written before `first_rung_share` existed decides where it names no others."""
