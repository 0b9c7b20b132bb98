"""The other side of vLLM's wire, of plain forward passes; vLLM itself is in the drills.

T tokens of a text   V vocabulary   K likeliest ids
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file

from teacher_service.engine.vllm.worker import (
    END,
    IDS,
    INPUT_IDS,
    LABEL,
    LOGPROBS,
    SEED,
    WRITTEN,
)
from tests.engines.subjects import Plain


class PlainWorker:
    """The wire's other side, of plain forward passes; vLLM itself is in the drills."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._plain = folder, Plain(folder)
        self._vocab = self._plain.vocab
        self.asked: list[int] = []
        self.seeds: list[int] = []
        self.settings: dict[str, Any] = {}

    def __call__(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.settings, self._longest = settings, settings["max_model_len"]
        return {"engine": "plain", "device": "cpu", "threads": "1", "vocab": self._vocab}

    def logprobs(self, texts: pa.Table, num_ids: int) -> pa.Table:
        self.asked.append(num_ids)
        labels, ids, logprobs = [], [], []
        for text in texts.column(INPUT_IDS).to_pylist():
            ids_T = np.array(text)
            assert len(ids_T) < self._longest, "it writes a token after each text"
            found_TV = self._plain.logits(ids_T)[:-1].log_softmax(-1)
            values_TK, ids_TK = found_TV.topk(num_ids)
            labels.append(found_TV.numpy()[np.arange(len(ids_T) - 1), ids_T[1:]])
            ids.append(ids_TK.flatten().numpy().astype(np.int32))
            logprobs.append(values_TK.flatten().numpy())
        return pa.table(
            {
                LABEL: pa.array(labels, pa.list_(pa.float32())),
                IDS: pa.array(ids, pa.list_(pa.int32())),
                LOGPROBS: pa.array(logprobs, pa.list_(pa.float32())),
            }
        )

    def write(self, texts: pa.Table, sampling: dict[str, Any]) -> pa.Table:
        self.seeds = texts.column(SEED).to_pylist()
        pairs = zip(texts.column(INPUT_IDS).to_pylist(), self.seeds, strict=True)
        found = [self._written(np.array(text), seed, **sampling) for text, seed in pairs]
        written, logprobs, ends = zip(*found, strict=True)
        return pa.table(
            {
                WRITTEN: pa.array(written, pa.list_(pa.int32())),
                LOGPROBS: pa.array(logprobs, pa.list_(pa.float32())),
                END: pa.array(ends, pa.int32()),
            }
        )

    def load_weights(self, file: str) -> None:
        self._plain.load(load_file(file))

    def load_adapters(self, file: str, adapters: dict[str, Any]) -> None:
        """Each product of two matrices on the model as it was loaded."""
        given, own = load_file(file), Plain(self._folder).weights()
        for name, down in given.items():
            if ".lora_A." not in name:
                continue
            up = given[name.replace(".lora_A.", ".lora_B.")]
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            own[f"{layer}.weight"] += adapters["lora_alpha"] / adapters["r"] * (up @ down).double()
        self._plain.load(own)

    def _written(self, ids_T: np.ndarray, seed: int, **asked: Any) -> tuple[list, list, int]:
        """By the words of vLLM's sampling; each id is the largest of its logit and noise."""
        assert asked["ignore_eos"]
        noise, stops = np.random.default_rng(seed), asked["stop_token_ids"]
        allowed, opening = asked.get("allowed_token_ids", [*range(self._vocab)]), len(ids_T)
        logprobs: list[float] = []
        while len(ids_T) - opening < asked["max_tokens"]:
            logits_V = np.full(self._vocab, -np.inf)
            logits_V[allowed] = self._plain.logits(ids_T)[-1].numpy()[allowed]
            if len(logprobs) < asked["min_tokens"]:
                logits_V[stops] = -np.inf
            warmth = asked["temperature"] or 1.0
            scores_V = logits_V / warmth + bool(asked["temperature"]) * noise.gumbel(
                size=self._vocab
            )
            ids_T = np.append(ids_T, scores_V.argmax())
            logprobs.append(-1.0)
            if ids_T[-1] in stops:
                return ids_T[opening:].tolist(), logprobs, int(ids_T[-1])
        return ids_T[opening:].tolist(), logprobs, -1
