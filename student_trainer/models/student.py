"""The student: a causal language model taken apart into decoder and output head.

The loss multiplies hidden states with the head chunk by chunk, so the head must be found and must
be all there is between hidden states and logits; that is probed, never assumed.

B lines of the batch   T padded length   V vocabulary
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.config.models.student import LoRATraining
from shared.config.models.student import Student as StudentConfig
from shared.config.run import Config
from shared.data.layout import Layout
from shared.data.passes import TOGETHER, switches_of
from shared.data.trust import Trust, probe, reach_of
from shared.errors import ConfigError
from shared.loading import read_config, why_unloadable
from shared.model_parts import (
    decoder_of,
    longest_context,
    not_finite,
    takes,
    why_incomplete,
)
from student_trainer.losses.kernel.primitive import Head
from student_trainer.models.adapters import (
    adapt,
    freeze,
    freeze_bystanders,
    keep_unpacked,
    quantisation,
    refuse_lost_adapters,
    with_adapters,
)
from student_trainer.models.classes import is_of_head, name_classes
from student_trainer.models.decoding import decode
from student_trainer.models.probing import (
    Parts,
    empties_padding,
    evaluating,
    probe_ids,
    take_apart,
)
from student_trainer.models.routers import routers_of
from student_trainer.models.saving import refuse_unsaveable
from student_trainer.models.upcycling import refuse_idle_experts, refuse_without_experts
from student_trainer.tasks.task import ModelKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Student:
    """A loaded student; `saved` is what has the `save_pretrained` for the trained weights."""

    saved: nn.Module  # the model itself, or the PeftModel around it
    decoder: nn.Module
    head: nn.Linear
    logit_scale: float
    soft_cap: float | None
    is_adapted: bool
    state_width: int  # of the hidden states that losses ask for
    routers: tuple[int, int] = (0, 0)  # layers and experts of each, where losses balance them

    @property
    def width(self) -> int:
        """Width of the last hidden state."""
        return self.head.in_features

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        return self.head.out_features

    @property
    def read_by_losses(self) -> Iterable[nn.Parameter]:
        """Weights that losses read outside the modules that hold them."""
        return self.head.parameters()

    def outputs(
        self, batch: Mapping[str, Tensor], options: Mapping[str, bool]
    ) -> tuple[Any, Tensor]:
        """What the model gives for a batch, `options` as of `decode`, and the head's input at the
        positions with loss [N, D]."""
        output = decode(self.decoder, batch, options=options)
        return output, output.last_hidden_state.flatten(0, 1)[batch["loss_index_N"]]

    def output_head(self) -> Head:
        """From that input to logits."""
        return Head(self.head.weight, self.head.bias, self.logit_scale, self.soft_cap)

    def probe(self, device: torch.device, *, tokens: int) -> dict[str, Tensor]:
        """A batch of a few fixed tokens, all with loss."""
        ids_T, place_T = probe_tokens(self.vocab_size, tokens, device), torch.arange(tokens)
        place_T = place_T.to(device)
        return {
            "input_ids_BT": ids_T[None],
            "position_ids_BT": place_T[None],
            "loss_index_N": place_T,
        }


def probe_tokens(vocabulary: int, tokens: int, device: torch.device) -> Tensor:
    """Fixed ids [T] of a vocabulary."""
    return (3 + torch.arange(tokens, device=device) * 5) % vocabulary


class LoadStudent(Protocol):
    """How a run comes by its student: a task's `load`, or one that was loaded before."""

    def __call__(self, config: Config, *, device: torch.device) -> Student:
        """The student of a config on a device. Raises ConfigError."""
        ...


def load_student(
    config: Config, kind: ModelKind, *, device: torch.device, export: Path | None = None
) -> Student:
    """Load, quantise, adapt and probe the student of a config, a decoder under a linear head; with
    `export` what that folder holds, a whole model or adapters on the config's.

    Raises ConfigError for a model that cannot be loaded or trained as asked.
    """
    asked = config.student
    if export is not None and not isinstance(asked.train, LoRATraining):
        asked = asked.model_copy(update={"model": str(export), "revision": None})
    model = load_model(asked, kind)
    _refuse_short_context(model, config)
    _refuse_missing_layers(model, config)
    model.to(device)  # type: ignore[arg-type]
    parts = take_apart(model, name=asked.model, sees=kind.sees)
    routers = routers_of(model, config)
    width = _state_width(model, parts, config)
    if asked.upcycle is not None:
        refuse_without_experts(model, name=asked.model)
    freeze(model, asked)
    freeze_bystanders(model, decoder=parts.decoder, head=parts.head)
    if export is not None:
        adapted = with_adapters(model, asked, export)
    else:
        adapted = adapt(
            model, asked, kind, decoder=parts.decoder, head=parts.head, seed=config.seed
        )
    if asked.upcycle is not None and adapted is not model:
        refuse_idle_experts(adapted, name=asked.model)
    if asked.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Student(
        adapted,
        parts.decoder,
        parts.head,
        parts.logit_scale,
        parts.soft_cap,
        is_adapted=adapted is not model,
        state_width=width,
        routers=routers,
    )


def load_model(asked: StudentConfig, kind: ModelKind) -> PreTrainedModel:
    """The bare model in its training dtype, weights from safetensors only."""
    folder = Path(asked.model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"student.model: {asked.model} holds no .safetensors weights; "
            "name a folder written by save_pretrained or a hub model"
        )
    transformers.utils.logging.disable_progress_bar()
    auto_model: Any = getattr(transformers, kind.auto_class)
    named = {
        "revision": asked.revision or "main",
        "trust_remote_code": asked.trust_remote_code,
    }
    try:
        config = read_config(asked.model, **named, attention=asked.attention)
        if kind.labels:
            name_classes(config, kind.labels, model=asked.model)
        model, found = auto_model.from_pretrained(
            asked.model,
            config=config,
            **named,
            dtype=DTYPES[asked.dtype],
            use_safetensors=True,
            quantization_config=quantisation(asked, DTYPES[asked.dtype]),
            output_loading_info=True,
        )
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a model's own code and of every library it needs
        reason = why_unloadable(error, section="student", attention=asked.attention)
        raise ConfigError(f"student.model: {asked.model} cannot be loaded: {reason}") from error
    missing = sorted(found["missing_keys"])
    if kind.labels:
        missing = [name for name in missing if not is_of_head(name, model)]
    if missing:
        raise ConfigError(
            f"student.model: {asked.model} lacks weights for {', '.join(missing[:3])}; "
            "name the folder of a whole model"
        )
    if why := why_incomplete(model, found["unexpected_keys"]):
        raise ConfigError(f"student.model: {asked.model} cannot be loaded: {why}")
    keep_unpacked(model)
    return model


def trust_in(model: PreTrainedModel, *, name: str, context: int) -> Trust:
    """What units of rows of up to `context` tokens are trusted for. Raises ConfigError for a model
    that gives one row two answers."""
    decoder, text = decoder_of(model), model.config.get_text_config()
    assert decoder is not None, "the model has been taken apart"

    def run(layout: Layout) -> np.ndarray:
        batch = {
            "input_ids_BT": layout.input_ids_BT,
            "position_ids_BT": layout.position_ids_BT,
            "loss_index_N": layout.loss_index_N,
            "pass_B": layout.pass_B,
            "width_P": layout.width_P,
        }
        tensors = {key: torch.from_numpy(value).to(model.device) for key, value in batch.items()}
        with torch.no_grad():
            states_BTD = decode(decoder, tensors).last_hidden_state
        return states_BTD.flatten(0, 1)[tensors["loss_index_N"]].float().cpu().numpy()

    with evaluating(model):
        return probe(
            run,
            name=f"student.model: {name}",
            vocab=model.get_input_embeddings().weight.shape[0],  # type: ignore[union-attr,index,arg-type]
            context=context,
            dtype=str(model.dtype).removeprefix("torch."),
            takes_positions=takes(decoder, "position_ids"),
            limit=longest_context(text),
            switches=switches_of(text),
            reach=reach_of(text),
        )


def student_trust(config: Config, kind: ModelKind) -> Trust:
    """Load the student's model once and probe what its units are trusted for (`RunPlan.packed`,
    `RunPlan.passes`).

    Raises ConfigError for a head or `target_modules` that the workers could not train either, and
    for forward passes in a number of their own under ZeRO-3, whose ranks go together.
    """
    plain = config.student.model_copy(update={"train": {"kind": "full"}})
    model = load_model(plain, kind)
    if (weight := not_finite(model)) is not None:
        raise ConfigError(
            f"student.model: {plain.model} has values in {weight} that are not finite in "
            f"{plain.dtype}; get its files again"
        )
    parts = take_apart(model, name=plain.model, sees=kind.sees)
    routers_of(model, config)
    found = trust_in(model, name=plain.model, context=config.data.context)
    if found.passes != TOGETHER and config.student.zero == 3:
        raise ConfigError(
            f"student.zero is 3, but {plain.model} runs {found.passes.in_words()}, so that ranks "
            "would make different numbers of forward passes; set student.zero=2"
        )
    _state_width(model, parts, config)
    asked, head = config.student, parts.head
    if not isinstance(asked.train, LoRATraining):
        _refuse_lost_row(model, head, name=plain.model)
        refuse_unsaveable(model, asked, kind)
    adapted = adapt(model, asked, kind, decoder=parts.decoder, head=head, seed=config.seed)
    if adapted is not model:
        refuse_lost_adapters(adapted, name=asked.model)
        if asked.upcycle is not None:
            refuse_idle_experts(adapted, name=asked.model)
    return found


def _refuse_lost_row(model: PreTrainedModel, head: nn.Linear, *, name: str) -> None:
    """A head that shares an embedding learns the padding token's row too."""
    embedding: Any = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is None or embedding.weight is not head.weight:
        return
    if empties_padding(model):
        raise ConfigError(
            f"student.model: {name} shares the rows of its embedding with its head, and "
            f"transformers empties that of its padding token {embedding.padding_idx} whenever it "
            "loads, so that an export would not be what was trained; set "
            "student.train.kind=lora, or pad_token_id in its config.json to null"
        )


def _refuse_short_context(model: PreTrainedModel, config: Config) -> None:
    limit = longest_context(model.config.get_text_config())
    if limit is not None and config.data.context > limit:
        raise ConfigError(
            f"data.context is {config.data.context}, but {config.student.model} reads at most "
            f"{limit} tokens; lower data.context to {limit}"
        )


def _state_width(model: PreTrainedModel, parts: Parts, config: Config) -> int:
    """Width of the hidden states that losses ask for, of the last where they ask for none. Raises
    ConfigError where layers do not give one state per token, or those asked for differ in width."""
    asked = {layer: loss.kind for loss in config.losses for layer in loss.student_layers}
    if not asked:
        return parts.head.in_features
    ids = probe_ids(model, length=16)
    with torch.no_grad(), evaluating(model):
        output = parts.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    states, name = output.hidden_states or (), config.student.model
    if any(layer >= len(states) or states[layer].shape[:-1] != ids.shape for layer in asked):
        kind = next(iter(asked.values()))
        raise ConfigError(
            f"a {kind} loss asks for the student's states, but the layers of {name} do not give "
            f"one state per token; take {kind} out of losses"
        )
    widths = {layer: states[layer].shape[-1] for layer in sorted(asked)}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{width} in layer {layer}" for layer, width in widths.items())
        raise ConfigError(
            f"a {asked[min(asked)]} loss asks for student layers of different widths ({said}); ask "
            "for layers of one width"
        )
    return widths[min(asked)]


def _refuse_missing_layers(model: PreTrainedModel, config: Config) -> None:
    """Layer 0 is the embedding's output, layer L the last one."""
    last = model.config.get_text_config().num_hidden_layers
    asked = [(loss.kind, layer) for loss in config.losses for layer in loss.student_layers]
    for kind, layer in asked:
        if not 0 <= layer <= last:
            raise ConfigError(
                f"a {kind} loss asks for student layer {layer}, but {config.student.model} "
                f"has layers 0 to {last}; change losses"
            )
