"""The named search spaces, and the settings a search tries first."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.fixes import DOCUMENT_EPOCHS, all_fixes, baseline, default_of, documented_after
from search_spaces.space import DERIVED, Parameter, Role, Sample, Space, SpaceError, is_read
from trainables.config import Scalar


def _log(name: str, low: float, high: float, role: Role = "searched", why: str = "") -> Parameter:
    return Parameter(name, FloatDistribution(low, high, log=True), role, why)


def _even(
    name: str, low: float, high: float, *, why: str = "", step: float | None = None
) -> Parameter:
    return Parameter(name, FloatDistribution(low, high, step=step), why=why)


def _one_of(name: str, *choices: Scalar, why: str = "") -> Parameter:
    return Parameter(name, CategoricalDistribution(choices), "searched", why)


def _space(
    name: str,
    title: str,
    *parameters: Parameter,
    fixed: Mapping[str, Scalar],
    notes: tuple[str, ...],
) -> Space:
    return Space(name, title, {parameter.name: parameter for parameter in parameters}, fixed, notes)


_RETUNED = "each loss, margin and decay has its own best rate; at one rate for all, the one it suits would win"
_OURS: dict[str, Scalar] = {"head": "cosine", "ema_warmup": True, "ema_buffers": "averaged"}

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        _space(
            "documented",
            "the hyperparameters of the fixes, around their original and their recommended values",
            _even("max_m", 0.05, 0.5),
            _log("s", 5.0, 40.0),
            _even(
                "drw_start_share", 0.1, 0.9, why="25 of 60 epochs is 0.4; LDAM as published is 0.8"
            ),
            _log("grad_clip", 0.25, 4.0),
            _log(
                "one_minus_ema_decay",
                5e-4,
                2e-2,
                why="it has to be read in updates: 1 / this is the average's memory",
            ),
            _log("backbone_lr", 2e-5, 5e-4, "retuned", _RETUNED),
            _log("classifier_lr", 1e-4, 5e-3, "retuned", _RETUNED),
            fixed=_OURS,
            notes=(
                "Head and averaging are held at the values found here: without them the search looks for settings that "
                "happen to survive the collapse.",
            ),
        ),
        _space(
            "narrow",
            "close around the recommended values: for a second search, or a small budget",
            _even("max_m", 0.15, 0.25),
            _log("s", 12.0, 20.0),
            _even("drw_start_share", 0.3, 0.6),
            _log("grad_clip", 0.5, 2.0),
            _log("one_minus_ema_decay", 2e-3, 1e-2),
            _log("backbone_lr", 5e-5, 2e-4, "retuned", _RETUNED),
            _log("classifier_lr", 5e-4, 2e-3, "retuned", _RETUNED),
            fixed=_OURS,
            notes=("The original settings, from before the fixes, lie outside.",),
        ),
        _space(
            "wide",
            "everything that is plausible: head, geometry, loss, freezing and regularisation too",
            _one_of("loss", "ldam", "cross_entropy", "focal"),
            _one_of("head", "cosine", "linear"),
            _one_of(
                "geometry",
                "strided",
                "dilated",
                why="dilated is MedicalNet's own, at about 5 times the arithmetic",
            ),
            _even("max_m", 0.05, 0.5),
            _log("s", 4.0, 60.0),
            _even("focal_gamma", 0.5, 5.0),
            _even("drw_start_share", 0.0, 1.0, why="0 is from the first epoch on, 1 is never"),
            _log("grad_clip", 0.1, 10.0),
            _log("one_minus_ema_decay", 1e-4, 5e-2),
            _even("freeze_backbone_share", 0.0, 0.3, step=0.1, why="0 does not freeze"),
            Parameter(
                "unfreeze_stage_epochs", IntDistribution(0, 3), why="0 thaws all stages at once"
            ),
            _even("dropout", 0.0, 0.6),
            _even("augmentation_strength", 0.0, 2.0),
            _log("backbone_lr", 5e-6, 1e-3, "retuned", _RETUNED),
            _log("classifier_lr", 5e-5, 1e-2, "retuned", _RETUNED),
            _log("weight_decay", 1e-6, 1e-2, "retuned", "its best value moves with the rates"),
            fixed={"ema_warmup": True, "ema_buffers": "averaged"},
            notes=("Needs some hundred trials; `documented` is the better use of fifty.",),
        ),
        _space(
            "preprocessing",
            "how volumes are prepared: spacing, shape, intensity and window; training as recommended",
            _one_of(
                "spacing_mm",
                None,
                "1x1x1",
                "1.5x1.5x1.5",
                "2x2x2",
                why="null fits each volume separately, which hides how large things are",
            ),
            _one_of(
                "volume_shape",
                "64x64x64",
                "96x96x96",
                why="larger costs memory and time in proportion",
            ),
            _one_of("intensity", "zscore", "zscore_nonzero", "window"),
            _one_of("window_low", -1000.0, -160.0, why="lung; soft tissue"),
            _one_of("window_high", 240.0, 400.0, why="soft tissue; lung"),
            _log("backbone_lr", 5e-5, 5e-4, "retuned", _RETUNED),
            fixed=_OURS,
            notes=(
                "Each combination is a prepared copy of all volumes on disk, made when a trial first needs it.",
                "Windows are in Hounsfield units. For MR, or where voxels are 0 outside the body, write out a space without "
                "`window`, with spacings and shapes that suit the scans: `medtune data check` shows theirs.",
            ),
        ),
        _space(
            "collapse",
            "meant to reproduce the collapse: averaged weights as before the fixes, around the original values",
            _even("max_m", 0.2, 0.5),
            _log("s", 15.0, 40.0),
            _even("drw_start_share", 0.05, 0.4),
            _log("grad_clip", 0.25, 1.0),
            _log("one_minus_ema_decay", 2e-4, 5e-3),
            _log("backbone_lr", 1e-4, 1e-3, "retuned", _RETUNED),
            _log("classifier_lr", 1e-4, 1e-3, "retuned", _RETUNED),
            fixed={"head": "linear", "ema_warmup": False, "ema_buffers": "copied"},
            notes=(
                "Compare val_auc_raw with val_auc_ema: the raw network mostly does not collapse.",
                "Contains the original and the recommended settings (docs/fixes.md) exactly.",
            ),
        ),
    )
}
"""The spaces by name."""


class WarmStart(NamedTuple):
    """Settings to try first."""

    points: dict[str, Sample]
    left_out: dict[str, list[str]]
    """Settings that are no point of the space, each with the reasons."""


WARM_STARTS: dict[str, Callable[[int], dict[str, Scalar]]] = {
    "before": baseline,
    "after": documented_after,
    "defaults": all_fixes,
}
"""The document's original and recommended settings, and the defaults; by the names a study file uses."""


def warm_start_points(space: Space, epochs: int, names: Iterable[str] | None = None) -> WarmStart:
    """Return the named settings as samples of the space; all of WARM_STARTS when `names` is None.

    Only the searched hyperparameters are taken from a setting, the rest stays as the space fixes it: `before` in a space
    that fixes the cosine head is the document's margins, rates and epochs under a cosine head, not its baseline.
    Epochs keep their share of the run. A setting outside a range is left out, not clipped, and so is one that gives
    the same sample as another. Raises SpaceError for unknown names.
    """
    wanted = list(WARM_STARTS) if names is None else list(names)
    if unknown := [name for name in wanted if name not in WARM_STARTS]:
        raise SpaceError(
            f"unknown warm start {', '.join(unknown)}: there are {', '.join(WARM_STARTS)}"
        )
    searched = {parameter.hyperparameter for parameter in space.parameters.values()}
    points: dict[str, Sample] = {}
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        # A share of the run is exact at the document's own length; epochs themselves are those of this run.
        lengths = {
            length: _searched_values(space, name, length, searched)
            for length in (epochs, DOCUMENT_EPOCHS)
        }
        reasons: list[str] = []
        sample: Sample = {}
        for parameter in space.parameters.values():
            if is_read(parameter.hyperparameter, lengths[epochs]):
                values = lengths[DOCUMENT_EPOCHS if parameter.name in DERIVED else epochs]
                sample[parameter.name] = space.place(parameter, values, reasons)
        same = next((other for other, point in points.items() if point == sample), None)
        if same is not None:
            reasons.append(f"the same point as {same!r} in this space")
        if reasons:
            left_out[name] = reasons
        else:
            points[name] = sample
    return WarmStart(points, left_out)


def _searched_values(space: Space, name: str, epochs: int, searched: set[str]) -> dict[str, Any]:
    setting = {key: value for key, value in WARM_STARTS[name](epochs).items() if key in searched}
    return {**space.start(epochs), **{key: default_of(key) for key in searched}, **setting}
