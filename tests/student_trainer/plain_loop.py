"""A plain loop of `transformers`, torch's AdamW and `transformers`' schedules, in float64.

The trainer is held against it: nothing here is the product's, but for the options it reads from a
config. Documents are read one by one, unpadded and unpacked, and a step is one backward pass.

N positions with loss of a document   V vocabulary   M ids kept, and their tail
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from shared.config.losses import TAID, Loss
from shared.config.models.student import LoRATraining
from shared.config.run import Config
from shared.data.row_store import RaggedRows


@dataclass(frozen=True)
class Document:
    """Token ids, and where among the positions before the last the next token is learnt."""

    ids_T: Tensor
    index_N: Tensor

    @property
    def label_N(self) -> Tensor:
        return self.ids_T[self.index_N + 1]


@dataclass
class Outcome:
    """What the loop did: a dictionary for every step, and the weights at its end."""

    steps: list[dict] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    nll: float = 0.0  # of validation text at the end, nats per token
    kl: float = 0.0  # KL(teacher || student) there, over the whole vocabulary


def documents_of(rows: RaggedRows) -> list[Document]:
    """The documents of rows that have loss anywhere."""
    found = []
    for ids, starts, mask in zip(rows.input_ids, rows.doc_starts, rows.loss_masks, strict=True):
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            index_N = torch.from_numpy(mask[start:stop].nonzero()[0])
            found.append(Document(torch.from_numpy(ids[start:stop].astype("int64")), index_N))
    return [document for document in found if len(document.index_N)]


def plain_loop(
    config: Config, *, train: RaggedRows, validation: RaggedRows, kept: int | None
) -> Outcome:
    """Train on all of `train` at every step. `kept`: ids per position that the losses see, with one
    bucket for all others; None: the whole vocabulary."""
    model = _student(config)
    teacher = _load(config.teachers["t"].model)
    optimiser, rates = adamw(model, config), rates_of(config)
    documents, out, target = documents_of(train), Outcome(), Target.start(config)
    with torch.no_grad():
        teachers = [_logits(teacher, document) for document in documents]
    tokens = sum(len(document.index_N) for document in documents)
    for step in range(config.steps):
        sums = [torch.zeros((), dtype=torch.float64) for _ in config.losses]
        kl = 0.0
        for document, teacher_NV in zip(documents, teachers, strict=True):
            student_NV = _logits(model, document)
            for place, term in enumerate(config.losses):
                value_N = value_of(term, teacher_NV, student_NV, document.label_N, kept, target.t)
                sums[place] = sums[place] + value_N.sum()
            kl += float(_kl(*buckets(teacher_NV, student_NV.detach(), kept, temperature=1.0)).sum())
        pairs = zip(config.losses, sums, strict=True)
        loss = torch.stack([term.weight * total for term, total in pairs]).sum() / tokens
        optimiser.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        limit = config.optimiser.clip_norm
        norm = nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit)
        for group in optimiser.param_groups:
            group["lr"] = rates[step]
        optimiser.step()
        terms = [float(total.detach()) / tokens for total in sums]
        target.follow(terms, config, step)
        said = {
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "lr": rates[step],
            "kl": kl / tokens,
        }
        out.steps.append(said | {"tokens": tokens, "terms": terms, "t": target.t})
    out.weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    out.nll, out.kl = _evaluated(model, teacher, documents_of(validation))
    return out


def value_of(
    term: Loss, teacher_NV: Tensor, student_NV: Tensor, label_N: Tensor, kept: int | None, t: float
) -> Tensor:
    """A loss at every position, nats [N]."""
    if term.kind == "cross_entropy":
        return F.cross_entropy(student_NV, label_N, reduction="none")
    p_NM, q_NM = buckets(teacher_NV, student_NV, kept, temperature=term.temperature)
    if isinstance(term, TAID):
        target_NM = t * p_NM.exp() + (1 - t) * q_NM.detach().exp()
        value_N = -(target_NM * q_NM).sum(-1)
    else:
        assert term.kind == "forward_kl"
        value_N = _kl(p_NM, q_NM)
    return value_N * (term.temperature**2 if term.times_temperature_squared else 1.0)


def buckets(
    teacher_NV: Tensor, student_NV: Tensor, kept: int | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's likeliest ids and of all others together [N, M]."""
    p_NV, q_NV = (x.div(temperature).log_softmax(-1) for x in (teacher_NV, student_NV))
    if kept is None:
        return p_NV, q_NV
    ids_NK = teacher_NV.topk(kept, dim=-1).indices
    outside_NV = torch.ones_like(p_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    p_NM, q_NM = (
        torch.cat(
            [x.gather(1, ids_NK), x.masked_fill(~outside_NV, -math.inf).logsumexp(-1, True)], 1
        )
        for x in (p_NV, q_NV)
    )
    return p_NM, q_NM


@dataclass
class Target:
    """TAID's t (arXiv 2501.16937, Algorithm 1)."""

    t: float = 1.0
    momentum: float = 0.0
    last: float | None = None

    @staticmethod
    def start(config: Config) -> "Target":
        starts = [term.t_start for term in config.losses if isinstance(term, TAID)]
        return Target(*starts)

    def follow(self, losses: Sequence[float], config: Config, step: int) -> None:
        """Take in the losses of a step, each unweighted."""
        for term, loss in zip(config.losses, losses, strict=True):
            if not isinstance(term, TAID):
                continue
            if self.last is not None:
                fall = (self.last - loss) / (self.last + 1e-15)
                self.momentum = term.beta * self.momentum + (1 - term.beta) * fall
                grown = self.t + term.alpha * (1 - self.t) / (1 + math.exp(-self.momentum))
                line = term.t_start + (term.t_end - term.t_start) * step / config.steps
                self.t = min(term.t_end, max(line, grown))
            self.last = loss


def _kl(p_NM: Tensor, q_NM: Tensor) -> Tensor:
    return (p_NM.exp() * (p_NM - q_NM)).sum(-1)


def _load(folder: str) -> nn.Module:
    """A model in float64, its weights as they were saved in float32."""
    found = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32)
    return found.double().eval()


def _student(config: Config) -> nn.Module:
    train = config.student.train
    model = _load(config.student.model)
    if not isinstance(train, LoRATraining):
        return model
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=train.r, lora_alpha=train.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model.float(), lora).double()


def _logits(model: nn.Module, document: Document) -> Tensor:
    whole_TV = model(input_ids=document.ids_T[None], use_cache=False).logits[0]
    return whole_TV[document.index_N].double()


def adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser of a config over what trains. Biases and norms do not decay."""
    options = config.optimiser
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if "norm" in name.lower() or name.endswith("bias")]
    decayed = [p for _, p in named if all(p is not other for other in plain)]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def rates_of(config: Config) -> list[float]:
    """The rate of every step. `transformers` starts its warm-up at 0 and reaches the floor after
    the last step; here the first step moves already, and the last is taken at the floor."""
    options, steps = config.optimiser, config.steps
    warmup, floor = options.warmup_steps, options.final_lr_fraction
    dummy = torch.optim.SGD([torch.zeros(1)], lr=options.lr)
    shape = {"num_warmup_steps": warmup, "num_training_steps": steps - 1}
    match options.schedule:
        case "constant":
            schedule = get_constant_schedule_with_warmup(dummy, warmup)
        case "linear":
            schedule = get_polynomial_decay_schedule_with_warmup(
                dummy, **shape, lr_end=floor * options.lr, power=1.0
            )
        case "cosine":
            schedule = get_cosine_with_min_lr_schedule_with_warmup(
                dummy, **shape, min_lr_rate=floor
            )
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        dummy.step()
        schedule.step()
    return [rates[step + 1 if step < warmup else step] for step in range(steps)]


@torch.no_grad()
def _evaluated(
    model: nn.Module, teacher: nn.Module, documents: Sequence[Document]
) -> tuple[float, float]:
    nll = kl = tokens = 0.0
    for document in documents:
        student_NV, teacher_NV = _logits(model, document), _logits(teacher, document)
        nll += float(F.cross_entropy(student_NV, document.label_N, reduction="sum"))
        kl += float(_kl(*buckets(teacher_NV, student_NV, None, temperature=1.0)).sum())
        tokens += len(document.index_N)
    return nll / tokens, kl / tokens
