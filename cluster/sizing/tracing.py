"""What a model holds and computes, from its config alone: built and run on tensors without numbers.

transformers' own classes are instantiated under a fake mode, so that every family counts as it is;
a forward and a backward pass of the decoder are followed operation by operation, and what is alive
is counted in bytes.

B lines   T tokens   D hidden width   V head rows
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cluster.sizing.alive import Alive
from cluster.sizing.kinds import parts_of, pixels_of, with_classes
from cluster.sizing.memory import Activations, ModelSizes, Writing, int8_bytes, nf4_bytes
from shared.config.models.modules import TrainedModules
from shared.config.models.student import QLoRATraining, Student
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError
from shared.loading import auto_class_of, first_line, read_config, untrusted
from shared.model_parts import logit_formulas, takes
from student_trainer.models.adapters import adapt, freeze, freeze_bystanders
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.task import ModelKind

ATEN = torch.ops.aten
NOTHING: Mapping = {}
LAWS = 4  # tensors [B, V] in float32 while tokens are drawn: logits, the law, noise, and their sum


def student_sizes(
    asked: Student, *, lines: int, tokens: int, seed: int, kind: ModelKind = CAUSAL_LM.model
) -> tuple[ModelSizes, Activations]:
    """What a student is, and what a micro-batch of it keeps alive. Raises ConfigError for a config
    that cannot be read."""
    with _built("student", asked, kind) as model:
        decoder, head = parts_of(model, kind, option="student.model", name=asked.model)
        freeze(model, asked)
        freeze_bystanders(model, decoder=decoder, head=head)
        saved = adapt(model, asked, kind, decoder=decoder, head=head, seed=seed)
        if asked.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        quantised = "nf4" if isinstance(asked.train, QLoRATraining) else "none"
        sizes = _sizes(saved, model, head, quantisation=quantised)
        pixels = pixels_of(model, asked, kind, lines=lines)
        return sizes, _traced(
            model.train(), decoder, sizes, lines, tokens, learns=True, pixels=pixels
        )


def teacher_sizes(
    name: str, asked: Teacher, *, lines: int, tokens: int, kind: ModelKind = CAUSAL_LM.model
) -> tuple[ModelSizes, Activations]:
    """What a teacher is, with its adapter, and what a scoring unit of it keeps alive. Raises
    ConfigError for a config that cannot be read."""
    with _built(f"teachers.{name}", asked, kind) as model:
        decoder, head = parts_of(model, kind, option=f"teachers.{name}.model", name=asked.model)
        model.requires_grad_(False)
        if asked.adapter is not None:
            _adapt_teacher(model, f"teachers.{name}.adapter", asked.adapter, asked.adapter_revision)
        sizes = _sizes(model, model, head, quantisation=asked.quantisation)
        pixels = pixels_of(model, asked, kind, lines=lines)
        return sizes, _traced(
            model.eval(), decoder, sizes, lines, tokens, learns=False, pixels=pixels
        )


def module_sizes(
    name: str, asked: Teacher, modules: TrainedModules, *, lines: int, tokens: int
) -> tuple[int, Activations]:
    """How many weights the modules on a teacher have, and what a unit that they learn from keeps
    alive. Raises ConfigError for a config that cannot be read, and for layers that are not
    there."""
    import peft

    with _built(f"teachers.{name}", asked) as model:
        option = f"teachers.{name}.model"
        decoder, head = parts_of(model, CAUSAL_LM.model, option=option, name=asked.model)
        sizes = _sizes(model, model, head, quantisation=asked.quantisation)
        targets = modules.target_modules
        named = targets if targets == "all-linear" else list(targets)
        config = peft.LoraConfig(
            r=modules.r,
            lora_alpha=modules.alpha,  # type: ignore[arg-type]
            target_modules=named,
            task_type="CAUSAL_LM",
        )
        try:
            peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"teachers.{name}.online_modules.target_modules is {targets}: "
                f"{first_line(error).rstrip('.')}; correct it, or take all-linear"
            ) from None
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return count, _traced(model.train(), decoder, sizes, lines, tokens, learns=True)


def writing_of(
    section: str, asked: Student | Teacher, *, lines: int, opening: int, tokens: int
) -> Writing:
    """What a model keeps that goes on from `lines` openings of so many tokens to texts of `tokens`
    in all. Raises ConfigError for a config that cannot be read."""
    with _built(section, asked) as model:
        option = f"{section}.model"
        decoder, head = parts_of(model, CAUSAL_LM.model, option=option, name=asked.model)
        model.requires_grad_(False)
        sizes = _sizes(model, model, head, quantisation="none")
        scale = _followed_at(model, sizes)
        line_bytes = _states_of_a_line(decoder, tokens)
        if line_bytes is None:
            line_bytes = 2 * sizes.layers * tokens * sizes.width * sizes.itemsize // scale
        reading = _traced(model.eval(), decoder, sizes, lines, opening, learns=False)
    return Writing(
        lines=lines,
        tokens=tokens,
        states_bytes=scale * lines * line_bytes,
        reading_bytes=reading.most_bytes,
        logits_bytes=LAWS * 4 * lines * sizes.vocabulary,
    )


def _states_of_a_line(decoder: nn.Module, tokens: int) -> int | None:
    """Bytes of the keys and values of one line; None where a model's code cannot be followed, or
    keeps what it has read in a way of its own."""
    ids_1T = torch.zeros(1, tokens, dtype=torch.int64)
    try:
        with torch.no_grad():
            cache = decoder(input_ids=ids_1T, use_cache=True).past_key_values
    except Exception:  # of a model's own code on tensors without numbers
        return None
    if not isinstance(cache, transformers.Cache):
        return None
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum({id(t): t.nbytes for t in held if isinstance(t, Tensor) and t.dim()}.values())


@contextmanager
def _built(
    section: str, asked: Student | Teacher, kind: ModelKind = CAUSAL_LM.model
) -> Iterator[Any]:
    """A model of the class that its config names, in the dtype asked for, without numbers."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    trusted = asked.trust_remote_code
    try:
        config = read_config(
            asked.model,
            revision=asked.revision,
            trust_remote_code=trusted,
            attention=asked.attention if asked.attention != "flash_attention_2" else "sdpa",
        )
        config.quantization_config = None
        config = with_classes(config, kind)
        with torch.device("meta"):
            auto_class = kind.auto_class if kind.labels else auto_class_of(config)
            auto_model: Any = getattr(transformers, auto_class)
            model = auto_model.from_config(
                config, dtype=getattr(torch, asked.dtype), trust_remote_code=trusted
            )
    except Exception as error:  # of a config's own code and of every library it needs
        trust = untrusted(error, trust=f"{section}.trust_remote_code")
        reason = trust or first_line(error).rstrip(".")
        raise ConfigError(
            f"{section}.model is {asked.model!r}, whose config.json transformers cannot build a "
            f"model from: {reason}; correct it or name another model"
        ) from None
    with torch.device("meta"):
        yield model


def _adapt_teacher(model: Any, option: str, adapter: str, revision: str | None) -> None:
    """Put an adapter's layers on a model, from its config alone."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(adapter, revision=revision)
        config.inference_mode = False  # what learns is in no few bits, see `_quantised_bytes`
        peft.get_peft_model(model, config)
    except Exception as error:  # of every library that reads it
        raise ConfigError(
            f"{option} is {adapter}, whose adapter_config.json peft cannot build an adapter from: "
            f"{first_line(error).rstrip('.')}; correct it or name another adapter"
        ) from None


def _sizes(saved: nn.Module, model: Any, head: nn.Linear, *, quantisation: str) -> ModelSizes:
    """Weights, each storage once; linear layers but the head in few bits where that is asked."""
    few_bits = _quantised_bytes(model, head, quantisation)
    tensors: dict[int, Tensor] = {id(p): p for p in [*saved.parameters(), *_kept_buffers(saved)]}
    parameters = {id(p): p for p in saved.parameters()}
    held = {key: few_bits.get(key) or tensor.nbytes for key, tensor in tensors.items()}
    trained = [p for p in parameters.values() if p.requires_grad]
    tied = model.get_input_embeddings().weight is head.weight
    formula = next(logit_formulas(model.config.get_text_config()))
    return ModelSizes(
        num_weights=sum(p.numel() for p in parameters.values()),
        weight_bytes=sum(held.values()),
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.nbytes for p in trained),
        trains_head=head.weight.requires_grad,
        vocabulary=head.out_features,
        width=head.in_features,
        itemsize=head.weight.itemsize,
        tied=tied,
        soft_capped=formula.soft_cap is not None,
        layers=getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0,
        most_quantised=max((p.nbytes for k, p in parameters.items() if k in few_bits), default=0),
    )


def _kept_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Buffers that lie in files beside the parameters."""
    kept = model.state_dict(keep_vars=True)
    parameters = {id(p) for p in model.parameters()}
    return (tensor for tensor in kept.values() if id(tensor) not in parameters)


def _quantised_bytes(model: nn.Module, head: nn.Linear, quantisation: str) -> dict[int, int]:
    """By identity, the bytes of weights that bitsandbytes holds in few bits."""
    if quantisation == "none":
        return {}
    size = nf4_bytes if quantisation == "nf4" else int8_bytes
    linear = (m for m in model.modules() if type(m) is nn.Linear and m is not head)
    frozen = [m for m in linear if not m.weight.requires_grad]  # adapters learn
    return {id(m.weight): size(m.out_features, m.in_features) for m in frozen}


def _traced(
    model: nn.Module,
    decoder: nn.Module,
    sizes: ModelSizes,
    lines: int,
    tokens: int,
    *,
    learns: bool,
    pixels: Mapping[str, np.ndarray] = NOTHING,
) -> Activations:
    """What a forward pass, and a backward pass where it `learns`, keep alive and multiply; of a
    model that sees, what makes states of `pixels` too, which are there while text is read.

    A model whose code looks at numbers cannot be followed; it is estimated from its sizes.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)  # type: ignore[arg-type]
    scale = _followed_at(model, sizes)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    seen = most_seen = 0
    try:
        _on_cpu(model, mode)
        if pixels:
            alive = Alive(*model.parameters(), *model.buffers())
            with mode, torch.device("cpu"), counter, alive:
                seen = _passed(model, lambda: _seen(model, pixels), learns=learns, alive=alive)
            most_seen = alive.most
        alive = Alive(*model.parameters(), *model.buffers())
        with mode, torch.device("cpu"), counter, alive:
            placed = partial(_read, placed=not pixels)  # lines with images have their own places
            read = partial(_told_apart if decoder is model else placed, decoder, lines, tokens)
            kept = seen + _passed(model, read, learns=learns, alive=alive)
    except Exception:  # of a model's own code on tensors without numbers
        return _estimated(sizes, lines, tokens, learns=learns)
    head_flops = 2 * lines * tokens * sizes.width * sizes.vocabulary
    return Activations(
        kept_bytes=scale * kept,
        most_bytes=scale * max(most_seen, seen + alive.most),
        flops=counter.get_total_flops(),
        head_flops=head_flops,
        tokens=lines * tokens,
        traced=True,
    )


def _followed_at(model: nn.Module, sizes: ModelSizes) -> int:
    """Make a model one whose passes can be followed; what their numbers take then counts so many
    times. Products of experts can be followed in bfloat16 alone."""
    if sizes.itemsize != 4 or not any(p.dim() == 3 for p in model.parameters()):
        return 1
    model.to(torch.bfloat16)
    return 2


def _read(decoder: nn.Module, lines: int, tokens: int, *, placed: bool) -> Tensor:
    """The last states of a batch of text; `placed`: at positions that it is told."""
    ids_BT = torch.zeros(lines, tokens, dtype=torch.int64)
    positions_BT = torch.arange(tokens).expand(lines, -1).contiguous()
    told = placed and takes(decoder, "position_ids")
    named = {"position_ids": positions_BT} if told else {}
    return decoder(input_ids=ids_BT, use_cache=False, **named).last_hidden_state


def _told_apart(model: nn.Module, lines: int, tokens: int) -> Tensor:
    """The logits of the classes of a batch of text."""
    return model(input_ids=torch.zeros(lines, tokens, dtype=torch.int64)).logits


def _seen(model: Any, pixels: Mapping[str, np.ndarray]) -> Tensor:
    """The states of images, all of them together."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tensors = {
        name: torch.zeros(array.shape, dtype=dtype)
        if array.dtype.kind == "f"
        else torch.from_numpy(array)
        for name, array in pixels.items()
    }
    found = model.get_image_features(**tensors)
    states = getattr(found, "pooler_output", found)
    return torch.cat(list(states)) if isinstance(states, list | tuple) else states


def _passed(model: nn.Module, forward: Callable[[], Tensor], *, learns: bool, alive: Alive) -> int:
    """Run the passes; returns the bytes that lie between them. A gradient of a weight is let go of
    as it comes: it is a part of its own."""
    gc.freeze()  # what is there already is not looked through at every collection
    try:
        with torch.set_grad_enabled(learns):
            states_BTD = forward()
        gc.collect()  # of tensors without numbers some lie in reference cycles
        kept = alive.bytes
        if not learns or not states_BTD.requires_grad:
            return kept
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_let_go)
        alive.collects = True
        gc.freeze()
        states_BTD.backward(torch.empty_like(states_BTD))
        return kept
    finally:
        gc.unfreeze()


def _on_cpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Let a model of the meta device say that it is on the CPU, whose kernels are then followed."""
    known: dict[int, Any] = {}

    def faked(tensor: Tensor) -> Any:
        if id(tensor) not in known:
            fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return known[id(tensor)]

    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = faked(tensor)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _estimated(sizes: ModelSizes, lines: int, tokens: int, *, learns: bool) -> Activations:
    """34 numbers of 16 bits a layer, token and unit of width (arXiv 2205.05198, Eq. 2, without the
    scores of attention, which its kernels do not keep); two products a weight and token, four
    backward."""
    states = lines * tokens * sizes.width * sizes.itemsize
    kept = 17 * states * sizes.layers if learns else 8 * states
    matrices = sizes.num_weights - (1 if sizes.tied else 2) * sizes.vocabulary * sizes.width
    forward = 2 * lines * tokens * matrices
    return Activations(
        kept_bytes=kept,
        most_bytes=kept + 8 * states,
        flops=forward * (3 if learns else 1),
        head_flops=2 * lines * tokens * sizes.width * sizes.vocabulary,
        tokens=lines * tokens,
        traced=False,
    )


def _grouped_mm_flops(
    left: Any, right: Any, *args: Any, out_shape: Any = None, **named: Any
) -> int:
    """Of a product whose rows go to one matrix of several each; shapes only."""
    return 2 * left[0] * left[1] * right[-1]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


FLOPS: dict[Any, Any] = {
    ATEN._grouped_mm: _grouped_mm_flops,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
