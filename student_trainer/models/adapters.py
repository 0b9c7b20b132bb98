"""LoRA and QLoRA: which weights of the student are quantised, frozen and adapted."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.config.models.student import LoRATraining, QLoRATraining
from shared.config.models.student import Student as StudentConfig
from shared.errors import ConfigError
from shared.loading import first_line
from student_trainer.models.upcycling import freeze_all_but_experts
from student_trainer.tasks.task import ModelKind

ALL_LINEAR = "all-linear"
HEADS_OF_TOKENS = ("classifier", "score")  # which peft leaves out for classifiers of texts alone
PLAIN = (nn.Linear.forward, Conv1D.forward)
# By a Mamba mixer or its kernels, past any adapter.
READ_AS_WEIGHTS = ("out_proj", "conv1d", "x_proj", "dt_proj")


def quantisation(asked: StudentConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the frozen base is stored: nf4 for QLoRA, as it is otherwise."""
    if not isinstance(asked.train, QLoRATraining):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def keep_unpacked(model: PreTrainedModel) -> None:
    """Stop an evaluation pass on an AVX512-BF16 CPU from repacking nf4 weights in place.

    Repacked weights serve inference only; training after it would get wrong gradients unnoticed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes, whose import is slow
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def freeze_bystanders(model: nn.Module, *, decoder: nn.Module, head: nn.Module) -> None:
    """Let only decoder and head train: what lies beside them, as a vision tower, gets no gradient
    from text, and weight decay would shrink it."""
    trained = {id(p) for part in (decoder, head) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def adapt(
    model: PreTrainedModel,
    asked: StudentConfig,
    kind: ModelKind,
    *,
    decoder: nn.Module,
    head: nn.Module,
    seed: int,
) -> nn.Module:
    """Put adapters on a frozen base; a fully trained student is returned as it is.

    Only the decoder is adapted; of it "all-linear" leaves out what no adapter reaches. The head of
    a classifier trains whole beside them, as peft has it for its task.
    Raises ConfigError if a name in `target_modules` is that of no layer, or of the output head.
    """
    train = asked.train
    if not isinstance(train, LoRATraining):
        return model
    from peft import LoraConfig, TaskType, get_peft_model  # slow, and only adapters need it

    torch.manual_seed(seed)
    output = model.get_output_embeddings()
    left_out = set(_bystanders(model, decoder, head))
    if train.target_modules == ALL_LINEAR:
        left_out |= set(_beyond_reach(model)) | set(HEADS_OF_TOKENS if kind.labels else ())
    lora = LoraConfig(
        task_type=TaskType(kind.peft_task),
        r=train.r,
        lora_alpha=train.alpha,  # type: ignore[arg-type]
        lora_dropout=train.dropout,
        target_modules=train.target_modules,
        exclude_modules=sorted(left_out) or None,
    )
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False, revision=asked.revision)
    except (ValueError, TypeError) as error:  # a head that trains whole may be named too
        raise ConfigError(
            f"student.train.target_modules is {train.target_modules!r}: {first_line(error)}"
        ) from error
    _refuse_unmatched(train.target_modules, adapted)
    if model.get_output_embeddings() is not output:
        raise ConfigError(
            f"student.train.target_modules is {train.target_modules!r}, which adapts the output "
            'head; leave the head out or use "all-linear"'
        )
    return adapted


def with_adapters(model: PreTrainedModel, asked: StudentConfig, export: Path) -> nn.Module:
    """The adapters of an exported folder on their base, as peft loads them; a student without any
    is returned as it is. Raises ConfigError where they cannot be loaded."""
    if not isinstance(asked.train, LoRATraining):
        return model
    from peft import PeftModel  # slow, and only adapters need it

    try:
        return PeftModel.from_pretrained(
            model, str(export), is_trainable=True, autocast_adapter_dtype=False
        )
    except Exception as error:  # of every library that reads one of its files
        raise ConfigError(
            f"the adapters in {export} cannot be loaded on {asked.model}: {first_line(error)}; "
            "export the run again with `tutelage export`"
        ) from error


def _refuse_unmatched(asked: str | list[str], adapted: Any) -> None:
    """Raise ConfigError for a name among several that none of the adapted layers ends in. Those of
    experts, which peft takes out of its config, stand for fused tensors."""
    layers = adapted.base_model.targeted_module_names
    fused = bool(adapted.base_model.targeted_parameter_names)
    kept = adapted.peft_config["default"].target_modules
    last = sorted({layer.rpartition(".")[2] for layer in layers})
    for name in asked if isinstance(asked, list) else ():
        found = any(layer == name or layer.endswith(f".{name}") for layer in layers)
        if not found and not (fused and name not in kept):
            raise ConfigError(
                f"student.train.target_modules names {name}, but the decoder has no such linear "
                f"layer; those of the other names are {', '.join(last)}: correct it or leave it out"
            )


def refuse_lost_adapters(adapted: Any, *, name: str) -> None:
    """Save fresh adapters and load them again beside themselves. Raises ConfigError where peft
    loses some on the way, as where a family's weights have other names in files: their export
    could not be used."""
    with TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        adapted.load_adapter(folder, adapter_name="again")
    found = dict(adapted.named_parameters())
    pairs = {n: found.get(n.replace(".default.", ".again.")) for n in found if ".default." in n}
    lost = [
        n for n, p in pairs.items() if p is None or not torch.equal(p.float(), found[n].float())
    ]
    if lost:
        raise ConfigError(
            f"the adapters of {name} at {len(lost)} weights, as {lost[0]}, do not survive saving "
            "and loading; name other layers in student.train.target_modules"
        )


def _bystanders(model: nn.Module, decoder: nn.Module, head: nn.Module) -> Iterator[str]:
    """Names of the layers with weights that lie neither in the decoder nor in the head."""
    inside = {id(module) for part in (decoder, head) for module in part.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name


def _beyond_reach(model: nn.Module) -> Iterator[str]:
    """Names of linear layers that no adapter stands in for: routers, which answer more than a
    product, and what a Mamba mixer's kernels read as plain weights."""
    for name, module in model.named_modules():
        if _answers_more(module):
            yield name
        if _is_mamba(module):
            yield from (f"{name}.{part}" for part in READ_AS_WEIGHTS if hasattr(module, part))


def _answers_more(module: Any) -> bool:
    """Whether a linear layer's `forward` is a model's own and gives more than the product, which
    is tried."""
    if not isinstance(module, nn.Linear) or type(module).forward in PLAIN:
        return False
    if type(module).__module__.startswith(("bitsandbytes", "torch")):
        return False
    states_1D = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
    with torch.no_grad():
        product_1E = nn.functional.linear(states_1D, module.weight, module.bias)
        try:
            found = module(states_1D)
        except Exception:  # of the model's own code, as where it takes other shapes
            return True
    plain = isinstance(found, torch.Tensor) and found.shape == product_1E.shape
    return not (plain and torch.allclose(found, product_1E, rtol=1e-2, atol=1e-3))


def _is_mamba(module: nn.Module) -> bool:
    """Whether a module is a mixer of the Mamba kind, by the names of its parts."""
    return all(hasattr(module, part) for part in ("A_log", "D", "conv1d", "out_proj"))


def freeze(model: PreTrainedModel, asked: StudentConfig) -> None:
    """Adapters leave every base weight as it is, and an upcycled student's experts may train alone;
    nothing is cast on the way."""
    if isinstance(asked.train, LoRATraining):
        model.requires_grad_(False)
    elif asked.upcycle is not None and asked.upcycle.train == "experts":
        freeze_all_but_experts(model)
        if asked.zero == 3:  # it lets go of a module's weights once its inputs have their gradients
            model.enable_input_require_grads()
