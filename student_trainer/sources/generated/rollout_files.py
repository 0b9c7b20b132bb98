"""What the student wrote for a step, on disk before it is learnt, so that a resumed run learns the
same although the weights that wrote it are gone.

    rollouts/
      step-000012.rank-0.arrow    the rows of a rank for the step with index 12, from 0

R rows of a rank for a step
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shared.data.rows import Rows
from shared.errors import CheckpointError, not_kept, reason_of
from student_trainer.sources.generated.arrow_files import write_table

PLACE = "place"  # a further column: where in its step a row stands
METADATA_KEY = b"tutelage.rollouts"
_NAME = re.compile(r"step-(\d{6,})\.rank-\d+\.arrow")


@dataclass(frozen=True, slots=True)
class RolloutFiles:
    """The rollouts of a run; every rank writes its own and may read those of all."""

    folder: Path

    def keep(self, step: int, rank: int, rows: Rows, *, place_R: np.ndarray, version: int) -> None:
        """Write a rank's rows of a step, whole or not at all. Raises StorageError."""
        table = rows.table.append_column(PLACE, pa.array(place_R, pa.int64()))
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps({"version": version})})
        path = self.folder / f"step-{step:06d}.rank-{rank}.arrow"
        try:
            write_table(path, table)
        except OSError as error:
            wrote = f"what the student wrote for step {step + 1}"
            raise not_kept(wrote, self.folder, error) from None

    def read(
        self,
        step: int,
        names: Sequence[str] | None,
        *,
        place_R: np.ndarray,
        version: int | None = None,
    ) -> Rows:
        """The rows of a step at these places, whichever ranks wrote them; of these names, and by
        this version, where they are given.

        Raises CheckpointError where they are not there, or are others.
        """
        tables = []
        for path in sorted(self.folder.glob(f"step-{step:06d}.rank-*.arrow")):
            try:
                with pa.memory_map(str(path)) as source:
                    tables.append(pa.ipc.open_file(source).read_all())
            except (OSError, pa.ArrowException) as error:
                raise _lost(step, f"{path.name} cannot be read ({reason_of(error)})") from None
        written = [_version(table) for table in tables]
        if version is not None and any(found != version for found in written):
            raise _lost(step, f"weights {written} wrote them, and not those of step {version}")
        whole = pa.concat_tables(tables).combine_chunks() if tables else None
        places = [] if whole is None else whole.column(PLACE).to_pylist()
        lines = {place: line for line, place in enumerate(places)}
        wanted = [lines.get(place) for place in place_R.tolist()]
        if whole is None:
            raise _lost(
                step,
                f"{len(wanted)} of {len(wanted)} are not in {self.folder} (where weights of the "
                "mixture were not decided yet, a run that has taken all its steps leaves none for "
                "further ones)",
            )
        if None in wanted:
            raise _lost(step, f"{wanted.count(None)} of {len(wanted)} are not in {self.folder}")
        rows = Rows(whole.take(pa.array(wanted, pa.int64())).drop_columns([PLACE]))
        rows = Rows(rows.table.replace_schema_metadata(None))
        if names is not None and rows.names() != list(names):
            raise _lost(step, f"{self.folder} holds other rows")
        return rows

    def forget(self, *, before: int = 0, since: int | None = None) -> None:
        """Remove those of steps before one, and since another one."""
        for path in self.folder.glob("*.arrow"):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            step = int(match[1])
            if step < before or (since is not None and step >= since):
                path.unlink(missing_ok=True)


def _version(table: pa.Table) -> int:
    return json.loads((table.schema.metadata or {})[METADATA_KEY])["version"]


def _lost(step: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is gone on from with what the student wrote for step {step + 1} before "
        f"it, but {why}; put the folder back, or start over with --fresh"
    )
