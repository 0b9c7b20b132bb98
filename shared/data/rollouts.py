"""Rollouts: rows whose answers a model wrote, student or teacher, from the prompts of rows of the
data set.

R rows   N positions with loss of a row
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shared.config.source import TokenSources
from shared.data.row_store import RowStore
from shared.data.rows import DRAW, Rows

MOST_LOOKED_AT = 512  # rows from which the length of rollouts is foreseen
# In place of the version of the student's weights that wrote a row: who else has.
DATA_SET = -1
TEACHER = -2
STUDENT = 0  # its versions count upwards


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """What is gone on from, once in a document of a row."""

    row: int
    document: int  # of those of the row that are gone on from
    input_ids: np.ndarray  # int32
    room: int  # tokens that may be written
    answer: int  # tokens with loss that the data set has in its place


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a model wrote after a prompt."""

    prompt: RowPrompt
    output_ids: np.ndarray  # int32; with the id that ended it
    logprobs: np.ndarray  # float32, of each under the law that it was drawn from, nats
    ended: bool  # False: it was cut at its room
    own_logprobs: np.ndarray | None = None  # of each under the student's law, where that is another


def prompts_of(rows: Rows, source: TokenSources, *, context: int) -> list[RowPrompt]:
    """The prompts of rows, in their order: of the documents of a row the first, and those after it
    that leave each `max_new_tokens` within the context.

    The prompt of a conversation is all before its last answer, that of a text its first
    `prompt_tokens`, at most half of it. Where the first leaves less, its room is the next lower
    power of two, so that few lengths are asked for; one that fills the context is left out.
    """
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    found = []
    for row, (ids, starts, mask) in enumerate(zip(*columns, strict=True)):
        used = 0
        documents = _split(ids, starts, mask, most=source.prompt_tokens)
        for document, (prompt, answer) in enumerate(documents):
            room = min(source.max_new_tokens, context - used - len(prompt))
            if used and room < source.max_new_tokens:
                break
            if room < 1:
                break
            if room < source.max_new_tokens:
                room = 1 << (room.bit_length() - 1)
            found.append(RowPrompt(row, document, prompt, room, answer))
            used += len(prompt) + room
    return found


def _split(
    ids: np.ndarray, starts: np.ndarray, mask: np.ndarray, *, most: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The prompt of each document that is learnt, and the tokens with loss after it."""
    for first, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        own, learnt = ids[first:stop], np.flatnonzero(mask[first:stop])
        if not len(learnt):
            continue
        if learnt[0] == 0:
            length = min(most, max(1, len(own) // 2))
            yield own[:length], len(own) - length
            continue
        runs = np.flatnonzero(np.diff(learnt) > 1)
        last = learnt[runs[-1] + 1 :] if len(runs) else learnt
        yield own[: last[0] + 1], len(last)


def longest_text(store: RowStore, source: TokenSources, *, context: int) -> int:
    """Tokens of the longest text that a model may write, its prompt among them; all rows are
    read."""
    units = store.units(MOST_LOOKED_AT)
    prompts = (one for rows in units for one in prompts_of(rows, source, context=context))
    return max((len(one.input_ids) + one.room for one in prompts), default=0)


def expected_tokens(store: RowStore, source: TokenSources, *, context: int) -> float:
    """Loss tokens of a row that a model writes, as if it wrote as much as the data set has, in the
    mean over the first rows of a domain."""
    rows = store.take(range(min(len(store), MOST_LOOKED_AT)))
    prompts = prompts_of(rows, source, context=context)
    return sum(min(p.room, p.answer) for p in prompts) / max(1, len(rows))


def share_of_rows(share: float, *, written: float, given: float) -> float:
    """The share of a domain's rows that models write, so that they write `share` of the loss tokens
    where their rows have `written` of them and those of the data set `given`."""
    if share in (0.0, 1.0) or not written:
        return share if written else 0.0
    ours, theirs = share / written, (1 - share) / given
    return ours / (ours + theirs)


def dealt(share: float, counted_R: Sequence[int]) -> np.ndarray:
    """Which rows have a share, bool [R], of the `counted`-th rows of a domain: the n-th where n
    times the share passes an integer, so that no stretch of rows is off by more than one."""
    return np.array([_passed(share, n + 1) > _passed(share, n) for n in counted_R], bool)


def _passed(share: float, count: int) -> int:
    """Rows that have a share among the first `count`."""
    one = 2**40
    return count * round(share * one) // one


def writers(student: float, teacher: float, counted_R: Sequence[int]) -> np.ndarray:
    """Who writes the `counted`-th rows of a domain by their shares: `STUDENT`, `TEACHER` or
    `DATA_SET`, int64 [R]. The teacher has its share of the rows that the student leaves."""
    is_student_R = dealt(student, counted_R)
    others = [n - _passed(student, n) for n in counted_R]
    of_others = min(1.0, teacher / (1 - student)) if student < 1 else 0.0
    who_R = np.where(dealt(of_others, others), TEACHER, DATA_SET)
    return np.where(is_student_R, STUDENT, who_R)


def with_rollouts(
    rows: Rows, rollouts: Sequence[Rollout], *, version_R: np.ndarray, mixed: bool = False
) -> Rows:
    """The rows with every answer that a model wrote in place of the data set's, who wrote them, and
    the student's log-probabilities of what it wrote.

    `version_R` is the version of the student's weights, `TEACHER`, or `DATA_SET` for rows that stay
    as they are. `mixed` says that the student writes with a partner. All that was written has loss,
    the first end among it, and nothing after it; where it was cut, no end is put.
    """
    by_row: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_row.setdefault(rollout.prompt.row, []).append(rollout)
    names = ("input_ids", "doc_starts", "loss_mask")
    columns = {name: list(rows.column(name)) for name in names}
    behaviour = [np.zeros(0, np.float32)] * len(rows)
    own_logprobs = list(behaviour) if mixed else None
    for row in np.flatnonzero(version_R != DATA_SET).tolist():
        own = by_row.get(row)
        if own is None:  # no prompt that leaves room: nothing of the row is learnt
            columns["loss_mask"][row] = np.zeros_like(columns["loss_mask"][row])
            continue
        built = _row_of(own)
        for name, array in zip(names, built, strict=True):
            columns[name][row] = array
        if version_R[row] >= STUDENT:
            behaviour[row] = np.concatenate([rollout.logprobs for rollout in own])
            if own_logprobs is not None:
                own_logprobs[row] = np.concatenate([_own(rollout) for rollout in own])
    found = Rows.build(
        domains=rows.domains(),
        indices=rows.table.column("index").to_pylist(),
        input_ids=columns["input_ids"],
        doc_starts=columns["doc_starts"],
        loss_masks=columns["loss_mask"],
    )
    if DRAW in rows.table.column_names:  # on every rank, so that their files are alike
        found = found.with_draws(rows.draws())
    return found.with_versions(version_R, behaviour, own_logprobs)


def _own(rollout: Rollout) -> np.ndarray:
    assert rollout.own_logprobs is not None, "it was written with a partner"
    return rollout.own_logprobs


def with_others(rows: Rows, others: Mapping[int, Rows]) -> Rows:
    """Rows with versions, some of which, by their places, others of one row each stand in for."""
    if not others:
        return rows
    parts = [others.get(row, rows.part(slice(row, row + 1))) for row in range(len(rows))]
    tables = [part.table for part in parts]
    if any(DRAW in table.column_names for table in tables):
        tables = [_with_draw(table) for table in tables]
    names = tables[0].column_names
    return Rows(pa.concat_tables([table.select(names) for table in tables]).combine_chunks())


def _with_draw(table: pa.Table) -> pa.Table:
    """A table with the number of each row's draw, the first where it names none."""
    if DRAW in table.column_names:
        return table
    return table.append_column(DRAW, pa.array(np.zeros(table.num_rows, np.int32)))


def _row_of(rollouts: Sequence[Rollout]) -> tuple[np.ndarray, ...]:
    """Token ids, document starts and loss mask of a row."""
    ids, starts, masks, length = [], [], [], 0
    for rollout in rollouts:
        prompt, output = rollout.prompt.input_ids, rollout.output_ids
        mask = np.zeros(len(prompt) + len(output), np.uint8)
        mask[len(prompt) - 1 : len(prompt) - 1 + len(output)] = 1
        ids.append(np.concatenate([prompt, output]))
        starts.append(length)
        masks.append(mask)
        length += len(mask)
    return np.concatenate(ids), np.array(starts), np.concatenate(masks)
