"""Every divergence as its paper writes it, on plain probabilities, for numpy or torch float64.

N positions   M outcomes: all ids, or the kept ids and the tail
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from shared.config.losses import Loss

Array = Any  # numpy or torch, [N,M]

# Each kind with the parameters it is tested at, by a name.
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "soft_cross_entropy": {"kind": "soft_cross_entropy"},
    "jsd 0": {"kind": "jsd", "beta": 0.0, "continuous": False},
    "jsd .1": {"kind": "jsd", "beta": 0.1, "continuous": False},
    "jsd .5": {"kind": "jsd", "beta": 0.5, "continuous": False},
    "jsd .9": {"kind": "jsd", "beta": 0.9, "continuous": False},
    "jsd 1": {"kind": "jsd", "beta": 1.0, "continuous": True},
    "jsd .1 continuous": {"kind": "jsd", "beta": 0.1, "continuous": True},
    "jsd .5 continuous": {"kind": "jsd", "beta": 0.5, "continuous": True},
    "skew_forward_kl 0": {"kind": "skew_forward_kl", "alpha": 0.0},
    "skew_forward_kl .1": {"kind": "skew_forward_kl", "alpha": 0.1},
    "skew_forward_kl .5": {"kind": "skew_forward_kl", "alpha": 0.5},
    "skew_reverse_kl 0": {"kind": "skew_reverse_kl", "alpha": 0.0},
    "skew_reverse_kl .1": {"kind": "skew_reverse_kl", "alpha": 0.1},
    "skew_reverse_kl .5": {"kind": "skew_reverse_kl", "alpha": 0.5},
    "total_variation": {"kind": "total_variation"},
    "akl .5": {"kind": "akl", "mu": 0.5},
    "akl .9": {"kind": "akl", "mu": 0.9},
    "akl 1": {"kind": "akl", "mu": 1.0},
    "alpha_beta .2 .7": {"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    "alpha_beta 1 1": {"kind": "alpha_beta", "alpha": 1.0, "beta": 1.0},
    "alpha_beta 1.2 .1": {"kind": "alpha_beta", "alpha": 1.2, "beta": 0.1},
    "generalised_kl forward": {"kind": "generalised_kl", "direction": "forward"},
    "generalised_kl reverse": {"kind": "generalised_kl", "direction": "reverse"},
    "taid 0": {"kind": "taid", "teacher_share": 0.0},
    "taid .4": {"kind": "taid", "teacher_share": 0.4},
    "taid 1": {"kind": "taid", "teacher_share": 1.0},
}


def parameters(name: str) -> dict[str, Any]:
    """The keyword arguments of a case's function."""
    return {key: value for key, value in CASES[name].items() if key != "kind"}


def term(name: str, **options: Any) -> Any:
    """A case as the config's own section; temperature 1 unless given."""
    fields = {key: value for key, value in CASES[name].items() if key != "teacher_share"}
    return TypeAdapter(Loss).validate_python({"temperature": 1.0, **fields, **options})


def teacher_share(name: str) -> float:
    """The step's t where the case is TAID's."""
    return CASES[name].get("teacher_share", 1.0)


def textbook(name: str, p: Array, q: Array, *, tail: bool) -> Array:
    """A case's value [N]; `tail`: the last of the M outcomes is the tail."""
    return FORMULAS[CASES[name]["kind"]](p, q, tail=tail, **parameters(name))


def _log(x: Array) -> Array:
    return x.log() if isinstance(x, Tensor) else np.log(x)


def _constant(x: Array) -> Array:
    return x.detach() if isinstance(x, Tensor) else x


def _kl(p: Array, q: Array) -> Array:
    return (p * (_log(p) - _log(q))).sum(-1)


def _jsd(p: Array, q: Array, *, beta: float, continuous: bool) -> Array:
    if beta in (0, 1):
        return _kl(q, p) if beta else _kl(p, q)
    m = beta * p + (1 - beta) * q
    value = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    return value / (beta * (1 - beta)) if continuous else value


def _akl(p: Array, q: Array, *, mu: float, tail: bool) -> Array:
    """Position by position: walk down the teacher's ids until its mass exceeds mu."""
    values = []
    for p_M, q_M in zip(p, q, strict=True):
        ids = range(len(p_M) - tail)
        order = sorted(ids, key=lambda i: -float(p_M[i]))
        head, mass = [order[0]], float(p_M[order[0]])
        for i in order[1:]:
            mass += float(p_M[i])
            if mass > mu:
                break
            head.append(i)
        gap_M = abs(p_M - _constant(q_M))
        weight = 1.0 if mu == 1 else gap_M[head].sum() / gap_M.sum()
        values.append(weight * _kl(p_M, q_M) + (1 - weight) * _kl(q_M, p_M))
    return torch.stack(values) if isinstance(p, Tensor) else np.stack(values)


def _alpha_beta(p: Array, q: Array, *, alpha: float, beta: float) -> Array:
    a, b = alpha, beta
    parts = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -parts.sum(-1) / (a * b)


def _generalised_kl(p: Array, q: Array, *, direction: str, tail: bool) -> Array:
    if direction == "reverse":
        p, q = q, p
    if tail:
        p, q = p[..., :-1], q[..., :-1]
    return (p * (_log(p) - _log(q)) - p + q).sum(-1)


def _taid(p: Array, q: Array, *, teacher_share: float) -> Array:
    target = teacher_share * p + (1 - teacher_share) * _constant(q)
    return -(target * _log(q)).sum(-1)


def _blind(formula: Callable[..., Array]) -> Callable[..., Array]:
    """A formula to which the tail is an outcome like any other."""
    return lambda p, q, tail, **parameters: formula(p, q, **parameters)


FORMULAS: dict[str, Callable[..., Array]] = {
    "forward_kl": _blind(_kl),
    "reverse_kl": _blind(lambda p, q: _kl(q, p)),
    "soft_cross_entropy": _blind(lambda p, q: -(p * _log(q)).sum(-1)),
    "jsd": _blind(_jsd),
    "skew_forward_kl": _blind(lambda p, q, alpha: _kl(p, alpha * p + (1 - alpha) * q)),
    "skew_reverse_kl": _blind(lambda p, q, alpha: _kl(q, alpha * q + (1 - alpha) * p)),
    "total_variation": _blind(lambda p, q: abs(p - q).sum(-1) / 2),
    "akl": _akl,
    "alpha_beta": _blind(_alpha_beta),
    "generalised_kl": _generalised_kl,
    "taid": _blind(_taid),
}
