"""Columns of an answer: what each holds of a position, and the numbers read from them.

A row of the Table is a row of the unit; a column's lists hold its entries position by position.
Most columns have one entry of a position; a column of some of the kept ids' numbers has as many as
the bits of another column count.

N positions with loss, all rows end to end   K numbers of an entry   W bytes of the bits
R rows
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shared.data.rows import Rows
from shared.errors import TeacherError

# bfloat16 travels as its bits.
STATE_TYPES = {"bf16": pa.uint16(), "fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.int8()}


@dataclass(frozen=True, slots=True)
class Column:
    """What a column has of a position."""

    type: pa.DataType  # of an entry: a number, or a list of a fixed size
    holds: str  # what its bytes are counted as where a run says what a token costs
    counted_by: str = ""  # column of bits, one of each entry that is there; "": one entry each
    typical: int = 1  # entries of a position; about, where bits count them

    @property
    def num_bytes(self) -> int:
        """Of a position."""
        return self.typical * _size(self.type)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a Table as numbers, all positions end to end; views where that is possible."""

    table: pa.Table

    def vector(self, name: str) -> np.ndarray:
        """A column of numbers, [N] or as many as bits count."""
        return self._flat(name).to_numpy()

    def matrix(self, name: str) -> np.ndarray:
        """A column of lists of a fixed size [N, K]."""
        lists = self._flat(name)
        return lists.flatten().to_numpy(zero_copy_only=True).reshape(-1, lists.type.list_size)

    @property
    def num_positions(self) -> int:
        """N."""
        return len(self._flat("label_logprob"))

    def refuse_other_types(self, expected: Mapping[str, Column]) -> None:
        """Raise TeacherError where a column is missing or of another type."""
        schema = self.table.schema
        for name, column in expected.items():
            place, wanted = schema.get_field_index(name), pa.list_(column.type)
            if place < 0 or schema.field(place).type != wanted:
                found = "is missing" if place < 0 else f"holds {schema.field(place).type}"
                raise TeacherError(
                    f"column {name} of an answer {found}, it must hold {wanted}; "
                    "the answer is damaged or of another version"
                )

    def refuse_other_lengths(self, expected: Mapping[str, Column], rows: Rows) -> None:
        """Raise TeacherError where a column does not have the entries of the rows' positions."""
        num_R = rows.num_loss_tokens()
        for name in self.table.schema.names[1:]:
            length_R = num_R
            if name in expected and (bits := expected[name].counted_by):
                ends = np.concatenate([[0], num_marked(self.matrix(bits)).cumsum()])
                length_R = np.diff(ends[np.minimum(offsets(num_R), len(ends) - 1)])
            found = self.table.column(name).combine_chunks().offsets.to_numpy()
            if not np.array_equal(np.diff(found), length_R):
                raise TeacherError(
                    f"column {name} of an answer does not have an entry for every token with loss "
                    f"of rows {', '.join(rows.names())}; the answer is damaged"
                )

    def _flat(self, name: str) -> pa.Array:
        return self.table.column(name).combine_chunks().flatten()


def list_arrays(
    columns: Mapping[str, np.ndarray], expected: Mapping[str, Column], num_R: np.ndarray
) -> dict[str, pa.ListArray]:
    """Numbers of all positions as lists of each row."""
    ends, lists = offsets(num_R), {}
    for name, column in columns.items():
        entries = ends
        if bits := expected[name].counted_by:
            entries = offsets(num_marked(columns[bits]))[ends]
        lists[name] = pa.ListArray.from_arrays(entries, entries_of(column))
    return lists


def entries_of(column: np.ndarray) -> pa.Array:
    """Numbers [N], or lists of a fixed size [N, K]."""
    if column.ndim == 1:
        return pa.array(column)
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where lists of these lengths begin, and the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def num_marked(bits_NW: np.ndarray) -> np.ndarray:
    """Bits that are set at each position [N]."""
    return np.bitwise_count(bits_NW).sum(axis=1, dtype=np.int64)


def _size(type_: pa.DataType) -> int:
    """Bytes of an entry."""
    if pa.types.is_fixed_size_list(type_):
        return type_.list_size * _size(type_.value_type)
    return type_.bit_width // 8
