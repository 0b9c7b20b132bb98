"""Find the decoder and the head inside any causal language model, and prove that they are it.

B lines   T tokens   N positions   D hidden width
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.model_parts import decoder_of, logit_formulas, takes, tolerance
from teacher_service.engine.tensor_parallel import is_spread, sharded
from teacher_service.scoring.scoring import ScoringHead

PROBE_TOKENS = 12  # of each of two rows


@dataclass(slots=True)
class Decoder:
    """The model without its head; keeps only the hidden states it is asked for."""

    module: nn.Module
    layers: nn.ModuleList | None  # None: the model's own list of all hidden states is used
    num_layers: int
    takes_positions: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state_widths: tuple[int, ...] = ()  # by layer; empty where layers do not give one per token

    @torch.inference_mode()
    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        index_N: Tensor,
        layers: Sequence[int],
        beside: Mapping[str, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states [N, D] of the chosen layers and the last one, at the chosen positions;
        `beside` is what the module reads beside ids, by its names.

        Layer 0 is the embedding's output, layer `num_layers` the last one after the final norm.
        """
        kept: dict[int, Tensor] = {}
        inner = [layer for layer in layers if layer < self.num_layers]
        if self.layers is None and inner:
            output = self.outputs(input_ids_BT, position_ids_BT, beside, with_states=True)
            kept |= {layer: _rows(output.hidden_states[layer], index_N) for layer in inner}
        else:
            with _captured(self.layers, inner, index_N, kept):
                output = self.outputs(input_ids_BT, position_ids_BT, beside)
        kept[self.num_layers] = _rows(output.last_hidden_state, index_N)
        return kept

    def outputs(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        beside: Mapping[str, Tensor] | None = None,
        *,
        with_states: bool = False,
    ):
        """What the module gives, with the list of all layers' states where they are wanted."""
        call: dict[str, Any] = {"input_ids": input_ids_BT.to(self.device), "use_cache": False}
        if self.takes_positions:
            call["position_ids"] = position_ids_BT.to(self.device)
        call |= {name: tensor.to(self.device) for name, tensor in (beside or {}).items()}
        options = {"output_hidden_states": True} if with_states else {}
        return self.module(**call, **options)


def find_decoder(model: nn.Module, device: torch.device) -> Decoder:
    """The decoder of a causal model; hooks on its layers are used where they prove exact.

    Raises ConfigError for a model none of whose parts turns token ids into states.
    """
    module = decoder_of(model)
    if module is None:
        raise ConfigError(
            f"{type(model).__name__} has no part that turns token ids into hidden states; use "
            "another teacher"
        )
    text = model.config.get_text_config()  # type: ignore[union-attr]
    num_layers = int(getattr(text, "num_hidden_layers", 0))
    plain = Decoder(module, None, num_layers, takes(module, "position_ids"), device)
    vocab_rows = _embedded(model)
    plain.state_widths = _state_widths(plain, vocab_rows)
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not lists or not plain.state_widths:
        return plain
    hooked = replace(plain, layers=lists[0])
    return hooked if _hooks_are_exact(hooked, plain, vocab_rows) else plain


def find_head(model: nn.Module) -> ScoringHead | None:
    """The head as plain tensors, in a group the rows held here, with what its config most likely
    means, or None where it is more than one matrix product."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    formula = next(logit_formulas(model.config.get_text_config()))  # type: ignore[union-attr]
    bias = getattr(module, "bias", None)
    head = ScoringHead(weight.detach(), bias, logit_scale=formula.scale, soft_cap=formula.soft_cap)
    return sharded(head) if is_spread(model) else head


@torch.inference_mode()
def exact_head(model: nn.Module, decoder: Decoder, head: ScoringHead) -> ScoringHead | None:
    """The head with the scale and the cap that give the model's own logits on a probe, from the
    decoder's states; None where nothing does that the config may mean. Raises ConfigError for
    logits that are no numbers."""
    ids_BT, positions_BT = _probe(head.vocab.rows)
    index_N = torch.arange(ids_BT.numel())
    hidden_ND = decoder.hidden(ids_BT, positions_BT, index_N, ())[decoder.num_layers]
    output = model(input_ids=ids_BT.to(decoder.device), use_cache=False)
    expected_NV = output.logits.float().flatten(0, 1)
    if not bool(expected_NV.isfinite().all()):
        raise ConfigError(
            f"the logits of {model.name_or_path} are not finite in {str(head.weight_VD.dtype)[6:]};"
            " look at its weights and its config.json"
        )
    rows, width = head.vocab.rows, head.weight_VD.shape[1]
    if hidden_ND.shape[1] != width or expected_NV.shape != (len(hidden_ND), rows):
        return None
    allowed = tolerance(head.weight_VD.dtype) * expected_NV.abs().max()
    for formula in logit_formulas(model.config.get_text_config()):  # type: ignore[union-attr]
        meant = replace(head, logit_scale=formula.scale, soft_cap=formula.soft_cap)
        found_NV = meant.logits(hidden_ND)
        error_NV = (found_NV - head.vocab.here(expected_NV).to(found_NV.device)).abs()
        if bool(head.vocab.peak(error_NV.max()) <= allowed.to(error_NV.device)):
            return meant
    return None


def _embedded(model: nn.Module) -> int:
    """Rows of the embedding, which bound the token ids a model accepts."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding is None:
        raise ConfigError(f"{type(model).__name__} has no embedding; use a causal language model")
    return int(embedding.weight.shape[0])


@torch.inference_mode()
def reads_onwards(decoder: Decoder, head: ScoringHead) -> bool:
    """Whether a token's last state is the same whatever follows it, to the rounding of the head."""
    ids_BT, positions_BT = _probe(head.vocab.rows)
    other_BT, half = ids_BT.clone(), PROBE_TOKENS // 2
    other_BT[:, half:] = ids_BT[:, half:].flip(1)
    found_BTD, expected_BTD = (
        decoder.outputs(ids, positions_BT).last_hidden_state[:, :half].float()
        for ids in (other_BT, ids_BT)
    )
    error = (found_BTD - expected_BTD).abs().max()
    return bool(error <= tolerance(head.weight_VD.dtype) * expected_BTD.abs().max())


@torch.inference_mode()
def _state_widths(decoder: Decoder, vocab_rows: int) -> tuple[int, ...]:
    """Numbers of a token's state by layer, the embedding's first; empty where the model's list of
    states holds something else, as several streams of them."""
    ids_BT, positions_BT = _probe(vocab_rows)
    states = decoder.outputs(ids_BT, positions_BT, with_states=True).hidden_states or ()
    whole = all(s is not None and s.ndim == 3 and s.shape[:2] == ids_BT.shape for s in states)
    return (
        tuple(s.shape[2] for s in states) if whole and len(states) == decoder.num_layers + 1 else ()
    )


def _hooks_are_exact(hooked: Decoder, plain: Decoder, vocab_rows: int) -> bool:
    ids_BT, positions_BT = _probe(vocab_rows)
    index_N = torch.arange(ids_BT.numel())
    layers = range(plain.num_layers + 1)
    found, expected = (d.hidden(ids_BT, positions_BT, index_N, layers) for d in (hooked, plain))
    return found.keys() == expected.keys() and all(
        torch.equal(found[layer], expected[layer]) for layer in layers
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
    ids_BT = torch.arange(2 * PROBE_TOKENS).reshape(2, PROBE_TOKENS) * 7919 % vocab_rows
    return ids_BT, torch.arange(PROBE_TOKENS).repeat(2, 1)
