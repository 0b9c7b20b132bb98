"""Scoring, selectors and losses on small shapes, against float64.

The exact answer is made of the same numbers, products included, in float64; so an error in bfloat16
is that of logits which the model itself would have rounded. Of losses, forward KL is compared with
full logits and the others with the same code in float64, which the suite compares with full logits.

N positions   D width   V vocabulary   K ids kept   S temperatures
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead, Selection, select
from tests.benchmarks import losses
from tests.benchmarks.gpu.product import loss_of, targets_of
from tests.benchmarks.gpu.sections import Case, Numbers, conforms
from tests.benchmarks.gpu.sizes import Sizes

TEMPERATURES = (1.0, 2.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCORING_BAR = {"fp32": 1e-4, "bf16": 5e-2}  # nats
LOSS_BAR = {"fp32": 1e-5, "bf16": 2e-2}  # relative
SECTIONS: dict[str, dict[str, object]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5, "continuous": False},
    "skew_forward_kl": {"alpha": 0.1},
    "total_variation": {},
    "cross_entropy": {},
}


def cases(sizes: Sizes, device: torch.device) -> Mapping[str, Case]:
    """Of both types: three selectors and every loss of `SECTIONS`."""
    found: dict[str, Case] = {}
    for name in DTYPES:
        for selector in ("top_k", "threshold", "sampled"):
            found[f"{selector} {name}"] = partial(scoring, selector, name, sizes, device)
        for kind in SECTIONS:
            found[f"{kind} {name}"] = partial(loss, kind, name, sizes, device)
    return found


def scoring(selector: str, name: str, sizes: Sizes, device: torch.device) -> Numbers:
    """A selector's largest errors in nats. `missed`: by how much an id that is left out is more
    likely than one that is kept, of a selector by rank."""
    num, width, vocabulary = sizes.checked
    torch.manual_seed(0)
    made = {"device": device, "dtype": DTYPES[name]}
    hidden_ND = torch.randn(num, width, **made)
    head = ScoringHead(torch.randn(vocabulary, width, **made).mul_(2 / width**0.5))
    label_N = torch.randint(vocabulary, (num,), device=device)
    log_p_NV = torch.log_softmax(hidden_ND.double() @ head.weight_VD.double().t(), -1)
    if selector == "top_k":
        found = select(
            hidden_ND,
            head,
            label_N,
            num_ids=sizes.top_k,
            shared_vocab=vocabulary,
            temperatures=TEMPERATURES,
            entropy=True,
        )
        errors = by_rank(found, log_p_NV)
    else:
        count = sizes.top_k if selector == "sampled" else 1
        found = draw(
            hidden_ND,
            head,
            label_N,
            uniform_NU=torch.rand(num, count, dtype=torch.float64, device=device),
            selector="sampled" if selector == "sampled" else "threshold",
            num_ids=sizes.top_k,
            shared_vocab=vocabulary,
        )
        errors = drawn(found, log_p_NV)
    assert found.entropy_N is not None, "it was asked for"
    entropy_N = torch.special.entr(log_p_NV.exp()).sum(-1)
    errors["label"] = largest(found.label_logprob_N - log_p_NV.gather(1, label_N[:, None])[:, 0])
    errors["entropy"] = largest(found.entropy_N - entropy_N)
    return conforms(errors, bar=SCORING_BAR[name])


def by_rank(found: Selection, log_p_NV: Tensor) -> dict[str, float]:
    """Errors of log-probabilities, tails at every temperature, and of the choice."""
    chosen_NK = log_p_NV.gather(1, found.ids_NK)
    errors = {"logprobs": largest(found.logprobs_NK - chosen_NK)}
    for column, temperature in enumerate(TEMPERATURES):
        scaled_NV = torch.log_softmax(log_p_NV / temperature, -1)
        tail_N = scaled_NV.scatter(1, found.ids_NK, -torch.inf).logsumexp(-1)
        errors[f"tail at {temperature:g}"] = largest(found.log_tail_NS[:, column] - tail_N)
    best_NK = log_p_NV.topk(found.ids_NK.shape[1]).values
    errors["missed"] = largest(best_NK[:, -1] - chosen_NK.amin(1))
    return errors


def drawn(found: Selection, log_p_NV: Tensor) -> dict[str, float]:
    """Errors of what is kept exactly and of the mass that is not."""
    exact_NK = found.logprobs_NK > -torch.inf
    chosen_NK = log_p_NV.gather(1, found.ids_NK)
    off_NK = torch.where(exact_NK, found.logprobs_NK - chosen_NK, 0.0)
    known_NK = exact_NK if exact_NK.any() else torch.ones_like(exact_NK)  # sampled: all drawn ones
    known_NV = torch.zeros_like(log_p_NV, dtype=torch.int32)
    known_NV.scatter_add_(1, found.ids_NK, known_NK.int())
    tail_N = log_p_NV.masked_fill(known_NV > 0, -torch.inf).logsumexp(-1)
    return {"logprobs": largest(off_NK), "tail": largest(found.log_tail_NS[:, 0] - tail_N)}


def largest(error: Tensor) -> float:
    """The largest absolute value."""
    return float(error.abs().max())


def loss(kind: str, name: str, sizes: Sizes, device: torch.device) -> Numbers:
    """Relative errors of the value and the gradients, over the whole vocabulary and over ids."""
    num, width, vocabulary = sizes.checked
    dtype = str(DTYPES[name]).removeprefix("torch.")
    size = losses.Size(num, width, vocabulary, dtype=dtype, device=device.type)
    problem = losses.Problem.random(size)
    errors = {}
    for task in losses.EXACT:
        call = partial(ours, task=task, kind=kind)
        exact_call = losses.EXACT[task] if kind == "forward_kl" else call
        pairs = zip(outcome(call, problem), outcome(exact_call, problem.in_float64()), strict=True)
        for part, pair in zip(("value", "states", "head"), pairs, strict=True):
            errors[f"{task}, {part}"] = losses.relative_error(*pair)
    return conforms(errors, bar=LOSS_BAR[name])


def outcome(call: losses.Loss, problem: losses.Problem) -> list[Tensor]:
    """The value and both gradients."""
    value = call(problem)
    return [value.detach(), *torch.autograd.grad(value, [problem.hidden_ND, problem.weight_VD])]


def ours(problem: losses.Problem, *, task: str, kind: str) -> Tensor:
    """The product's loss of a kind."""
    return loss_of(
        problem.hidden_ND,
        problem.weight_VD,
        problem.label_N,
        kind=kind,
        targets=targets_of(problem, task),
        **SECTIONS[kind],
    )
