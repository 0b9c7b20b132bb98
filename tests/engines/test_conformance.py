"""What every engine holds to: the eight tests of the suite, on each engine there is.

An engine has three calls: `score`, `generate` and `load_weights`. Ours is here always; one in an
environment of its own is in the drills.

B openings   N positions with loss   W tokens written
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config.models.teachers import Teacher
from shared.targets.canary import LEVELS, Canary, canary_rows
from shared.targets.generation import NO_END, Continuations, GenerationSpec, Openings
from teacher_service.engine.hf import HFEngine
from teacher_service.service.replicas.environments import load_vllm
from tests.answers import decoded, question_of
from tests.engines.subjects import CONTEXT, STOPS, VOCAB, Plain, openings, save_model, weights_file
from tests.teacher_service.scripted import make_rows

LEVEL = 2e-5  # nats, of float32 against float64
SPEC = GenerationSpec(8, temperature=0.7, top_p=0.9, logprobs=True, seed=11)
LENGTHS = (5, 17, 9, 30, 5, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("engine") / "model", seed=1)


@pytest.fixture(scope="module")
def plain(folder) -> Plain:
    return Plain(folder)


@pytest.fixture(
    scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.drill)]
)
def engine(request, folder) -> Any:
    if request.param == "transformers":
        return HFEngine.load(str(folder), context=CONTEXT)
    request.getfixturevalue("ray_cluster")
    python = str(request.getfixturevalue("vllm_python"))
    teacher = Teacher(model=str(folder), engine="vllm", python=python)
    return load_vllm(teacher, context=CONTEXT)


def same(one: Continuations, other: Continuations) -> None:
    """The same tokens, and log-probabilities to the rounding of a batch."""
    assert [w.tolist() for w in one.written()] == [w.tolist() for w in other.written()]
    for a, b in zip(one.logprobs(), other.logprobs(), strict=True):
        np.testing.assert_allclose(a, b, atol=LEVEL)


def test_a_text_has_the_log_probabilities_of_a_plain_forward_pass(engine, plain):
    """Rows of several documents, which never see each other, and the likeliest ids with them."""
    rows = make_rows([[7, 20], [3], [40, 2, 11]], vocab=VOCAB)
    spec = question_of(8, VOCAB, encoding="fp32")
    found = decoded(engine.score(rows, spec))
    np.testing.assert_allclose(found.label_logprob_N, plain.label_logprobs(rows), atol=LEVEL)
    at = 0
    for document in rows.documents().column("input_ids"):
        logprobs_NV = plain.logits(document)[:-1].log_softmax(-1)
        values_NK, ids_NK = logprobs_NV.topk(8)
        part = slice(at, at + len(logprobs_NV))
        at += len(logprobs_NV)
        for row, (ids, values) in enumerate(zip(ids_NK.tolist(), values_NK.tolist(), strict=True)):
            own = dict(zip(found.ids_NK[part][row], found.logprobs_NK[part][row], strict=True))
            assert sorted(own) == sorted(ids)
            assert [own[i] for i in ids] == pytest.approx(values, abs=LEVEL)
        rest_N = np.log1p(-np.exp(values_NK.numpy()).sum(1))
        np.testing.assert_allclose(found.log_tail_NS[part, 0], rest_N, atol=1e-4)


def test_what_is_drawn_depends_on_seed_and_opening_and_on_nothing_beside_them(engine):
    asked = openings(*LENGTHS)
    together = engine.generate(asked, SPEC)
    same(engine.generate(asked.at([5, 4, 3, 2, 1, 0]), SPEC), _at(together, [5, 4, 3, 2, 1, 0]))
    for line in range(len(asked)):
        same(engine.generate(asked.at([line]), SPEC), _at(together, [line]))
    other = engine.generate(asked, replace(SPEC, seed=12))
    assert [w.tolist() for w in other.written()] != [w.tolist() for w in together.written()]
    ids = asked.ids()[1]
    twice = Openings.build(names=["a", "b", "c"], input_ids=[ids] * 3).with_draws("xyx")
    first, second, third = (w.tolist() for w in engine.generate(twice, SPEC).written())
    assert first == third != second


def _at(found: Continuations, lines: list[int]) -> Continuations:
    return Continuations(found.table.take(lines))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 1.0), (2.0, 0.5)])
def test_the_log_probability_kept_is_of_the_law_that_was_drawn_from(
    engine, plain, temperature, top_p
):
    asked = openings(*LENGTHS)
    found = engine.generate(asked, replace(SPEC, temperature=temperature, top_p=top_p))
    for ids, written, logprobs in zip(asked.ids(), found.written(), found.logprobs(), strict=True):
        p_WV = plain.law(ids, written, temperature=temperature, top_p=top_p)
        expected = np.log(p_WV[np.arange(len(written)), written])
        np.testing.assert_allclose(logprobs, expected, atol=2 * LEVEL / temperature)


def test_the_first_end_ends_a_text_and_is_kept_apart_from_it(engine):
    """Any of the stop ids, none before the least number of tokens, and no id beyond a vocabulary
    that is asked for."""
    spec = replace(SPEC, temperature=2.0, top_p=1.0, stop_ids=STOPS)
    asked = openings(*[6] * 24)
    found = engine.generate(asked, spec)
    ends = found.table.column("end_id").to_pylist()
    assert 0 < sum(found.stopped()) < len(ends)
    for ids, written, end, stopped, logprobs in zip(
        found.ids(), found.written(), ends, found.stopped(), found.logprobs(), strict=True
    ):
        assert not set(ids.tolist()) & set(STOPS)
        assert stopped == (end in STOPS) == (end != NO_END)
        assert len(written) == len(ids) + stopped == len(logprobs)
    least = engine.generate(asked, replace(spec, min_new_tokens=5))
    assert min(map(len, found.ids())) < 5 <= min(map(len, least.ids()))
    narrow = engine.generate(asked, replace(spec, vocab=100))
    assert max(w.max() for w in found.written()) >= 100 > max(w.max() for w in narrow.written())


def test_a_text_that_ends_at_once_is_empty_and_harmless(engine):
    asked = openings(7, 12)
    greedy = GenerationSpec(6, logprobs=True)
    stops = {int(written[0]) for written in engine.generate(asked, greedy).written()}
    found = engine.generate(asked, replace(greedy, stop_ids=tuple(sorted(stops))))
    assert [len(ids) for ids in found.ids()] == [0, 0]
    assert found.stopped() == [True, True]
    assert [len(w) for w in found.written()] == [1, 1]
    assert all((logprobs == 0).all() for logprobs in found.logprobs())  # the likeliest is certain


def test_a_text_that_is_cut_has_no_end(engine):
    asked = openings(7, 12, 30)
    found = engine.generate(asked, replace(SPEC, max_new_tokens=5))
    assert [len(ids) for ids in found.ids()] == [5, 5, 5]
    assert found.stopped() == [False] * 3
    assert found.table.column("end_id").to_pylist() == [NO_END] * 3
    assert [len(logprobs) for logprobs in found.logprobs()] == [5, 5, 5]


def test_a_text_that_was_read_before_is_read_as_at_first(engine):
    """Also after others that begin alike, whose states an engine may have kept."""
    limit = engine.describe().max_context
    canary = Canary(engine.score, "the engine", VOCAB, limit, interval=1)
    canary.begin()
    (ids,) = canary_rows(VOCAB, limit).column("input_ids")
    longer = Openings.build(names=["a", "b"], input_ids=[ids, np.append(ids, 77)])
    first = engine.generate(longer, SPEC)
    same(engine.generate(longer, SPEC), first)
    canary.count()
    rows = make_rows([[40, 20]], vocab=VOCAB, seed=5)
    spec = question_of(8, VOCAB, encoding="fp32")
    one, other = (decoded(engine.score(rows, spec)) for _ in range(2))
    np.testing.assert_array_equal(one.label_logprob_N, other.label_logprob_N)
    np.testing.assert_array_equal(one.logprobs_NK, other.logprobs_NK)


def test_weights_that_are_handed_over_are_those_it_goes_on_with(engine, plain, folder, tmp_path):
    """The log-probabilities are the trainer's own, in scoring and in writing; and there is a way
    back."""
    other = save_model(tmp_path / "other", seed=2)
    theirs, asked = Plain(other), openings(*LENGTHS)
    rows = canary_rows(VOCAB, engine.describe().max_context)
    before = engine.generate(asked, SPEC)
    canary = Canary(engine.score, "the engine", VOCAB, engine.describe().max_context)
    canary.begin(plain.label_logprobs(rows))
    engine.load_weights(weights_file(other, tmp_path / "pushed"))
    canary.begin(theirs.label_logprobs(rows), level=LEVELS["float32"])
    found = engine.generate(asked, SPEC)
    assert [w.tolist() for w in found.written()] != [w.tolist() for w in before.written()]
    for ids, written, logprobs in zip(asked.ids(), found.written(), found.logprobs(), strict=True):
        p_WV = theirs.law(ids, written, temperature=SPEC.temperature, top_p=SPEC.top_p)
        expected = np.log(p_WV[np.arange(len(written)), written])
        np.testing.assert_allclose(logprobs, expected, atol=1e-3)
    engine.load_weights(weights_file(folder, tmp_path / "back"))
    canary.begin(plain.label_logprobs(rows))
    same(engine.generate(asked, SPEC), before)
