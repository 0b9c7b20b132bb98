"""Rows: tokenised sequences, the unit of everything that is drawn, scored and learnt.

A row holds at most the context and one or more documents of one domain. A position has loss when
it predicts a counted token of its own document: never a prompt, padding, a row's last token, or a
position whose next token opens another document.

R rows   T tokens of a row   N positions with loss, all rows end to end
M ids of the student per position   X the same and all others together
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "index": pa.int64(),  # position of the row in its domain's file
        "input_ids": pa.list_(pa.int32()),  # T
        "doc_starts": pa.list_(pa.int32()),  # ascending, first is 0
        "loss_mask": pa.list_(pa.uint8()),  # T; 1 where position t is trained to predict token t+1
    }
)
# A further column of rows that have some: the encoded images of each, as their files hold them, in
# the order of their places in its first document; its other documents have the same ones.
IMAGES = pa.field("images", pa.list_(pa.large_binary()))
DRAW = "draw"  # a further column, where a selector draws
STUDENT_IDS = "student_ids"  # a further column, where the student asks about ids of its own
# One more, where a teacher's modules learn from the student: its log-probabilities of those ids and
# of all others together.
STUDENT_LOGPROBS = "student_logprobs"
# Two more of rows that a model may have written, which are no part of what is asked: the version of
# the student's weights, and its log-probability of every token with loss, empty where it did not
# write.
VERSION, BEHAVIOUR = "version", "behaviour"
CHANGED = "changed"  # of each document the number under which it was changed, see `augmenting`
OWN = "own_logprob"  # beside them, where what it wrote was drawn from another law than its own


@dataclass(frozen=True, slots=True)
class Rows:
    """An Arrow table of `SCHEMA` with views; what a scoring request carries."""

    table: pa.Table

    @staticmethod
    def build(
        *,
        domains: Sequence[str],
        indices: Sequence[int],
        input_ids: Sequence[np.ndarray],
        doc_starts: Sequence[np.ndarray],
        loss_masks: Sequence[np.ndarray],
        images: Sequence[Sequence[bytes]] = (),
    ) -> "Rows":
        """Rows from ragged arrays, one entry of each argument per row; `images` are empty where no
        row has any."""
        columns = [
            pa.array(list(domains), pa.string()),
            pa.array(list(indices), pa.int64()),
            *(
                _ragged(arrays, kind)
                for arrays, kind in (
                    (input_ids, np.int32),
                    (doc_starts, np.int32),
                    (loss_masks, np.uint8),
                )
            ),
        ]
        rows = Rows(pa.Table.from_arrays(columns, schema=SCHEMA))
        return rows.with_images(images) if any(images) else rows

    def __len__(self) -> int:
        return self.table.num_rows

    def part(self, rows: slice) -> "Rows":
        """Some of the rows in their order, without a copy; it travels without the others."""
        first, stop, _ = rows.indices(len(self))
        return Rows(self.table.slice(first, stop - first))

    def where(self, is_chosen_R: Sequence[bool]) -> "Rows":
        """The rows that are chosen, in their order."""
        return Rows(self.table.filter(pa.array(is_chosen_R, pa.bool_())))

    def documents(self) -> "Rows":
        """Every document as a row of its own, in order, without what is asked beside the rows."""
        columns = (self.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        cut = [
            (row, np.split(ids, starts[1:]), np.split(mask, starts[1:]))
            for row, (ids, starts, mask) in enumerate(zip(*columns, strict=True))
        ]
        rows = [row for row, parts, _ in cut for _ in parts]
        domains, indices = self.domains(), self.table.column("index").to_pylist()
        images = self.images()
        return Rows.build(
            domains=[domains[row] for row in rows],
            indices=[indices[row] for row in rows],
            input_ids=[part for _, parts, _ in cut for part in parts],
            doc_starts=[np.zeros(1)] * len(rows),
            loss_masks=[part for _, _, parts in cut for part in parts],
            images=[images[row] for row in rows],
        )

    def column(self, name: str) -> list[np.ndarray]:
        """A ragged column as read-only arrays, one per row."""
        return [_numpy(scalar.values) for scalar in self.table.column(name)]

    def domains(self) -> list[str]:
        """The domain of each row."""
        return self.table.column("domain").to_pylist()

    def names(self) -> list[str]:
        """`domain/index` of each row, for messages."""
        pairs = zip(self.domains(), self.table.column("index").to_pylist(), strict=True)
        return [f"{domain}/{index}" for domain, index in pairs]

    def named(self) -> str:
        """The names, each once, as a message lists them."""
        return ", ".join(dict.fromkeys(self.names()))

    def num_loss_tokens(self) -> np.ndarray:
        """Positions with loss in each row, int64 [R]."""
        return np.array([int(mask.sum()) for mask in self.column("loss_mask")], dtype=np.int64)

    def with_images(self, images: Sequence[Sequence[bytes]]) -> "Rows":
        """The same rows with the images of each."""
        column = pa.array([list(own) for own in images], IMAGES.type)
        return Rows(self.table.append_column(IMAGES, column))

    def images(self) -> list[list[bytes]]:
        """The encoded images of each row, empty of one that has none."""
        if IMAGES.name not in self.table.column_names:
            return [[] for _ in range(len(self))]
        return self.table.column(IMAGES.name).to_pylist()

    def with_draws(self, draw_R: np.ndarray) -> "Rows":
        """The same rows with the number of the draw that is asked for, from 0: of what a selector
        draws at random for a row, each number names one outcome."""
        images = [IMAGES.name] if IMAGES.name in self.table.column_names else []
        kept = self.table.select([*SCHEMA.names, *images])
        return Rows(kept.append_column(DRAW, pa.array(draw_R, pa.int32())))

    def draws(self) -> np.ndarray:
        """The number of each row's draw [R], 0 where none is named."""
        if DRAW not in self.table.column_names:
            return np.zeros(len(self), np.int32)
        return self.table.column(DRAW).to_numpy()

    def with_student_ids(self, ids_NM: np.ndarray) -> "Rows":
        """The same rows with ids that the student asks about at every position with loss."""
        return self._with_matrix(STUDENT_IDS, np.asarray(ids_NM, np.int32))

    def student_ids(self) -> np.ndarray | None:
        """The ids that the student asks about, int32 [N, M]; None where it asks about none."""
        return self._matrix(STUDENT_IDS)

    def with_student_logprobs(self, ids_NM: np.ndarray, logprob_NX: np.ndarray) -> "Rows":
        """The same rows with the student's own distribution at every position with loss: the
        log-probabilities of ids, and of all others together, nats."""
        named = self.with_student_ids(ids_NM)
        return named._with_matrix(STUDENT_LOGPROBS, np.asarray(logprob_NX, np.float32))

    def student_logprobs(self) -> np.ndarray | None:
        """What `with_student_logprobs` put beside the ids, float32 [N, X]; None where nothing
        was."""
        return self._matrix(STUDENT_LOGPROBS)

    def _with_matrix(self, name: str, values_NX: np.ndarray) -> "Rows":
        """The same rows with a column of as many numbers for every position with loss."""
        flat = pa.array(np.ascontiguousarray(values_NX).reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, values_NX.shape[1])
        ends = np.concatenate([[0], self.num_loss_tokens().cumsum()]).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(ends), lists)
        return Rows(self.table.append_column(name, column))

    def _matrix(self, name: str) -> np.ndarray | None:
        """What `_with_matrix` appended; None where nothing was."""
        if name not in self.table.column_names:
            return None
        lists = self.table.column(name).combine_chunks().flatten()
        return _numpy(lists.flatten()).reshape(-1, lists.type.list_size)

    def with_versions(
        self,
        version_R: np.ndarray,
        behaviour: Sequence[np.ndarray],
        own: Sequence[np.ndarray] | None = None,
    ) -> "Rows":
        """The same rows with the version of the student's weights that wrote each, negative where
        another did (`shared.data.rollouts`), and the log-probabilities of what they wrote, nats:
        under the law that it was drawn from, and where that is another one, under the student's."""
        table = self.table.append_column(VERSION, pa.array(version_R, pa.int64()))
        table = table.append_column(BEHAVIOUR, _ragged(behaviour, np.float32))
        if own is not None:
            table = table.append_column(OWN, _ragged(own, np.float32))
        return Rows(table)

    def versions(self) -> np.ndarray | None:
        """The version of the student's weights that wrote each row, int64 [R], negative where
        another did; None where all are the data set's."""
        if VERSION not in self.table.column_names:
            return None
        return self.table.column(VERSION).to_numpy()

    def behaviour(self) -> np.ndarray:
        """Log-probabilities of what the student wrote under the law that it was drawn from, float32
        [N], 0 where it did not write; of rows with versions."""
        return self._of_written(BEHAVIOUR)

    def own_logprobs(self) -> np.ndarray:
        """The same under the student's own law."""
        return self._of_written(OWN if OWN in self.table.column_names else BEHAVIOUR)

    def _of_written(self, name: str) -> np.ndarray:
        pairs = zip(self.column(name), self.num_loss_tokens().tolist(), strict=True)
        parts = [own if len(own) else np.zeros(size, np.float32) for own, size in pairs]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def with_changed(self, numbers: Sequence[np.ndarray]) -> "Rows":
        """The same rows with the number of each document that was changed, 0 of others."""
        return Rows(self.table.append_column(CHANGED, _ragged(numbers, np.int64)))

    def changed(self) -> np.ndarray | None:
        """What `with_changed` put beside the rows, int64, a number for each document of all rows
        end to end; None where nothing was."""
        if CHANGED not in self.table.column_names:
            return None
        return np.concatenate([np.zeros(0, np.int64), *self.column(CHANGED)])

    def as_asked(self) -> "Rows":
        """The same rows as they are put to a teacher, without who wrote or changed them."""
        beside = (VERSION, BEHAVIOUR, OWN, CHANGED)
        names = [name for name in beside if name in self.table.column_names]
        return Rows(self.table.drop_columns(names)) if names else self

    def hashes(self) -> list[bytes]:
        """16 bytes per row over token ids, document starts, loss mask, the draw where it is not
        the first, and the student's ids and the images where there are some: the identity of the
        row, and of what is asked about it."""
        columns = (self.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        asked = [[np.array([draw])] if draw else [] for draw in self.draws()]
        if (ids_NM := self.student_ids()) is not None:
            by_row = np.split(ids_NM, self.num_loss_tokens().cumsum())[:-1]
            asked = [[*n, ids] for n, ids in zip(asked, by_row, strict=True)]
        seen = [[np.frombuffer(one, np.uint8) for one in own] for own in self.images()]
        asked = [[*more, *own] for more, own in zip(asked, seen, strict=True)]
        return [_digest((*parts, *more)) for *parts, more in zip(*columns, asked, strict=True)]


def _digest(parts: Sequence[np.ndarray]) -> bytes:
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(part).tobytes())
    return state.digest()


def _ragged(arrays: Sequence[np.ndarray], kind: type) -> pa.ListArray:
    lengths = np.array([len(a) for a in arrays], dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    flat = np.concatenate([np.zeros(0, kind), *(np.asarray(a, kind) for a in arrays)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind)))


def _numpy(values: pa.Array | None) -> np.ndarray:
    assert values is not None, "rows have no null lists"
    return values.to_numpy(zero_copy_only=True)
