"""Drawn ids on the wire: what is kept exactly arrives, the rest follows, and damage is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from shared.data.rows import Rows
from shared.errors import TeacherError
from shared.store.target_store import TargetStore
from shared.targets.draws import uniforms
from shared.targets.question import Question
from shared.targets.soft_targets import METADATA_KEY, SoftTargets
from tests.answers import decoded, question_of
from tests.drawn import dense_weights, drawn_answer, drawn_spec, row_of
from tests.shared.data.test_rows import rows
from tests.shared.targets.made_up import shipped
from tests.teacher_service.scoring.test_drawing import zipf

SELECTORS = ("threshold", "sampled")
LARGE_VOCAB = 151_936


def unit_answer(spec: Question, *, unit: Rows, scale: float = 2.0) -> SoftTargets:
    """About ragged rows, one of which has no loss position."""
    num = int(unit.num_loss_tokens().sum())
    return drawn_answer(zipf(num, spec.ask.shared_vocab, scale=scale), spec, rows=unit)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8"])
def test_weights_arrive_within_the_rounding_of_the_encoding(selector, encoding: str) -> None:
    unit = rows([20, 1, 13])
    exact = unit_answer(drawn_spec(selector, 24, 300), unit=unit)
    spec = drawn_spec(selector, 24, 300, encoding=encoding)
    answer = shipped(unit_answer(spec, unit=unit))
    answer.check(unit, spec)
    one, other = dense_weights(exact), dense_weights(answer)
    assert torch.equal(one > 0, other > 0)
    torch.testing.assert_close(other.sum(1), torch.ones(len(one)).double(), rtol=0, atol=2e-6)
    relative = {"fp32": 1e-6, "fp16": 5e-3, "int8": 2e-2}[encoding]
    torch.testing.assert_close(other, one, rtol=relative, atol=1e-9)
    assert decoded(answer).ids_NK.dtype == np.int64
    assert (np.diff(decoded(answer).ids_NK) >= 0).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("ids", ["plain", "elias_fano"])
def test_rows_travel_alone_and_in_any_order(selector, ids: str) -> None:
    unit = rows([20, 1, 13, 9])
    spec = drawn_spec(selector, 8, 300, ids=ids)
    whole = unit_answer(spec, unit=unit)
    weights_NV = dense_weights(whole)
    chosen = [3, 1, 0]
    part = SoftTargets(whole.table.take(chosen).combine_chunks())
    part.check(Rows(unit.table.take(chosen)), spec)
    ends = np.concatenate([[0], np.cumsum(unit.num_loss_tokens())])
    places = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in chosen])
    assert torch.equal(dense_weights(part), weights_NV[places])
    sliced = SoftTargets(whole.table.slice(2, 2))
    assert torch.equal(dense_weights(sliced), weights_NV[ends[2] :])
    other = whole.with_ids("plain" if ids == "elias_fano" else "elias_fano")
    assert torch.equal(dense_weights(other), weights_NV)


def test_a_store_keeps_the_draws_of_a_row_apart(tmp_path) -> None:
    unit, spec = rows([20, 13]), drawn_spec("threshold", 8, 300)
    first, second = (unit.with_draws(np.full(2, number)) for number in (0, 1))
    assert first.hashes() == unit.hashes()
    assert not set(first.hashes()) & set(second.hashes())
    store = TargetStore(tmp_path, teacher={}, question=spec)
    for asked in (first, second):
        assert store.missing(asked) == asked.names()
        store.write(unit_answer(spec, unit=asked))
    found = [store.read(asked) for asked in (first, second)]
    assert not found[0].table.equals(found[1].table)
    for asked, answer in zip((first, second), found, strict=True):
        answer.check(asked, spec)
        assert answer.table.equals(unit_answer(spec, unit=asked).table)
    assert first.part(slice(1, 2)).draws().tolist() == [0]
    assert second.part(slice(1, 2)).draws().tolist() == [1]


def test_a_question_without_draws_is_called_what_it_was_called_before_there_were_any() -> None:
    assert set(question_of(4, 512).identity()) == {
        "top_k", "shared_vocab", "temperatures", "encoding", "hidden_layers", "hidden_encoding",
        "projection",
    }  # fmt: skip
    spec = drawn_spec("sampled", 4, 512, seed=3, temperature=2.0)
    assert Question.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    assert "sampled 4 of 512 ids at temperature 2" in spec.in_words()
    assert "seed 3" in spec.in_words()


@pytest.mark.parametrize("selector", SELECTORS)
def test_an_answer_to_another_question_is_refused(selector) -> None:
    unit = rows([20, 13])
    spec = drawn_spec(selector, 8, 300)
    answer = unit_answer(spec, unit=unit)
    for other in (
        drawn_spec(selector, 8, 300, seed=1),
        drawn_spec(selector, 8, 300, temperature=2.0),
        drawn_spec("sampled" if selector == "threshold" else "threshold", 8, 300),
        question_of(8, 300, encoding="fp32", entropy=True),
    ):
        with pytest.raises(TeacherError, match="asked was"):
            answer.check(unit, other)
    with pytest.raises(TeacherError, match="not about rows"):
        answer.check(unit.with_draws(np.array([0, 1])), spec)


def test_a_missing_log_probability_is_damage() -> None:
    unit, spec = rows([20, 13]), drawn_spec("threshold", 8, 300)
    table = unit_answer(spec, unit=unit).table
    place = table.schema.get_field_index("exact_logprobs")
    lists = table.column("exact_logprobs").combine_chunks()
    offsets = lists.offsets.to_numpy().copy()
    offsets[-1] -= 1
    cut = pa.ListArray.from_arrays(offsets, lists.values)
    broken = SoftTargets(table.set_column(place, "exact_logprobs", cut))
    assert METADATA_KEY in broken.table.schema.metadata
    with pytest.raises(TeacherError, match="exact_logprobs"):
        broken.check(unit, spec)
    with pytest.raises(TeacherError, match="ids exactly"):
        decoded(broken)


@pytest.mark.parametrize(("encoding", "most"), [("fp16", 130), ("int8", 100)])
def test_32_ids_of_a_large_vocabulary_take_no_more_than_the_bar(encoding: str, most: int) -> None:
    num = 64
    logits_NV = zipf(num, LARGE_VOCAB, scale=1.5)
    spec = drawn_spec("threshold", 32, LARGE_VOCAB, encoding=encoding)
    answer = drawn_answer(logits_NV, spec, rows=row_of(num))
    columns = [name for name in answer.table.column_names if name != "row_hash"]
    size = sum(answer.table.column(name).combine_chunks().flatten().nbytes for name in columns)
    assert size / num <= most


def test_every_seed_row_draw_and_position_has_numbers_of_its_own():
    one = row_of(6)
    found = [uniforms(one, seed=seed, count=3) for seed in (0, 1)]
    found.append(uniforms(one.with_draws(np.array([1])), seed=0, count=3))
    found.append(uniforms(row_of(7), seed=0, count=3))
    numbers = np.concatenate([uniform_NU.ravel() for uniform_NU in found])
    assert len(np.unique(numbers)) == len(numbers) == 3 * (6 + 6 + 6 + 7)
    assert 0 <= numbers.min() < 0.2 < 0.8 < numbers.max() < 1
    again = uniforms(one, seed=0, count=3)
    np.testing.assert_array_equal(again, found[0])
