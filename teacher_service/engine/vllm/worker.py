"""A model in vLLM, in a process of an environment of its own. Token ids in, numbers out.

This file is the wire between the two environments: the engine (`engine.py`) reads the columns
that are named here, and the class is sent by value to a process that has nothing else of ours. So
it imports pyarrow and numpy alone, and vLLM where that is.

T tokens of a text   K likeliest ids   W tokens written
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

INPUT_IDS = "input_ids"  # of both requests: list<int32> [T], a text each
# Of the answer to `logprobs`, a text each: of every token but the first its log-probability, and
# the likeliest ids in its place with theirs, most likely first.
LABEL, IDS, LOGPROBS = "label_logprob", "ids", "logprobs"  # [T - 1], [(T - 1) * K] and the same
# Of a request to `write`, beside the texts: the seed of each. Of its answer: the ids written, with
# the one that ended them (`END`, -1: none did), and their log-probabilities [W].
SEED, WRITTEN, END = "seed", "written", "end_id"


def in_plain_words(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose errors are RuntimeErrors of one line, which any process can read."""

    @functools.wraps(method)
    def worded(*args: Any) -> Any:
        try:
            return method(*args)
        except Exception as error:
            lines = [line.strip() for line in str(error).strip().splitlines()]
            reason = next(filter(None, lines), "no reason given")
            raise RuntimeError(f"{type(error).__name__}: {reason}") from None

    return worded


def pack_head(model: Any) -> None:
    """Make anew what vLLM on CPUs multiplies with in place of a head's weights: of a head that
    shares them with the embedding, reloading leaves it as it was."""
    head = getattr(model, "lm_head", None)
    if (method := getattr(head, "quant_method", None)) is not None:
        method.process_weights_after_loading(head)


class VllmWorker:
    """Holds one model."""

    _lora: Any = None  # the adapters that it answers with, as vLLM names them

    @in_plain_words
    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Load; `settings` are vLLM's own. What was loaded, and by what."""
        import torch
        import transformers

        vllm: Any = import_module("vllm")
        self._llm: Any = vllm.LLM(**settings)
        self._on_gpu = torch.cuda.is_available()
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        return {
            "engine": f"vllm {vllm.__version__} torch {torch.__version__} transformers "
            f"{transformers.__version__}",
            "device": torch.cuda.get_device_name() if self._on_gpu else kind,
            "threads": str(torch.get_num_threads()),
            "vocab": int(self._llm.llm_engine.model_config.get_vocab_size()),
        }

    @in_plain_words
    def logprobs(self, texts: pa.Table, num_ids: int) -> pa.Table:
        """Log-probabilities at temperature 1 of what follows in texts of two tokens or more."""
        SamplingParams = import_module("vllm").SamplingParams
        asked = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=num_ids,
            flat_logprobs=True,
            detokenize=False,
        )
        answers = self._generate(texts, [asked] * texts.num_rows)
        columns: dict[str, list[np.ndarray]] = {LABEL: [], IDS: [], LOGPROBS: []}
        for answer in answers:
            found = answer.prompt_logprobs  # of the first token there are none
            ids = np.array(found.token_ids, np.int32).reshape(-1, num_ids + 1)
            logprobs = np.array(found.logprobs, np.float32).reshape(-1, num_ids + 1)
            columns[LABEL].append(logprobs[:, 0])
            columns[IDS].append(ids[:, 1:].ravel())
            columns[LOGPROBS].append(logprobs[:, 1:].ravel())
        types = {LABEL: pa.float32(), IDS: pa.int32(), LOGPROBS: pa.float32()}
        return pa.table({name: pa.array(columns[name], pa.list_(types[name])) for name in types})

    @in_plain_words
    def write(self, texts: pa.Table, sampling: dict[str, Any]) -> pa.Table:
        """Go on with texts, each with a seed of its own; `sampling` is what vLLM calls so."""
        SamplingParams = import_module("vllm").SamplingParams
        seeds = texts.column(SEED).to_pylist()
        asked = [
            SamplingParams(**sampling, seed=seed, logprobs=0, flat_logprobs=True, detokenize=False)
            for seed in seeds
        ]
        outputs = [answer.outputs[0] for answer in self._generate(texts, asked)]
        ended = [output.finish_reason == "stop" for output in outputs]
        written = [np.array(output.token_ids, np.int32) for output in outputs]
        columns = {
            WRITTEN: pa.array(written, pa.list_(pa.int32())),
            LOGPROBS: pa.array(
                [np.array(output.logprobs.logprobs, np.float32) for output in outputs],
                pa.list_(pa.float32()),
            ),
            END: pa.array(
                [int(ids[-1]) if end else -1 for ids, end in zip(written, ended, strict=True)],
                pa.int32(),
            ),
        }
        return pa.table(columns)

    @in_plain_words
    def load_weights(self, file: str) -> None:
        """Go on with the weights of a file of safetensors, named as the model's own files name
        them."""
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(file, Path(folder) / "model.safetensors")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self._on_gpu:
            self._llm.apply_model(pack_head)
        self._llm.reset_prefix_cache()

    @in_plain_words
    def load_adapters(self, file: str, adapters: dict[str, Any]) -> None:
        """Go on with LoRA adapters out of a file of safetensors, named as peft's modules are;
        `adapters` are rank and alpha as peft's config has them."""
        LoRARequest = import_module("vllm.lora.request").LoRARequest
        safetensors = import_module("safetensors.torch")
        named = {
            name.replace(".default.", "."): t for name, t in safetensors.load_file(file).items()
        }
        modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in named})
        described = {"peft_type": "LORA", "bias": "none", "target_modules": modules, **adapters}
        before = self._lora and self._lora.lora_int_id
        number = (before or 0) + 1  # none is taken for another
        with tempfile.TemporaryDirectory() as folder:
            safetensors.save_file(named, Path(folder) / "adapter_model.safetensors")
            (Path(folder) / "adapter_config.json").write_text(json.dumps(described))
            request = LoRARequest(f"version {number}", number, folder)
            if before is not None:
                self._llm.llm_engine.remove_lora(before)
            self._llm.llm_engine.add_lora(request)
        self._lora = request

    def _generate(self, texts: pa.Table, asked: list[Any]) -> list[Any]:
        prompts = [{"prompt_token_ids": ids} for ids in texts.column(INPUT_IDS).to_pylist()]
        return self._llm.generate(prompts, asked, use_tqdm=False, lora_request=self._lora)
