"""Answers that hold the teacher's last state in place of ids: the wire, the store, the config."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from shared.errors import ConfigError, TeacherError
from shared.store.target_store import TargetStore
from shared.targets.asks.head_location import find_head, head_path
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from tests.answers import Given, changed, decoded, encoded, question_of
from tests.shared.config.test_run import config
from tests.shared.targets.made_up import TEACHER, UNIT, shipped

WIDTH = 6
TYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
every_type = pytest.mark.parametrize("states", TYPES)


def spec_of(states: str) -> Question:
    return question_of(0, 512, head="a digest", states=states, states_width=WIDTH)


def answer(states: str) -> tuple[SoftTargets, Given]:
    """Random states of a unit, below the numbers that stand for infinity."""
    counts, rng = UNIT.num_loss_tokens(), np.random.default_rng(0)
    num = int(counts.sum())
    numbers_ND = rng.normal(size=(num, WIDTH)).astype(np.float32)
    bits_ND = (numbers_ND.view(np.uint32) >> 16).astype(np.uint16)
    empty_N0 = np.empty((num, 0), np.float32)
    arrays = Given(
        ids_NK=empty_N0.astype(np.int64),
        logprobs_NK=empty_N0,
        log_tail_NS=empty_N0,
        label_logprob_N=-rng.random(num, np.float32),
        hidden_ND={},
        last_ND=bits_ND if states == "bf16" else numbers_ND.astype(TYPES[states]),
    )
    built = SoftTargets.build(
        question=spec_of(states),
        teacher=TEACHER,
        row_hashes=UNIT.hashes(),
        num_targets_R=counts,
        columns=encoded(spec_of(states), arrays),
    )
    return built, arrays


@every_type
def test_states_arrive_bit_for_bit_in_the_teachers_own_type(states):
    built, sent = answer(states)
    arrived = shipped(built)
    arrived.check(UNIT, spec_of(states), TEACHER)
    got = decoded(arrived)
    assert got.last_ND.dtype == TYPES[states]
    np.testing.assert_array_equal(got.last_ND, sent.last_ND)
    np.testing.assert_array_equal(got.label_logprob_N, sent.label_logprob_N)
    assert got.ids_NK.shape == got.logprobs_NK.shape == (len(sent.label_logprob_N), 0)
    assert built.table.schema.names == ["row_hash", "last_hidden", "label_logprob"]


@every_type
def test_another_head_is_another_question(states):
    built, _ = answer(states)
    for field, value in (("head", "another"), ("states_width", 7), ("shared_vocab", 511)):
        with pytest.raises(TeacherError, match="asked was"):
            built.check(UNIT, changed(spec_of(states), **{field: value}))


def test_questions_for_ids_are_named_as_before():
    assert not {"head", "states", "states_width"} & set(question_of(4, 512).identity())
    again = Question.from_dict(spec_of("bf16").as_dict())
    assert again == spec_of("bf16")
    assert "last hidden states in bf16 before the head a digest" in again.in_words()


@every_type
@pytest.mark.parametrize("column", ["last_hidden", "label_logprob"])
def test_a_damaged_table_is_refused(states, column):
    built, _ = answer(states)
    place = built.table.schema.get_field_index(column)
    lists = built.table.column(column).combine_chunks()
    short = pa.array([entry[:-1] for entry in lists.to_pylist()], lists.type)
    with pytest.raises(TeacherError, match=f"column {column} .* every token with loss"):
        SoftTargets(built.table.set_column(place, column, short)).check(UNIT, spec_of(states))
    for other in (
        built.table.drop_columns([column]),
        built.table.set_column(place, column, pa.array([b""] * 3)),
    ):
        with pytest.raises(TeacherError, match=f"column {column} .* must hold"):
            decoded(SoftTargets(other))


@every_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_no_number_is_refused(states, value):
    _, arrays = answer(states)
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    arrays.last_ND.reshape(-1)[5] = bits[0] if states == "bf16" else value
    with pytest.raises(TeacherError, match="non-finite last_hidden"):
        SoftTargets.build(
            question=spec_of(states),
            teacher=TEACHER,
            row_hashes=UNIT.hashes(),
            num_targets_R=UNIT.num_loss_tokens(),
            columns=encoded(spec_of(states), arrays),
        )


@every_type
def test_a_store_returns_the_bytes_and_there_are_no_ids_to_rewrite(states, tmp_path):
    built, _ = answer(states)
    writer = TargetStore(tmp_path, teacher=TEACHER, question=spec_of(states), ids="plain")
    writer.write(built)
    writer.close()
    stored = TargetStore(tmp_path, teacher=TEACHER, question=spec_of(states)).read(UNIT)
    stored.check(UNIT, spec_of(states), TEACHER)
    for name in built.table.schema.names:
        assert stored.table.column(name).equals(built.table.column(name))


def test_a_head_that_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"needs the teacher's head a1, .* not in paths.cache"):
        find_head(tmp_path, "a1")
    path = head_path(tmp_path, "a1")
    path.parent.mkdir()
    path.write_bytes(b"not what the digest says")
    with pytest.raises(ConfigError, match=r"is damaged; remove it"):
        find_head(tmp_path, "a1")


@pytest.mark.parametrize(
    ("option", "value"),
    [("top_k", 32), ("encoding", "int8"), ("ids", "plain"), ("store_ids", "plain")],
)
def test_options_of_ids_are_refused_beside_states(option, value):
    with pytest.raises(ValidationError, match=f"ships no ids, so targets.{option} has no meaning"):
        config(targets={"exact": "last_hidden", option: value})


def test_a_bucketed_kl_is_refused_beside_states():
    with pytest.raises(ValidationError, match=r"KL is over the full vocabulary, but evaluation.kl"):
        config(targets={"exact": "last_hidden"}, evaluation={"kl": "bucketed"})


def test_a_recorded_config_which_names_every_default_is_read_again():
    asked = config(targets={"exact": "last_hidden"})
    assert config(**asked.model_dump()) == asked
