"""A causal model's word on classes is that of reading each class by itself, whatever they share.

P rows   C classes
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets.asks.classes import ClassLogProbs
from shared.targets.question import Question
from teacher_service.engine.classes import verbaliser
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.verbalising import Tree
from tests import tiny

# One token; what begins as another and goes on; two tokens of which the first is another's class.
CLASSES = ((5,), (5, 9), (5, 9, 11), (7, 8), (300,), (9, 5))
FREE = (4, 17, 60)


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 500, size) for size in (1, 9, 13, 13, 4)]


def rows_of(texts: Sequence[np.ndarray]) -> Rows:
    """Texts with the numbers of classes in the place of a next token."""
    return Rows.build(
        domains=["kinds"] * len(texts),
        indices=range(len(texts)),
        input_ids=[[*text, n % len(CLASSES)] for n, text in enumerate(texts)],
        doc_starts=[np.zeros(1)] * len(texts),
        loss_masks=[[0] * (len(text) - 1) + [1, 0] for text in texts],
    )


def answered(engine: HFEngine, texts: Sequence[np.ndarray], ask: ClassLogProbs) -> np.ndarray:
    rows, question = rows_of(texts), Question(ask)
    answer = engine.score(rows, question)
    answer.check(rows, question, engine.fingerprint)
    arrays = answer.arrays()
    found_PC = arrays.kept["class_logprobs_NC"]
    own_P = found_PC[np.arange(len(texts)), np.arange(len(texts)) % len(CLASSES)]
    assert np.array_equal(arrays.label_logprob_N, own_P)
    return found_PC


def summed(folder, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of every class's tokens after each text, float64 [P, C]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = torch.zeros(len(texts), len(CLASSES), dtype=torch.float64)
    for row, text in enumerate(texts):
        for number, tokens in enumerate(CLASSES):
            with torch.no_grad():
                logp_TV = model(torch.tensor([[*text, *tokens]])).logits[0].log_softmax(-1)
            at = range(len(text) - 1, len(text) - 1 + len(tokens))
            found[row, number] = logp_TV[at, tokens].sum()
    return found


def test_classes_have_the_summed_log_probabilities_of_their_tokens(tiny_pair, texts):
    found_PC = answered(HFEngine.load(str(tiny_pair.teacher)), texts, ClassLogProbs(CLASSES))
    expected_PC = summed(tiny_pair.teacher, texts).log_softmax(-1)
    np.testing.assert_allclose(found_PC, expected_PC, rtol=0, atol=2e-5)
    assert np.exp(found_PC).sum(1) == pytest.approx(1, abs=1e-6)


def test_calibration_takes_off_what_a_text_without_content_gets(tiny_pair, texts):
    engine, ask = HFEngine.load(str(tiny_pair.teacher)), ClassLogProbs(CLASSES, FREE)
    found_PC = answered(engine, [*texts, np.array(FREE)], ask)
    log_prior_C = summed(tiny_pair.teacher, [FREE])
    expected_PC = (summed(tiny_pair.teacher, texts) - log_prior_C).log_softmax(-1)
    np.testing.assert_allclose(found_PC[:-1], expected_PC, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found_PC[-1], -np.log(len(CLASSES)), rtol=0, atol=2e-5)


def test_an_answer_does_not_depend_on_what_is_read_together(tiny_pair, texts, monkeypatch):
    engine, ask = HFEngine.load(str(tiny_pair.teacher)), ClassLogProbs(CLASSES)
    together_PC = answered(engine, texts, ask)
    monkeypatch.setattr(verbaliser, "TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(answered(engine, texts, ask), together_PC, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "gpt2"])
def test_families_that_keep_other_things_or_nothing_say_the_same(tmp_path, family, texts):
    sizes = {
        "mamba": MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=8),
        "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    tiny.save_tokenizer(tmp_path)
    AutoModelForCausalLM.from_config(sizes[family]).save_pretrained(tmp_path)
    engine = HFEngine.load(str(tmp_path))
    found_PC = answered(engine, texts, ClassLogProbs(CLASSES))
    expected_PC = summed(tmp_path, texts).log_softmax(-1)
    np.testing.assert_allclose(found_PC, expected_PC, rtol=0, atol=5e-5)
    assert engine._branching._is_proven is (family == "gpt2")


def test_a_text_is_read_once_for_all_classes(tiny_pair, texts, monkeypatch):
    engine, ask, read = HFEngine.load(str(tiny_pair.teacher)), ClassLogProbs(CLASSES), []
    answered(engine, texts[:1], ask)
    assert engine._branching._is_proven
    before = engine.decoder.module.forward

    def counted(*args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return before(*args, **kwargs)

    monkeypatch.setattr(engine.decoder.module, "forward", counted)
    answered(engine, texts[1:2], ask)
    assert read == [len(texts[1]), sum(2 for _ in Tree.of(CLASSES).leaves)]


def test_what_classes_begin_with_is_read_once():
    tree = Tree.of(CLASSES)
    assert tree.paths == ((), (5,), (7,), (9,), (5, 9))
    assert tree.leaves == ((7,), (9,), (5, 9))


def test_a_text_that_leaves_no_room_for_the_classes_is_refused(tiny_pair):
    engine = HFEngine.load(str(tiny_pair.teacher))
    assert engine.max_context is not None
    text = np.arange(engine.max_context - 2) % 400 + 3
    with pytest.raises(ConfigError, match=r"row kinds/0 has \d+ tokens .* a class up to 3"):
        engine.score(rows_of([text]), Question(ClassLogProbs(CLASSES)))
