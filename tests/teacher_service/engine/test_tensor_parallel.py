"""A teacher spread over two processes: what it answers, and what is not spread."""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from transformers import AutoConfig

from shared.errors import ConfigError
from shared.targets.asks.last_states import LastStates
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.loading import refuse_unloadable
from teacher_service.engine.tensor_parallel import layered_note, refuse_unsplittable
from tests.answers import decoded, question_of
from tests.drawn import drawn_spec
from tests.teacher_service.ranks import Ranks
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import FAMILIES, SIZES, save_family
from tests.telling import telling

ROWS = make_rows([[20, 9, 5], [31], [2, 40], [3]])
SPREAD = ("llama", "qwen2", "qwen3", "gemma2", "granite", "cohere", "qwen3_moe")
HIDDEN = {"hidden_layers": (0, 1, 3), "hidden_encoding": "fp32"}
LIKELIEST = question_of(7, VOCAB, encoding="fp32", entropy=True, temperatures=(1.0, 2.0), **HIDDEN)
QUESTIONS = {
    "likeliest": LIKELIEST,
    "all": question_of(VOCAB, VOCAB, encoding="fp32"),
    "threshold": drawn_spec("threshold", 9, VOCAB, temperature=2.0, encoding="fp32"),
    "sampled": drawn_spec("sampled", 9, VOCAB),
    "shared": question_of(7, VOCAB // 2 - 3, encoding="fp32"),
}


@cache
def engine(folder: str, size: int) -> HFEngine:
    return HFEngine.load(folder, tensor_parallel=size)


def answers(folder: str, size: int) -> dict[str, Any]:
    """By question, with what was loaded."""
    found: dict[str, Any] = {
        name: decoded(engine(folder, size).score(ROWS, question))
        for name, question in QUESTIONS.items()
    }
    return found | {"described": engine(folder, size).describe()}


@pytest.fixture(scope="module", params=telling(SPREAD, "gemma2", "qwen3_moe"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(request.param, tmp_path_factory.mktemp(request.param)))


def test_answers_are_the_single_processs(folder: str, two_ranks: Ranks) -> None:
    alone = answers(folder, 1)
    for spread in two_ranks.call(answers, folder, 2):
        for name in QUESTIONS:
            one, same = spread[name], alone[name]
            np.testing.assert_array_equal(one.ids_NK, same.ids_NK)
            for field in ("logprobs_NK", "log_tail_NS", "label_logprob_N"):
                np.testing.assert_allclose(
                    getattr(one, field), getattr(same, field), rtol=0, atol=1e-5
                )
        one, same = spread["likeliest"], alone["likeliest"]
        np.testing.assert_allclose(one.entropy_N, same.entropy_N, rtol=0, atol=1e-5)
        assert one.hidden_ND.keys() == {0, 1, 3}
        for layer, states_ND in same.hidden_ND.items():
            np.testing.assert_allclose(one.hidden_ND[layer], states_ND, rtol=0, atol=1e-5)
        described, own = spread["described"], alone["described"]
        assert (described.vocab_rows, described.hidden_width, described.packed) == (
            own.vocab_rows,
            own.hidden_width,
            own.packed,
        )
    leader = two_ranks.call(answers, folder, 2)[0]["described"].fingerprint
    assert leader == alone["described"].fingerprint | {"tensor_parallel": "2"}


def shipped(folder: str, size: int, cache: str, dtype: str) -> tuple[Any, Any, Any]:
    """The head that one process or a group ships, and what it answers with last states."""
    loaded = HFEngine.load(folder, tensor_parallel=size, dtype=dtype)  # type: ignore[arg-type]
    loaded.cache = cache
    head = loaded.ship_head()
    ask = LastStates(VOCAB, head.digest, head.states, head.states_width)
    found = decoded(loaded.score(ROWS, Question(ask)))
    return head, found.last_ND, found.label_logprob_N


@pytest.mark.parametrize("dtype", telling(["float32", "bfloat16"], "float32"))
def test_the_head_that_is_shipped_is_the_whole_one(two_ranks, tmp_path, dtype):
    folder = str(save_family("gemma2", tmp_path / "model"))
    own, states_ND, label_N = shipped(folder, 1, str(tmp_path / "own"), dtype)
    for head, spread_ND, spread_N in two_ranks.call(
        shipped, folder, 2, str(tmp_path / "spread"), dtype
    ):
        assert head == own  # a digest of its bytes among it
        if dtype == "float32":
            np.testing.assert_allclose(spread_ND, states_ND, rtol=0, atol=1e-5)
            np.testing.assert_allclose(spread_N, label_N, rtol=0, atol=1e-5)
    (file,) = (tmp_path / "spread").rglob("*.safetensors")
    (same,) = (tmp_path / "own").rglob("*.safetensors")
    assert file.read_bytes() == same.read_bytes()


def written(folder: str, size: int, spec: GenerationSpec) -> list[list[int]]:
    rng = np.random.default_rng(0)
    asked = Openings.build(
        names=[f"intent/{n}" for n in range(4)],
        input_ids=[rng.integers(3, VOCAB, n) for n in (3, 17, 30, 8)],
    )
    return [ids.tolist() for ids in engine(folder, size).generate(asked, spec).ids()]


@pytest.mark.parametrize("temperature", telling([0.0, 1.0], 1.0))
def test_it_writes_what_one_process_writes(folder, two_ranks, temperature):
    spec = GenerationSpec(8, stop_ids=(2,), temperature=temperature)
    alone = written(folder, 1, spec)
    assert any(alone)
    assert two_ranks.call(written, folder, 2, spec) == [alone, alone]


def one_rank_stops(folder: str) -> str:
    """What each process says when one of them takes no part in a unit."""
    spread = engine(folder, 2)
    if dist.get_rank():
        return ""
    try:
        spread.score(ROWS, LIKELIEST)
    except RuntimeError as error:
        return str(error)
    return "answered"


@pytest.mark.drill
def test_a_process_that_takes_no_part_is_not_waited_for_for_ever(tmp_path):
    ranks = Ranks(2, timeout_s=10)
    try:
        said, _ = ranks.call(one_rank_stops, str(save_family("llama", tmp_path)))
    finally:
        ranks.close()
    assert "imed out" in said


REFUSED = {
    "gpt2": ({}, 2, "no sound plan for gpt2 models; leave it at 1: the layers then lie"),
    "llama": ({}, 4, "4, which does not divide the model's 2 key-value heads; take one of 1, 2"),
    "qwen2": (
        {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 3},
        2,
        "2, which does not divide the model's 3 key-value heads; take one of 1, 3",
    ),
    "gemma2": (
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
        2,
        "does not divide the model's 3 attention heads; take one of 1",
    ),
    "granite": (
        {"quantization_config": {"quant_method": "fp8"}},
        2,
        "weights are stored quantised by fp8; leave it at 1, or name an unquantised model",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_spread_is_refused_before_it_is_loaded(family):
    changes, size, reason = REFUSED[family]
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))
    with pytest.raises(ConfigError, match=re.escape(reason)) as refused:
        refuse_unsplittable(config, size, section="teachers.one")
    assert str(refused.value).startswith(f"teachers.one.tensor_parallel is {size}")


def test_an_adapter_is_not_spread(tmp_path):
    model = str(save_family("llama", tmp_path))
    asked = {"revision": None, "trust_remote_code": False, "attention": "auto", "gpus": 0}
    refuse_unloadable(model, **asked, tensor_parallel=2)
    with pytest.raises(ConfigError, match="the adapter mine on the model is not split; merge it"):
        refuse_unloadable(model, **asked, tensor_parallel=2, adapter="mine")
    with pytest.raises(ConfigError, match="3, which does not divide the model's 4 attention heads"):
        refuse_unloadable(model, **asked, tensor_parallel=3)


def test_layers_one_after_the_other_are_said_to_be_slower():
    planned, not_planned = (AutoConfig.for_model(name, **SIZES) for name in ("llama", "gpt2"))
    said = layered_note("big", planned, 4)
    assert "lie on 4 GPUs one after the other" in said
    assert "which is slower" in said
    assert "set tensor_parallel=4" in said
    assert "has no sound plan" in layered_note("big", not_planned, 4)
