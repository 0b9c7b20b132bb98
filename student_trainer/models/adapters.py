"""LoRA and QLoRA: which weights of the student are quantised, frozen and adapted."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from shared.config.run import LoRATraining, QLoRATraining
from shared.config.run import Student as StudentConfig
from shared.errors import ConfigError
from student_trainer.tasks.task import ModelKind


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


def adapt(
    model: PreTrainedModel, asked: StudentConfig, kind: ModelKind, *, head: nn.Linear, seed: int
) -> nn.Module:
    """Put adapters on a frozen base; a fully trained student is returned as it is.

    Raises ConfigError if `target_modules` names no layer, or the output head.
    """
    train = asked.train
    if not isinstance(train, LoRATraining):
        return model
    from peft import LoraConfig, TaskType, get_peft_model  # slow, and only adapters need it

    torch.manual_seed(seed)
    lora = LoraConfig(
        task_type=TaskType(kind.peft_task),
        r=train.r,
        lora_alpha=train.alpha,  # type: ignore[arg-type]
        lora_dropout=train.dropout,
        target_modules=train.target_modules,
    )
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False, revision=asked.revision)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"student.train.target_modules is {train.target_modules!r}: {reason}"
        ) from error
    if model.get_output_embeddings() is not head:
        raise ConfigError(
            f"student.train.target_modules is {train.target_modules!r}, which adapts the output "
            'head; leave the head out or use "all-linear"'
        )
    return adapted
