"""model.json in words: the Markdown card that travels with a model. A pure function of the model's folder."""

from trainables.config import FineTuneConfig
from trainables.data.folds import few_of_a_class
from trainables.data.visible import visible
from trainables.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from tune_app.models.folder import (
    SPACING_FACTOR,
    Decides,
    Evaluation,
    Measured,
    ModelInfo,
    times,
)

NAMES = {
    "auc": "AUC",
    "auprc": "area under precision-recall",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity (class 1)",
    "specificity": "specificity (class 0)",
    "brier": "Brier score, calibrated",
    "brier_uncalibrated": "Brier score, before calibration",
    "ece": "calibration error, calibrated",
    "ece_uncalibrated": "calibration error, before calibration",
}


DECISIONS: dict[Decides, str] = {
    "threshold": "class 1 where score_1 reaches the threshold below",
    "likeliest": "the class with the largest calibrated probability",
    "largest score": "the class with the largest score",
    "nothing": "empty, and so is `probability_c`: no threshold and no calibration belong to these weights",
}


def model_card(info: ModelInfo, configs: list[FineTuneConfig]) -> str:
    """Return the card: the model, its purpose and its limits, its data, how it was chosen, and its performance."""
    sections = [
        [f"# Model card: {_what(info, configs[0])}", "", f"> {NOT_CLINICAL}"],
        _use(info),
        _data(info),
        _chosen(info),
        _worth(info),
        _decides(info),
        _reads(info, configs[0]),
        _limits(info),
        _files(info, configs),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


NOT_CLINICAL = (
    "**Not for clinical use.** A research model, made by an automatic search on a small data set. It has no regulatory "
    "clearance, was not validated on other sites, and must not inform the care of any patient."
)


def _what(info: ModelInfo, config: FineTuneConfig) -> str:
    one = f"3D ResNet-{config.depth}" + (f" (width {config.width:g})" if config.width != 1 else "")
    many = f"ensemble of {len(info.members)} networks" if len(info.members) > 1 else one
    named = ", ".join(f"{number} {_plain(name)}" for number, name in enumerate(info.class_names))
    classes = f"{info.num_classes} classes{f' ({named})' if named else ''}"
    return f"{many}, {classes}, from study {_code(info.choice.study)}"


def _use(info: ModelInfo) -> list[str]:
    lines = [
        "## Use",
        "",
        "```",
        "medtune predict FOLDER scan.nii.gz more/ table.csv --out scores.csv",
        "sha256sum --check SHA256SUMS",
        "```",
        "",
        f"`score_c` is the log-odds of class c by the network itself; `probability_c` is calibrated; `decision` is "
        f"{DECISIONS[info.decides]}.",
    ]
    if len(info.members) > 1:
        lines.append(
            "The ensemble's score is the mean of its members' calibrated log-odds, calibrated once more; "
            "`members_sd`, `members_low` and `members_high` show how far they are apart."
        )
    return lines


def _data(info: ModelInfo) -> list[str]:
    known, seen = info.training, info.validation
    lines = [
        "## Data",
        "",
        f"- Table {_code(known.table)}, prepared cohort {_code(known.cohort)}.",
        f"- Trained on {_volumes(known.volumes, known.subjects, known.classes)}.",
    ]
    if info.kind != "retrained":
        lines.append(
            f"- Validated on {_volumes(seen.volumes, seen.subjects, seen.classes)}; no subject is on both sides."
        )
    lines += [
        f"- Voxel spacing of the training files: {known.spacing()} (x, y, z).",
        f"- Their extent: {times(known.extent_low_mm)} to {times(known.extent_high_mm)} mm.",
        f"- Backbone started from {_code(known.pretrained) if known.pretrained else 'random weights'}.",
        "- Origin, scanners, sites, population, consent and licence of the data are not known to the software that wrote "
        "this card. **Add them here before passing the model on.**",
    ]
    return lines


def _chosen(info: ModelInfo) -> list[str]:
    choice = info.choice
    lines = [
        "## How it was chosen",
        "",
        f"{_plain(choice.how[0].upper() + choice.how[1:])}. Study: {_code(choice.study)} ({choice.kind}).",
    ]
    if info.kind == "retrained":
        lines.append(
            f"Then its configuration was trained once more on the training and validation volumes together, for the "
            f"{info.members[0].epoch} epochs after which it had been at its best."
        )
        return lines
    lines += [
        _which_weights(info),
        "",
        "| trial | epoch | validated on | seed | AUC at export | AUC in the study | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in info.members:
        lines.append(
            f"| {one.trial} | {one.epoch} | {one.validates} | {one.seed} | {_three(one.auc)} | {_three(one.study_auc)} "
            f"({one.precision}) | {one.verdict or '-'} |"
        )
    return lines


def _which_weights(info: ModelInfo) -> str:
    of = info.members[0].weights
    kept = OBJECTIVES.get(info.choice.objective, OBJECTIVES[DEFAULT_OBJECTIVE])
    # a study of format 1 keeps the averaged weights whatever its objective is
    if kept.weights != of:
        kept = OBJECTIVES[DEFAULT_OBJECTIVE]
    words = {
        "ema": "the running average over training (EMA)",
        "raw": "the network's own, without averaging over training",
    }[of]
    return (
        f"The weights are {words}, of the epoch that stands for the run's objective: {kept.title}."
    )


def _worth(info: ModelInfo) -> list[str]:
    lines = ["## Performance", ""]
    if info.kind == "retrained":
        lines += [
            f"**This network itself was never validated**: no volume was left for it. The numbers are those of trial "
            f"{info.members[0].trial}, with the same configuration, trained without the validation volumes. More data "
            "usually helps; nothing here shows that it did.",
            "",
        ]
    lines += [
        f"On the validation volumes ({_volumes(info.validation.volumes, info.validation.subjects, info.validation.classes)}), "
        "95 % intervals. **Optimistic**: epoch, threshold and calibration were chosen on these volumes; "
        f"{info.choice.luck}. Rows *without the subject* are threshold and calibration fitted each time on the other subjects.",
    ]
    if len({one.validates for one in info.members}) > 1:
        lines.append(
            "Each volume is scored by those members only that were not trained on it: fewer than score a new one."
        )
    if len(info.members) > 1:
        lines.append(
            "Members were put on one scale by calibrations fitted on all these volumes, in those rows too."
        )
    lines += ["", *_table(info.validation)]
    if info.test is not None:
        test = info.test
        looks = (
            ""
            if test.times == 1
            else f" This was look number {test.times} at them: the first one is the honest one."
        )
        lines += [
            "",
            f"On the table's {test.volumes} test rows ({test.positive} positive, {test.negative} negative), scored on "
            f"{test.when} with {test.runs} confirming runs of this configuration, not with this model: mean AUC of a "
            f"single run {test.mean_auc:.3f} ({test.lowest_auc:.3f} to {test.highest_auc:.3f}), of all together "
            f"{_three(test.ensemble_auc.value)} ({_cells(test.ensemble_auc).split(' | ')[1]}).{looks}",
        ]
    return lines


def _table(evaluation: Evaluation) -> list[str]:
    lines = ["| metric | value | 95 % interval | |", "|---|---|---|---|"]
    return lines + [
        f"| {_name(name)} | {_cells(one)} |" for name, one in evaluation.metrics.items()
    ]


def _name(name: str) -> str:
    plain = name.removesuffix("_unseen")
    shown = NAMES.get(plain) or (
        f"recall of class {plain.removeprefix('recall_')}" if plain.startswith("recall_") else plain
    )
    return f"{shown}, without the subject" if name.endswith("_unseen") else shown


def _cells(one: Measured) -> str:
    interval = "" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"
    return f"{_three(one.value)} | {interval} | {one.interval or ''}"


def _decides(info: ModelInfo) -> list[str]:
    if info.decides == "nothing":
        return [
            "## Operating point and calibration",
            "",
            "**None.** This network was never validated. The threshold and the calibration of the run that it repeats are "
            "left out: another network of the same configuration puts its scores on another scale. The scores rank; to "
            "decide, score labelled volumes that the network has not seen and choose a threshold on them, or use "
            "`medtune export --confirmed`, with `--ensemble N` for several networks.",
        ]
    fitted = f"{info.validation.volumes} validation volumes"
    offsets = ", ".join(f"{offset:.4g}" for offset in info.calibration.offsets)
    lines = ["## Operating point and calibration", ""]
    if info.threshold is None:
        lines.append(
            f"The decision is {DECISIONS[info.decides]}; there is no threshold with more than two classes."
        )
    else:
        assert info.threshold_probability is not None
        assert info.threshold_calibrated is not None
        lines += [
            f"Class 1 is decided from the threshold on, the one with the best balanced accuracy on the {fitted}:",
            "",
            "| scale | threshold |",
            "|---|---|",
            f"| log-odds (`score_1`) | {info.threshold:.6g} |",
            f"| the network's own probability | {info.threshold_probability:.6g} |",
            f"| calibrated probability (`probability_1`) | {info.threshold_calibrated:.6g} |",
            "",
            "It weighs both kinds of error alike. `validation.csv` has the scores to choose another.",
        ]
    lines += [
        "",
        f"Calibration: softmax(slope x logits + offsets), slope {info.calibration.slope:.4g}, offsets {offsets} (Platt's "
        f"method with his softened targets; a temperature alone cannot undo the shift that margins and class weights "
        f"cause), fitted on the {fitted}. Calibrated probabilities hold for the validation volumes' share of classes.",
    ]
    if info.calibration.slope == 0:
        lines.append(
            "**Slope 0: the scores rank no better than chance; every volume gets the share of its class.**"
        )
    briers = [info.validation.metrics.get(f"brier_{which}") for which in ("uncalibrated", "unseen")]
    before, unseen = (None if brier is None else brier.value for brier in briers)
    if before is not None and unseen is not None and unseen > before:
        lines.append(
            f"**It did not help here**: fitted on the other subjects, it takes the Brier score from {before:.3f} to {unseen:.3f} "
            "(lower is better). It takes more volumes than these to fit it."
        )
    return lines


def _reads(info: ModelInfo, config: FineTuneConfig) -> list[str]:
    recipe = info.recipe
    spacing = (
        f"{times(recipe.spacing_mm)} mm"
        if recipe.spacing_mm
        else "the smallest isotropic spacing at which it fits whole"
    )
    intensity = f"`{recipe.intensity}`" + (
        f" {recipe.window_low:g} to {recipe.window_high:g}" if recipe.intensity == "window" else ""
    )
    headers = (
        "must state an orientation"
        if not info.training.unoriented
        else "may lack an orientation, as in training"
    )
    return [
        "## Input",
        "",
        f"- A NIfTI volume of {recipe.in_channels} channel(s); its header {headers}.",
        f"- Turned to RAS+, resampled to {spacing}, cropped or padded to {times(recipe.volume_shape)} voxels, intensities "
        f"by {intensity}, rounded to half precision; network in float32.",
        f"- Refused: voxel spacing more than {SPACING_FACTOR:g} times beyond the training files', other channels, damaged "
        "or constant files.",
        f"- Network: ResNet-{config.depth}, geometry {config.geometry}, {config.head} head; {config.loss} loss.",
    ]


def _limits(info: ModelInfo) -> list[str]:
    seen = info.validation
    of_classes, unit = seen.class_subjects, "subjects"
    if of_classes is None:  # a model of a version that did not count them
        of_classes, unit = seen.classes, "volumes"
    lines = [
        "## Limits",
        "",
        f"- The rarest class has {min(of_classes)} validation {unit}: the intervals above are as wide as that makes them (for an AUC "
        f"in at least 93 of 100 cases with 1 to 20 {unit}, where scores are spread alike in the classes), and do not cover "
        "other scanners, sites or populations.",
        "- A volume of something else entirely (another organ, another modality) is scored like any other.",
        "- Maps of `--explain` show where a layer found evidence, coarsely; they do not show that it is right.",
    ]
    if (few := few_of_a_class(of_classes, unit)) is not None:
        lines.append(f"- **Few {unit}**: {few}.")
    for one in info.members:
        if one.trouble:
            lines.append(f"- **The run of trial {one.trial}**: {_plain(one.trouble)}.")
    if info.training.unoriented:
        lines.append(
            f"- {info.training.unoriented} training files state no orientation; LAS was assumed for them."
        )
    return lines


def _files(info: ModelInfo, configs: list[FineTuneConfig]) -> list[str]:
    weights = "raw" if info.members[0].weights == "raw" else "averaged"
    lines = [
        "## Files",
        "",
        f"`model.json` (all of this as data), `model.safetensors` ({weights} weights), `config.json` (every "
        "hyperparameter), `validation.csv` (scores of the validation volumes; row 1 is the first of the table), `SHA256SUMS` (of these; this "
        "card may be completed).",
    ]
    lines += [
        f"{one.parameters:,} parameters, configuration {_code(config.hash())}."
        for one, config in zip(info.members, configs, strict=True)
    ]
    differences = [one.onnx_difference for one in info.members if one.onnx_difference is not None]
    if differences:
        lines.append(
            f"`model.onnx`: prepared volumes to scaled logits; differs from torch by at most {max(differences):.2g}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items() if version)
    return [*lines, "", f"Written {info.created} by {versions}."]


def _volumes(volumes: int, subjects: int, classes: tuple[int, ...]) -> str:
    shares = ", ".join(f"{count} of class {label}" for label, count in enumerate(classes))
    return f"{volumes} volumes of {subjects} subjects: {shares}"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(text: str) -> str:
    """Text of names and messages that cannot become markup."""
    return "".join(
        f"\\{letter}" if letter in "\\`*_{}[]<>#|" else letter
        for letter in visible(" ".join(text.split()))
    )


def _code(text: str) -> str:
    """A name in code quotes; a name may hold quotes itself."""
    return f"`{visible(' '.join(text.split())).replace('`', chr(39)).replace('|', '/')}`"
