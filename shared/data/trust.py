"""What a unit of a model is trusted for, found by running the same rows alone and together.

Teacher and student are probed alike, at the context and in the dtype they run with, through the
very function they run with. The probe is one line of several documents and one shorter line: what
gives every document the states that it has alone is trusted, the first of `WAYS` that does.

K documents   L tokens of one   D hidden width
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared.data.layout import Layout, lay_out
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.errors import ConfigError, TutelageError
from shared.loading import first_line

Run = Callable[[Layout], np.ndarray]  # hidden states [N, D] at the positions with loss

LEAST_TOKENS = 256  # of the packed line: what leaks shows against rounding
DOCUMENTS = 6  # on the packed line, where the context has room for them
SHORTEST = 4  # tokens of a document
FIRST_TOKENS = 8  # of a document, where states carried over show most
WAYS = (
    (True, TOGETHER),
    (False, TOGETHER),
    (False, Passes(padded=False)),
    (False, Passes(padded=False, shared=False)),
)

# Relative to the norm of a state. What 16 bits round away differs from model to model, so there the
# first document of a line, which no other can reach, says how much it is.
TOLERANCE = {"float32": 1e-4}
ROUNDING = 2.0**-8  # of bfloat16
ROUNDINGS = 3.0  # times the first document's
COARSE_TOLERANCE = 5e-2


def tolerance(dtype: str) -> float:
    """What a state may be off on the whole, relative to its norm."""
    return TOLERANCE.get(dtype, COARSE_TOLERANCE)


@dataclass(frozen=True, slots=True)
class Trust:
    """How a model's units are run."""

    packed: bool  # whether documents that lie on one line leave each other alone
    passes: Passes = TOGETHER

    def in_words(self) -> str:
        """What is not done with units of this model; empty where everything is."""
        unpacked = "" if self.packed else "every document on a line of its own"
        return "; ".join(filter(None, (unpacked, self.passes.in_words())))


def probe(
    run: Run,
    *,
    name: str,
    vocab: int,
    context: int,
    dtype: str,
    takes_positions: bool,
    limit: int | None = None,
    switches: Iterable[int] = (),
    reach: int | None = None,
) -> Trust:
    """Find what units of rows of up to `context` tokens are trusted for.

    A model without position ids never packs. `limit` is how many tokens it reads at most,
    `switches` are those of `passes.switches_of`, `reach` is that of `reach_of`. Raises ConfigError
    for a model that cannot read such rows, or gives one two answers.
    """
    length = max(context, min(LEAST_TOKENS, limit or LEAST_TOKENS))
    rows, switches = _rows(vocab, length), tuple(switches)
    documents = rows.documents()
    each = (documents.part(slice(n, n + 1)) for n in range(len(documents)))
    try:
        alone = [_states(run, document, *WAYS[-1]) for document in each]
    except Exception as error:  # of the model's own code
        if isinstance(error, TutelageError) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise ConfigError(
            f"{name} cannot read rows of {length} tokens: {first_line(error)}; set data.context to "
            "what it reads, or use another model"
        ) from error
    for packed, passes in WAYS:
        if packed and not (takes_positions and _reaches_all(reach, length, dtype)):
            continue
        apart = replace(passes, switches=switches if passes.shared else ())
        try:
            together = _states(run, rows, packed, apart)
        except (IndexError, RuntimeError):  # padding beyond the model's last position, or memory
            if not passes.shared:
                raise
            continue
        found = np.split(together, np.cumsum([len(states) for states in alone])[:-1])
        errors = [_errors(*pair) for pair in zip(found, alone, strict=True)]
        if _is_sound(errors, dtype, packed=packed):
            return Trust(packed, apart.within(context))
    raise ConfigError(
        f"{name} gives the same row another answer the second time, so nothing can be learnt from "
        "it or taught to it; use another model"
    )


def reach_of(config: Any) -> int | None:
    """How many keys a token attends to, where a model picks them among all of a line by scores;
    None where it picks none. Some pick blocks of keys."""
    block = getattr(config, "index_block_size", None)
    per_pick = {"index_topk": 1, "indexer_budget": 1, "index_topk_blocks": block}
    found = [(getattr(config, name, None), size) for name, size in per_pick.items()]
    return min((picks * size for picks, size in found if picks and size), default=None)


def _reaches_all(reach: int | None, length: int, dtype: str) -> bool:
    """Whether no key of a line is picked in place of another, or picks are told from rounding: in
    16 bits they change by rounding too."""
    return reach is None or reach >= length or dtype in TOLERANCE


def _rows(vocab: int, context: int) -> Rows:
    """A row of several documents of one length, and a shorter one of a single document."""
    count = max(2, min(DOCUMENTS, context // SHORTEST))
    length = max(2, context // count)
    ids = np.random.default_rng(0).integers(min(3, vocab - 1), vocab, count * length + context)
    starts = np.arange(0, count * length, length)
    mask = np.ones(count * length, np.uint8)
    mask[starts + length - 1] = 0
    single = max(2, 2 * context // 3)
    return Rows.build(
        domains=["probe"] * 2,
        indices=range(2),
        input_ids=[ids[: count * length], ids[-single:]],
        doc_starts=[starts, np.zeros(1)],
        loss_masks=[mask, np.append(np.ones(single - 1), 0)],
    )


def _states(run: Run, rows: Rows, packed: bool, passes: Passes) -> np.ndarray:
    return run(lay_out(rows, packed=packed, passes=passes)).astype(np.float32)


def _errors(found_LD: np.ndarray, expected_LD: np.ndarray) -> np.ndarray:
    """How far each state is from the right one, relative to it [L]; infinite where either is."""
    with np.errstate(all="ignore"):
        size_L = np.linalg.norm(expected_LD, axis=1)
        off_L = np.linalg.norm(found_LD - expected_LD, axis=1) / np.maximum(size_L, 1e-30)
    return np.where(np.isfinite(off_L), off_L, np.inf)


def _is_sound(errors: list[np.ndarray], dtype: str, *, packed: bool) -> bool:
    """Whether documents kept their states: on the whole, and those that follow another on a line by
    their median token, which a router that flips by rounding cannot move, and by their first."""
    if max(map(_rms, errors)) > tolerance(dtype):
        return False
    if not packed or dtype in TOLERANCE:
        return True
    first, *others, _ = errors
    early = _rms(np.median([document[:FIRST_TOKENS] for document in others], axis=0))
    late = max(float(np.median(document)) for document in others)
    bounds = (max(ROUNDING, ROUNDINGS * _rms(e)) for e in (first[:FIRST_TOKENS], first))
    return all(error <= bound for error, bound in zip((early, late), bounds, strict=True))


def _rms(errors_L: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors_L).mean()))
