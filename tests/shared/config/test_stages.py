"""Stages: each a config of its own, made of the one before it and a few options."""

import re
from pathlib import Path

import pytest

from shared.config.file import dump, in_stages, load_config
from shared.errors import ConfigError

STAGED = """\
name: x
steps: 10
teachers: {t: {model: a/b}}
student: {model: c/d}
domains: {math: {train: text.txt}}
optimiser: {lr: 1e-3, warmup_steps: 2}
stages:
  dense: {}
  sparse:
    student.upcycle: {experts: 3}
    optimiser.lr: 1e-4
  preference:
    steps: 4
    domains: {pairs: {train: pairs.jsonl}}
    losses: [{kind: preference}]
    data.too_long: drop
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(STAGED)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_stage_has_the_options_of_the_one_before_it_but_for_its_own(path):
    config = load_config(path)
    dense, sparse, preference = in_stages(config).values()
    assert dense == config.model_copy(update={"stages": {}})
    assert dense.model_fields_set == config.model_fields_set - {"stages"}
    assert dense.data.model_fields_set == set()  # which decides what its default is
    assert preference.data.model_fields_set == {"too_long"}
    assert (sparse.student.upcycle and sparse.student.upcycle.experts) == 3
    assert (sparse.optimiser.lr, sparse.optimiser.warmup_steps) == (1e-4, 2)
    assert (sparse.steps, preference.steps) == (10, 4)
    assert (sparse.losses, sparse.domains) == (dense.losses, dense.domains)
    assert list(preference.domains) == ["pairs"]
    assert [loss.kind for loss in preference.losses] == ["preference"]
    assert preference.student == sparse.student
    assert preference.optimiser == sparse.optimiser


def test_a_config_that_was_written_down_has_the_same_stages(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert in_stages(load_config(tmp_path / "again.yaml")) == in_stages(config)


def test_an_override_reaches_one_stage_or_all_that_say_nothing_else(path):
    asked = ["stages.sparse.optimiser.lr=5e-5", "stages.dense.steps=7", "optimiser.warmup_steps=1"]
    dense, sparse, preference = in_stages(load_config(path, asked)).values()
    assert [one.optimiser.lr for one in (dense, sparse, preference)] == [1e-3, 5e-5, 5e-5]
    assert [one.steps for one in (dense, sparse, preference)] == [7, 7, 4]
    assert preference.optimiser.warmup_steps == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.sparse.optimizer.lr=1", "optimizer is not an option. Did you mean optimiser?"),
        ("stages.sparse.steps=0", r"steps is 0, but it should be greater .*\(stage sparse, "),
        ("stages.dense.losses=[{kind: preference}]", "a preference, .* but data.too_long is split"),
        ("stages.dense.student.model=e/f", "stages.dense sets student.model, which all stages"),
        ("stages.dense.teachers.t.model=e/f", "stages.dense sets teachers.t.model, which all"),
        ("stages.dense.student={model: e/f}", "sets student as a whole, .*as student.upcycle"),
        ("stages.Dense={}", "stages names 'Dense'; folders are named after stages"),
        ("active={method: pgkd}", "stages and active are both set; leave one out"),
        (f"name={'n' * 195}", r"name and stages.dense have 200 characters.* take 199"),
        ("stages.sparse=[]", r"stages.sparse is \[\], but it should be a mapping"),
    ],
)
def test_what_makes_no_run_is_refused_with_its_stage(path, override, said):
    found = refusal(path, override)
    assert re.search(said, found), found


def test_the_line_of_a_stages_option_is_named(path):
    path.write_text(STAGED.replace("steps: 4", "steps: four"))
    line = STAGED.splitlines().index("    steps: 4") + 1
    assert refusal(path).endswith(f"(stage preference, {path}, line {line})")
