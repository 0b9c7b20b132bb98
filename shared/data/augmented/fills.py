"""Masked tokens of training rows, and what a teacher puts in their places.

Which tokens of a document are masked is a pure function of the seed, the row, its document and the
copy, and so is the number by which one of the teacher's likeliest ids is drawn. What was drawn lies
on disk, so that every epoch, and a run that is gone on with, has the same.

T tokens of a document   M its masked ones   K ids that the teacher names at a position
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from shared.errors import DataError

COPIES, DIGEST = b"tutelage.copies", b"tutelage.digest"
PLACES, IDS = "places", "ids"

_Arrays = Sequence[np.ndarray]


@dataclass(frozen=True, slots=True)
class Fills:
    """What a teacher put into copies of every training row of a domain: line `C row + copy` of a
    mapped table has places in the row and the ids that stand there."""

    table: pa.Table
    copies: int  # C
    digest: str

    @staticmethod
    def open(path: str | Path) -> "Fills":
        """Map a file of `write`. Raises DataError where it is missing or damaged."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            facts = table.schema.metadata or {}
            found = Fills(table, int(facts[COPIES]), facts[DIGEST].decode())
            is_whole = _digest(table) == found.digest
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(
                f"{path} holds what a teacher filled masks with, and cannot be read "
                f"({str(error).splitlines()[0]}); run the same command again, it is asked anew"
            ) from None
        if not is_whole:
            raise DataError(
                f"{path} holds what a teacher filled masks with, and is damaged; run the same "
                "command again, it is asked anew"
            )
        return found

    def put(self, ids: np.ndarray, *, row: int, epoch: int) -> np.ndarray:
        """The token ids of a row with the fills of an epoch's copy in their places, int32."""
        line = self.table.slice(self.copies * row + epoch % self.copies, 1)
        places, fills = (line.column(name)[0].values.to_numpy() for name in (PLACES, IDS))
        filled = ids.copy()
        filled[places] = fills
        return filled

    @property
    def num_fills(self) -> int:
        """Tokens filled, over all rows and copies."""
        return sum(len(chunk.values) for chunk in self.table.column(IDS).chunks)


def write(path: Path, *, copies: int, places: _Arrays, ids: _Arrays) -> None:
    """Write what `Fills` reads, whole or not at all, a line for each copy of each row. Raises
    OSError."""
    kind, draft = pa.list_(pa.int32()), path.with_name(f".{path.name}.draft")
    table = pa.table({PLACES: pa.array(places, kind), IDS: pa.array(ids, kind)})
    table = table.replace_schema_metadata({COPIES: str(copies), DIGEST: _digest(table)})
    try:
        with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Masked:
    """A document with masks."""

    ids_T: np.ndarray  # int32, as it was
    place_M: np.ndarray  # int64, ascending
    chance_M: np.ndarray  # float64, from 0 to 1, each draws the fill of its mask

    @staticmethod
    def of(
        ids_T: np.ndarray,
        random: np.random.Generator,
        *,
        share: float,
        special_ids: Collection[int],
        first: int = 0,
    ) -> "Masked":
        """Mask each token that may be changed, from place `first` on, with the probability
        `share`."""
        is_masked_T = changeable(ids_T, special_ids) & (random.random(len(ids_T)) < share)
        is_masked_T[:first] = False
        place_M = np.flatnonzero(is_masked_T)
        return Masked(ids_T, place_M, random.random(len(place_M)))


def generator_of(seed: int, row: str, document: int, copy: int) -> np.random.Generator:
    """The source of chance of a copy of a document, the row being `domain/index`."""
    name = f"{seed}/{row}/{document}/copy {copy}"
    return np.random.default_rng(xxhash.xxh64_intdigest(name.encode()))


def drawn(
    ids_MK: np.ndarray,
    logprobs_MK: np.ndarray,
    *,
    own_M: np.ndarray,
    chance_M: np.ndarray,
    most: int,
    special_ids: Collection[int],
) -> np.ndarray:
    """One of the teacher's ids for each mask, int64 [M], -1 where it names no other.

    Of the ids that are neither the token's own nor special the `most` likeliest are drawn from, by
    their probabilities among themselves, by inversion at `chance`.
    """
    may_MK = ordinary(ids_MK, special_ids) & (ids_MK != own_M[:, None])
    masked_MK = np.where(may_MK, logprobs_MK.astype(np.float64), -np.inf)
    order_MK = np.argsort(-masked_MK, axis=1, kind="stable")[:, :most]
    kept_MK = np.take_along_axis(masked_MK, order_MK, axis=1)
    with np.errstate(invalid="ignore"):  # of a mask without any
        weight_MK = np.exp(kept_MK - kept_MK[:, :1])
    total_MK = np.nancumsum(weight_MK, axis=1)
    at_M = (chance_M[:, None] * total_MK[:, -1:] >= total_MK).sum(axis=1)
    at_M = np.minimum(at_M, np.maximum(np.isfinite(kept_MK).sum(axis=1) - 1, 0))
    found_M = np.take_along_axis(np.take_along_axis(ids_MK, order_MK, 1), at_M[:, None], 1)[:, 0]
    return np.where(may_MK.any(axis=1), found_M, -1)


def changeable(ids_T: np.ndarray, special_ids: Collection[int]) -> np.ndarray:
    """Which tokens of a document may become others, bool [T]: all but its first and last and
    special ones."""
    may_T = ordinary(ids_T, special_ids)
    may_T[:1] = may_T[-1:] = False
    return may_T


def ordinary(ids: np.ndarray, special_ids: Collection[int]) -> np.ndarray:
    """Which ids are no special ones, bool of their shape."""
    return ~np.isin(ids, np.fromiter(special_ids, np.int64, len(special_ids)))


def _digest(table: pa.Table) -> str:
    """A hash of both columns."""
    state = xxhash.xxh3_128()
    for name in (PLACES, IDS):
        column = table.column(name).combine_chunks()
        state.update(column.value_lengths().to_numpy().tobytes())
        state.update(column.flatten().to_numpy().tobytes())
    return state.hexdigest()
