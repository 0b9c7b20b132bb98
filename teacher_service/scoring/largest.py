"""The largest logits of every row and their ids, sooner than `topk` finds them. Needs torch alone.

C positions of a chunk   V ids   K that are kept   G groups of ids   P members of each
X candidates
"""

import math

import numpy as np
import torch
from torch import Tensor

FEW_LOGITS = 2048  # among which looking in groups is no faster
BEYOND_FLOAT32 = 2.0**1000  # a float64 that is infinite as float32
ID_BITS = 2**28 - 1  # the lowest bits of a float64, which are less than half a float32's last bit


def largest(logits_CV: Tensor, size: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The `size` largest of every row and their ids [C, K], largest first unless they need not be
    `ordered`; which of equal ones is as good as chance, and the same each time.

    They lie within the `size` groups of ids whose own largest are the largest, and those groups are
    looked for in the same way, so that `topk`, which takes several times as long as another pass
    over V, sees few numbers.
    """
    vocab = logits_CV.shape[1]
    members = 2 ** round(math.log2(max(1, vocab // max(1, size))) / 2)  # of a group: the least work
    if members == 1 or size == 0 or vocab <= FEW_LOGITS:
        return largest_of_few(logits_CV, size, ordered=ordered)
    groups = vocab // members
    grouped_CPG = logits_CV[:, : members * groups].unflatten(1, (members, groups))
    group_C1K = largest(grouped_CPG.amax(1), size, ordered=False)[1][:, None]
    member_P1 = torch.arange(members, device=logits_CV.device)[:, None]
    ids_CX = (group_C1K + member_P1 * groups).flatten(1)
    if members * groups < vocab:
        left = torch.arange(members * groups, vocab, device=logits_CV.device)
        ids_CX = torch.cat([ids_CX, left.expand(len(ids_CX), -1)], dim=1)
    values_CK, place_CK = largest(logits_CV.gather(1, ids_CX), size, ordered=ordered)
    return values_CK, ids_CX.gather(1, place_CK)


def largest_of_few(
    logits_CX: Tensor, size: int, *, ordered: bool, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `topk`, with `ids`, which broadcast to the logits, for their places; on a CPU by numpy's
    partition of float64, which is several times as fast.

    The bits that a float64 has beyond a float32 hold the id, so that values need no company: they
    are too few to change how it is rounded to float32. Infinities have no such bits.
    """
    if logits_CX.device.type != "cpu":
        values_CK, place_CK = logits_CX.topk(size, sorted=ordered)
        return values_CK, place_CK if ids is None else ids.expand_as(logits_CX).gather(1, place_CK)
    num = logits_CX.shape[1]
    keyed_CX = logits_CX.double().clamp_(-BEYOND_FLOAT32, BEYOND_FLOAT32)
    keyed_CX.view(torch.int64).bitwise_or_(torch.arange(num) if ids is None else ids)
    keyed_CK = np.partition(keyed_CX.numpy(), num - max(1, size), axis=1)[:, num - size :]
    if ordered:
        keyed_CK = np.sort(keyed_CK, axis=1)[:, ::-1]
    keyed_CK = torch.from_numpy(keyed_CK.copy())
    return keyed_CK.float(), keyed_CK.view(torch.int64) & ID_BITS
