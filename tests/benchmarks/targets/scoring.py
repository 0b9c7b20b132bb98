"""The teacher's side: scoring with selection against a plain forward pass of the same model.

Random Llamas on one thread, processor time. `deep` and `wide` have trunks with the weights of
twelve heads, `shallow` one with a fifth of a head's. In every round each call runs once, one after
the other. The decoder does the same work in all of them and most of it, so that on a shared machine
its own time varies by as much as what is looked for: it is timed apart, in every call, and taken to
be the median of all; what a call does outside of it is the median over the rounds.

Plain is the model's own forward pass to full logits; scoring is what a replica does with a unit,
the Table included, with ids by rank (`top_k`) and drawn ones (`threshold`).

    python -m tests.benchmarks.targets.scoring [--rounds 9]

N positions   D width   V vocabulary
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.data.layout import lay_out
from shared.data.rows import Rows
from teacher_service.engine.hf import HFEngine
from tests.answers import question_of

ROWS, TOKENS, TOP_K = 4, 256, 64
MODELS = {  # layers, width and vocabulary
    "deep": (16, 256, 4_096),
    "wide": (16, 1_024, 16_384),
    "shallow": (2, 256, 32_000),
}
Selector = Literal["top_k", "threshold"]
SELECTORS: tuple[Selector, ...] = ("top_k", "threshold")


@dataclass(frozen=True)
class Result:
    """Processor seconds of one unit."""

    model: str
    selector: Selector
    trunk_s: float  # the decoder, in any of the calls
    plain_s: float  # a plain forward pass outside the decoder
    scoring_s: float  # the same of scoring
    head_s: float  # the product with the head alone

    @property
    def ratio(self) -> float:
        """Of scoring to a plain forward pass."""
        return (self.trunk_s + self.scoring_s) / (self.trunk_s + self.plain_s)

    @property
    def selection(self) -> float:
        """What scoring takes beyond a plain forward pass, in products with the head."""
        return (self.scoring_s - self.plain_s) / self.head_s

    @property
    def trunk(self) -> float:
        """What the decoder takes, in products with the head."""
        return self.trunk_s / self.head_s


def measure(name: str, folder: Path, *, rounds: int, tokens: int = TOKENS) -> list[Result]:
    """A model of `MODELS` on a unit of random rows, by selector."""
    engine, vocabulary = HFEngine.load(str(saved(name, folder))), MODELS[name][2]
    rows = random_rows(vocabulary, tokens)
    specs = [question_of(TOP_K, vocabulary, selector=s, entropy=s != "top_k") for s in SELECTORS]
    ids_BT = torch.from_numpy(lay_out(rows, packed=True).input_ids_BT)
    hidden_ND = engine.last_hidden(rows)

    def plain() -> None:
        engine.model(input_ids=ids_BT, use_cache=False)

    def head() -> None:
        torch.mm(hidden_ND, engine.head.weight_VD.t())

    calls = (plain, head, *(partial(engine.score, rows, spec) for spec in specs))
    stopwatch = Stopwatch(engine.decoder.module)
    with torch.inference_mode():
        for call in calls:
            call()
        turns = [[stopwatch.seconds(call) for call in calls] for _ in range(rounds)]
    decoder_s = [inside for turn in turns for inside, _ in turn if inside]
    plain_s, head_s, *scoring = (
        median(outside for _, outside in column) for column in zip(*turns, strict=True)
    )
    return [
        Result(name, selector, median(decoder_s), plain_s, scoring_s, head_s)
        for selector, scoring_s in zip(SELECTORS, scoring, strict=True)
    ]


class Stopwatch:
    """Processor time of calls inside and outside a module that they call at most once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.marks: list[float] = []
        module.register_forward_pre_hook(self._mark)
        module.register_forward_hook(self._mark)

    def _mark(self, *_: object) -> None:
        self.marks.append(time.process_time())

    def seconds(self, call: Callable[[], object]) -> tuple[float, float]:
        """Inside and outside the module."""
        self.marks.clear()
        start = time.process_time()
        call()
        whole = time.process_time() - start
        inside = self.marks[1] - self.marks[0] if self.marks else 0.0
        return inside, whole - inside


def saved(name: str, folder: Path) -> Path:
    """A random model on disk."""
    layers, width, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_rows(vocabulary: int, tokens: int) -> Rows:
    """One document to a row, every position but the last with loss."""
    rng = np.random.default_rng(0)
    return Rows.build(
        domains=["any"] * ROWS,
        indices=range(ROWS),
        input_ids=[rng.integers(0, vocabulary, tokens) for _ in range(ROWS)],
        doc_starts=[np.zeros(1)] * ROWS,
        loss_masks=[np.r_[np.ones(tokens - 1), 0]] * ROWS,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | layers | D | V | trunk, in head products | selector "
        "| scoring / plain forward | beyond, in head products |"
    )
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    for name, (layers, width, vocabulary) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder), rounds=options.rounds)
        for result in found:
            print(
                f"| {name} | {layers} | {width:,} | {vocabulary:,} | "
                f"{result.trunk:.1f} | `{result.selector}` | "
                f"{result.ratio:.2f} | {result.selection:.2f} |"
            )


if __name__ == "__main__":
    main()
