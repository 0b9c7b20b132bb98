"""Train the small models of the embedded default: plain torch, on two cores where there are two.

The matrices of the layers train with Muon, the rest with AdamW: in one pass over a small corpus
that reaches what AdamW alone needs several passes for. What is done is kept every few seconds.

R rows of the corpus   B rows of a step   T tokens of a row   V vocabulary
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.builtin.muon import Muon
from cluster.builtin.plans import ModelPlan
from cluster.builtin.team import Team, paired, partner
from cluster.session.interrupts import on_first_signal
from shared.errors import StoppedError, TutelageError

LOG_EVERY_S = 10.0
KEEP_EVERY_S = 10.0
MAX_THREADS = 8
TOKENS_FOR_TWO = 200_000  # fewer are learnt before a second process is up
JOB, ROWS, STATE = "job.json", "rows.npy", "state.pt"  # in the folder of a training


def train_model(
    plan: ModelPlan,
    tokens: Sequence[np.ndarray],
    *,
    vocab: int,
    title: str,
    folder: Path,
    processes: int | None = None,
) -> LlamaForCausalLM:
    """A Llama trained on `tokens`, one array of ids per domain; every row comes once per pass.

    `folder` is made, holds what is done, and goes at the end: the same call after an interruption
    continues from there, and the first signal keeps the step under way. `processes` is 1 or 2, by
    default as cores and tokens suggest. The number of threads and the random state are restored
    after. Raises TutelageError where the second process ends early, StoppedError after a signal.
    """
    rows_RT = _rows(tokens, plan.context)
    folder.mkdir(exist_ok=True)
    np.save(folder / ROWS, rows_RT)
    (folder / JOB).write_text(json.dumps([asdict(plan), vocab]))
    if processes is None:
        much = plan.steps * plan.rows_per_step * plan.context >= TOKENS_FOR_TWO
        processes = 2 if much and _num_cores() > 1 else 1
    stop = threading.Event()

    def ask() -> str:
        stop.set()
        return "the step under way is finished and kept; again, and the command ends at once"

    with (
        _team(folder, plan, vocab, processes) as team,
        _progress(plan, title) as show,
        on_first_signal(ask),
    ):
        model = _train(_Job(plan, vocab, rows_RT), folder, team, show, stop, title)
    shutil.rmtree(folder)
    return model


@dataclass(frozen=True, slots=True)
class _Job:
    plan: ModelPlan
    vocab: int
    rows_RT: np.ndarray

    @staticmethod
    def read(folder: Path) -> "_Job":
        plan, vocab = json.loads((folder / JOB).read_text())
        plan = ModelPlan(**plan | {"domains": tuple(plan["domains"])})
        return _Job(plan, vocab, np.load(folder / ROWS))


@contextmanager
def _team(folder: Path, plan: ModelPlan, vocab: int, processes: int) -> Iterator[Team]:
    if processes == 1:
        yield Team()
        return
    with torch.device("meta"):
        size = sum(p.numel() for p in LlamaForCausalLM(_llama_config(plan, vocab)).parameters())
    with paired(__name__, [str(folder)], folder, numbers=size) as team:
        yield team


def _train(
    job: _Job,
    folder: Path,
    team: Team,
    show: Callable[[int, float], None],
    stop: threading.Event,
    title: str = "",
) -> LlamaForCausalLM:
    """All steps from the last that is kept; every process of a team calls it. Raises StoppedError
    where `stop` is set, once what is done is kept."""
    plan = job.plan
    with _own_torch_state(plan.seed, team.size):
        model = LlamaForCausalLM(_llama_config(plan, job.vocab))
        optimisers = _optimisers(model, plan, team)
        order = np.random.default_rng(plan.seed).permutation(len(job.rows_RT))
        done, kept = _restored(folder, model, optimisers), time.monotonic()
        for step in range(done, plan.steps):
            if stop.is_set():
                _keep(folder, model, optimisers, done=step)
                raise StoppedError(
                    f"Stopped after step {step} of {plan.steps} of the {title}'s training, which "
                    "is kept; the same command continues from there."
                )
            first = step * plan.rows_per_step
            chosen = order.take(range(first, first + plan.rows_per_step), mode="wrap")
            ids_BT = torch.from_numpy(job.rows_RT[chosen].astype(np.int64))
            loss = _train_step(model, ids_BT, optimisers, team, share=_rate(plan, step))
            show(step + 1, loss)
            if team.rank == 0 and time.monotonic() - kept > KEEP_EVERY_S:
                _keep(folder, model, optimisers, done=step + 1)
                kept = time.monotonic()
        return model.eval()


def _keep(
    folder: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], *, done: int
) -> None:
    """Write the state after `done` steps, whole or not at all."""
    state = [done, model.state_dict(), [optimiser.state_dict() for optimiser in optimisers]]
    scratch = folder / f"{STATE}.partial"
    torch.save(state, scratch)
    scratch.replace(folder / STATE)


def _restored(folder: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Load what `_keep` wrote; returns the steps done, 0 where there is nothing."""
    if not (folder / STATE).exists():
        return 0
    done, weights, states = torch.load(folder / STATE, weights_only=True)
    model.load_state_dict(weights)
    for optimiser, state in zip(optimisers, states, strict=True):
        optimiser.load_state_dict(state)
    return done


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


def _optimisers(model: nn.Module, plan: ModelPlan, team: Team) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=plan.muon_lr, dtype=_fast_dtype(), team=team)
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["full_lr"] = group["lr"]
    return [muon, adam]


def _fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _rows(tokens: Sequence[np.ndarray], context: int) -> np.ndarray:
    """Every domain's ids cut into rows [R, T]; a domain's last, short row is left out."""
    return np.concatenate([i[: len(i) // context * context].reshape(-1, context) for i in tokens])


def _rate(plan: ModelPlan, step: int) -> float:
    """The share of the full learning rate: a linear rise, then half a cosine to 2 %."""
    rise = min(1.0, (step + 1) / plan.warmup_steps)
    return rise * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / plan.steps)))


def _train_step(
    model: nn.Module,
    ids_BT: torch.Tensor,
    optimisers: Sequence[torch.optim.Optimizer],
    team: Team,
    *,
    share: float,
) -> float:
    """One update; returns the loss of this process's rows in nats per token."""
    own_BT = ids_BT[team.rank :: team.size]
    dtype = _fast_dtype()
    with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
        logits_BTV = model(input_ids=own_BT, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), own_BT[:, 1:].flatten())
    (loss * len(own_BT) / len(ids_BT)).backward()
    _add_up_gradients(model, team)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * group["full_lr"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def _add_up_gradients(model: nn.Module, team: Team) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    team.add_up(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def _own_torch_state(seed: int, processes: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(max(1, min(MAX_THREADS, _num_cores() // processes)))
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
def _progress(plan: ModelPlan, title: str) -> Iterator[Callable[[int, float], None]]:
    """Call with the steps done and the loss after every step: a bar on a terminal, else a line
    every ten seconds."""
    shown, first, began = time.monotonic(), 0, 0.0

    def show(done: int, loss: float) -> None:
        nonlocal shown, first, began
        now = time.monotonic()
        if not began:
            first, began = done, now
            bar.initial = bar.n = done - 1
        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        bar.update()
        if bar.disable and (now - shown > LOG_EVERY_S or done == plan.steps):
            shown = now
            left = (now - began) / max(1, done - first) * (plan.steps - done)
            line = f"{title}: step {done}/{plan.steps}, loss {loss:.2f}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    off = not sys.stderr.isatty()
    with tqdm(total=plan.steps, desc=title, unit="step", disable=off) as bar:
        yield show


def _take_part(folder: Path) -> None:
    """What the second process runs; it ends with the first."""
    with suppress(TutelageError):
        _train(_Job.read(folder), folder, partner(folder), lambda *_: None, threading.Event())


if __name__ == "__main__":
    _take_part(Path(sys.argv[1]))
