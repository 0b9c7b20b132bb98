"""What is kept of a model's files, and when it is looked at again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.planning.description import describe, student_trust
from shared.config.file import load_config
from shared.errors import ConfigError
from tests import tiny
from tests.cluster.jobs import write_job

SECOND = """
import sys
from pathlib import Path
from cluster.planning.description import describe, student_trust
from shared.config.file import load_config, resolve
config = resolve(load_config(Path(sys.argv[1])))
cache = Path(config.paths.cache)
found = describe("m", config.student.model, revision=None, trusted=False, cache=cache)
heavy = {"torch", "transformers", "peft"} & set(sys.modules)
print(found.vocab_size, found.identity.digest, student_trust(config).packed, *heavy)
"""


@pytest.fixture
def own(tmp_path, tiny_pair) -> Path:
    """A job whose student's folder may be changed."""
    student = shutil.copytree(tiny_pair.student, tmp_path / "student")
    return write_job(tmp_path, tiny_pair, student={"model": str(student)})


def described(job: Path):
    config = load_config(job)
    cache = Path(config.paths.cache)
    return describe("m", config.student.model, revision=None, trusted=False, cache=cache)


def test_the_second_time_nothing_heavy_is_imported_and_the_same_is_said(own):
    first, packs = described(own), student_trust(load_config(own)).packed
    command = [sys.executable, "-c", SECOND, str(own)]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.split() == [str(first.vocab_size), first.identity.digest, str(packs)]
    assert first.identity == described(own).identity
    assert len(first.load_tokenizer()) == first.identity.num_ids


def test_a_changed_small_file_is_read_again(own):
    before = described(own)
    tiny.edit_config(own.parent / "student", max_position_embeddings=77)
    assert before.max_context != 77
    assert described(own).max_context == 77


@pytest.mark.parametrize(
    "field", [{"num_attention_heads": 5}, {"hidden_size": "wide"}, {"use_return_dict": True}]
)
def test_a_config_that_is_not_valid_is_refused_in_a_sentence(own, field):
    tiny.edit_config(own.parent / "student", **field)
    with pytest.raises(
        ConfigError, match=r"whose config\.json transformers cannot read: "
    ) as refused:
        described(own)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_limit_reads_any_context(own):
    tiny.edit_config(own.parent / "student", max_position_embeddings=-1)
    assert described(own).max_context is None


def test_changed_weights_are_probed_again(own):
    assert student_trust(load_config(own)).packed
    weights = own.parent / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        student_trust(load_config(own))


def test_another_way_to_train_is_probed_again(own):
    assert student_trust(load_config(own)).packed
    lora = "student.train={kind: lora, target_modules: [no_such_layer]}"
    with pytest.raises(ConfigError, match="target_modules"):
        student_trust(load_config(own, [lora]))


def test_a_spoilt_record_is_made_again(own):
    before = described(own)
    cache = Path(load_config(own).paths.cache) / "descriptions"
    for path in cache.glob("*.json"):
        path.write_text('{"identity": ')
    assert described(own).identity == before.identity
