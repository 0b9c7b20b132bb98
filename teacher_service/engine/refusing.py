"""Rows that an engine can never read."""

from collections.abc import Sequence

import numpy as np

from shared.data.rows import Rows
from shared.errors import HandshakeError


def refuse_rows(rows: Rows, *, vocab: int, limit: int | None) -> None:
    """Raise HandshakeError for rows beyond a model's context, or with ids that it does not have."""
    refuse_ids(rows.names(), rows.column("input_ids"), vocab=vocab, limit=limit)


def refuse_ids(
    names: Sequence[str], all_ids: Sequence[np.ndarray], *, vocab: int, limit: int | None
) -> None:
    """The same of the token ids of what is read of rows of these names."""
    for name, ids in zip(names, all_ids, strict=True):
        if limit is not None and len(ids) > limit:
            raise HandshakeError(
                f"row {name} has {len(ids)} tokens and the teacher's context is "
                f"{limit}; lower data.context"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise HandshakeError(
                f"row {name} holds token id {ids.max()} and the teacher knows {vocab}; "
                "use a student that shares its tokenizer"
            )


def refuse_vocabulary(shared: int, *, vocab: int) -> None:
    """Raise HandshakeError where more ids are shared than a model has."""
    if shared > vocab:
        raise HandshakeError(
            f"{shared} ids are asked for and the teacher's head has {vocab}; "
            "use a student that shares its tokenizer"
        )
