"""Run a student's decoder on a batch, in as many forward passes as its lines may share.

B lines   T tokens   P forward passes   b, t lines and tokens of one pass   E experts
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shared.model_parts import takes


def decode(
    decoder: nn.Module, batch: Mapping[str, Tensor], *, options: Mapping[str, bool] | None = None
) -> Any:
    """The decoder's output on `input_ids_BT` at `position_ids_BT`, with `options` such as
    `output_hidden_states` set. A batch of several passes, which has `pass_B` and `width_P`, gives
    `last_hidden_state` and what the options name, zero where no pass has been."""
    options = dict(options or {})
    ids_BT, positions_BT = batch["input_ids_BT"], batch["position_ids_BT"]
    if "pass_B" not in batch:
        return _output(decoder, ids_BT, positions_BT, options)
    names = ("last_hidden_state", *(name.removeprefix("output_") for name in options))
    found: dict[str, Any] = {}
    for number, width in enumerate(batch["width_P"].tolist()):
        lines = torch.nonzero(batch["pass_B"] == number).squeeze(1)
        output = _output(decoder, ids_BT[lines, :width], positions_BT[lines, :width], options)
        for name in names:
            found[name] = _placed(output[name], lines, width, found.get(name), ids_BT.shape)
    return SimpleNamespace(**found)


def _output(
    decoder: nn.Module, ids_BT: Tensor, positions_BT: Tensor, options: Mapping[str, bool]
) -> Any:
    positions = {"position_ids": positions_BT} if takes(decoder, "position_ids") else {}
    return decoder(input_ids=ids_BT, **positions, use_cache=False, **options)


def _placed(value: Any, lines: Tensor, width: int, whole: Any, shape: torch.Size) -> Any:
    """A pass's tensor [b, t, ...] or [b * t, E], or several of them, put where its lines are."""
    if isinstance(value, tuple | list):
        before = whole if whole is not None else [None] * len(value)
        pairs = zip(value, before, strict=True)
        return tuple(_placed(each, lines, width, one, shape) for each, one in pairs)
    is_flat = value.shape[0] == len(lines) * width and value.dim() == 2
    value = value.unflatten(0, (len(lines), width)) if is_flat else value
    rest = value.shape[2:]
    whole = value.new_zeros(*shape, *rest) if whole is None else whole.reshape(*shape, *rest)
    placed = whole.index_put((lines[:, None], torch.arange(width, device=lines.device)), value)
    return placed.flatten(0, 1) if is_flat else placed
