"""Weights and activations of students that tell classes apart or see, beside those of real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from cluster.sizing.kinds import with_classes
from cluster.sizing.memory import Activations, ModelSizes
from cluster.sizing.tracing import student_sizes
from shared.config.models.student import Student
from shared.images.processor import blank_image, image_processor
from shared.model_parts import seeing_part_of
from student_trainer.models.classifier import padded
from student_trainer.tasks.task import ModelKind
from tests.allocations import peak_bytes
from tests.cluster.sizing.small import SMALL
from tests.pictured import save_llava
from tests.telling import in_turn

CLASSES = ("one", "two", "three")
WHOLE = ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", labels=CLASSES)
WORDS = ModelKind("AutoModelForTokenClassification", "TOKEN_CLS", labels=CLASSES)
SEEING = ModelKind("AutoModelForImageTextToText", "CAUSAL_LM", sees=True)
TEXT = {name: value for name, value in SMALL.items() if name != "tie_word_embeddings"}
FAMILIES = {"bert": transformers.BertConfig(**TEXT), "llama": transformers.LlamaConfig(**SMALL)}
LINES, TOKENS = 4, 96


def sized(folder: Path, kind: ModelKind, **options) -> tuple[ModelSizes, Activations]:
    asked = Student(model=str(folder), **options)
    return student_sizes(asked, lines=LINES, tokens=TOKENS, seed=0, kind=kind)


def real_peak(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that live at most in a real forward and backward pass, gradients of weights apart."""
    for parameter in model.train().parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return peak_bytes(lambda: forward().float().sum().backward())


def weight_bytes(model: nn.Module) -> int:
    storages = [t.untyped_storage() for t in model.state_dict().values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, [WORDS, WHOLE]))
def test_a_classifier_is_the_real_one_and_its_passes_those_of_padded_texts(family, kind, tmp_path):
    FAMILIES[family].save_pretrained(tmp_path)
    config = with_classes(transformers.AutoConfig.from_pretrained(tmp_path), kind)
    model = getattr(transformers, kind.auto_class).from_config(config)
    ids_BT = torch.arange(1, TOKENS + 1).repeat(LINES, 1)
    lengths_B = torch.tensor([TOKENS, *[TOKENS // 2] * (LINES - 1)])
    batch = padded({"input_ids_BT": ids_BT, "length_B": lengths_B}, pad_id=0)
    sizes, found = sized(tmp_path, kind)
    assert found.traced
    assert sizes.weight_bytes == weight_bytes(model)
    real = real_peak(model, lambda: model(**batch).logits)
    assert found.most_bytes == pytest.approx(real, rel=0.05)


def test_a_student_that_sees_is_the_real_one_and_its_passes_those_of_a_picture_a_line(tmp_path):
    """Without numbers transformers cannot see that no mask is needed, and counts one: the estimate
    is above the truth."""
    save_llava(tmp_path, width=256, layers=3, seed=0, side=64)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = image_processor(str(tmp_path), None)
    seen_T = torch.from_numpy(processor.blank_ids()).long()
    text_T = torch.ones(TOKENS - len(seen_T), dtype=torch.int64)
    ids_BT = torch.cat([seen_T, text_T]).repeat(LINES, 1)
    pixels = processor.pixels([[blank_image()]] * LINES)["pixel_values"]
    decoder = seeing_part_of(model)
    assert decoder is not None
    sizes, found = sized(tmp_path, SEEING)
    assert found.traced
    assert sizes.weight_bytes == weight_bytes(model)

    def forward() -> Tensor:
        named = {"pixel_values": torch.tensor(pixels), "use_cache": False}
        return decoder(input_ids=ids_BT, **named).last_hidden_state

    real = real_peak(model, forward)
    assert real <= found.most_bytes <= 1.15 * real
