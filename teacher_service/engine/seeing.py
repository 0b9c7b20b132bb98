"""A teacher that sees: rows with images, each on a line of its own, their pixels beside the ids.

N positions with loss   V head rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.data.layout import Layout, lay_out
from shared.data.rows import Rows
from shared.errors import ConfigError, TutelageError
from shared.images.processor import ImageProcessor, blank_image, image_processor
from shared.loading import first_line
from shared.model_parts import read_by, seeing_part_of, token_types_of, tolerance
from teacher_service.engine.model_parts import Decoder
from teacher_service.scoring.scoring import ScoringHead


@dataclass(frozen=True)
class Sight:
    """The part of a model that takes ids and pixels, and what makes pixels of images."""

    decoder: Decoder
    processor: ImageProcessor

    def hidden(self, rows: Rows, layers: Sequence[int]) -> tuple[Layout, dict[int, Tensor]]:
        """A unit's batch, and hidden states [N, D] by layer, in one forward pass. A line has the
        positions that the model gives it, as one alone has."""
        layout = lay_out(rows, packed=False)
        pixels = self.processor.pixels(rows.documents().images())
        states = self.decoder.hidden(
            torch.from_numpy(layout.input_ids_BT),
            torch.from_numpy(layout.position_ids_BT),
            torch.from_numpy(layout.loss_index_N),
            layers,
            beside=as_tensors(pixels, self.decoder.module),
        )
        return layout, states


def find_sight(
    model: nn.Module,
    decoder: Decoder,
    head: ScoringHead,
    *,
    name: str,
    revision: str | None,
    trusted: bool,
) -> Sight | str:
    """What sees in a model, proven on an image; where nothing does, why, for a sentence."""
    part = seeing_part_of(model)
    if part is None:
        return "it is a model of text alone"
    if (told := token_types_of(part)) is not None:
        return f"it is told by {told} which tokens are images, which nobody here does"
    try:
        processor = image_processor(name, revision, trusted=trusted)
        seeing = replace(decoder, module=part, layers=None, takes_positions=False)
        sight = Sight(seeing, processor)
        if not _is_exact(model, head, sight):
            return "its logits with an image are not its head times its last hidden state"
    except (TutelageError, torch.OutOfMemoryError) as error:
        if isinstance(error, ConfigError):
            return str(error)
        raise
    except Exception as error:  # of the model's own code
        return f"it cannot read an image: {first_line(error)}"
    return sight


def as_tensors(pixels: Mapping[str, Any], module: nn.Module) -> dict[str, Tensor]:
    """What a module reads of what a processor gives, in the module's dtype."""
    return read_by(module, {name: torch.tensor(array) for name, array in pixels.items()})


@torch.inference_mode()
def _is_exact(model: nn.Module, head: ScoringHead, sight: Sight) -> bool:
    """Whether the head makes the model's logits of what the seeing part gives for an image."""
    encoded, ids_1T = blank_image(), torch.from_numpy(sight.processor.blank_ids()).long()[None]
    beside = as_tensors(sight.processor.pixels([[encoded]]), sight.decoder.module)
    device, last = sight.decoder.device, sight.decoder.num_layers
    positions_1T, index_N = torch.arange(ids_1T.shape[1])[None], torch.arange(ids_1T.shape[1])
    found_ND = sight.decoder.hidden(ids_1T, positions_1T, index_N, (), beside=beside)[last]
    moved = {name: tensor.to(device) for name, tensor in beside.items()}
    expected_NV = model(input_ids=ids_1T.to(device), use_cache=False, **moved).logits[0].float()
    found_NV = head.logits(found_ND)
    if found_NV.shape != expected_NV.shape:
        return False
    off = (found_NV - expected_NV.to(found_NV.device)).abs().max()
    return bool(off <= tolerance(head.weight_VD.dtype) * expected_NV.abs().max())
