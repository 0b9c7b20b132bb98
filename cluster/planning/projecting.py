"""Which projection a run's hidden states pass through: made once, kept in the cache.

N positions   D hidden width
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from cluster.planning.preparation import Prepared, shipped_width
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.run.plan import OpenReader
from shared.run.run_dir import write_atomically
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import HiddenAsk, Question
from shared.targets.reader import TargetReader, answered
from teacher_service.scoring.projection import (
    Projections,
    fit_pca,
    load_projections,
    random_projection,
    save_projections,
)


def passes_projection(prepared: Prepared) -> bool:
    """Whether hidden states travel, and narrower than they are."""
    layers = prepared.config.hidden_layers
    return bool(layers) and shipped_width(prepared) != prepared.facts.width


def projection_of(prepared: Prepared, fingerprint: dict[str, str], open_reader: OpenReader) -> str:
    """Digest of the projection, "" where states travel whole.

    A PCA is fit on the first rows of every domain, scored by the teacher; the same teacher, rows
    and width find the same matrices again. `open_reader` reads past any store, which these answers
    would only fill. Raises ConfigError for a cache that has lost them.
    """
    config = prepared.config
    if not passes_projection(prepared):
        return ""
    cache = config.paths.cache
    units: list[Rows] = []
    if config.targets.hidden.projection == "pca":
        units = [unit for d in prepared.domains for unit in _sample(config, d.train_path)]
    known = Path(cache) / "projections" / f"{_key(prepared, fingerprint, units)}.json"
    if known.exists():
        digest = json.loads(known.read_text())["projection"]
        load_projections(cache, digest)
        return digest
    digest = save_projections(cache, _made(prepared, units, open_reader))
    write_atomically(known, json.dumps({"projection": digest}))
    return digest


def _made(prepared: Prepared, units: list[Rows], open_reader: OpenReader) -> Projections:
    config, width = prepared.config, shipped_width(prepared)
    layers = config.hidden_layers
    if config.targets.hidden.projection == "random":
        return {
            layer: random_projection(prepared.facts.width, width, seed=layer) for layer in layers
        }
    print(f"fitting the projection of hidden states to {width} dimensions", flush=True)
    reader = open_reader(0)
    try:
        moments = _moments(reader, units, prepared)
    finally:
        reader.close()
    return {layer: fit_pca(moments[layer], width) for layer in layers}


def _moments(reader: TargetReader, units: list[Rows], prepared: Prepared) -> dict[int, np.ndarray]:
    """Sum of h h^T over the sample for each layer, float64 [D, D]."""
    layers, size = prepared.config.hidden_layers, prepared.facts.width
    question = Question(
        LikeliestIds(1, prepared.facts.shared_vocab),
        hidden=HiddenAsk(layers, "fp32"),
        prefix=prepared.showing.prompts,
    )
    moments = {layer: np.zeros((size, size)) for layer in layers}
    for _, answer in answered(reader, units, question, ahead=0):
        for layer, states_ND in answer.arrays().hidden_ND.items():
            wide_ND = states_ND.astype(np.float64)
            moments[layer] += wide_ND.T @ wide_ND
    return moments


def _sample(config: Config, path: str) -> Iterator[Rows]:
    most = config.targets.hidden.calibration_rows
    return RowStore.open(path).units(config.batch.micro_batch, most=most)


def _key(prepared: Prepared, fingerprint: dict[str, str], units: list[Rows]) -> str:
    config = prepared.config
    payload = config.targets.hidden
    decided = [fingerprint, config.hidden_layers, payload.width, payload.projection]
    state = xxhash.xxh3_128(json.dumps(decided, sort_keys=True).encode())
    state.update(prepared.showing.prompts.encode())
    for unit in units:
        for digest in unit.hashes():
            state.update(digest)
    return state.hexdigest()
