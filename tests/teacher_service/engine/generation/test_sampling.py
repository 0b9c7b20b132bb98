"""What is kept of a draw is the log-probability of the law that it came from.

B openings   S positions   V vocabulary
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.targets.generation import NO_END, GenerationSpec, Openings
from teacher_service.engine.generation.generating import open_generator
from teacher_service.engine.hf import HFEngine
from tests.teacher_service.engine.generation.test_generating import openings
from tests.tiny import VOCAB

CPU = torch.device("cpu")
SPEC = GenerationSpec(6, temperature=0.7, top_p=0.9, logprobs=True)
STOPS = tuple(range(3, 40))


@pytest.fixture(scope="module")
def engine(tiny_pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


@pytest.fixture(scope="module")
def model(tiny_pair) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()


def law(logits_V: Tensor, spec: GenerationSpec) -> Tensor:
    """Probabilities [V], float64, written down once more from the definition of top-p."""
    p_V = (logits_V.double() / spec.temperature).softmax(-1)
    kept, mass = [], 0.0
    for token in sorted(range(len(p_V)), key=lambda i: -float(p_V[i])):
        kept.append(token)
        mass += float(p_V[token])
        if mass >= spec.top_p:
            break
    cut_V = torch.zeros_like(p_V)
    cut_V[kept] = p_V[kept]
    return cut_V / cut_V.sum()


def after(model, opening: np.ndarray, written: np.ndarray) -> Tensor:
    """Logits [S, V] of a plain forward pass at the positions that were written."""
    ids = torch.from_numpy(np.concatenate([opening, written]).astype(np.int64))[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, len(opening) - 1 : -1]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_the_kept_logprob_is_that_of_the_distribution_sampled_from(
    engine, model, temperature, top_p
):
    spec = replace(SPEC, temperature=temperature, top_p=top_p, stop_ids=STOPS[:4])
    asked = openings(vocab=VOCAB)
    found = engine.generate(asked, spec)
    for opening, ids, logprobs in zip(asked.ids(), found.written(), found.logprobs(), strict=True):
        logits_SV = after(model, opening, ids)
        assert len(ids) == len(logprobs) > 0
        for logits_V, token, logprob in zip(logits_SV, ids, logprobs, strict=True):
            assert logprob == pytest.approx(float(law(logits_V, spec)[token].log()), abs=2e-5)


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, temperature=1.5, top_p=0.5)])
def test_draws_follow_their_law(engine, model, spec):
    """Chi-square of the first token over 3,000 draws of one opening."""
    ids, times = openings([7], vocab=VOCAB).ids()[0], 3000
    asked = Openings.build(names=["one"] * times, input_ids=[ids] * times)
    asked = asked.with_draws([str(n) for n in range(times)])
    drawn = np.array(
        [each[0] for each in engine.generate(asked, replace(spec, max_new_tokens=1)).written()]
    )
    p_V = law(after(model, ids, ids[:1])[0], spec).numpy()
    counts_V = np.bincount(drawn, minlength=len(p_V))
    assert not counts_V[p_V == 0].any()
    often = p_V * times >= 5
    counts = [*counts_V[often], counts_V[~often].sum()]
    expected = [*(p_V[often] * times), p_V[~often].sum() * times]
    pairs = [(c, e) for c, e in zip(counts, expected, strict=True) if e > 0]
    assert len(pairs) > 3
    assert stats.chisquare(*zip(*pairs, strict=True), sum_check=False).pvalue > 1e-3


def test_every_draw_of_an_opening_is_another_one(engine):
    (ids,) = openings([9], vocab=VOCAB).ids()
    one = Openings.build(names=["a", "a", "a"], input_ids=[ids] * 3)
    found = [w.tolist() for w in engine.generate(one.with_draws("xyx"), SPEC).written()]
    assert found[0] == found[2] != found[1]
    plain = [w.tolist() for w in engine.generate(one, SPEC).written()]
    assert plain[0] == plain[1] == plain[2] != found[0]


def test_a_rollout_is_the_same_alone_and_in_any_batch(tiny_pair, model):
    asked = openings(vocab=VOCAB).with_draws("abcdef")
    spec = replace(SPEC, stop_ids=STOPS)
    ways = [open_generator(model, device=CPU, dtype="float32", batch_rows=n) for n in (1, 2, 4, 9)]
    alone, *others = [way.generate(asked, spec) for way in ways]
    for other in others:
        assert [w.tolist() for w in other.written()] == [w.tolist() for w in alone.written()]
        for a, b in zip(other.logprobs(), alone.logprobs(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_end_is_kept_with_its_logprob_and_a_cut_has_none(engine):
    found = engine.generate(openings(vocab=VOCAB), replace(SPEC, stop_ids=STOPS))
    assert 0 < sum(found.stopped()) < len(found.stopped())
    ends = found.table.column("end_id").to_pylist()
    whole = zip(found.ids(), found.written(), found.logprobs(), found.stopped(), ends, strict=True)
    for ids, written, logprobs, stopped, end in whole:
        assert len(written) == len(logprobs) == len(ids) + stopped
        assert (end != NO_END) == stopped
        assert not set(ids.tolist()) & set(STOPS)
        assert not stopped or written[-1] == end in STOPS


def test_no_end_comes_before_min_new_tokens(engine):
    spec = replace(SPEC, stop_ids=STOPS, temperature=2.0, top_p=1.0)
    asked = openings([5] * 20, vocab=VOCAB).with_draws([str(n) for n in range(20)])
    free = [len(ids) for ids in engine.generate(asked, spec).ids()]
    held = [len(ids) for ids in engine.generate(asked, replace(spec, min_new_tokens=3)).ids()]
    assert min(free) < 3 <= min(held)
    cold = replace(spec, temperature=0.0)
    greedy = engine.generate(openings([5], vocab=VOCAB), cold).written()[0]
    first = replace(cold, stop_ids=(int(greedy[0]),))
    assert len(engine.generate(openings([5], vocab=VOCAB), first).ids()[0]) == 0
    later = engine.generate(openings([5], vocab=VOCAB), replace(first, min_new_tokens=2))
    assert len(later.ids()[0]) >= 2
    assert (later.logprobs()[0] == 0).all()  # the likeliest is certain


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_ids_that_the_teacher_does_not_know_are_never_written(engine, model, temperature):
    """And the law is that of the others alone."""
    asked = openings([5] * 20, vocab=30).with_draws([str(n) for n in range(20)])
    spec = replace(SPEC, temperature=temperature, top_p=1.0)
    free = np.concatenate(engine.generate(asked, spec).written())
    found = engine.generate(asked, replace(spec, vocab=30))
    assert np.concatenate(found.written()).max() < 30 <= free.max()
    if temperature:
        ids, logprobs = found.written()[0], found.logprobs()[0]
        logits_SV = after(model, asked.ids()[0], ids)[:, :30]
        expected = (logits_SV.double() / temperature).log_softmax(-1)
        own = expected.gather(1, torch.from_numpy(ids.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, own.numpy(), atol=2e-5)


def test_a_models_own_defaults_are_there_again_afterwards(model):
    before = model.generation_config
    way = open_generator(model, device=CPU, dtype="float32", batch_rows=4)
    way.generate(openings(vocab=VOCAB), SPEC)
    assert model.generation_config is before
