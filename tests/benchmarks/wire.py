"""What a token costs on its way from teacher to student: bytes, time and error of every encoding.

`python -m tests.benchmarks.wire` prints three tables. Real: the reference teacher and student on
validation text of all domains, V = 4,096. Synthetic: V = 151,936, from `synthetic_logits`. Times
are processor time of one thread; encoding is `SoftTargets.build`, decoding `SoftTargets.arrays`.

N positions with loss   V head rows   K ids kept per position   D hidden width
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.commands import load
from cluster.preparation import prepare_run
from shared.layout import lay_out
from shared.row_store import RowStore
from shared.rows import Rows
from shared.soft_targets import SoftTargets, TargetArrays
from shared.target_spec import IdsEncoding, TargetSpec
from student_trainer.losses.buckets import Buckets, teacher_distribution
from student_trainer.losses.divergences import forward_kl
from teacher_service.drawing import draw
from teacher_service.engine import HFEngine
from teacher_service.scoring import Head, select
from tests.drawn import arrays_of

PROJECT = Path(__file__).resolve().parents[2]
REFERENCE = PROJECT.parent / "shared"
RECIPE = PROJECT / "cluster" / "recipes" / "real_text.yaml"

LARGE_VOCAB = 151_936
SIZES = (64, 32)
ENCODINGS: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
WAYS_OF_IDS: tuple[IdsEncoding, ...] = ("plain", "elias_fano")
UNIT_ROWS, ROW_TOKENS = 8, 511
TEMPERATURES = (1.0, 4.0)
Selector = Literal["top_k", "threshold"]
SELECTORS: tuple[Selector, ...] = ("top_k", "threshold")
LOGPROBS = ("top_logprobs", "top_logprobs_range", "exact_logprobs", "exact_logprobs_range")

T = TypeVar("T")


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


@dataclass(frozen=True)
class Real:
    """The reference pair on validation text."""

    logits_NV: Tensor  # float32, of the teacher
    student_NV: Tensor
    hidden_ND: Tensor  # of the teacher's last layer
    head: Head
    label_N: Tensor
    layers_s: float  # processor time of the teacher's layers per position


def reference_pair(
    reference: Path, cache: Path, *, rows: int
) -> tuple[list[Rows], HFEngine, HFEngine]:
    """`rows` validation rows of every domain, and both models."""
    settings = [f"paths.root={reference}", f"paths.cache={cache}", f"data.validation_rows={rows}"]
    prepared = prepare_run(load(RECIPE, settings))
    units = [RowStore.open(d.validation_path).take(range(rows)) for d in prepared.domains]
    teacher = HFEngine.load(prepared.teacher.model)
    return units, teacher, HFEngine.load(str(reference / "models" / "student-base-1m"))


def real_pair(reference: Path, cache: Path, *, rows: int) -> Real:
    """Both models on `rows` validation rows of every domain."""
    units, teacher, student = reference_pair(reference, cache, rows=rows)
    hidden_ND, layers_s = _timed(lambda: torch.cat([teacher.last_hidden(u) for u in units]), 2)
    with torch.inference_mode():
        student_NV = torch.cat([student.head.logits(student.last_hidden(u)) for u in units])
        logits_NV = teacher.head.logits(hidden_ND)
    return Real(
        logits_NV=logits_NV.clone(),
        student_NV=student_NV.clone(),
        hidden_ND=hidden_ND.clone(),
        head=teacher.head,
        label_N=torch.cat([labels_of(unit, teacher.packed) for unit in units]),
        layers_s=layers_s / len(hidden_ND),
    )


def labels_of(unit: Rows, packed: bool) -> Tensor:
    """The token that each position with loss of a unit predicts, int64 [N]."""
    return torch.from_numpy(lay_out(unit, packed=packed).label_N)


def synthetic_logits(logits_NV: Tensor, *, vocab: int, num: int, seed: int = 0) -> Tensor:
    """Logits [num, vocab] with the rank profile and the mean entropy of real ones over fewer ids.

    A position takes the sorted log-probabilities of a real one. Beyond half of the real
    vocabulary, where a small one ends too soon, they go on as a power law of the rank, with the
    slope that the position has between a quarter and a half. One temperature then brings the mean
    entropy back to the real one. Which id has which rank is drawn at random.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(logits_NV), generator=draw)[:num]
    profile_nV = logits_NV[chosen].log_softmax(1).sort(1, descending=True).values
    end = profile_nV.shape[1] // 2
    fall_n = (profile_nV[:, end // 2] - profile_nV[:, end]) / np.log(2)
    rest = torch.log(torch.arange(end, vocab) / end)
    tail = profile_nV[:, end : end + 1] - fall_n.clamp(min=1.05)[:, None] * rest
    sorted_nV = torch.cat([profile_nV[:, :end], tail], dim=1)
    sorted_nV *= _sharpness(sorted_nV, float(entropy(logits_NV[chosen]).mean()))
    ids_nV = torch.stack([torch.randperm(vocab, generator=draw) for _ in range(len(chosen))])
    return torch.empty_like(sorted_nV).scatter_(1, ids_nV, sorted_nV)


def _sharpness(logits_NV: Tensor, wanted: float) -> float:
    """The factor that gives logits this mean entropy, by bisection."""
    low, high = 0.2, 5.0
    for _ in range(16):
        middle = (low * high) ** 0.5
        too_flat = float(entropy(logits_NV * middle).mean()) > wanted
        low, high = (middle, high) if too_flat else (low, middle)
    return (low * high) ** 0.5


def entropy(logits_NV: Tensor) -> Tensor:
    """Nats [N]."""
    log_p_NV = logits_NV.log_softmax(1)
    return -(log_p_NV.exp() * log_p_NV).sum(1)


def selected(
    head: Head, hidden_ND: Tensor, label_N: Tensor, k: int, selector: Selector = "top_k"
) -> TargetArrays:
    """What the teacher selects, as its engine hands it to the encoder."""
    vocab = len(head.weight_VD)
    if selector == "top_k":
        found = select(
            hidden_ND, head, label_N, top_k=k, shared_vocab=vocab, temperatures=TEMPERATURES
        )
    else:
        draw_from = torch.Generator().manual_seed(0)
        found = draw(
            hidden_ND,
            head,
            label_N,
            uniform_NU=torch.rand(len(label_N), 1, generator=draw_from, dtype=torch.float64),
            selector=selector,
            top_k=k,
            shared_vocab=vocab,
        )
    return arrays_of(found)


def costs(
    arrays: TargetArrays, selector: Selector, *, vocab: int, scoring_s: float, rounds: int
) -> Iterator[Cost]:
    """Every encoding of one selection, repeated to a unit of 8 rows of 511 tokens."""
    place = np.arange(UNIT_ROWS * ROW_TOKENS) % len(arrays.ids_NK)
    unit = TargetArrays(
        ids_NK=arrays.ids_NK[place],
        logprobs_NK=arrays.logprobs_NK[place],
        log_tail_NS=arrays.log_tail_NS[place, :1],
        label_logprob_N=arrays.label_logprob_N[place],
        hidden_ND={},
        entropy_N=None if arrays.entropy_N is None else arrays.entropy_N[place],
    )
    asked = {"selector": selector, "entropy": arrays.entropy_N is not None}
    k, num = arrays.ids_NK.shape[1], len(place)
    for ids in WAYS_OF_IDS:
        for encoding in ENCODINGS:
            spec = TargetSpec(k, vocab, encoding=encoding, ids=ids, **asked)
            answer, encode_s = _timed(lambda spec=spec: _built(spec, unit), rounds)
            _, decode_s = _timed(answer.arrays, rounds)
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


def _built(spec: TargetSpec, arrays: TargetArrays) -> SoftTargets:
    return SoftTargets.build(
        spec=spec,
        teacher={},
        row_hashes=[bytes(16)] * UNIT_ROWS,
        num_targets_R=np.full(UNIT_ROWS, ROW_TOKENS),
        arrays=arrays,
    )


def _bytes_by_column(answer: SoftTargets) -> dict[str, float]:
    """Bytes of a position in each list column, without the lists' ends."""
    num, table = UNIT_ROWS * ROW_TOKENS, answer.table
    names = [name for name in table.schema.names if name != "row_hash"]
    return {name: table.column(name).combine_chunks().flatten().nbytes / num for name in names}


def _timed(work: Callable[[], T], rounds: int) -> tuple[T, float]:
    """The last result and the least processor time of several rounds."""
    times_s, result = [], None
    for _ in range(rounds):
        started = time.process_time()
        result = work()
        times_s.append(time.process_time() - started)
    assert result is not None
    return result, min(times_s)


def errors(real: Real, k: int) -> Iterator[Error]:
    """What fp16 and int8 change, against float32, on the real pair in float64."""
    arrays = selected(real.head, real.hidden_ND, real.label_N, k)
    vocab = real.logits_NV.shape[1]
    decoded = {
        encoding: SoftTargets.build(
            spec=TargetSpec(k, vocab, TEMPERATURES, encoding=encoding),
            teacher={},
            row_hashes=[bytes(16)],
            num_targets_R=np.array([len(arrays.ids_NK)]),
            arrays=arrays,
        ).arrays()
        for encoding in ENCODINGS
    }
    for column, temperature in enumerate(TEMPERATURES):
        exact, exact_grad_NV = _pulled(decoded["fp32"], real.student_NV, column)
        for encoding in ENCODINGS[1:]:
            coded, grad_NV = _pulled(decoded[encoding], real.student_NV, column)
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


def _pulled(arrays: TargetArrays, student_NV: Tensor, column: int) -> tuple[Buckets, Tensor]:
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


def real_costs(real: Real, *, rounds: int) -> list[Cost]:
    """The reference teacher's own answers; its layers and its selection are the scoring time."""
    found: list[Cost] = []
    for selector, k in product(SELECTORS, SIZES):
        arrays, select_s = _timed(
            lambda k=k, s=selector: selected(real.head, real.hidden_ND, real.label_N, k, s), rounds
        )
        scoring_s = real.layers_s + select_s / len(real.label_N)
        vocab = real.logits_NV.shape[1]
        found += costs(arrays, selector, vocab=vocab, scoring_s=scoring_s, rounds=rounds)
    return found


def synthetic_costs(logits_NV: Tensor, *, rounds: int) -> list[Cost]:
    """The scoring time is that of a head of 256 x V and the selection, without any layers."""
    num, vocab = logits_NV.shape
    label_N = torch.arange(num)
    exact = Head(logits_NV.T.contiguous())  # times an identity: these very logits
    dense = Head(torch.randn(vocab, 256) / 16)
    hidden_ND = torch.randn(num, 256) * 4
    found: list[Cost] = []
    for selector, k in product(SELECTORS, SIZES):
        arrays = selected(exact, torch.eye(num), label_N, k, selector)
        _, select_s = _timed(
            lambda k=k, s=selector: selected(dense, hidden_ND, label_N, k, s), min(rounds, 2)
        )
        found += costs(arrays, selector, vocab=vocab, scoring_s=select_s / num, rounds=rounds)
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


def print_profile(name: str, logits_NV: Tensor) -> None:
    """Entropy and mean log-probability by rank."""
    ranks = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
    top_NK = logits_NV.log_softmax(1).topk(max(ranks)).values
    means = " ".join(f"{float(top_NK[:, rank - 1].mean()):7.2f}" for rank in ranks)
    entropy_N = entropy(logits_NV)
    print(f"{name:10} {float(entropy_N.mean()):8.3f} {float(entropy_N.std()):5.2f}  {means}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2, help="validation rows of each domain")
    parser.add_argument("--positions", type=int, default=96, help="of synthetic logits")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        real = real_pair(REFERENCE, Path(cache), rows=options.rows)
    logits_NV = synthetic_logits(real.logits_NV, vocab=LARGE_VOCAB, num=options.positions)
    print("\nlogits      entropy   std  mean log-probability at rank 1 2 4 8 16 32 64 256 1024")
    print_profile("real", real.logits_NV)
    print_profile("synthetic", logits_NV)
    print(f"\n{len(real.label_N):,} real positions, {len(logits_NV)} synthetic ones, one thread")
    print_costs(real_costs(real, rounds=options.rounds))
    print_costs(synthetic_costs(logits_NV, rounds=options.rounds))
    print("\nAgainst fp32, the real pair")
    print_errors([error for k in SIZES for error in errors(real, k)])


if __name__ == "__main__":
    main()
