"""Every causal family that transformers has scores, packs, learns, exports and writes as plain
transformers does, or is refused before the start, or stands in `known.py` with its reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.data.passes import TOGETHER
from shared.errors import ConfigError, UserError
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.families import stages
from tests.families.known import APART, NOT_STATED, REFUSED, STAGES_APART
from tests.families.making import FAMILIES
from tests.families.trial import Trial
from tests.telling import telling

# Unlike each other where families are: heads, caps, positions, experts, recurrence, streams.
DIVERSE = (
    "bart",
    "bert",
    "bloom",
    "gemma2",
    "gemma3n_text",
    "gpt_oss",
    "hyperclovax",
    "llama4_text",
    "mamba2",
    "minicpm3",
    "opt",
    "recurrent_gemma",
)
# These go through `stages.py` too.
TRIED = sorted({*DIVERSE, *NOT_STATED, "llama", "qwen3_moe"} - {*REFUSED})
POSITIONS = {
    **{f: {"max_position_embeddings": 50} for f in ("opt", "biogpt", "bart", "xglm")},
    "gpt2": {"n_positions": 50},
}
OTHERS = tuple(family for family in FAMILIES if family not in {*DIVERSE, *APART})


def _try(trial: Trial, family: str) -> None:
    apart, _ = STAGES_APART.get(family, (set(), ""))
    if family in REFUSED:
        _refused(trial, REFUSED[family])
        return
    if {"scores", "continues"} - apart:
        engine = HFEngine.load(str(trial.family))
        if "scores" not in apart:
            trial.scores(engine)
        if "continues" not in apart:
            trial.continues(engine)
    trust = CAUSAL_LM.trust(trial.with_train("lora" if "full" in apart else "full"))
    trial.plan = replace(trial.plan, packed=trust.packed, passes=trust.passes)
    if "gradient" not in apart:
        trial.gradient()
    for kind in ("full", "lora"):
        if kind not in apart:
            trial.trains(kind)


def _refused(trial: Trial, said: str) -> None:
    """Both roles, each in one sentence, which for a teacher may be another."""
    with pytest.raises(UserError, match=said) as student:
        CAUSAL_LM.trust(trial.plan.config)
    with pytest.raises(UserError) as teacher:
        HFEngine.load(str(trial.family))
    for refusal in (student, teacher):
        sentence = str(refusal.value)
        assert "\n" not in sentence
        assert str(trial.family) in sentence


@pytest.mark.parametrize("family", telling(DIVERSE, "bert", "bloom", "gemma2", "gpt_oss", "mamba2"))
def test_a_family_does_what_plain_transformers_does(
    on_trial: Callable[[str], Trial], family: str
) -> None:
    _try(on_trial(family), family)


@pytest.mark.drill
@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family_does_too(on_trial: Callable[[str], Trial], family: str) -> None:
    _try(on_trial(family), family)


@pytest.mark.parametrize("family", ["laguna", "llama"])
def test_adapters_that_would_be_lost_are_refused_before_the_start(
    on_trial: Callable[[str], Trial], family: str
) -> None:
    config = on_trial(family).with_train("lora")
    if family == "llama":
        CAUSAL_LM.trust(config)
        return
    with pytest.raises(UserError, match=r"shared_experts.* do not survive saving and loading"):
        CAUSAL_LM.trust(config)


@pytest.mark.parametrize(
    ("pad", "train"),
    telling([(0, "full"), (None, "full"), (0, "lora")], (0, "full"), (None, "full")),
)
def test_a_row_that_would_be_lost_is_refused_before_the_start(
    on_trial: Callable[[str], Trial], pad: int | None, train: str
) -> None:
    trial = on_trial("youtu")
    tiny.edit_config(trial.family, pad_token_id=pad)
    if (pad, train) != (0, "full"):
        CAUSAL_LM.trust(trial.with_train(train))
        trial.trains(train)
        return
    with pytest.raises(UserError, match=r"empties that of its padding token 0 .* to null"):
        CAUSAL_LM.trust(trial.with_train(train))


def test_families_that_stand_apart_are_families() -> None:
    assert {*REFUSED, *APART, *STAGES_APART, *DIVERSE} <= set(FAMILIES)
    assert not set(REFUSED) & {*APART, *STAGES_APART}


def test_a_frozen_weight_of_the_students_own_is_exported(
    on_trial: Callable[[str], Trial],
) -> None:
    trial = on_trial("llama")

    def load(config, *, device):
        student = CAUSAL_LM.load(config, device=device)
        student.decoder.norm.weight.requires_grad_(False)
        return student

    trial.trains("full", load=load)


def trusted(trial: Trial, kind: str = "full") -> HFEngine:
    """Let a trial run as its student is trusted to; its teacher."""
    trust = CAUSAL_LM.trust(trial.with_train(kind))
    trial.plan = replace(trial.plan, packed=trust.packed, passes=trust.passes)
    return HFEngine.load(str(trial.family), context=trial.plan.config.data.context)


@pytest.mark.drill
@pytest.mark.parametrize("family", TRIED)
def test_a_family_goes_through_every_other_stage(
    on_trial: Callable[..., Trial], family: str
) -> None:
    apart, _ = STAGES_APART.get(family, (set(), ""))
    kind, trial = "lora" if "full" in apart else "full", on_trial(family)
    engine = trusted(trial, kind)
    stages.twin(trial, engine)
    stages.exact(trial, engine)
    if family in NOT_STATED:
        with pytest.raises(ConfigError, match=NOT_STATED[family]):
            CAUSAL_LM.trust(stages.with_hidden(trial))
    else:
        stages.hidden(trial, engine)
    trial.gradient(checkpointing=True)
    exported = trial.trains(kind, zero=3 if trial.plan.passes == TOGETHER else 2)
    if "continues" not in apart:
        stages.writes(exported)


@pytest.mark.drill
@pytest.mark.parametrize("family", POSITIONS)
def test_positions_that_end_off_the_ladder_are_scored_and_learnt(
    on_trial: Callable[..., Trial], family: str
) -> None:
    """A row of 50 tokens would be padded to more than the model has positions for."""
    trial = on_trial(family, POSITIONS[family], context=50)
    engine = trusted(trial)
    trial.scores(engine)
    trial.gradient()
    for kind in ("full", "lora"):
        trial.trains(kind)


@pytest.mark.drill
def test_a_model_whose_ends_are_narrower_than_its_layers_is_scored_and_taught(
    on_trial: Callable[..., Trial],
) -> None:
    """OPT's embedding and head have 16 numbers, its layers 32."""
    trial = on_trial("opt", {"word_embed_proj_dim": 16})
    engine = trusted(trial)
    trial.scores(engine)
    trial.gradient()
    trial.trains("full")
    with pytest.raises(ConfigError, match=r"different widths \(32 in layer 1, 16 in layer 2\)"):
        CAUSAL_LM.trust(stages.with_hidden(trial))
