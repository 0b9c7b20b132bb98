"""An attention that cannot be had is refused before anything starts."""

import shutil

import pytest
from transformers import BloomConfig, BloomForCausalLM

from cluster.planning.preparation import check, prepare_run
from shared.config.file import load_config
from shared.errors import ConfigError
from student_trainer.models.student import load_model
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.audit import load_engine
from tests import tiny
from tests.cluster.jobs import write_job
from tests.telling import in_turn

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


def of_own_choice(folder, pair, side, **fields):
    """A job whose teacher or student says in its config.json how it attends, and that model's
    attention once it is loaded as the job asks."""
    shutil.copytree(getattr(pair, side), folder / side)
    tiny.edit_config(folder / side, **fields)
    models = {"teacher": pair.teacher, "student": pair.student} | {side: folder / side}
    job = write_job(folder, tiny.Pair(**models))

    def attends(attention):
        config = load_config(job, [f"{SECTIONS[side]}.attention={attention}"])
        prepare_run(config)
        if side == "teacher":
            return load_engine(config.teachers["tiny"]).fingerprint["attention"]
        return load_model(config.student, CAUSAL_LM.model).config._attn_implementation

    return attends


@pytest.mark.parametrize(
    ("side", "field"), in_turn(SECTIONS, ["attn_implementation", "_attn_implementation"])
)
def test_what_is_asked_for_wins_over_the_models_own_choice(side, field, tmp_path, tiny_pair):
    attends = of_own_choice(tmp_path, tiny_pair, side, **{field: "flash_attention_2"})
    assert attends("eager") == "eager"
    assert attends("auto") == "sdpa", "its package is not installed"


@pytest.mark.parametrize("side", SECTIONS)
def test_a_models_own_choice_stands_where_nothing_is_asked(side, tmp_path, tiny_pair):
    attends = of_own_choice(tmp_path, tiny_pair, side, attn_implementation="eager")
    assert attends("auto") == "eager"
    assert attends("sdpa") == "sdpa"


@pytest.mark.parametrize("side", SECTIONS)
def test_a_choice_that_nothing_computes_is_refused(side, tmp_path, tiny_pair):
    attends = of_own_choice(tmp_path, tiny_pair, side, attn_implementation="quick")
    with pytest.raises(
        ConfigError, match=r"(student|teachers\.tiny)\.attention=eager, since its config"
    ):
        attends("auto")
    assert attends("eager") == "eager"
