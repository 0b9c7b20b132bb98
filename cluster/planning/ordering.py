"""The order of each domain's rows, from simple to complex: scored, sorted, kept in the cache."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from cluster.planning.difficulty import Measure, ScoringModel, scores
from cluster.planning.preparation import Prepared
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import storage_errors
from shared.data.row_store import RowStore
from shared.mixture.curriculum import parts_of, write_order


def ordered_domains(
    prepared: Prepared,
    measure: Measure,
    *,
    parts: int,
    teachers: Mapping[str, ScoringModel],
    student: ScoringModel | None,
) -> tuple[PreparedDomain, ...]:
    """The run's domains with the orders that phases of so many parts need; says where they are
    cut. `student` is needed for `gap` alone.

    Raises ConfigError where scores are not stored and nobody is there to score, DataError where
    they are no numbers, StorageError where the cache is full.
    """
    found = scores(prepared, measure, teachers=teachers, student=student)
    folder = Path(prepared.config.paths.cache).expanduser() / "orders"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        domains = tuple(
            replace(domain, order_path=str(_kept(folder, found[domain.name])))
            for domain in prepared.domains
        )
    print(f"phases by {measure}, cut at: {cut_points(domains, found, parts=parts)}", flush=True)
    return domains


def cut_points(
    domains: tuple[PreparedDomain, ...], difficulty: Mapping[str, np.ndarray], *, parts: int
) -> str:
    """The difficulty at which each part but the first begins, by domain, for people."""
    said = []
    for domain in domains:
        assert domain.order_path is not None, "the rows are in order by now"
        store, path = RowStore.open(domain.train_path), Path(domain.order_path)
        cut = parts_of(domain.name, store=store, order_path=path, parts=parts)
        assert cut.order_R is not None, "parts come from an order"
        firsts = difficulty[domain.name][cut.order_R[list(cut.first_P[1:])]]
        said.append(f"{domain.name} {', '.join(f'{first:.3g}' for first in firsts)}")
    return "; ".join(said)


def _kept(folder: Path, difficulty_R: np.ndarray) -> Path:
    """The order in the cache, under a name that is a hash of what decides it."""
    path = folder / f"{xxhash.xxh3_128_hexdigest(difficulty_R.tobytes())}.npy"
    if not path.exists():
        write_order(path, difficulty_R)
    return path
