"""Configs as files: strict YAML, overrides, suggestions, paths."""

import shutil
from pathlib import Path

import pytest

from shared.config.file import dump, load_config, read_file, resolve
from shared.config.losses import HiddenStates
from shared.config.paths import recovered
from shared.errors import ConfigError

SMALLEST = """\
name: x
steps: 10
teachers: {t: {model: a/b}}
student:
  model: c/d
domains:
  math: {train: text.txt}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(SMALLEST)
    (tmp_path / "text.txt").write_text("some text")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_exponents_are_numbers_and_only_true_and_false_are_booleans(config):
    config.write_text(SMALLEST.replace("math", "off") + "optimiser: {lr: 1e-5, eps: 2.e-8}\n")
    loaded = load_config(config)
    assert (loaded.optimiser.lr, loaded.optimiser.eps) == (1e-5, 2e-8)
    assert list(loaded.domains) == ["off"]
    values = read_file(config).values
    assert values["domains"]["off"] == {"train": "text.txt"}


@pytest.mark.parametrize(
    ("override", "key", "apart"),
    [
        ("student.workers={min:1,max:4}", "min:1", "min: 1"),
        ("losses=[{kind:jsd}]", "kind:jsd", "kind: jsd"),
    ],
)
def test_a_colon_without_a_space_is_named(config, override, key, apart):
    said = f"{key} has no space after its colon; write {apart} (override {override!r}, line 1)"
    assert refusal(config, override) == said


def test_an_override_without_a_value_is_said_to_be_empty(config):
    assert refusal(config, "steps=").startswith("steps is empty, but it should be a valid integer")


def test_zero_padded_numbers_and_dates_are_not_reinterpreted(config):
    assert load_config(config, ["steps=010"]).steps == 10
    assert load_config(config, ["name=2024-01-01"]).name == "2024-01-01"


def test_a_domain_without_a_source_is_refused(config, tmp_path):
    name = next(iter(load_config(config).domains))
    job = load_config(config, [f"domains.{name}.train=[]", f"paths.root={tmp_path}"])
    with pytest.raises(
        ConfigError, match=rf"^domains\.{name}\.train is an empty list; name a file"
    ):
        resolve(job)


def test_a_key_written_twice_is_refused_with_its_line(config):
    config.write_text(SMALLEST + "steps: 20\n")
    assert f"steps is written twice; remove one ({config}, line 8)" in refusal(config)


def test_invalid_yaml_is_refused_with_its_line(config):
    config.write_text(SMALLEST + "batch: {micro_batch: 2\n")
    assert "is not valid YAML" in refusal(config)
    assert "line 9" in refusal(config)


def test_tags_cannot_construct_objects(config):
    config.write_text(SMALLEST + "seed: !!python/object/apply:os.getpid []\n")
    assert "seed is" in refusal(config) or "not allowed" in refusal(config)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("student.learning_rate=1", "optimiser.lr"),
        ("optimizer.lr=1", "optimiser"),
        ("student.worker=2", "student.workers"),
        ("teachers.t.modle=x", "teachers.t.model"),
        ("domains.math.trian=x", "domains.math.train"),
        ("batch_size=3", "batch.rows_per_step"),
        ("epochs=1", "steps"),
        ("student.train.rank=8", "student.train.r"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_option(config, override, suggestion):
    sentence = refusal(config, "student.train.kind=lora", override)
    assert f"Did you mean {suggestion}?" in sentence
    assert override in sentence


def test_a_misspelt_key_in_a_file_is_named_with_its_line(config):
    config.write_text(SMALLEST.replace("  model: c/d", "  model: c/d\n  zerro: 2"))
    expected = f"student.zerro is not an option. Did you mean student.zero? ({config}, line 6)"
    assert refusal(config) == expected


def test_a_misspelt_required_key_is_named_rather_than_the_missing_one(config):
    config.write_text(SMALLEST.replace("steps", "stesp"))
    assert "stesp is not an option. Did you mean steps?" in refusal(config)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("steps='3'", "steps is '3', but it should be a valid integer"),
        ("steps=true", "steps is True"),
        ("steps=0", "steps is 0, but it should be greater than or equal to 1"),
        ("optimiser.lr=-1", "optimiser.lr is -1"),
        ("student.dtype=fp16", "'float32' or 'bfloat16'"),
        ("mixture.policy=ddkk", "mixture.policy is 'ddkk', which is none of 'fixed', 'ddk'"),
        ("mixture.interval=3", "mixture needs mixture.policy"),
        ("domains.math.train=5", "domains.math.train is 5"),
        ("teachers={}", "teachers is {}"),
        ("teachers.t.replicas={max: 2, min: 3}", "replicas.min is 3, more than replicas.max"),
        ("teachers.t.replicas={max: 2, min: 0}", "teachers.t.replicas.min is 0, but it should be"),
        ("teachers.t.replicas={max: 2, wait: 1}", "teachers.t.replicas.wait is 1, but it should"),
        ("teachers.t.replicas={max: 2, wait: 0}", "teachers.t.replicas.wait is 0, but it should"),
        ("teachers.t.replicas={min: 2}", "teachers.t.replicas.max is required and not set"),
        ("teachers.t.replicas=0", "teachers.t.replicas is 0, but it should be greater than"),
        ("student.workers={max: 2, min: 3}", "workers.min is 3, more than workers.max"),
        ("student.workers={max: 2, min: 0}", "student.workers.min is 0, but it should be"),
        ("student.workers={max: 0}", "student.workers.max is 0, but it should be greater"),
        ("student.workers={min: 2}", "student.workers.max is required and not set"),
        ("student.workers={max: 2, most: 3}", "student.workers.most is not an option"),
        ("student.workers={max: 2.5}", "student.workers.max is 2.5, but it should be a valid"),
        ("student.workers=0", "student.workers is 0, but it should be greater than"),
        ("student.workers=[1, 2]", "student.workers is [1, 2], but it should be"),
        ("student.workers={min: 3, max: 9}", "times any student.workers from 3 to 9"),
        ("student.zero=true", "student.zero is True, but it should be a valid integer"),
        ("steps=9223372036854775808", "steps is 9223372036854775808, but it should be less than"),
        (f"steps={'9' * 5000}", "has too many digits for a number; write fewer (override"),
        ("student.train={kind: lora, dropout: 1.0}", "student.train.dropout is 1.0, but it should"),
        ("student.train={kind: lora, target_modules: []}", "target_modules is [], but it should"),
        *(
            (f"{option}={value}", f"{option} is {said}, but it should be {wanted}")
            for option in (
                *("paths.root", "paths.runs", "paths.cache", "domains.math.train", "prompts"),
                "prompt_search.to",
            )
            for value, said, wanted in (
                ("''", "''", "a name that can be read"),
                ("' '", "' '", "a name that can be read"),
                ('"a\\0b"', "'a\\x00b'", "a name that can be read"),
                ("s3://b/x", "'s3://b/x'", "a path of this machine, no address"),
            )
        ),
        *(
            (f"{option}=''", f"{option} is '', but it should be a name that can be read")
            for option in (
                *("teachers.t.model", "teachers.t.adapter", "student.model", "targets.store"),
                *("student.revision", "teachers.t.python"),
            )
        ),
    ],
)
def test_a_wrong_value_is_refused_with_path_and_value(config, override, part):
    assert part in refusal(config, override)


def test_an_option_of_another_kind_is_refused(config):
    sentence = refusal(config, "mixture.policy=ddk", "mixture.weights=uniform")
    assert "mixture.weights is not an option with the kind chosen there" in sentence


def test_overrides_reach_lists_by_index_and_create_what_is_between(config):
    overrides = [
        "losses=[{kind: forward_kl}, {kind: hidden_states, layers: {1: 2}}]",
        "losses.0.temperature=2",
        "optimiser.lr=3e-4",
    ]
    loaded = load_config(config, overrides)
    assert loaded.temperatures == (1.0, 2.0)
    assert loaded.optimiser.lr == 3e-4
    assert isinstance(loaded.losses[1], HiddenStates)
    assert loaded.losses[1].layers == {1: 2}
    assert "is no index" in refusal(config, *overrides, "losses.2.weight=1")


def test_what_is_wrong_with_a_long_value_is_said_shortly(config):
    for override in (f"steps={'x' * 5000}", f"student.train.kind={'x' * 5000}"):
        assert len(refusal(config, override)) < 400


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=1", "domains..train=x", ".steps=1"])
def test_what_is_no_override_is_refused(config, override):
    assert refusal(config, override)


def test_a_resolved_config_survives_the_trip_through_its_dump(config, tmp_path):
    overrides = [f"paths.root={tmp_path}", "losses=[{kind: hidden_states, layers: {0: 0, 3: 2}}]"]
    resolved = resolve(load_config(config, overrides))
    (tmp_path / "dumped.yaml").write_text(dump(resolved))
    assert load_config(tmp_path / "dumped.yaml") == resolved
    assert resolve(resolved) == resolved


def test_paths_are_relative_to_root_and_root_to_the_current_folder(config, tmp_path):
    (tmp_path / "models").mkdir()
    overrides = ["paths.root=sub/..", "student.model=models", "targets.store=store"]
    (tmp_path / "sub").mkdir()
    resolved = resolve(load_config(config, overrides), base=tmp_path)
    assert resolved.student.model == str(tmp_path / "models")
    assert resolved.domains["math"].train == str(tmp_path / "text.txt")
    assert resolved.targets.store == str(tmp_path / "store")
    assert resolved.paths.runs == str(tmp_path / "runs")
    assert resolved.teachers["t"].model == "a/b"  # no such folder: a name on the hub


def test_a_misspelt_folder_beside_others_is_not_taken_for_a_name_on_the_hub(config, tmp_path):
    (tmp_path / "models" / "there").mkdir(parents=True)
    loaded = load_config(config, [f"paths.root={tmp_path}", "student.model=models/nope"])
    with pytest.raises(ConfigError, match=r"student\.model is 'models/nope'"):
        resolve(loaded)


@pytest.mark.parametrize(
    "override", ["student.model=./absent", "teachers.t.model=/absent", "domains.math.train=no*.txt"]
)
def test_a_path_that_does_not_exist_is_refused_with_the_option(config, tmp_path, override):
    loaded = load_config(config, [f"paths.root={tmp_path}", override])
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        resolve(loaded)


def test_the_runs_of_a_ray_job_outlive_its_temporary_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("some text")
    overrides = ["targets.store=answers", "prompt_search.to=found.json"]
    resolved = resolve(load_config(config, overrides), base=folder)
    assert resolved.paths.runs == str(tmp_path / "home" / "runs")
    assert resolved.targets.store == str(tmp_path / "home" / "answers")
    assert resolved.prompt_search.to == str(tmp_path / "home" / "found.json")
    assert resolved.paths.root == str(folder)
    (folder / "answers").mkdir()
    assert resolve(load_config(config, overrides), base=folder).targets.store == str(
        folder / "answers"
    )


def test_what_a_job_read_from_its_folder_is_read_from_the_current_one_once_that_is_gone(
    config, tmp_path
):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    (folder / "models" / "student").mkdir(parents=True)
    (folder / "text.txt").write_text("some text")
    job = resolve(load_config(config, ["student.model=models/student"]), base=folder)
    assert recovered(job, base=tmp_path / "mine") == job
    shutil.rmtree(folder)
    mine = recovered(job, base=tmp_path / "mine")
    assert mine.student.model == str(tmp_path / "mine" / "models" / "student")
    assert mine.paths.root == str(tmp_path / "mine")
    assert mine.domains["math"].train == str(tmp_path / "mine" / "text.txt")
    assert mine.paths.runs == job.paths.runs


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_that_are_not_finite_are_refused(config, value):
    assert "optimiser.lr is" in refusal(config, f"optimiser.lr={value}")
    weights = f"mixture={{policy: fixed, weights: {{math: {value}}}}}"
    assert "mixture.weights.math is" in (sentence := refusal(config, weights))
    assert "it should be a finite number (" in sentence


@pytest.mark.parametrize("text", ["a: &x {b: *x}\n", "a: " + "[" * 3000 + "]" * 3000])
def test_endless_nesting_is_refused(config, text):
    config.write_text(text)
    assert "nested without end or too deeply" in refusal(config)


@pytest.mark.parametrize("text", ["? [a]\n: b\n", '"": 1\n'])
def test_an_option_without_a_plain_name_is_refused_with_its_line(config, text):
    config.write_text(text)
    assert f"({config}, line 1)" in refusal(config)
