import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from trainables.diagnosis import expected_error
from tune_app.report import findings
from tune_app.report.cautions import cautions
from tune_app.report.checklist import Check, checklist
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.ties import ranking
from tune_app.study.files import StudyFiles

WriteStudy = Callable[..., Path]

THREE = {"depth": 10, "volume_shape": 28, "num_classes": 3}


@pytest.fixture(scope="module")
def search(a_search: Path) -> Study:
    return load_study(a_search)


@pytest.fixture(scope="module")
def ablation(an_ablation: Path) -> Study:
    return load_study(an_ablation)


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> Study:
    """Apply `change` to every row of epochs.jsonl, forget recorded objectives, and load."""
    files = StudyFiles(root)
    rows = [json.loads(line) for line in files.epochs.read_text().splitlines()]
    for row in rows:
        change(row)
    files.epochs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in files.trials.glob("*/trial.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "objective": None}))
    return load_study(root)


def check(study: Study, words: str) -> Check:
    return next(check for check in checklist(study) if words in check.text)


# Sentences -------------------------------------------------------------------------------------------------------------


def test_a_search_is_told_in_two_sentences_with_its_numbers(search: Study) -> None:
    asked, found = findings.summary(search)
    best = search.best()
    assert asked.endswith("?")
    assert "20 settings" in asked
    assert "28 positive and 70 negative" in asked
    assert f"Trial {best['trial']} is best with {best['objective']:.3f}" in found
    assert (
        f"{(search.trials_full['state'] == 'stopped').sum()} of 20 trials were stopped early"
        in found
    )
    assert found.endswith(".")
    assert ". " not in found


def test_the_documents_settings_are_told_beside_the_best_when_they_were_run(search: Study) -> None:
    before = search.trials_full.set_index("trial")["objective"]["00000"]
    assert (
        f"{before:.3f} for the original settings that this project started from"
        in findings.summary(search)[1]
    )


def test_an_ablation_is_told_by_what_stands_out_and_what_does_not(ablation: Study) -> None:
    asked, found = findings.summary(ablation)
    assert "over 3 folds and 2 seeds" in asked
    assert found.startswith("Against baseline, combined is better by")
    assert (
        "for only-delayed-drw the data do not decide" in found
        or "only-delayed-drw" in found.split("for ")[-1]
    )


def test_a_study_without_scores_says_so(write_study: WriteStudy) -> None:
    def lose(row: dict[str, Any]) -> None:
        row.update(val_auc=None, val_auc_raw=None, val_auc_ema=None)

    study = rewrite(write_study(trials=2, epochs=3, policy=False), lose)
    assert findings.summary(study)[1] == "Nothing yet: 2 trials have started and none has a score."
    assert cautions(study) == []


def test_a_confirmation_names_a_winner_only_if_the_data_do(write_study: WriteStudy) -> None:
    names = {"documented": {}, "defaults": {"max_m": 0.21}, "trial-00007": {"max_m": 0.22}}
    options = {"kind": "confirmation", "variants": names, "seeds": 2, "folds": 4, "epochs": 5}
    told = load_study(write_study("clear", effect={"trial-00007": 0.06}, **options))
    assert findings.summary(told)[1].startswith("Winner: trial-00007")
    even = load_study(write_study("even", **options))
    assert findings.summary(even)[1].startswith("No winner")
    begun = load_study(write_study("begun", unfinished=20, **options))
    assert findings.summary(begun)[1].startswith("Not finished")


def test_test_scores_on_record_are_told(write_study: WriteStudy, search: Study) -> None:
    assert findings.test_lines(search) == []
    root = write_study(trials=2, epochs=3)
    StudyFiles(root).test.write_text("{}")
    assert "damaged" in findings.test_lines(load_study(root))[0]


# Noise -----------------------------------------------------------------------------------------------------------------


def test_the_standard_error_comes_from_the_interval_or_the_class_counts(search: Study) -> None:
    best = search.best().copy()
    from_interval = findings.standard_error(best)
    assert from_interval == pytest.approx(
        (best["best_val_auc_high"] - best["best_val_auc_low"]) / 3.92
    )
    best["best_val_auc_low"] = best["best_val_auc_high"] = math.nan
    assert findings.standard_error(best) == pytest.approx(from_interval, rel=0.1)
    best["best_val_positive"] = pd.NA
    assert math.isnan(findings.standard_error(best))


@pytest.mark.parametrize("trials", [2, 10, 100])
def test_luck_is_what_the_best_of_equal_trials_gains(trials: int) -> None:
    draws = np.random.default_rng(0).normal(0, 0.05 * math.sqrt(0.5), (20_000, trials)).max(axis=1)
    assert findings.luck(0.05, trials) == pytest.approx(draws.mean(), rel=0.05)
    assert findings.luck(0.05, 1) == 0


def test_rivals_are_the_trials_within_noise(search: Study) -> None:
    rivals, half = findings.rivals_within_noise(search)
    best = search.best()
    ended = search.trials_full[search.trials_full["state"] != "failed"]
    assert half == pytest.approx(1.96 * findings.standard_error(best))
    assert rivals == (ended["objective"] > best["objective"] - half).sum() - 1


# Cautions --------------------------------------------------------------------------------------------------------------


def test_noise_repeated_use_and_failures_are_cautioned_about(search: Study) -> None:
    titles = [caution.title for caution in cautions(search)]
    assert titles[0] == "1 of 20 trials failed"
    assert "Noise is larger than the differences" in titles
    assert "The validation fold was used often" in titles
    for caution in cautions(search):
        assert caution.text
        assert caution.remedy


def test_an_optimum_at_the_edge_of_its_range_is_cautioned_about(write_study: WriteStudy) -> None:
    root = write_study(trials=8, epochs=4, policy=False)
    files = StudyFiles(root)
    for number, path in enumerate(sorted(files.trials.glob("*/trial.json"))):
        record = json.loads(path.read_text())
        config = json.loads(path.with_name("config.json").read_text())
        config["max_m"] = record["overrides"]["max_m"] = (
            0.051 if number == 3 else 0.3 - 0.01 * number
        )
        record["objective"] = 0.99 if number == 3 else 0.8
        path.write_text(json.dumps(record))
        path.with_name("config.json").write_text(json.dumps(config))
    told = {caution.title: caution.text for caution in cautions(load_study(root))}
    text = told["The best max_m is at the edge of its range"]
    assert "0.051 in 0.05 to 0.5, at the lower end, as do 1 of the 5 best trials" in text


def test_an_edge_among_equally_good_trials_elsewhere_is_no_caution(write_study: WriteStudy) -> None:
    root = write_study(trials=6, epochs=4, policy=False)
    for number, path in enumerate(sorted(StudyFiles(root).trials.glob("*/trial.json"))):
        config = json.loads(path.with_name("config.json").read_text())
        path.with_name("config.json").write_text(
            json.dumps({**config, "max_m": 0.05 if number == 0 else 0.3})
        )
        path.write_text(json.dumps({**json.loads(path.read_text()), "objective": 1.0}))
    assert not [c for c in cautions(load_study(root)) if "max_m" in c.title]


def test_people_are_counted_where_the_validation_fold_is_small(write_study: WriteStudy) -> None:
    def with_people(row: dict[str, Any]) -> None:
        row |= {"val_positive_subjects": 4, "val_negative_subjects": 30, "val_rarest_subjects": 4}

    root = write_study(trials=6, epochs=4, policy=False)
    title = "The validation fold is very small"
    assert title not in [caution.title for caution in cautions(load_study(root))]
    study = rewrite(root, with_people)
    [told] = [caution for caution in cautions(study) if caution.title == title]
    assert told.text.startswith("Only 4 subjects of class 1 to validate on: with fewer than 5")
    asked = findings.summary(study)[0]
    assert "28 positive and 70 negative validation volumes of 4 and 30 subjects" in asked
    [noise] = [one for one in cautions(study) if one.title.startswith("Noise is larger")]
    assert "on 4 positive and 30 negative subjects" in noise.text
    best = study.best().copy()
    best[["best_val_auc_low", "best_val_auc_high"]] = math.nan
    expected = expected_error(float(best["best_val_auc"]), 4, 30)
    assert findings.standard_error(best) == expected


def test_of_three_classes_the_rarest_is_told_by_its_people(write_study: WriteStudy) -> None:
    root = write_study(trials=4, epochs=4, policy=False, spec={"config": {**THREE, "epochs": 4}})
    study = rewrite(root, lambda row: row.update({"val_rarest_subjects": 1}))
    [told] = [one for one in cautions(study) if "very small" in one.title]
    assert told.text.startswith("Only 1 subject of the rarest class to validate on")


def test_an_interrupted_study_and_a_sick_best_trial_are_cautioned_about(
    write_study: WriteStudy,
) -> None:
    root = write_study(trials=4, epochs=10, unfinished=1, policy=False)
    titles = [caution.title for caution in cautions(load_study(root))]
    assert "The study was interrupted" in titles
    best = load_study(root).best()["trial"]
    path = root / "trials" / best / "trial.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "verdict": "saturated", "verdict_summary": "all tied"}
        )
    )
    titles = [caution.title for caution in cautions(load_study(root))]
    assert f"The best trial itself ({best}) is diagnosed saturated" in titles


def test_collapses_that_healed_are_cautioned_about(write_study: WriteStudy) -> None:
    """Objective and verdict are of the best and of the last epochs: neither shows an average that was lost in between."""
    root = write_study(trials=4, epochs=10, policy=False, seed=2)
    study = load_study(root)
    assert not [caution for caution in cautions(study) if "came back" in caution.title]
    best = study.best()["trial"]
    record = {
        "healed_epochs": 20,
        "verdict_summary": "nothing found; healed: ema_lag in epochs 37 to 56",
    }
    path = root / "trials" / best / "trial.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), **record, "verdict": "healthy", "advice": "set x=1"}
        )
    )
    study = load_study(root)
    [told] = [caution for caution in cautions(study) if "came back" in caution.title]
    assert told.title == "1 of 4 trials collapsed for a time and came back, the best among them"
    assert (
        f"Trial {best} for 20 epochs: nothing found; healed: ema_lag in epochs 37 to 56. "
        in told.text
    )
    assert told.remedy == "Set x=1"
    assert check(study, "No sudden metric collapses").present is False


def test_commands_in_remedies_can_be_pasted(write_study: WriteStudy) -> None:
    study = load_study(
        write_study("name with 'quotes' & blanks", trials=4, epochs=10, unfinished=1, policy=False)
    )
    remedy = next(c.remedy for c in cautions(study) if "interrupted" in c.title)
    import shlex

    assert shlex.split(remedy.split("`")[1]) == ["medtune", "resume", str(study.path)]


def test_an_ablation_on_one_fold_or_with_lost_runs_is_cautioned_about(
    write_study: WriteStudy,
) -> None:
    variants = {"baseline": {}, "other": {"max_m": 0.3}}
    study = load_study(write_study(variants=variants, seeds=3, epochs=4, failed=(1,)))
    titles = [caution.title for caution in cautions(study)]
    assert "Not every run has a partner" in titles
    assert "All runs share one fold" in titles


# Stops and settings ----------------------------------------------------------------------------------------------------


def test_every_stop_is_counted_once_with_what_it_saved(search: Study) -> None:
    table = findings.stops(search)
    stopped = search.trials_full[search.trials_full["state"] == "stopped"]
    assert table["trials"].sum() == len(stopped)
    assert set(table["reason"]) >= {"halving"}
    assert table["epochs_spared"].sum() == (stopped["epochs"] - stopped["epochs_run"]).sum()
    assert findings.epochs_saved(search) == pytest.approx(
        table["epochs_spared"].sum() / search.trials_full["epochs"].sum()
    )
    expected = (
        (stopped["epochs"] - stopped["epochs_run"]) / stopped["epochs_run"] * stopped["work_s"]
    ).sum()
    assert table["time_spared_s"].sum() == pytest.approx(expected)
    assert table["example"].str.contains("000").all()


def test_a_study_without_stops_has_an_empty_table_of_them(ablation: Study) -> None:
    assert findings.stops(ablation).empty
    assert findings.epochs_saved(ablation) == 0


def test_variants_lead_by_their_mean_and_not_by_one_lucky_run(write_study: WriteStudy) -> None:
    root = write_study(variants={"steady": {}, "lucky": {"max_m": 0.21}}, seeds=3, epochs=3)
    files = StudyFiles(root)
    values = {"steady": [0.8, 0.8, 0.81], "lucky": [0.5, 0.95, 0.5]}
    for path in sorted(files.trials.glob("*/trial.json")):
        record = json.loads(path.read_text())
        record["objective"] = values[record["variant"]].pop(0)
        path.write_text(json.dumps(record))
    study = load_study(root)
    leading = findings.leading(study)
    assert (leading["variant"], leading["objective"]) == ("steady", 0.81)
    assert study.best()["variant"] == "lucky"


def test_the_configuration_lists_what_fixes_touch_and_marks_what_differs(search: Study) -> None:
    table = findings.configuration(search).set_index("name")
    assert {
        "max_m",
        "s",
        "backbone_lr",
        "classifier_lr",
        "drw_start_epoch",
        "grad_clip",
        "ema_decay",
        "head",
    } <= set(table.index)
    assert table.loc["max_m", "before"] == "0.3"
    assert table.loc["max_m", "after"] == "0.2"
    assert table.loc["drw_start_epoch", "after"] == "9"  # 25 of 60, in 20 epochs
    assert (table["differs"] == (table["after"] != table["best"])).all()
    assert "fold" not in table.index


# The checklist ---------------------------------------------------------------------------------------------------------


def test_the_checklist_has_the_documents_indicators_and_signs_with_evidence(search: Study) -> None:
    checks = checklist(search)
    assert [check.kind for check in checks] == ["success"] * 5 + ["warning"] * 4
    assert all(check.evidence and check.among for check in checks)
    good = [check.text for check in checks if check.good]
    assert {
        "Loss decreases smoothly (no spikes)",
        "No sudden metric collapses",
        "Backbone LR < classifier LR",
    } <= set(good)


def test_a_loss_spike_is_found_where_it_is(write_study: WriteStudy) -> None:
    def spike(row: dict[str, Any]) -> None:
        row["train_loss"] = 30.0 if row["epoch"] == 6 else 2.0 - 0.01 * row["epoch"]
        row["drw_active"] = False

    study = rewrite(write_study(trials=1, epochs=12, policy=False), spike)
    assert check(study, "smoothly").present is False
    sign = check(study, "Loss spikes")
    assert sign.present is True
    assert "in epoch 6" in sign.evidence
    assert sign.among == "1 of 1 trials"


def test_the_step_of_the_loss_when_class_weights_begin_is_no_spike(write_study: WriteStudy) -> None:
    def step(row: dict[str, Any]) -> None:
        row["drw_active"] = row["epoch"] >= 7
        row["train_loss"] = (10.0 if row["drw_active"] else 2.0) - 0.01 * row["epoch"]

    study = rewrite(write_study(trials=1, epochs=14, policy=False), step)
    assert check(study, "Loss spikes").present is False
    assert check(study, "smoothly").present is True


def test_losses_and_scores_that_are_not_finite_are_a_warning_sign(write_study: WriteStudy) -> None:
    def lose(row: dict[str, Any]) -> None:
        if row["epoch"] == 4:
            row.update(train_loss=None, val_nonfinite_raw=0.5)

    sign = check(rewrite(write_study(trials=1, epochs=8, policy=False), lose), "Loss spikes")
    assert sign.present is True
    assert "epochs whose loss is not finite: 1, whose scores: 1" in sign.evidence


def test_a_fall_after_the_class_weights_began_is_a_warning_sign(write_study: WriteStudy) -> None:
    def fall(row: dict[str, Any]) -> None:
        row["drw_active"] = row["epoch"] >= 8
        low = row["epoch"] >= 9
        row.update(
            dict.fromkeys(
                ("val_auc", "val_auc_ema", "val_balanced_accuracy_ema"), 0.6 if low else 0.85
            )
        )

    study = rewrite(write_study(trials=1, epochs=16, policy=False), fall)
    sign = check(study, "after DRW")
    assert sign.present is True
    assert (
        sign.evidence
        == "AUC 0.850 before, 0.600 after; balanced accuracy 0.850 before, 0.600 after"
    )


def test_rates_drw_start_level_and_gap_are_read_from_the_rows(write_study: WriteStudy) -> None:
    def change(row: dict[str, Any]) -> None:
        row.update(
            lr_backbone=1e-3,
            lr_classifier=1e-3,
            val_auc=0.65,
            val_auc_ema=0.65,
            val_auc_raw=0.65,
            train_auc=0.99,
        )
        row["drw_active"] = row["epoch"] >= 4

    study = rewrite(write_study(trials=1, epochs=10, policy=False), change)
    assert check(study, "Backbone LR").present is False
    drw = check(study, "DRW activates")
    assert drw.present is False
    assert drw.evidence.startswith("active from epoch 4, asked for 3")
    assert check(study, "0.70").present is True
    gap = check(study, "Large gap")
    assert gap.present is True
    assert "training 0.990, validation 0.650" in gap.evidence


def test_what_cannot_be_told_is_not_claimed(write_study: WriteStudy) -> None:
    study = load_study(write_study(trials=1, epochs=2, policy=False))
    checks = {check.text: check for check in checklist(study)}
    assert checks["Validation AUC increases steadily"].present is None
    assert checks["Validation metrics decreasing after DRW activation"].present is None
    assert checks["Validation AUC increases steadily"].good is None


# Words follow the numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "present"),
    [
        ([0.819] * 4 + [0.80, 0.79, 0.77, 0.764, 0.764, 0.764], None),  # a study's own numbers
        ([0.55, 0.60, 0.66, 0.72, 0.78, 0.82, 0.85, 0.86, 0.87, 0.88], True),
        ([0.60, 0.70, 0.85, 0.86, 0.86, 0.80, 0.70, 0.62, 0.60, 0.60], False),
    ],
)
def test_a_change_within_noise_is_neither_an_increase_nor_a_decrease(
    write_study: WriteStudy, curve: list[float], present: bool | None
) -> None:
    root = write_study(trials=1, epochs=10, policy=False)

    def change(row: dict[str, Any]) -> None:
        value = curve[row["epoch"] - 1]
        row |= {"val_auc": value, "val_auc_low": value - 0.07, "val_auc_high": value + 0.07}

    found = check(rewrite(root, change), "increases steadily")
    assert found.present is present
    assert ("no change beyond noise (± 0.07" in found.evidence) == (present is None)


def test_a_decline_within_noise_after_the_class_weights_is_told_as_noise(
    write_study: WriteStudy,
) -> None:
    root = write_study(trials=1, epochs=12, policy=False)

    def change(row: dict[str, Any]) -> None:
        value = 0.812 if row["epoch"] < 6 else 0.771
        row |= {"val_auc": value, "val_auc_low": value - 0.07, "val_auc_high": value + 0.07}
        row |= {"drw_active": row["epoch"] >= 6, "val_balanced_accuracy_ema": 0.7}

    found = check(rewrite(root, change), "decreasing after DRW")
    assert found.present is None
    assert "AUC 0.812 before, 0.771 after" in found.evidence
    assert "no change beyond noise (± 0.07" in found.evidence


def test_a_natural_bound_is_no_edge_of_a_range(write_study: WriteStudy) -> None:
    space = {"search": {"dropout": {"low": 0.0, "high": 0.5}, "max_m": {"low": 0.05, "high": 0.5}}}
    root = write_study(trials=8, epochs=10, policy=False, spec={"space": space})
    for number, path in enumerate(sorted(StudyFiles(root).trials.glob("*/trial.json"))):
        config = json.loads(path.with_name("config.json").read_text())
        best = number == 3
        config |= {"dropout": 0.0 if best else 0.3, "max_m": 0.05 if best else 0.3}
        path.with_name("config.json").write_text(json.dumps(config))
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"objective": 0.99 if best else 0.8}))
    titles = [caution.title for caution in cautions(load_study(root))]
    assert "The best max_m is at the edge of its range" in titles
    assert not [title for title in titles if "dropout" in title], "no dropout is below 0"


def test_trials_that_a_user_stopped_spare_nothing(write_study: WriteStudy) -> None:
    root = write_study(trials=6, epochs=10, policy=False)
    files = StudyFiles(root)
    path = files.trial("00002").record
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "stopped"}))
    rows = [json.loads(line) for line in files.epochs.read_text().splitlines()]
    kept = [row for row in rows if row["trial"] != "00002" or row["epoch"] <= 2]
    files.epochs.write_text("".join(json.dumps(row) + "\n" for row in kept))
    decision = {"trial": "00002", "epoch": 2, "action": "stop", "reason": "requested"}
    with files.decisions.open("a") as file:
        file.write(json.dumps(decision | {"summary": "stopped on request", "time": 0.0}) + "\n")
    study = load_study(root)
    assert study.trials_full.loc[2, "stopped_by"] == "requested"
    assert findings.epochs_saved(study) == 0
    assert "stopped early" not in findings.summary(study)[1]


def test_a_tie_goes_to_a_sound_trial_among_good_neighbours(write_study: WriteStudy) -> None:
    root = write_study(trials=9, epochs=4, policy=False)
    places = [0.05, 0.06, 0.07, 0.08, 0.40, 0.41, 0.42, 0.43, 0.44]
    values = [1.0, 0.6, 0.6, 0.6, 0.9, 0.9, 1.0, 1.0, 0.9]
    verdicts = ["healthy"] * 7 + ["loss_spike", "healthy"]
    for number, path in enumerate(sorted(StudyFiles(root).trials.glob("*/trial.json"))):
        config = json.loads(path.with_name("config.json").read_text())
        path.with_name("config.json").write_text(json.dumps({**config, "max_m": places[number]}))
        record = json.loads(path.read_text())
        record["overrides"] = {"max_m": places[number]}
        path.write_text(
            json.dumps(record | {"objective": values[number], "verdict": verdicts[number]})
        )
    study = load_study(root)
    assert study.best()["objective"] == 1.0
    assert study.best()["verdict"] != "loss_spike", "not 00007, whose loss jumped"
    assert study.leaderboard(1)["trial"].tolist() == [study.best()["trial"]]
    assert study.ranked["objective"].tolist() == sorted(values, reverse=True)
    only = [study.axis("max_m")]
    at = ranking(study.trials_full, "objective", only, smaller=False)[0]
    assert study.trials_full["trial"].iloc[at] == "00006", "00000 is good among poor ones"
    rows = study.trials_full.assign(verdict="saturated")
    assert rows["trial"].iloc[ranking(rows, "objective", only, smaller=False)[0]] in (
        "00006",
        "00007",
    )
