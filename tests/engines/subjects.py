"""Engines that the suite is run on, a model for them, and what a plain forward pass says of it.

T tokens of a text   V vocabulary
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.data.rows import Rows
from shared.targets.generation import Openings

VOCAB, CONTEXT = 256, 128
STOPS = tuple(range(3, 40))


def save_model(folder: Path, *, seed: int) -> Path:
    """A random Llama with a peaked head, of sizes that every engine takes."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def weights_file(model: Path, folder: Path) -> str:
    """The weights of a model in a file of a folder of its own, as a trainer hands them over."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(load_file(model / "model.safetensors"), path, metadata={"format": "pt"})
    return str(path)


class Plain:
    """A model read in plain forward passes, one text at a time, in float64."""

    def __init__(self, folder: Path) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self._model = model.double().eval()

    @property
    def vocab(self) -> int:
        """Rows of its head."""
        return self._model.config.vocab_size

    def weights(self) -> dict[str, Tensor]:
        """Its own, by name, to be changed in place."""
        return self._model.state_dict()

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on with other weights; those that are not given stay."""
        assert not self._model.load_state_dict(weights, strict=False).unexpected_keys

    @torch.no_grad()
    def logits(self, ids_T: np.ndarray) -> Tensor:
        """What follows each token [T, V], float64."""
        ids = torch.from_numpy(ids_T.astype(np.int64))[None]
        return self._model(ids, use_cache=False).logits[0]

    def label_logprobs(self, rows: Rows) -> np.ndarray:
        """The log-probability of each token with loss, of all rows end to end."""
        found = []
        for document in _documents(rows):
            logprobs_TV = self.logits(document)[:-1].log_softmax(-1)
            labels = torch.from_numpy(document[1:].astype(np.int64))[:, None]
            found.append(logprobs_TV.gather(1, labels)[:, 0].numpy())
        return np.concatenate(found)

    def law(self, opening: np.ndarray, written: np.ndarray, *, temperature: float, top_p: float):
        """Probabilities of what is drawn at each position that was written [W, V], from the
        definition of top-p."""
        whole = np.concatenate([opening, written])
        p_WV = (self.logits(whole)[len(opening) - 1 : -1] / temperature).softmax(-1).numpy()
        for p_V in p_WV:
            order = np.argsort(-p_V, kind="stable")
            kept = order[: int(np.searchsorted(p_V[order].cumsum(), top_p)) + 1]
            cut = np.setdiff1d(order, kept)
            p_V[cut] = 0
        return p_WV / p_WV.sum(1, keepdims=True)


def openings(*lengths: int, seed: int = 0) -> Openings:
    """Random openings, each a draw of its own."""
    rng = np.random.default_rng(seed)
    asked = Openings.build(
        names=[f"text/{n}" for n in range(len(lengths))],
        input_ids=[rng.integers(40, VOCAB, n) for n in lengths],
    )
    return asked.with_draws([str(n) for n in range(len(lengths))])


def _documents(rows: Rows) -> list[np.ndarray]:
    return list(rows.documents().column("input_ids"))
