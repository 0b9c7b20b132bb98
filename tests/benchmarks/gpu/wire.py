"""What an answer takes to be encoded where it was found and decoded on the student's host.

N positions   K ids kept   V vocabulary
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch

from tests.benchmarks.gpu.sections import Case, Numbers, timed
from tests.benchmarks.gpu.sizes import Sizes

Encoding = Literal["fp16", "int8"]


def cases(sizes: Sizes, device: torch.device) -> Mapping[str, Case]:
    """Both encodings."""
    return {name: partial(encoded, name, sizes, device) for name in ("fp16", "int8")}


def encoded(encoding: Encoding, sizes: Sizes, device: torch.device) -> Numbers:
    """Seconds to encode and to decode, bytes of a position, and that what was chosen comes back:
    its ids, and its log-probabilities within what the encoding rounds, in nats."""
    # Here, since these need pyarrow and xxhash, which other sections do without.
    from shared.targets.asks.kept_ids import LikeliestIds
    from shared.targets.codec.decoding import logprobs_from_int8
    from shared.targets.codec.elias_fano import EliasFano
    from shared.targets.question import Question
    from teacher_service.scoring.answering import encode
    from teacher_service.scoring.scoring import ScoringHead, select

    num, _, vocabulary = sizes.loss
    width = 64
    torch.manual_seed(0)
    hidden_ND = torch.randn(num, width, device=device)
    head = ScoringHead(torch.randn(vocabulary, width, device=device).mul_(2 / width**0.5))
    label_N = torch.randint(vocabulary, (num,), device=device)
    found = select(hidden_ND, head, label_N, num_ids=sizes.top_k, shared_vocab=vocabulary)
    spec = Question(LikeliestIds(sizes.top_k, vocabulary, encoding=encoding))
    numbers = timed(lambda: encode(found, spec), device, sizes.rounds)
    columns = encode(found, spec)
    began = time.perf_counter()
    ids_NK = EliasFano(sizes.top_k, vocabulary).decode(columns["top_ids"])
    if encoding == "int8":
        range_N, tail_N = columns["top_logprobs_range"], columns["log_tail"][:, 0]
        logprobs_NK = logprobs_from_int8(columns["top_logprobs"], range_N, tail_N)
    else:
        logprobs_NK = columns["top_logprobs"].astype(np.float32)
    decode_s = time.perf_counter() - began
    order_NK = found.ids_NK.argsort(1)
    off_NK = found.logprobs_NK.gather(1, order_NK).cpu().numpy() - logprobs_NK
    same = np.array_equal(ids_NK, found.ids_NK.gather(1, order_NK).cpu().numpy())
    return {
        "encode": numbers,
        "decode_s": decode_s,
        "bytes_per_position": sum(column.nbytes for column in columns.values()) / num,
        "same_ids": same,
        "logprob_error": float(np.abs(off_NK).max()),
    }
