"""An attention that cannot be had is refused before anything starts."""

import pytest
from transformers import BloomConfig, BloomForCausalLM

from cluster.planning.preparation import check
from shared.config.file import load_config
from shared.errors import ConfigError
from tests import tiny
from tests.cluster.jobs import write_job

SECTIONS = {"teacher": "teachers.tiny", "student": "student"}


@pytest.fixture
def without_sdpa(tmp_path):
    """A family that has the eager attention alone, beside the tokenizer of the tiny pair."""
    folder = tmp_path / "bloom"
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("side", SECTIONS)
def test_a_family_without_sdpa_is_refused_where_it_is_asked_for(
    side, tmp_path, tiny_pair, without_sdpa
):
    models = {"teacher": tiny_pair.teacher, "student": tiny_pair.student} | {side: without_sdpa}
    job = write_job(tmp_path, tiny.Pair(**models))
    check(load_config(job))
    option = f"{SECTIONS[side]}.attention"
    check(load_config(job, [f"{option}=eager"]))
    with pytest.raises(ConfigError, match=rf"^{option} is sdpa, .* set {option}=auto") as refused:
        check(load_config(job, [f"{option}=sdpa"]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("section", SECTIONS.values())
def test_flash_attention_needs_a_gpu_and_its_package(section, tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair)
    with pytest.raises(ConfigError, match=rf"{section}.attention is flash_attention_2"):
        check(load_config(job, [f"{section}.attention=flash_attention_2"]))
