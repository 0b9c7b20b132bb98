"""Recipes over seeds: every trial is a config, tables show what was recorded."""

import pytest

from shared.config.file import load_config
from tests.benchmarks.outcomes import publishing
from tests.benchmarks.outcomes.__main__ import measures_of
from tests.benchmarks.outcomes.making import RECIPES
from tests.benchmarks.outcomes.trials import CLASSES, TABLES, TRIALS


def record(trial: str, seed: int, *, after: float, hard: float) -> dict:
    told = {"before": 0.01, "after": after, "hard": hard, "teacher": 0.9}
    measures = dict.fromkeys(("accuracy", "macro_f1", "calibration_error"), told)
    return {"trial": trial, "seed": seed, "options": {}, "measures": measures}


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_recipe_with_both_students(name):
    trial = TRIALS[name]
    overrides = [f"{option}={value}" for option, value in trial.options.items()]
    config = load_config(RECIPES / f"{trial.recipe}.yaml", overrides)
    assert config.baseline or (trial.verb == "active" and config.active is not None)
    assert len(config.domains) == 1


def test_students_are_paired_by_seed_and_so_are_trials():
    records = [record("base", s, after=0.6 + s / 10, hard=0.5 + s / 10) for s in (0, 1, 2)]
    records += [record("base-llkd", s, after=0.9 + s / 10, hard=0.5) for s in (1, 2, 3)]
    text = publishing.text_of(CLASSES, records)
    assert (
        "| 1 M student | accuracy | 0.900 | 0.600 ± 0.248 | 0.700 ± 0.248 | **+0.100 ± 0.000** |"
        in text
    )
    assert "| 1 M student, LLKD \u2212 1 M student | **+0.300 ± 0.000** |" in text


def test_what_is_measured_of_a_run():
    told = {"teacher": 0.9, "before": 0.1, "after": 0.8, "hard": 0.7}
    domain = {"teacher_nll": None, "student_nll_before": 5.0, "student_nll_after": 2.0}
    summary = {"domains": {"intent": domain | {"classes": {"accuracy": told}}}}
    baseline = {"students": {"intent": {"hard_labels_nll": 2.5}}}
    found = measures_of(summary, baseline)
    assert found == {"accuracy": told, "nll": {"before": 5.0, "after": 2.0, "hard": 2.5}}


def test_the_document_shows_the_published_records():
    document = publishing.DOCUMENT.read_text()
    assert publishing.with_tables(document, publishing.published()) == document
    for table in TABLES:
        assert f"<!-- {table.mark}: begin -->" in document
