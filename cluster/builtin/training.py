"""Train the small models of the embedded default: one process, plain torch, a progress bar.

The matrices of the layers train with Muon, the rest with AdamW: in one pass over a small corpus
that reaches what AdamW alone needs several passes for.

R rows of the corpus   B rows of a step   T tokens of a row   V vocabulary
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

LOG_EVERY_S = 10.0
MAX_THREADS = 8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's quintic
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model of the embedded default and its training; a new plan is a new model."""

    width: int
    layers: int
    heads: int
    domains: tuple[str, ...]  # what it reads
    steps: int
    rows_per_step: int
    context: int  # tokens of a training row
    muon_lr: float = 0.02
    adam_lr: float = 0.02
    warmup_steps: int = 10
    max_length: int = 512  # positions the model is declared for
    seed: int = 0


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of a matrix is made nearly orthogonal (Jordan et al. 2024).

    `torch.optim.Muon` without weight decay, but in float32: that one works in bfloat16, with which
    a processor that lacks instructions for it takes 3 s for a step of these models.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], *, lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, lr=group["lr"], momentum=group["momentum"])

    def _update(self, matrix: nn.Parameter, *, lr: float, momentum: float) -> None:
        grad, state = matrix.grad, self.state[matrix]
        assert grad is not None, "the caller looked"
        if not state:
            state["mean"] = torch.zeros_like(grad)
        mean = state["mean"].lerp_(grad, 1 - momentum)
        rows, columns = matrix.shape
        stretch = math.sqrt(max(1.0, rows / columns))
        matrix.add_(orthogonalised(grad.lerp(mean, momentum)), alpha=-lr * stretch)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, between about .5 and 1.5."""
    a, b, c = NEWTON_SCHULZ
    found = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if matrix.shape[0] > matrix.shape[1] else found


def train_model(
    plan: ModelPlan, tokens: Sequence[np.ndarray], *, vocab: int, title: str
) -> LlamaForCausalLM:
    """A Llama trained on `tokens`, one array of ids per domain; every row comes once per pass.

    Uses the machine's cores; the number of threads and the random state are restored after.
    """
    with _own_torch_state(plan.seed):
        model = LlamaForCausalLM(_llama_config(plan, vocab))
        optimisers = _optimisers(model, plan)
        rows_RT = _rows(tokens, plan.context)
        order = np.random.default_rng(plan.seed).permutation(len(rows_RT))
        with _progress(plan.steps, title) as show:
            for step in range(plan.steps):
                first = step * plan.rows_per_step
                chosen = order.take(range(first, first + plan.rows_per_step), mode="wrap")
                show(_train_step(model, rows_RT[chosen], optimisers, share=_rate(plan, step)))
        return model.eval()


def _llama_config(plan: ModelPlan, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=plan.width,
        intermediate_size=plan.width * 8 // 3 // 32 * 32,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=plan.max_length,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _optimisers(model: nn.Module, plan: ModelPlan) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=plan.muon_lr)
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["full_lr"] = group["lr"]
    return [muon, adam]


def _rows(tokens: Sequence[np.ndarray], context: int) -> torch.Tensor:
    """Every domain's ids cut into rows, int64 [R, T]; a domain's last, short row is left out."""
    cut = [ids[: len(ids) // context * context].reshape(-1, context) for ids in tokens]
    return torch.from_numpy(np.concatenate(cut).astype(np.int64))


def _rate(plan: ModelPlan, step: int) -> float:
    """The share of the full learning rate: a linear rise, then half a cosine to 2 %."""
    rise = min(1.0, (step + 1) / plan.warmup_steps)
    return rise * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / plan.steps)))


def _train_step(
    model: nn.Module,
    ids_BT: torch.Tensor,
    optimisers: Sequence[torch.optim.Optimizer],
    *,
    share: float,
) -> float:
    """One update; returns the loss in nats per token."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * group["full_lr"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


@contextmanager
def _own_torch_state(seed: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(min(MAX_THREADS, _num_cores()))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _num_cores() -> int:
    """Cores this process may use; a container's share on Linux."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress(steps: int, title: str) -> Iterator[Callable[[float], None]]:
    """Call with the loss after every step: a bar on a terminal, else a line every ten seconds."""
    began = shown = time.monotonic()
    done = 0

    def show(loss: float) -> None:
        nonlocal shown, done
        done += 1
        now = time.monotonic()
        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        bar.update()
        if bar.disable and (now - shown > LOG_EVERY_S or done == steps):
            shown = now
            left = (now - began) / done * (steps - done)
            line = f"{title}: step {done}/{steps}, loss {loss:.2f}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    with tqdm(total=steps, desc=title, unit="step", disable=not sys.stderr.isatty()) as bar:
        yield show
