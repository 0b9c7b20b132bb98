"""Where the benchmarks of wire and selectors measure: a teacher and a student at the same tokens.

Three sources: the reference pair, V = 4,096; a pair made here, V = 65,536 (`wide_pair`); both on
validation text. And synthetic logits of both for V = 151,936, from those of the reference pair.

N positions   V ids that both know   D hidden width
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.planning.loading import load
from cluster.planning.preparation import prepare_run
from shared.data.layout import lay_out
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.scoring import ScoringHead

PROJECT = Path(__file__).resolve().parents[3]
REFERENCE = PROJECT.parent / "shared"
RECIPE = PROJECT / "cluster" / "recipes" / "real_text.yaml"

LARGE_VOCAB = 151_936
TEMPERED = 128  # positions from which the temperature of synthetic logits is found

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """What a teacher and a student say at the same positions."""

    teacher_NV: Tensor  # float32 logits
    student_NV: Tensor  # float32 logits
    student_ND: Tensor  # float32, the student's last hidden states
    label_N: Tensor

    @property
    def vocab(self) -> int:
        """V."""
        return self.teacher_NV.shape[1]

    def take(self, place_n: Tensor) -> "Scene":
        """The positions at these places."""
        parts = (self.teacher_NV, self.student_NV, self.student_ND, self.label_N)
        return Scene(*(part[place_n] for part in parts))

    def shuffled(self, num: int | None = None) -> "Scene":
        """Its positions in a random order, the first `num` of them."""
        generator = torch.Generator().manual_seed(0)
        return self.take(torch.randperm(len(self.label_N), generator=generator)[:num])


@dataclass(frozen=True)
class Pair:
    """The scene of two models, and what the teacher makes its answers of."""

    scene: Scene
    hidden_ND: Tensor  # of the teacher's last layer
    head: ScoringHead
    layers_s: float  # processor time of the teacher's layers per position


def reference_models(reference: Path) -> dict[str, Path]:
    """The folders of the reference teacher and student."""
    models = reference / "models"
    return {"teacher": models / "teacher-6m", "student": models / "student-base-1m"}


def read_pair(reference: Path, cache: Path, models: Mapping[str, Path], *, rows: int) -> Pair:
    """Both models on `rows` validation rows of each of the recipe's five domains."""
    settings = [f"paths.root={reference}", f"paths.cache={cache}", f"data.validation_rows={rows}"]
    settings += [f"teachers.teacher-6m.model={models['teacher']}"]
    prepared = prepare_run(load(RECIPE, [*settings, f"student.model={models['student']}"]))
    units = [RowStore.open(d.validation_path).take(range(rows)) for d in prepared.domains]
    teacher, student = (HFEngine.load(str(models[name])) for name in ("teacher", "student"))
    hidden_ND, layers_s = timed(lambda: torch.cat([teacher.last_hidden(u) for u in units]), 2)
    student_ND = torch.cat([student.last_hidden(u) for u in units])
    with torch.no_grad():
        scene = Scene(
            teacher_NV=teacher.head.logits(hidden_ND),
            student_NV=student_ND.float() @ student.head.weight_VD.float().T,
            student_ND=student_ND.float().clone(),
            label_N=torch.cat([labels_of(unit, teacher.trust.packed) for unit in units]),
        )
    return Pair(scene, hidden_ND.clone(), teacher.head, layers_s / len(hidden_ND))


def labels_of(unit: Rows, packed: bool) -> Tensor:
    """The token that each position with loss of a unit predicts, int64 [N]."""
    return torch.from_numpy(lay_out(unit, packed=packed).label_N)


def timed(work: Callable[[], T], rounds: int) -> tuple[T, float]:
    """The last result and the least processor time of several rounds."""
    times_s, result = [], None
    for _ in range(rounds):
        started = process_time()
        result = work()
        times_s.append(process_time() - started)
    assert result is not None
    return result, min(times_s)


def synthetic_scene(real: Scene, *, num: int, vocab: int = LARGE_VOCAB, seed: int = 0) -> Scene:
    """A pair with the rank profiles and the teacher's mean entropy of a real one over fewer ids.

    A position takes the teacher's log-probabilities of a real one, sorted, and the student's in the
    same order. Beyond half of the real vocabulary, where a small one ends too soon, the teacher's
    go on as a power law of the rank, with the slope that the position has between a quarter and a
    half, and the student's lie as far from them as at ranks drawn from that stretch. One
    temperature of both then brings the teacher's mean entropy back to the real one. Ids of the
    first half are numbered anew once, so that what is frequent stays frequent; which id has which
    rank beyond is drawn for each position.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = real.take(torch.randperm(len(real.label_N), generator=draw)[:num])
    log_p_NV, order_NV = chosen.teacher_NV.log_softmax(1).sort(1, descending=True)
    log_q_NV = chosen.student_NV.log_softmax(1).gather(1, order_NV)
    sorted_NV = _extended(log_p_NV, vocab)
    end = order_NV.shape[1] // 2
    like_NV = torch.randint(end // 2, end, (len(order_NV), vocab - end), generator=draw)
    apart_NV = (log_q_NV - log_p_NV).gather(1, like_NV)
    student_NV = torch.cat([log_q_NV[:, :end], sorted_NV[:, end:] + apart_NV], dim=1)
    wanted = float(entropy(chosen.teacher_NV[:TEMPERED]).mean())
    sharpness = _sharpness(sorted_NV[:TEMPERED], wanted)
    ids_NV = _ids(order_NV, end, vocab, draw)
    label_rank_N = (order_NV == chosen.label_N[:, None]).int().argmax(1)
    return Scene(
        teacher_NV=torch.empty_like(sorted_NV).scatter_(1, ids_NV, sorted_NV.mul_(sharpness)),
        student_NV=torch.empty_like(sorted_NV).scatter_(1, ids_NV, student_NV.mul_(sharpness)),
        student_ND=chosen.student_ND,
        label_N=ids_NV.gather(1, label_rank_N[:, None])[:, 0],
    )


def _extended(log_p_NV: Tensor, vocab: int) -> Tensor:
    """Sorted log-probabilities, from half of their ids on a power law up to rank `vocab`."""
    end = log_p_NV.shape[1] // 2
    fall_N = (log_p_NV[:, end // 2] - log_p_NV[:, end]) / np.log(2)
    rest = torch.log(torch.arange(end, vocab) / end)
    tail_NV = log_p_NV[:, end : end + 1] - fall_N.clamp(min=1.05)[:, None] * rest
    return torch.cat([log_p_NV[:, :end], tail_NV], dim=1)


def _ids(order_NV: Tensor, end: int, vocab: int, draw: torch.Generator) -> Tensor:
    """The id of every rank, int64 [N, vocab]."""
    renamed = torch.randperm(vocab, generator=draw)[: order_NV.shape[1]]
    ids_NV = torch.empty(len(order_NV), vocab, dtype=torch.int64)
    for ids, order in zip(ids_NV, order_NV, strict=True):
        ids[:end] = renamed[order[:end]]
        unused = torch.ones(vocab, dtype=torch.bool)
        unused[ids[:end]] = False
        ids[end:] = unused.nonzero()[torch.randperm(vocab - end, generator=draw), 0]
    return ids_NV


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


def print_profile(name: str, logits_NV: Tensor) -> None:
    """Entropy and mean log-probability by rank."""
    ranks = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
    top_NK = logits_NV.log_softmax(1).topk(max(ranks)).values
    means = " ".join(f"{float(top_NK[:, rank - 1].mean()):7.2f}" for rank in ranks)
    entropy_N = entropy(logits_NV)
    print(f"{name:10} {float(entropy_N.mean()):8.3f} {float(entropy_N.std()):5.2f}  {means}")
