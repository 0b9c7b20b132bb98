"""Find the decoder and the head inside any causal language model, and prove that they are it.

B lines   T tokens   N positions   D hidden width
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from teacher_service.scoring.scoring import ScoringHead

TOLERANCE = {torch.float32: 1e-4}  # relative to the largest logit; coarser types below
COARSE_TOLERANCE = 2e-2


@dataclass(slots=True)
class Decoder:
    """The model without its head; keeps only the hidden states it is asked for."""

    module: nn.Module
    layers: nn.ModuleList | None  # None: the model's own list of all hidden states is used
    num_layers: int
    takes_positions: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.inference_mode()
    def hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, index_N: Tensor, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Hidden states [N, D] of the chosen layers and the last one, at the chosen positions.

        Layer 0 is the embedding's output, layer `num_layers` the last one after the final norm.
        """
        kept: dict[int, Tensor] = {}
        inner = [layer for layer in layers if layer < self.num_layers]
        call = {"input_ids": input_ids_BT.to(self.device), "use_cache": False}
        if self.takes_positions:
            call["position_ids"] = position_ids_BT.to(self.device)
        if self.layers is None and inner:
            output = self.module(**call, output_hidden_states=True)
            kept |= {layer: _rows(output.hidden_states[layer], index_N) for layer in inner}
        else:
            with _captured(self.layers, inner, index_N, kept):
                output = self.module(**call)
        kept[self.num_layers] = _rows(output.last_hidden_state, index_N)
        return kept


def find_decoder(model: nn.Module, device: torch.device) -> Decoder:
    """The decoder of a causal model; hooks on its layers are used where they prove exact."""
    module = model.get_decoder()  # type: ignore[operator]
    num_layers = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr]
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    decoder = Decoder(module, lists[0] if lists else None, num_layers, takes_positions, device)
    if decoder.layers is not None and not _hooks_are_exact(decoder, len_vocab(model)):
        decoder.layers = None
    return decoder


def find_head(model: nn.Module) -> ScoringHead | None:
    """The head as plain tensors, or None where it is more than one matrix product."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    config = model.config.get_text_config()  # type: ignore[union-attr]
    scale = _number(config, "logit_scale") * _number(config, "lm_head_multiplier")
    cap = getattr(config, "final_logit_softcapping", None)
    return ScoringHead(
        weight.detach(),
        getattr(module, "bias", None),
        logit_scale=scale / _number(config, "logits_scaling"),
        soft_cap=float(cap) if cap else None,
    )


@torch.inference_mode()
def head_is_exact(model: nn.Module, decoder: Decoder, head: ScoringHead) -> bool:
    """Whether head(decoder(ids)) gives the model's own logits on a probe."""
    ids_BT, positions_BT = _probe(len(head.weight_VD))
    index_N = torch.arange(ids_BT.numel())
    hidden_ND = decoder.hidden(ids_BT, positions_BT, index_N, ())[decoder.num_layers]
    output = model(input_ids=ids_BT.to(decoder.device), use_cache=False)
    expected_NV = output.logits.float().flatten(0, 1)
    found_NV = head.logits(hidden_ND).to(expected_NV.device)
    if found_NV.shape != expected_NV.shape:
        return False
    error = (found_NV - expected_NV).abs().max() / expected_NV.abs().max()
    return bool(error <= TOLERANCE.get(head.weight_VD.dtype, COARSE_TOLERANCE))


def len_vocab(model: nn.Module) -> int:
    """Rows of the embedding, which bound the token ids a model accepts."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding is None:
        raise ConfigError(f"{type(model).__name__} has no embedding; use a causal language model")
    return int(embedding.weight.shape[0])


def _hooks_are_exact(decoder: Decoder, vocab_rows: int) -> bool:
    ids_BT, positions_BT = _probe(vocab_rows)
    index_N = torch.arange(ids_BT.numel())
    layers = range(decoder.num_layers + 1)
    hooked = decoder.hidden(ids_BT, positions_BT, index_N, layers)
    plain = Decoder(
        decoder.module, None, decoder.num_layers, decoder.takes_positions, decoder.device
    ).hidden(ids_BT, positions_BT, index_N, layers)
    return hooked.keys() == plain.keys() and all(
        torch.equal(hooked[layer], plain[layer]) for layer in layers
    )


@contextmanager
def _captured(
    modules: nn.ModuleList | None, layers: Sequence[int], index_N: Tensor, kept: dict[int, Tensor]
) -> Iterator[None]:
    """While open, what enters layer l of the decoder is stored as hidden state l."""

    def store(layer: int):
        def hook(_module, args: tuple, kwargs: dict) -> None:
            kept[layer] = _rows(args[0] if args else kwargs["hidden_states"], index_N)

        return hook

    chosen = [] if modules is None else [(layer, modules[layer]) for layer in layers]
    handles = [
        module.register_forward_pre_hook(store(layer), with_kwargs=True) for layer, module in chosen
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(hidden_BTD: Tensor, index_N: Tensor) -> Tensor:
    return hidden_BTD.flatten(0, 1)[index_N.to(hidden_BTD.device)]


def _probe(vocab_rows: int) -> tuple[Tensor, Tensor]:
    ids_BT = torch.arange(2 * 12).reshape(2, 12) * 7919 % vocab_rows
    return ids_BT, torch.arange(12).repeat(2, 1)


def _number(config: object, name: str) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else 1.0
