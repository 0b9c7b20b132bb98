"""How large everything is, on a GPU and in the suite.

N positions   D width of a model   V vocabulary
"""

from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def random(self, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
        """A model with random weights, made on the device."""
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=self.tied,
        )
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return Qwen2ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)

    @property
    def decoder_weights(self) -> int:
        """Elements of the matrices of all layers."""
        keys = self.width // self.heads * self.kv_heads
        attention = 2 * self.width * (self.width + keys)
        return self.layers * (attention + 3 * self.width * self.inner)


@dataclass(frozen=True)
class Sizes:
    """Of a run."""

    square: int  # of the matrix product whose rate the others are compared with
    checked: tuple[int, int, int]  # N, D, V of conformance
    loss: tuple[int, int, int]  # N, D, V of the token loss
    fewer_rows: int  # N at which full logits of both models have room too
    teachers: dict[str, Shape]
    student: Shape
    unit: tuple[int, int]  # rows of a unit and tokens of a row
    step: tuple[int, int]  # the same of a student's micro-batch
    top_k: int
    rounds: int
    seconds: float  # of a section
    left_out: tuple[str, ...] = ()  # of the contestants of the token loss


QWEN_1_5B = Shape(28, 1_536, 8_960, 12, 2, 151_936, tied=True)
QWEN_7B = Shape(28, 3_584, 18_944, 28, 4, 152_064, tied=False)
TINY = Shape(2, 32, 64, 4, 2, 300, tied=True)

FULL = Sizes(
    square=8_192,
    checked=(512, 256, 8_192),
    loss=(65_536, 2_048, 151_936),
    fewer_rows=8_192,
    teachers={"1.5B": QWEN_1_5B, "7B": QWEN_7B},
    student=QWEN_1_5B,
    unit=(8, 2_048),
    step=(4, 2_048),
    top_k=64,
    rounds=3,
    seconds=75.0,
)
SMALL = Sizes(
    square=64,
    checked=(24, 16, 300),
    loss=(48, 16, 300),
    fewer_rows=24,
    teachers={"tiny": TINY},
    student=TINY,
    unit=(2, 32),
    step=(2, 32),
    top_k=8,
    rounds=1,
    seconds=60.0,
    left_out=("compiled",),  # a minute for code that runs a millisecond
)
