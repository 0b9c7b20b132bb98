"""What a token costs on its way from teacher to student: bytes, time and error of every encoding.

`python -m tests.benchmarks.targets.wire` prints tables for the three scenes of `scenes`: the
reference teacher, V = 4,096; a teacher with the largest vocabulary that the text bears, V = 65,536,
trained first if `--folder` does not hold it; synthetic logits, V = 151,936. Times are processor
time of one thread; encoding is `encode` and `SoftTargets.build`, decoding `SoftTargets.arrays`.

N positions with loss   V head rows   K ids kept per position   D hidden width
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.targets.asks.ask import IdsEncoding
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.kernel.buckets import Buckets, teacher_distribution
from student_trainer.losses.terms.divergences import forward_kl
from teacher_service.scoring.answering import encode
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead, Selection, select
from tests.answers import Given, question_of
from tests.benchmarks.targets.scenes import (
    REFERENCE,
    Pair,
    print_profile,
    read_pair,
    reference_models,
    synthetic_scene,
    timed,
)
from tests.benchmarks.targets.wide_pair import wide_pair

SIZES = (64, 32)
ENCODINGS: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
WAYS_OF_IDS: tuple[IdsEncoding, ...] = ("plain", "elias_fano")
UNIT_ROWS, ROW_TOKENS = 8, 511
TEMPERATURES = (1.0, 4.0)
Selector = Literal["top_k", "threshold"]
SELECTORS: tuple[Selector, ...] = ("top_k", "threshold")
LOGPROBS = ("top_logprobs", "top_logprobs_range", "exact_logprobs", "exact_logprobs_range")


@dataclass(frozen=True)
class Cost:
    """One encoding of K ids of V: bytes of a position by column, and time per position."""

    vocab: int
    selector: str
    k: int
    encoding: str
    ids: str
    columns: dict[str, float]
    row_bytes: float  # of a row: its hash and where its lists end
    encode_s: float
    decode_s: float
    scoring_s: float  # what the teacher takes for the same positions

    @property
    def num_bytes(self) -> float:
        """Bytes of a position, all columns included, row overheads apart."""
        return sum(self.columns.values())

    @property
    def tokens_per_s(self) -> float:
        """Encoding and decoding together."""
        return 1 / (self.encode_s + self.decode_s)

    @property
    def share(self) -> float:
        """Encoding and decoding, of the time of scoring."""
        return (self.encode_s + self.decode_s) / self.scoring_s


@dataclass(frozen=True)
class Error:
    """What an encoding changes at a temperature: the teacher, and the gradient of the student's
    logits under forward KL."""

    k: int
    encoding: str
    temperature: float
    mean_kl: float  # nats, KL(exact || encoded) over the kept ids and the tail
    max_kl: float
    gradient: float  # norm of the difference over the norm, all positions together
    angle: float  # degrees, mean over positions


def selected(
    head: ScoringHead, hidden_ND: Tensor, label_N: Tensor, k: int, selector: Selector = "top_k"
) -> Selection:
    """What the teacher selects, as its engine hands it to the encoder."""
    vocab = len(head.weight_VD)
    if selector == "top_k":
        return select(
            hidden_ND, head, label_N, num_ids=k, shared_vocab=vocab, temperatures=TEMPERATURES
        )
    draw_from = torch.Generator().manual_seed(0)
    return draw(
        hidden_ND,
        head,
        label_N,
        uniform_NU=torch.rand(len(label_N), 1, generator=draw_from, dtype=torch.float64),
        selector=selector,
        num_ids=k,
        shared_vocab=vocab,
    )


def costs(
    found: Selection, selector: Selector, *, vocab: int, scoring_s: float, rounds: int
) -> Iterator[Cost]:
    """Every encoding of one selection, repeated to a unit of 8 rows of 511 tokens."""
    place = torch.arange(UNIT_ROWS * ROW_TOKENS) % len(found.ids_NK)
    unit = Selection(
        ids_NK=found.ids_NK[place],
        logprobs_NK=found.logprobs_NK[place],
        log_tail_NS=found.log_tail_NS[place, :1],
        label_logprob_N=found.label_logprob_N[place],
        entropy_N=None if found.entropy_N is None else found.entropy_N[place],
    )
    asked = {"selector": selector, "entropy": found.entropy_N is not None}
    k, num = found.ids_NK.shape[1], len(place)
    for ids in WAYS_OF_IDS:
        for encoding in ENCODINGS:
            spec = question_of(k, vocab, encoding=encoding, ids=ids, **asked)
            answer, encode_s = timed(lambda spec=spec: _built(spec, unit), rounds)
            _, decode_s = timed(answer.arrays, rounds)
            columns = _bytes_by_column(answer)
            yield Cost(
                vocab=vocab,
                selector=selector,
                k=k,
                encoding=encoding,
                ids=ids,
                columns=columns,
                row_bytes=(answer.num_bytes - num * sum(columns.values())) / UNIT_ROWS,
                encode_s=encode_s / num,
                decode_s=decode_s / num,
                scoring_s=scoring_s,
            )


def _built(spec: Question, found: Selection) -> SoftTargets:
    return SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=[bytes(16)] * UNIT_ROWS,
        num_targets_R=np.full(UNIT_ROWS, ROW_TOKENS),
        columns=encode(found, spec),
    )


def _bytes_by_column(answer: SoftTargets) -> dict[str, float]:
    """Bytes of a position in each list column, without the lists' ends."""
    num, table = UNIT_ROWS * ROW_TOKENS, answer.table
    names = [name for name in table.schema.names if name != "row_hash"]
    return {name: table.column(name).combine_chunks().flatten().nbytes / num for name in names}


def errors(pair: Pair, k: int) -> Iterator[Error]:
    """What fp16 and int8 change, against float32, on a pair in float64."""
    scene = pair.scene
    found = selected(pair.head, pair.hidden_ND, scene.label_N, k)
    decoded = {}
    for encoding in ENCODINGS:
        spec = question_of(k, scene.vocab, TEMPERATURES, encoding=encoding)
        decoded[encoding] = decoded(
            SoftTargets.build(
                question=spec,
                teacher={},
                row_hashes=[bytes(16)],
                num_targets_R=np.array([len(found.ids_NK)]),
                columns=encode(found, spec),
            )
        )
    for column, temperature in enumerate(TEMPERATURES):
        exact, exact_grad_NV = _pulled(decoded["fp32"], scene.student_NV, column)
        for encoding in ENCODINGS[1:]:
            coded, grad_NV = _pulled(decoded[encoding], scene.student_NV, column)
            kl_N = forward_kl(exact, coded)
            cosine_N = torch.cosine_similarity(grad_NV, exact_grad_NV, dim=1, eps=1e-30)
            yield Error(
                k=k,
                encoding=encoding,
                temperature=temperature,
                mean_kl=float(kl_N.mean()),
                max_kl=float(kl_N.max()),
                gradient=float((grad_NV - exact_grad_NV).norm() / exact_grad_NV.norm()),
                angle=float(torch.rad2deg(cosine_N.clamp(-1, 1).acos()).mean()),
            )


def _pulled(arrays: Given, student_NV: Tensor, column: int) -> tuple[Buckets, Tensor]:
    """The teacher's buckets, and the gradient of forward KL in the student's logits [N, V]."""
    temperature = TEMPERATURES[column]
    ids_NK = torch.tensor(arrays.ids_NK)
    teacher = teacher_distribution(
        torch.tensor(arrays.logprobs_NK).double(),
        torch.tensor(arrays.log_tail_NS[:, column]).double(),
        temperature=temperature,
    )
    logits_NV = student_NV.double().requires_grad_()
    log_q_NV = (logits_NV / temperature).log_softmax(1)
    tail_N = log_q_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
    loss = forward_kl(teacher, Buckets(log_q_NV.gather(1, ids_NK), tail_N)).sum()
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    return teacher, gradient_NV


def pair_costs(pair: Pair, *, rounds: int) -> list[Cost]:
    """A teacher's own answers; its layers and its selection are the scoring time."""
    label_N, vocab = pair.scene.label_N, pair.scene.vocab
    found: list[Cost] = []
    for selector, k in product(SELECTORS, SIZES):
        chosen, select_s = timed(
            lambda k=k, s=selector: selected(pair.head, pair.hidden_ND, label_N, k, s), rounds
        )
        scoring_s = pair.layers_s + select_s / len(label_N)
        found += costs(chosen, selector, vocab=vocab, scoring_s=scoring_s, rounds=rounds)
    return found


def synthetic_costs(logits_NV: Tensor, *, rounds: int) -> list[Cost]:
    """The scoring time is that of a head of 256 x V and the selection, without any layers."""
    num, vocab = logits_NV.shape
    label_N = torch.arange(num)
    exact = ScoringHead(logits_NV.T.contiguous())  # times an identity: these very logits
    dense = ScoringHead(torch.randn(vocab, 256) / 16)
    hidden_ND = torch.randn(num, 256) * 4
    found: list[Cost] = []
    for selector, k in product(SELECTORS, SIZES):
        chosen = selected(exact, torch.eye(num), label_N, k, selector)
        _, select_s = timed(
            lambda k=k, s=selector: selected(dense, hidden_ND, label_N, k, s), min(rounds, 2)
        )
        found += costs(chosen, selector, vocab=vocab, scoring_s=select_s / num, rounds=rounds)
    return found


def print_costs(found: list[Cost]) -> None:
    """Bytes by column and times."""
    print(
        "      V selector    k ids        log-p  ids B  log-p B  other B   B/token  B/row"
        "   encode us  decode us  tokens/s  of scoring"
    )
    for cost in found:
        columns = cost.columns
        logprobs = sum(columns.get(name, 0) for name in LOGPROBS)
        other = cost.num_bytes - columns["top_ids"] - logprobs
        print(
            f"{cost.vocab:7,} {cost.selector:9} {cost.k:3} {cost.ids:10} {cost.encoding:5} "
            f"{columns['top_ids']:6.0f} {logprobs:8.1f} {other:8.0f} "
            f"{cost.num_bytes:9.1f} {cost.row_bytes:6.1f} "
            f"{cost.encode_s * 1e6:11.2f} {cost.decode_s * 1e6:10.2f} {cost.tokens_per_s:9,.0f} "
            f"{cost.share:11.2%}"
        )


def print_errors(found: list[Error]) -> None:
    """What int8 and fp16 change."""
    print("  k log-p   T  mean KL   max KL   gradient error  angle in degrees")
    for error in found:
        print(
            f"{error.k:3} {error.encoding:5} {error.temperature:3.0f} {error.mean_kl:8.1e} "
            f"{error.max_kl:8.1e} {error.gradient:16.1e} {error.angle:17.3f}"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2, help="validation rows of each domain")
    parser.add_argument("--positions", type=int, default=96, help="of synthetic logits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the pair that is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        wide_models = wide_pair(REFERENCE, options.folder or cache)
        real = read_pair(REFERENCE, cache, reference_models(REFERENCE), rows=options.rows)
        wide = read_pair(REFERENCE, cache, wide_models, rows=options.rows)
    synthetic_NV = synthetic_scene(real.scene, num=options.positions).teacher_NV
    print("\nlogits      entropy   std  mean log-probability at rank 1 2 4 8 16 32 64 256 1024")
    print_profile("reference", real.scene.teacher_NV)
    print_profile("wide", wide.scene.teacher_NV)
    print_profile("synthetic", synthetic_NV)
    print(
        f"\n{len(real.hidden_ND):,} positions of the reference pair, {len(wide.hidden_ND):,} of "
        f"the wide one, {len(synthetic_NV)} synthetic ones, one thread"
    )
    print_costs(pair_costs(real, rounds=options.rounds))
    print_costs(pair_costs(wide, rounds=options.rounds))
    print_costs(synthetic_costs(synthetic_NV, rounds=options.rounds))
    print("\nAgainst fp32, the reference pair")
    print_errors([error for k in SIZES for error in errors(real, k)])


if __name__ == "__main__":
    main()
