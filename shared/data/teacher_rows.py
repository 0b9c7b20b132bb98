"""Rows that a teacher reads in place of the student's, where it has a file of its own.

Row i of a domain's teacher file belongs to row i of its student file. It may hold other tokens,
other documents and other positions with loss, so that entry n of an answer is no position of the
student's: a task pairs them (`student_trainer.tasks.task.Pairing`).

R rows of a unit
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import DRAW, Rows
from shared.errors import DataError
from shared.text.sources import Split


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The teacher's rows of every domain of a run, of training or of validation."""

    stores: Mapping[str, RowStore]  # by domain

    @staticmethod
    def open(domains: Sequence[PreparedDomain], split: Split) -> "TeacherRows | None":
        """Map the teacher's files; None where it reads the student's rows. Raises DataError for a
        damaged file, and for one with another number of rows than the student's."""
        stores = {}
        for domain in domains:
            own, students = domain.teacher_paths, domain.paths
            if own is not None:
                stores[domain.name] = _opened(domain.name, own[split], students[split])
        assert len(stores) in (0, len(domains)), "all domains have rows of the teacher's, or none"
        return TeacherRows(stores) if stores else None

    def of(self, rows: Rows) -> Rows:
        """What the teacher reads in place of a unit, row by row, with the same draws asked for."""
        names = list(self.stores)
        domain_R = [names.index(name) for name in rows.domains()]
        index_R = rows.table.column("index").to_numpy()
        found = take_rows(list(self.stores.values()), domain_R, index_R)
        is_drawn = DRAW in rows.table.column_names
        return found.with_draws(np.asarray(rows.draws())) if is_drawn else found


def _opened(domain: str, path: str, students: str) -> RowStore:
    store, expected = RowStore.open(path), len(RowStore.open(students))
    if len(store) != expected:
        raise DataError(
            f"{path} has {len(store):,} rows for the teacher of domain {domain}, whose student has "
            f"{expected:,}; remove it and start again, it is built anew"
        )
    return store
