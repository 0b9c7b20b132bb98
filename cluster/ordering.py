"""The order of each domain's rows, from simple to complex: scored, sorted, kept in the cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from cluster.difficulty import Asked, Measure, scores
from cluster.preparation import Prepared
from shared.curriculum import write_order
from shared.plan import PreparedDomain
from shared.row_cache import storage_errors


def ordered_domains(
    prepared: Prepared, measure: Measure, *, teacher: Asked, student: Asked | None
) -> tuple[PreparedDomain, ...]:
    """The run's domains with the orders that phases need; `student` only for `gap`.

    Raises ConfigError where scores are not stored and nobody is there to score, DataError where
    they are no numbers, StorageError where the cache is full.
    """
    found = scores(prepared, measure, teacher=teacher, student=student)
    folder = Path(prepared.config.paths.cache).expanduser() / "orders"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(
            replace(domain, order_path=str(_kept(folder, found[domain.name])))
            for domain in prepared.domains
        )


def _kept(folder: Path, difficulty_R: np.ndarray) -> Path:
    """The order in the cache, under a name that is a hash of what decides it."""
    path = folder / f"{xxhash.xxh3_128_hexdigest(difficulty_R.tobytes())}.npy"
    if not path.exists():
        write_order(path, difficulty_R)
    return path
