"""Rows: schema, identity and size."""

import pickle

import numpy as np
import pyarrow as pa

from shared.data.rows import SCHEMA, Rows


def rows(lengths: list[int], *, domain: str = "math", seed: int = 0) -> Rows:
    """Random rows of one document each; every token but the last has loss."""
    rng = np.random.default_rng(seed)
    masks = [np.ones(n, np.uint8) for n in lengths]
    for mask in masks:
        mask[-1:] = 0
    return Rows.build(
        domains=[domain] * len(lengths),
        indices=range(len(lengths)),
        input_ids=[rng.integers(0, 512, n) for n in lengths],
        doc_starts=[np.array([0]) for _ in lengths],
        loss_masks=masks,
    )


def test_the_schema_is_frozen() -> None:
    assert SCHEMA.equals(
        pa.schema(
            {
                "domain": pa.string(),
                "index": pa.int64(),
                "input_ids": pa.list_(pa.int32()),
                "doc_starts": pa.list_(pa.int32()),
                "loss_mask": pa.list_(pa.uint8()),
            }
        )
    )


def test_rows_give_back_what_they_were_built_from() -> None:
    ids = [np.array([5, 6, 7]), np.array([8])]
    built = Rows.build(
        domains=["math", "code"],
        indices=[3, 2**40],
        input_ids=ids,
        doc_starts=[np.array([0, 2]), np.array([0])],
        loss_masks=[np.array([1, 0, 0]), np.array([0])],
    )
    assert [a.tolist() for a in built.column("input_ids")] == [[5, 6, 7], [8]]
    assert [a.tolist() for a in built.column("doc_starts")] == [[0, 2], [0]]
    assert built.num_loss_tokens().tolist() == [1, 0]
    assert built.names() == ["math/3", f"code/{2**40}"]
    assert built.table.schema.equals(SCHEMA)


def test_no_rows_are_rows_too() -> None:
    empty = rows([])
    assert len(empty) == 0
    assert empty.hashes() == []
    assert empty.num_loss_tokens().tolist() == []


def test_a_hash_covers_ids_borders_and_mask_and_nothing_else() -> None:
    def one(ids: list[int], starts: list[int], mask: list[int], domain: str = "a") -> bytes:
        return Rows.build(
            domains=[domain],
            indices=[0],
            input_ids=[np.array(ids)],
            doc_starts=[np.array(starts)],
            loss_masks=[np.array(mask)],
        ).hashes()[0]

    base = one([1, 2, 3], [0], [1, 1, 0])
    assert len(base) == 16
    assert base == one([1, 2, 3], [0], [1, 1, 0], domain="b")
    others = {one([1, 2, 4], [0], [1, 1, 0]), one([1, 2, 3], [0, 2], [1, 0, 0])}
    others |= {one([1, 2, 3], [0], [0, 1, 0]), one([1, 2], [0], [1, 0])}
    others |= {one([1, 2, 3], [0, 1], [0, 1, 0])}  # borders alone
    assert len(others | {base}) == 6


def test_a_hash_covers_the_draw_but_for_the_first() -> None:
    plain = rows([7, 4])
    assert plain.with_draws(np.zeros(2, np.int32)).hashes() == plain.hashes()
    first, second = (plain.with_draws(np.array([0, n])).hashes() for n in (1, 2))
    assert first[0] == second[0] == plain.hashes()[0]
    assert len({first[1], second[1], plain.hashes()[1]}) == 3


def test_a_sliced_table_ships_its_slice_and_keeps_its_hashes() -> None:
    whole = rows([1000] * 100)
    part = Rows(whole.table.slice(40, 2))
    assert part.hashes() == whole.hashes()[40:42]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(part.table)
    assert sink.getvalue().size < 2 * 1000 * 5 + 4096
    assert whole.table.nbytes > 400_000


def test_views_are_read_only_and_rows_pickle() -> None:
    built = rows([7, 9])
    assert not built.column("input_ids")[0].flags.writeable
    assert pickle.loads(pickle.dumps(built)).hashes() == built.hashes()


def test_a_part_is_those_rows_and_travels_without_the_others() -> None:
    whole = rows([7, 300, 9, 5])
    part = whole.part(slice(2, 4))
    assert part.hashes() == whole.hashes()[2:]
    assert part.names() == whole.names()[2:]
    assert part.num_loss_tokens().tolist() == [8, 4]
    assert part.table.nbytes < whole.table.nbytes / 10
    assert len(whole.part(slice(3, 9))) == 1


def test_rows_carry_the_ids_that_a_student_names_and_their_hash_covers_them() -> None:
    plain = rows([7, 4, 1, 9])
    ids_NM = np.arange(17 * 3, dtype=np.int32).reshape(17, 3)
    named = plain.with_student_ids(ids_NM)
    assert plain.student_ids() is None
    np.testing.assert_array_equal(named.student_ids(), ids_NM)
    part = pickle.loads(pickle.dumps(named.part(slice(1, 4))))
    np.testing.assert_array_equal(part.student_ids(), ids_NM[6:])
    assert part.hashes() == named.hashes()[1:]
    other_NM = ids_NM.copy()
    other_NM[7, 1] += 1
    pairs = zip(named.hashes(), plain.with_student_ids(other_NM).hashes(), strict=True)
    assert [one == other for one, other in pairs] == [True, False, True, True]
    assert not set(named.hashes()) & set(plain.hashes())


def test_rows_without_a_position_name_no_id() -> None:
    empty = rows([]).with_student_ids(np.zeros((0, 4), np.int32))
    assert empty.student_ids() is not None
    assert empty.student_ids().shape == (0, 4)
    assert empty.hashes() == []
