"""Prompts of rows, and rows with what a student wrote in place of the answers."""

from pathlib import Path

import numpy as np
import pytest

from shared.config.source import TokenSources
from shared.data.layout import lay_out
from shared.data.rollouts import (
    DATA_SET,
    Rollout,
    RowPrompt,
    dealt,
    expected_tokens,
    prompts_of,
    share_of_rows,
    with_rollouts,
)
from shared.data.row_store import RaggedRows, RowStore, write_rows
from shared.data.rows import Rows

END = 2


def source(**options) -> TokenSources:
    return TokenSources(**{"student": 1.0, "dataset": 0.0, "max_new_tokens": 6, **options})


def rows_of(*documents_of_rows: list[tuple[int, int]]) -> Rows:
    """Rows of documents, each (tokens of its prompt, all its tokens); token ids count upwards."""
    built, ids, starts, masks = 100, [], [], []
    for documents in documents_of_rows:
        own_ids, own_starts, own_masks = [], [], []
        for prompt, length in documents:
            own_starts.append(len(own_ids))
            mask = [0] * length
            mask[max(0, prompt - 1) : length - 1] = [1] * (length - 1 - max(0, prompt - 1))
            own_ids += range(built, built + length)
            own_masks += mask
            built += length
        ids.append(np.array(own_ids))
        starts.append(np.array(own_starts))
        masks.append(np.array(own_masks))
    return Rows.build(
        domains=["a"] * len(ids),
        indices=range(len(ids)),
        input_ids=ids,
        doc_starts=starts,
        loss_masks=masks,
    )


def written(prompt: RowPrompt, ids: list[int], *, ended: bool = False) -> Rollout:
    return Rollout(prompt, np.array(ids), np.arange(len(ids), dtype=np.float32) - 9, ended)


def test_a_prompt_is_all_before_the_answer():
    (prompt,) = prompts_of(rows_of([(4, 9)]), source(), context=64)
    assert prompt.input_ids.tolist() == [100, 101, 102, 103]
    assert (prompt.room, prompt.answer) == (6, 5)


def test_the_prompt_of_a_conversation_ends_before_its_last_answer():
    rows = rows_of([(0, 10)])
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 0])
    rows = Rows.build(
        domains=["a"],
        indices=[0],
        input_ids=rows.column("input_ids"),
        doc_starts=[np.zeros(1)],
        loss_masks=[mask],
    )
    (prompt,) = prompts_of(rows, source(), context=64)
    assert prompt.input_ids.tolist() == list(range(100, 107))
    assert prompt.answer == 3


@pytest.mark.parametrize(("asked", "length", "found"), [(4, 20, 4), (32, 20, 10), (32, 2, 1)])
def test_a_text_without_a_prompt_gives_its_first_tokens_at_most_half(asked, length, found):
    (prompt,) = prompts_of(rows_of([(0, length)]), source(prompt_tokens=asked), context=64)
    assert prompt.input_ids.tolist() == list(range(100, 100 + found))
    assert prompt.answer == length - found


def test_documents_of_a_row_are_gone_on_from_while_each_has_its_room():
    rows = rows_of([(4, 9), (5, 7), (3, 20)], [(2, 4)])
    found = prompts_of(rows, source(), context=22)
    assert [(p.row, p.document, len(p.input_ids)) for p in found] == [
        (0, 0, 4),
        (0, 1, 5),
        (1, 0, 2),
    ]
    assert [p.room for p in found] == [6, 6, 6]


@pytest.mark.parametrize(("context", "room"), [(12, 6), (11, 6), (10, 4), (9, 4), (7, 2), (6, 1)])
def test_a_long_prompt_leaves_what_the_context_has(context, room):
    (prompt,) = prompts_of(rows_of([(5, 6)]), source(), context=context)
    assert prompt.room == room


def test_a_prompt_that_fills_the_context_is_counted_and_harmless():
    rows = rows_of([(5, 6)], [(2, 5)])
    found = prompts_of(rows, source(), context=5)
    assert [p.row for p in found] == [1]
    replaced = with_rollouts(rows, [written(found[0], [7, END])], version_R=np.array([3, 3]))
    assert replaced.num_loss_tokens().tolist() == [0, 2]
    assert replaced.versions().tolist() == [3, 3]
    assert replaced.behaviour().tolist() == [-9, -8]


def test_the_first_end_has_loss_and_nothing_follows_it():
    rows = rows_of([(4, 9)])
    (prompt,) = prompts_of(rows, source(), context=64)
    replaced = with_rollouts(
        rows, [written(prompt, [50, 51, END], ended=True)], version_R=np.array([0])
    )
    assert replaced.column("input_ids")[0].tolist() == [100, 101, 102, 103, 50, 51, END]
    assert replaced.column("loss_mask")[0].tolist() == [0, 0, 0, 1, 1, 1, 0]
    layout = lay_out(replaced, packed=True)
    assert layout.label_N.tolist() == [50, 51, END]
    assert replaced.behaviour().tolist() == [-9, -8, -7]


def test_a_rollout_cut_at_the_limit_has_no_end_appended():
    rows = rows_of([(4, 9)])
    (prompt,) = prompts_of(rows, source(), context=64)
    ids = [50, 51, 52, 53, 54, 55]
    replaced = with_rollouts(rows, [written(prompt, ids)], version_R=np.array([0]))
    assert replaced.column("input_ids")[0].tolist() == [100, 101, 102, 103, *ids]
    assert lay_out(replaced, packed=True).label_N.tolist() == ids


def test_every_position_has_the_logprob_of_its_own_token_whatever_the_layout():
    rows = rows_of([(4, 9), (5, 7)], [(3, 12)], [(2, 4)])
    prompts = [p for p in prompts_of(rows, source(), context=64) if p.row != 1]
    rollouts = [written(p, [10 * (n + 1) + i for i in range(n + 2)]) for n, p in enumerate(prompts)]
    replaced = with_rollouts(rows, rollouts, version_R=np.array([5, DATA_SET, 4]))
    for packed in (True, False):
        layout = lay_out(replaced, packed=packed)
        assert len(layout.label_N) == len(replaced.behaviour())
        known = {
            int(i): lp for r in rollouts for i, lp in zip(r.output_ids, r.logprobs, strict=True)
        }
        for label, logprob in zip(layout.label_N, replaced.behaviour(), strict=True):
            assert logprob == known.get(int(label), 0.0)


def test_who_wrote_a_row_is_no_part_of_what_is_asked():
    rows = rows_of([(4, 9)], [(3, 12)])
    kept = with_rollouts(rows, [], version_R=np.array([DATA_SET, DATA_SET]))
    assert kept.hashes() == rows.hashes()
    assert kept.as_asked().table.equals(rows.table)
    drawn = with_rollouts(rows.with_draws(np.array([0, 3])), [], version_R=np.array([DATA_SET] * 2))
    assert drawn.as_asked().hashes() == rows.with_draws(np.array([0, 3])).hashes()


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_rows_are_dealt_to_the_student_within_one_of_its_share(share):
    found = dealt(share, range(1000))
    for start, stop in ((0, 1000), (17, 400), (998, 1000), (5, 6)):
        assert abs(found[start:stop].sum() - share * (stop - start)) <= 1
    assert (dealt(share, range(300, 500)) == found[300:500]).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_shares_are_of_loss_tokens(share):
    rows = share_of_rows(share, written=40.0, given=120.0)
    assert rows * 40 / (rows * 40 + (1 - rows) * 120) == pytest.approx(share)
    assert share_of_rows(share, written=0.0, given=120.0) == 0.0  # nothing that it could write


def test_the_length_of_rollouts_is_foreseen_from_the_answers(tmp_path: Path):
    rows = rows_of([(4, 9), (5, 7)], [(2, 30)])
    columns = [rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask")]
    write_rows(tmp_path / "rows.arrow", domain="a", rows=RaggedRows(*columns))
    store = RowStore.open(tmp_path / "rows.arrow")
    assert expected_tokens(store, source(), context=64) == (5 + 2 + 6) / 2
    assert expected_tokens(store, source(max_new_tokens=50), context=64) == (5 + 28) / 2
