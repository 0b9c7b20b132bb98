"""A teacher spread over a group of processes, by the plan that transformers has for its family.

Every process of a group loads its part of each matrix and makes the same calls in the same order;
what they exchange within a call is transformers' part, and `scoring/vocab.py`'s of the head.

V head rows   D hidden width
"""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

from shared.errors import ConfigError
from shared.loading import stored_as
from teacher_service.scoring.scoring import ScoringHead
from teacher_service.scoring.vocab import VocabShard

_Store: Any = dist.TCPStore  # type: ignore[attr-defined]
LOAD_S = 1800.0  # until the slowest process has read its weights
STALL_S = 300.0  # that processes wait for one of them in the middle of a unit
# Model types whose plan computes something else than the model (hrm_text), or ends in an error of
# torch or transformers, which tests/families finds out.
UNSOUND = ("hrm_text", "doge", "gemma4_text", "inkling_text", "sarvam_moe")
QUERIES = ("q_proj", "qkv_proj", "query_key_value")  # whose columns are those of whole heads


def listen(host: str) -> tuple[Any, int]:
    """Where the processes of a group find each other, on the leader's node, and the port."""
    timeout = timedelta(seconds=LOAD_S)
    store: Any = _Store(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, store.port


def reach(host: str, port: int) -> Any:
    """The store on which the leader of a group listens."""
    return _Store(host, port, is_master=False, timeout=timedelta(seconds=LOAD_S))


def join(store: Any, rank: int, size: int, *, on_gpu: bool, stall_s: float = STALL_S) -> None:
    """Make this process one of a group. From then on, one that waits for another for longer than
    `stall_s` in the middle of a call fails."""
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=stall_s),
        device_id=torch.device("cuda", 0) if on_gpu else None,
    )


def leave() -> None:
    """Leave the group, so that processes that wait for this one fail at once."""
    dist.destroy_process_group()


def meet() -> None:
    """Wait until every process of the group has come here, however long it reads its weights."""
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=LOAD_S))
    dist.barrier(patient)
    dist.destroy_process_group(patient)


def is_spread(model: Any) -> bool:
    """Whether a model is spread over the group that this process has joined."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def leads(model: Any) -> bool:
    """Whether this process answers for its group; without one it does."""
    return not is_spread(model) or dist.get_rank() == 0


def layout() -> str:
    """How many processes, and on how many nodes if on several: sums over them are rounded in
    another order there."""
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, socket.gethostname())
    different = len(set(nodes))
    return f"{len(nodes)}" + (f" on {different} nodes" if different > 1 else "")


def refuse_unsplittable(
    config: Any, size: int, *, section: str, adapter: str | None = None
) -> None:
    """Raise ConfigError for a model, by its config of transformers, that is not spread over so many
    processes."""
    text, asked = config.get_text_config(), f"{section}.tensor_parallel is {size}"
    if (plan := has_plan(config)) is None:
        raise ConfigError(
            f"{asked}, and the installed transformers has no sound plan for {text.model_type} "
            f"models; leave it at 1: the layers then lie one after the other on {section}.gpus, "
            "which is slower"
        )
    if adapter is not None:
        raise ConfigError(
            f"{asked}, and the adapter {adapter} on the model is not split; merge it into the "
            "model, or leave tensor_parallel at 1"
        )
    if (stored := stored_as(config)) is not None:
        raise ConfigError(
            f"{asked}, and the model's weights are stored {stored}; leave it at 1, or name an "
            "unquantised model"
        )
    heads, pairs = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    split = any(name.endswith(QUERIES) and style == "colwise" for name, style in plan.items())
    if split and heads % size:
        raise ConfigError(
            f"{asked}, which does not divide the model's {heads} attention heads; take one of "
            f"{_divisors(heads, pairs or heads)}"
        )
    if pairs is not None and get_kv_heads_per_rank(plan, pairs, size) is None:
        raise ConfigError(
            f"{asked}, which does not divide the model's {pairs} key-value heads; take one of "
            f"{_divisors(heads, pairs)}"
        )


def has_plan(config: Any) -> dict[str, str] | None:
    """How transformers spreads a model of this config, layer by layer; None where it does not, or
    not as it should."""
    text = config.get_text_config()
    return None if text.model_type in UNSOUND else text.base_model_tp_plan or None


def layered_note(name: str, config: Any, num_gpus: int) -> str:
    """What is said of a teacher whose layers lie on several GPUs."""
    said = (
        f"The layers of the teacher {name} lie on {num_gpus} GPUs one after the other, so that one "
        "of them computes at a time, which is slower than "
    )
    if has_plan(config) is None:
        return f"{said}all together, for which transformers has no sound plan of this model."
    return f"{said}all together: set tensor_parallel={num_gpus}."


def sharded(head: ScoringHead) -> ScoringHead:
    """The rows of a head that this process holds, of one that transformers spread by rows or by
    columns, or left whole in every process."""
    rows, size, rank = head.weight_VD.shape[0], dist.get_world_size(), dist.get_rank()
    widest = -(-rows // size)
    first = min(rows, rank * widest)
    weight_VD, bias_V = _held(head.weight_VD, first, widest), head.bias_V
    bias_V = None if bias_V is None else _held(bias_V, first, widest)
    assert dist.group.WORLD is not None, "the process has joined a group"
    shard = VocabShard(rows, first, len(weight_VD), dist.group.WORLD)
    return ScoringHead(weight_VD, bias_V, head.logit_scale, head.soft_cap, shard)


def _held(rows_V: Tensor, first: int, widest: int) -> Tensor:
    if isinstance(rows_V, DTensor):
        return rows_V.redistribute(placements=[Shard(0)]).to_local().detach()
    return rows_V[first : first + widest].detach()


def _divisors(*numbers: int) -> str:
    common = [n for n in range(1, min(numbers) + 1) if not any(number % n for number in numbers)]
    return ", ".join(map(str, common))
