"""SoftTargets: the wire contract."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from shared.data.rows import Rows
from shared.errors import TeacherError
from shared.targets.question import Question
from shared.targets.soft_targets import METADATA_KEY, SoftTargets
from tests.answers import changed, decoded, question_of
from tests.shared.data.test_rows import rows
from tests.shared.targets.made_up import TEACHER, UNIT, answer, random_arrays, shipped


def test_fp32_arrives_bit_for_bit_with_hidden_states() -> None:
    spec = question_of(
        8,
        512,
        temperatures=(1.0, 2.0),
        encoding="fp32",
        hidden_layers=(2, 4),
        hidden_encoding="fp32",
    )
    built, sent = answer(spec)
    got = decoded(shipped(built))
    for name in ("ids_NK", "logprobs_NK", "log_tail_NS", "label_logprob_N"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
        assert getattr(got, name).dtype == getattr(sent, name).dtype
    for layer in (2, 4):
        np.testing.assert_array_equal(got.hidden_ND[layer], sent.hidden_ND[layer])


def test_fp16_rounds_kept_logprobs_alone_and_by_half_a_unit_in_the_last_place() -> None:
    spec = question_of(64, 512)
    built, sent = answer(spec)
    got = decoded(built)
    assert got.logprobs_NK.dtype == np.float32
    exact = sent.logprobs_NK.astype(np.float64)
    bound = np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)
    error = np.abs(got.logprobs_NK - exact)
    assert (error <= bound).all()
    assert error.max() > 0
    np.testing.assert_array_equal(got.label_logprob_N, sent.label_logprob_N)
    np.testing.assert_array_equal(got.log_tail_NS, sent.log_tail_NS)


def test_fp16_changes_the_kept_mass_by_less_than_a_thousandth() -> None:
    built, sent = answer(question_of(64, 512), arrays=random_arrays(question_of(64, 512), 31))
    mass = [np.exp(a.logprobs_NK.astype(np.float64)).sum(1) for a in (decoded(built), sent)]
    assert np.abs(mass[0] - mass[1]).max() < 1e-3


def test_hidden_states_travel_as_bfloat16_bits() -> None:
    spec = question_of(4, 512, hidden_layers=(1,))
    plain = random_arrays(spec, int(UNIT.num_loss_tokens().sum()))
    bits = (plain.hidden_ND[1].view(np.uint32) >> 16).astype(np.uint16)
    built, _ = answer(spec, arrays=dataclasses.replace(plain, hidden_ND={1: bits}))
    got = shipped(built).arrays().hidden_ND[1]
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, bits)


@pytest.mark.parametrize(("shared_vocab", "id_type"), [(65_536, pa.uint16()), (65_537, pa.int32())])
def test_plain_ids_take_two_bytes_up_to_65536_ids_and_four_beyond(
    shared_vocab: int, id_type: pa.DataType
) -> None:
    spec = question_of(4, shared_vocab, ids="plain")
    arrays = random_arrays(spec, int(UNIT.num_loss_tokens().sum()))
    arrays.ids_NK[0, 0] = shared_vocab - 1
    built, sent = answer(spec, arrays=arrays)
    assert built.table.schema.field("top_ids").type.value_type.value_type == id_type
    np.testing.assert_array_equal(decoded(built).ids_NK, sent.ids_NK)


def test_the_schema_and_its_metadata_are_frozen() -> None:
    spec = question_of(4, 512, temperatures=(1.0, 2.0), hidden_layers=(3,))
    built, _ = answer(spec)
    described = json.loads(built.table.schema.metadata[METADATA_KEY])
    assert built.table.schema.names == [
        "row_hash", "top_ids", "top_logprobs", "log_tail", "label_logprob", "hidden_3"
    ]  # fmt: skip
    assert {f.name: str(f.type) for f in built.table.schema} == {
        "row_hash": "fixed_size_binary[16]",
        "top_ids": "list<item: fixed_size_list<item: uint8>[5]>",
        "top_logprobs": "list<item: fixed_size_list<item: halffloat>[4]>",
        "log_tail": "list<item: fixed_size_list<item: float>[2]>",
        "label_logprob": "list<item: float>",
        "hidden_3": "list<item: fixed_size_list<item: uint16>[6]>",
    }
    assert described == {
        "schema_version": 3,
        "teacher": TEACHER,
        "spec": {
            "top_k": 4,
            "shared_vocab": 512,
            "temperatures": [1.0, 2.0],
            "encoding": "fp16",
            "hidden_layers": [3],
            "hidden_encoding": "bf16",
            "projection": "",
            "ids": "elias_fano",
        },
    }
    assert shipped(built).question == spec


@pytest.mark.parametrize(
    ("selector", "encoding", "names"),
    [
        ("top_k", "int8", ["top_ids", "top_logprobs_range", "top_logprobs", "log_tail"]),
        ("threshold", "fp16", ["top_ids", "log_tail", "exact", "exact_logprobs"]),
        (
            "threshold", "int8",
            ["top_ids", "log_tail", "exact", "exact_logprobs", "exact_logprobs_range"],
        ),
        ("sampled", "fp16", ["top_ids", "log_tail"]),
    ],
)  # fmt: skip
def test_the_order_of_columns_is_frozen(selector: str, encoding: str, names: list[str]) -> None:
    """Rows of a store are put together column by column."""
    spec = question_of(4, 512, selector=selector, encoding=encoding, entropy=True)
    spec = changed(spec, hidden_layers=(3,), hidden_encoding="int8")
    built, _ = answer(spec)
    hidden = ["label_logprob", "entropy", "hidden_3_scale", "hidden_3"]
    assert built.table.schema.names == ["row_hash", *names, *hidden]


@pytest.mark.parametrize("hidden_encoding", ["bf16", "int8", "fp32"])
def test_damaged_hidden_states_are_refused(hidden_encoding: str) -> None:
    spec = question_of(4, 512, hidden_layers=(1, 3), hidden_encoding=hidden_encoding)
    built, _ = answer(spec)
    for name in built.table.schema.names[4:]:
        place = built.table.schema.get_field_index(name)
        numbers = pa.array([[1.0]] * built.table.num_rows, pa.list_(pa.float64()))
        for other in (
            built.table.drop_columns([name]),
            built.table.set_column(place, name, numbers),
        ):
            with pytest.raises(TeacherError, match=r"column \w+ of an answer .* must hold"):
                SoftTargets(other).check(UNIT, spec)


@pytest.mark.parametrize("encoding", ["fp16", "fp32"])
def test_the_entropy_arrives_bit_for_bit_where_it_is_asked_for(encoding: str) -> None:
    spec = question_of(4, 512, encoding=encoding, entropy=True)
    built, sent = answer(spec)
    got = shipped(built)
    assert str(got.table.schema.field("entropy").type) == "list<item: float>"
    np.testing.assert_array_equal(got.arrays().entropy_N, sent.entropy_N)
    assert got.question == spec
    assert got.described["spec"]["entropy"] is True
    assert answer(question_of(4, 512))[0].arrays().entropy_N is None


def test_an_answer_without_the_entropy_asked_for_is_refused() -> None:
    built, _ = answer(question_of(4, 512))
    with pytest.raises(TeacherError, match=r"in fp16, asked was .* in fp16, entropy$"):
        built.check(UNIT, question_of(4, 512, entropy=True))


def test_an_answer_to_its_own_question_is_accepted() -> None:
    spec = question_of(4, 512)
    built, _ = answer(spec)
    assert shipped(built).check(UNIT, spec, TEACHER) is None
    assert len(built.arrays().label_logprob_N) == UNIT.num_loss_tokens().sum()


@pytest.mark.parametrize(
    ("unit", "spec", "teacher", "says"),
    [
        (rows([20, 1, 13], seed=9), question_of(4, 512), TEACHER, "not about rows math/0"),
        (rows([20, 1]), question_of(4, 512), TEACHER, "not about rows"),
        (UNIT, question_of(5, 512), TEACHER, "asked was"),
        (UNIT, question_of(4, 512, temperatures=(1.0, 3.0)), TEACHER, "asked was"),
        (UNIT, question_of(4, 512), {**TEACHER, "dtype": "bfloat16"}, "another teacher"),
    ],
)
def test_an_answer_to_anything_else_is_refused(
    unit: Rows, spec: Question, teacher: dict[str, str], says: str
) -> None:
    built, _ = answer(question_of(4, 512))
    with pytest.raises(TeacherError, match=says):
        built.check(unit, spec, teacher)


def test_another_schema_version_is_refused() -> None:
    built, _ = answer(question_of(4, 512))
    described = built.described | {"schema_version": 99}
    other = built.table.replace_schema_metadata({METADATA_KEY: json.dumps(described)})
    with pytest.raises(TeacherError, match="schema version 99"):
        SoftTargets(other).check(UNIT, question_of(4, 512))


@pytest.mark.parametrize("name", ["logprobs_NK", "label_logprob_N", "log_tail_NS", "entropy_N"])
def test_a_value_that_is_no_number_is_refused(name: str) -> None:
    spec = question_of(4, 512, entropy=True)
    arrays = random_arrays(spec, int(UNIT.num_loss_tokens().sum()))
    getattr(arrays, name).reshape(-1)[5] = np.nan
    with pytest.raises(TeacherError, match="teacher computed"):
        answer(spec, arrays=arrays)


def test_a_tail_of_nothing_is_minus_infinity_and_survives() -> None:
    arrays = random_arrays(question_of(4, 512), int(UNIT.num_loss_tokens().sum()))
    arrays.log_tail_NS[:] = -np.inf
    built, _ = answer(question_of(4, 512), arrays=arrays)
    assert np.isneginf(decoded(shipped(built)).log_tail_NS).all()


def test_a_sliced_table_ships_and_decodes_only_its_slice() -> None:
    unit = rows([200] * 50)
    spec = question_of(16, 512)
    built, sent = answer(spec, unit=unit)
    part = SoftTargets(built.table.slice(10, 1))
    assert part.num_bytes < built.num_bytes / 40
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.table.schema) as writer:
        writer.write_table(part.table)
    assert sink.getvalue().size < built.num_bytes / 20
    np.testing.assert_array_equal(decoded(part).ids_NK, sent.ids_NK[1990:2189])
    assert part.check(Rows(unit.table.slice(10, 1)), spec, TEACHER) is None


def test_tables_of_several_chunks_decode_as_one() -> None:
    spec = question_of(4, 512, encoding="fp32")
    built, sent = answer(spec)
    pieces = pa.concat_tables([built.table.slice(0, 1), built.table.slice(1)])
    assert pieces.column("top_ids").num_chunks == 2
    np.testing.assert_array_equal(decoded(SoftTargets(pieces)).logprobs_NK, sent.logprobs_NK)


def test_a_unit_without_rows_has_an_answer_without_entries() -> None:
    built, _ = answer(question_of(4, 512), unit=rows([]))
    got = decoded(shipped(built))
    assert got.ids_NK.shape == (0, 4)
    assert got.log_tail_NS.shape == (0, 1)


@pytest.mark.parametrize(
    ("k", "encoding", "num_bytes"),
    [(64, "fp16", 245), (64, "int8", 180), (32, "fp16", 130), (32, "int8", 100)],
)
def test_bytes_per_token_at_151936_ids_with_label_and_tail(
    k: int, encoding: str, num_bytes: int
) -> None:
    spec = question_of(k, 151_936, encoding=encoding)
    unit = rows([512] * 8)
    built, _ = answer(spec, unit=unit)
    row_overhead = 8 * (16 + 4 * 5) + 4 * 5  # the hash and an offset per list column
    assert built.num_bytes <= num_bytes * 8 * 511 + row_overhead


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("k", [1, 5, 64, 512])
def test_ids_written_in_either_way_are_the_same_answer(k: int, encoding: str) -> None:
    spec = question_of(k, 512, encoding=encoding)
    arrays = random_arrays(question_of(k, 4 * 512), int(UNIT.num_loss_tokens().sum()))
    arrays.ids_NK[:] = np.argsort(np.random.default_rng(0).random((len(arrays.ids_NK), 512)))[:, :k]
    if not spec.ask.names_ids:
        arrays.ids_NK.sort(axis=1)
    built, sent = answer(spec, arrays=arrays)
    plain = built.with_ids("plain")
    asked_plain, _ = answer(changed(spec, ids="plain"), arrays=arrays)
    assert plain.table.equals(asked_plain.table, check_metadata=True)
    assert plain.with_ids("elias_fano").table.equals(built.table, check_metadata=True)
    assert plain.question == built.question
    plain.check(UNIT, spec, TEACHER)
    np.testing.assert_array_equal(decoded(plain).ids_NK, sent.ids_NK)
    np.testing.assert_array_equal(decoded(plain).logprobs_NK, decoded(built).logprobs_NK)


def test_ids_of_a_slice_are_rewritten_alone() -> None:
    unit = rows([20, 9, 13])
    built, sent = answer(question_of(4, 512), unit=unit)
    part = SoftTargets(built.table.slice(1, 2)).with_ids("plain")
    np.testing.assert_array_equal(decoded(part).ids_NK, sent.ids_NK[19:])
    part.check(Rows(unit.table.slice(1, 2)), question_of(4, 512), TEACHER)


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
def test_the_whole_vocabulary_travels_without_ids(encoding: str) -> None:
    spec = question_of(512, 512, encoding=encoding)
    arrays = random_arrays(question_of(512, 512), int(UNIT.num_loss_tokens().sum()))
    arrays.ids_NK[:] = np.arange(512)
    built, sent = answer(spec, arrays=arrays)
    assert "top_ids" not in built.table.schema.names
    got = decoded(shipped(built))
    np.testing.assert_array_equal(got.ids_NK, sent.ids_NK)
    tolerance = {"fp16": 2.0**-11, "int8": 0.02, "fp32": 0}[encoding]
    np.testing.assert_allclose(got.logprobs_NK, sent.logprobs_NK, rtol=tolerance, atol=tolerance)


def test_int8_reads_its_level_from_the_tail_at_temperature_one() -> None:
    spec = question_of(16, 512, temperatures=(2.0, 1.0), encoding="int8")
    arrays = random_arrays(spec, int(UNIT.num_loss_tokens().sum()))
    arrays.log_tail_NS[:, 0] = -0.1
    built, sent = answer(spec, arrays=arrays)
    assert np.abs(decoded(shipped(built)).logprobs_NK - sent.logprobs_NK).max() < 0.1


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("ids", ["elias_fano", "plain"])
def test_a_damaged_table_is_refused(encoding: str, ids: str) -> None:
    spec = question_of(4, 512, encoding=encoding, ids=ids)
    built, _ = answer(spec)
    for name in built.table.schema.names[1:]:
        place = built.table.schema.get_field_index(name)
        column = built.table.column(name).combine_chunks()
        short = pa.array([entry[:-1] for entry in column.to_pylist()], column.type)
        damaged = SoftTargets(built.table.set_column(place, name, short))
        with pytest.raises(TeacherError, match=f"column {name} .* every token with loss"):
            damaged.check(UNIT, spec)
        for other in (
            built.table.drop_columns([name]),
            built.table.set_column(place, name, pa.array([b""] * 3)),
        ):
            for refuses in (
                SoftTargets(other).arrays,
                lambda t=other: SoftTargets(t).check(UNIT, spec),
            ):
                with pytest.raises(TeacherError, match=f"column {name} .* must hold"):
                    refuses()


def test_ids_damaged_in_the_high_part_are_refused() -> None:
    built, _ = answer(question_of(4, 512))
    column = built.table.column("top_ids").combine_chunks()
    written = column.flatten().flatten().to_numpy(zero_copy_only=False).copy()
    written[0] ^= 1
    lists = pa.FixedSizeListArray.from_arrays(pa.array(written), column.type.value_type.list_size)
    ids = pa.ListArray.from_arrays(column.offsets, lists)
    damaged = SoftTargets(built.table.set_column(1, "top_ids", ids))
    with pytest.raises(TeacherError, match="does not name 4 ids at every position"):
        decoded(damaged)


def test_a_probability_too_small_for_the_encoding_stays_finite() -> None:
    spec = question_of(8, 512)
    sent = random_arrays(spec, int(UNIT.num_loss_tokens().sum()))
    sent.logprobs_NK[:, -1] = -1e5  # beyond the smallest float16
    built, _ = answer(spec, arrays=sent)
    got = decoded(built).logprobs_NK
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got.min(axis=1), np.finfo(np.float16).min)
