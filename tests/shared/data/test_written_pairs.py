"""Rows of pairs that models wrote: their prompts, what of them is learnt, and what is no pair."""

import numpy as np

from shared.config.source import TokenSources
from shared.data.written_pairs import pair_prompts, pair_rows
from tests.shared.data.test_rollouts import rows_of

CONTEXT = 40
SOURCE = TokenSources(max_new_tokens=8, prompt_tokens=6)
DOCUMENTS = [[(4, 9), (5, 30)], [(18, 20)], [(25, 36)], [(0, 30)]]


def test_every_document_whose_prompt_leaves_room_for_two_responses_is_gone_on_from() -> None:
    """Of 40 tokens a document has 20; the rest of a room is a power of two."""
    found = pair_prompts(rows_of(*DOCUMENTS).documents(), SOURCE, context=CONTEXT)
    sizes = [(one.row, len(one.input_ids), one.room) for one in found]
    assert sizes == [(0, 4, 8), (1, 5, 8), (2, 18, 2), (4, 6, 8)]
    assert found[1].input_ids.tolist() == [109, 110, 111, 112, 113]


def test_all_that_was_written_is_learnt_after_its_prompt_and_what_is_alike_is_no_pair() -> None:
    prompts = pair_prompts(rows_of(*DOCUMENTS).documents(), SOURCE, context=CONTEXT)
    chosen = [np.array(ids) for ids in ([1, 2], [1, 2, 3], [7, 8], [5])]
    rejected = [np.array(ids) for ids in ([1, 3, 4], [1, 2, 3], [7], [6, 6])]
    rows, count = pair_rows(prompts, chosen, rejected, context=CONTEXT)
    assert count == 3
    found = []
    for ids, starts, mask in zip(rows.input_ids, rows.doc_starts, rows.loss_masks, strict=True):
        assert len(ids) <= CONTEXT
        assert len(starts) % 2 == 0
        parts = zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True)
        found += [(part.tolist(), part[1:][own[:-1] == 1].tolist()) for part, own in parts]
    expected = []
    for number in (0, 2, 3):
        for text in (chosen[number], rejected[number]):
            prompt = prompts[number].input_ids.tolist()
            expected.append(([*prompt, *text.tolist()], text.tolist()))
    pairs = {tuple(map(str, found[at : at + 2])) for at in range(0, len(found), 2)}
    assert pairs == {tuple(map(str, expected[at : at + 2])) for at in range(0, 6, 2)}
