"""How near each selector's gradient comes to that of the whole vocabulary, at what bytes.

`python -m tests.benchmarks.selectors` prints a table: the reference teacher and student on
validation text of all domains, V = 4,096, forward KL at temperature 1. The angle is between the
gradients of the student's head; a bias stays as tokens grow, a variance averages out.

N positions with loss   V ids   D student width   K ids kept per position
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.config_losses import ForwardKL
from shared.draws import uniforms
from shared.soft_targets import SoftTargets
from shared.target_spec import TargetSpec
from student_trainer.losses.drawn import DrawnTargets
from student_trainer.losses.objective import Targets, TeacherTargets, token_losses
from student_trainer.losses.primitive import Head as StudentHead
from teacher_service.drawing import draw
from teacher_service.scoring import Head, select
from tests.benchmarks.wire import REFERENCE, labels_of, reference_pair
from tests.drawn import arrays_of, row_of

Name = Literal["renormalised", "top_k", "sampled", "threshold"]
CHOICES: tuple[tuple[Name, int], ...] = (
    ("renormalised", 32),
    ("top_k", 32),
    ("top_k", 64),
    ("sampled", 50),
    ("sampled", 100),
    ("threshold", 32),
    ("threshold", 48),
    ("threshold", 64),
)
TOKENS = (512, 2048, 8192)
DRAWS = 4


@dataclass(frozen=True)
class Scene:
    """A teacher and a student at the same positions."""

    teacher_ND: Tensor  # its last hidden states
    teacher: Head
    student_ND: Tensor
    student: StudentHead
    label_N: Tensor

    @property
    def vocab(self) -> int:
        """Ids that both know."""
        return min(len(self.teacher.weight_VD), self.student.vocabulary)

    def part(self, num: int) -> "Scene":
        """The first positions."""
        return Scene(
            self.teacher_ND[:num],
            self.teacher,
            self.student_ND[:num],
            self.student,
            self.label_N[:num],
        )


@dataclass(frozen=True)
class Result:
    """One selector on so many tokens, the mean over draws."""

    name: Name
    size: int
    distinct: float  # ids per position
    num_bytes: float  # per position in fp16, without what a row costs
    tokens: int
    angle: float  # degrees to the gradient of the whole vocabulary
    norm: float  # over that gradient's


def real_scene(reference: Path, cache: Path, *, rows: int) -> Scene:
    """Both models on `rows` validation rows of every domain, their positions shuffled."""
    units, teacher, student = reference_pair(reference, cache, rows=rows)
    states = [torch.cat([e.last_hidden(u).float() for u in units]) for e in (teacher, student)]
    labels = [labels_of(unit, teacher.packed) for unit in units]
    order_N = torch.randperm(len(states[0]), generator=torch.Generator().manual_seed(0))
    return Scene(
        teacher_ND=states[0][order_N].clone(),
        teacher=teacher.head,
        student_ND=states[1][order_N].clone(),
        student=StudentHead(student.head.weight_VD.float().detach().clone()),
        label_N=torch.cat(labels)[order_N],
    )


def measure(
    scene: Scene, choices: Sequence[tuple[Name, int]], *, tokens: Sequence[int], draws: int
) -> Iterator[Result]:
    """Every choice on the first so many tokens."""
    for num in tokens:
        part = scene.part(num)
        whole_VD = gradient(part, asked(part, "top_k", scene.vocab, seed=0), "top_k")
        for name, size in choices:
            yield _measured(part, name, size, whole_VD, draws=draws)


def _measured(scene: Scene, name: Name, size: int, whole_VD: Tensor, *, draws: int) -> Result:
    angles, norms, distinct, size_bytes = [], [], [], 0.0
    for seed in range(draws if name in ("sampled", "threshold") else 1):
        answer = asked(scene, name, size, seed=seed)
        grad_VD = gradient(scene, answer, name)
        cosine = torch.cosine_similarity(grad_VD.flatten(), whole_VD.flatten(), dim=0)
        angles.append(float(torch.rad2deg(cosine.double().clamp(-1, 1).acos())))
        norms.append(float(grad_VD.norm() / whole_VD.norm()))
        ids_NK = answer.arrays().ids_NK
        distinct.append(1 + float((np.diff(ids_NK, axis=1) > 0).sum(1).mean()))
        size_bytes = _bytes(answer)
    return Result(
        name=name,
        size=size,
        distinct=float(np.mean(distinct)),
        num_bytes=size_bytes,
        tokens=len(scene.label_N),
        angle=float(np.mean(angles)),
        norm=float(np.mean(norms)),
    )


def asked(scene: Scene, name: Name, size: int, *, seed: int) -> SoftTargets:
    """The teacher's answer about all positions, as one row, in fp16."""
    num, vocab = len(scene.label_N), scene.vocab
    rows = row_of(num)
    if name in ("top_k", "renormalised"):
        spec = TargetSpec(size, vocab)
        found = select(
            scene.teacher_ND, scene.teacher, scene.label_N, top_k=size, shared_vocab=vocab
        )
    else:
        spec = TargetSpec(size, vocab, selector=name, seed=seed, entropy=True)
        count = size if name == "sampled" else 1
        found = draw(
            scene.teacher_ND,
            scene.teacher,
            scene.label_N,
            uniform_NU=torch.from_numpy(uniforms(rows, seed=seed, count=count)),
            selector=name,
            top_k=size,
            shared_vocab=vocab,
        )
    return SoftTargets.build(
        spec=spec,
        teacher={},
        row_hashes=rows.hashes(),
        num_targets_R=np.array([num]),
        arrays=arrays_of(found),
    )


def gradient(scene: Scene, answer: SoftTargets, name: Name) -> Tensor:
    """That of the student's head [V, D], as the trainer forms it."""
    weight_VD = scene.student.weight_VD.detach().requires_grad_()
    found = token_losses(
        scene.student_ND,
        StudentHead(weight_VD),
        label_N=scene.label_N,
        terms=[ForwardKL()],
        targets=_targets(answer, name),
    )
    found.loss.backward()
    assert weight_VD.grad is not None
    return weight_VD.grad


def _targets(answer: SoftTargets, name: Name) -> Targets:
    arrays = answer.arrays()
    ids_NK, logprobs_NK = (torch.tensor(a) for a in (arrays.ids_NK, arrays.logprobs_NK))
    tail_NS = torch.tensor(arrays.log_tail_NS)
    if arrays.entropy_N is not None:
        return DrawnTargets(ids_NK, logprobs_NK, tail_NS[:, 0], torch.tensor(arrays.entropy_N), 1.0)
    renormalised = name == "renormalised"
    return TeacherTargets(ids_NK, logprobs_NK, tail_NS, (1.0,), renormalised=renormalised)


def _bytes(answer: SoftTargets) -> float:
    table = answer.table
    columns = [table.column(n) for n in table.column_names if n != "row_hash"]
    num = len(answer.arrays().label_logprob_N)
    return sum(column.combine_chunks().flatten().nbytes for column in columns) / num


def print_table(found: Sequence[Result]) -> None:
    """One line per selector, the angles side by side."""
    tokens = sorted({result.tokens for result in found})
    print(
        "| selector | ids | distinct | bytes | "
        + " | ".join(f"{n:,}" for n in tokens)
        + " | norm |"
    )
    print("| --- " * (5 + len(tokens)) + "|")
    choices = dict.fromkeys((result.name, result.size) for result in found)
    for name, size in choices:
        own = {r.tokens: r for r in found if (r.name, r.size) == (name, size)}
        last = own[tokens[-1]]
        angles = " | ".join(f"{own[n].angle:.1f}" for n in tokens)
        print(
            f"| `{name}` | {size} | {last.distinct:.0f} | {last.num_bytes:.0f} | {angles} | "
            f"{last.norm:.3f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2, help="validation rows of each domain")
    parser.add_argument("--draws", type=int, default=DRAWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        scene = real_scene(REFERENCE, Path(cache), rows=options.rows)
    num = len(scene.label_N)
    tokens = [n for n in TOKENS if n < num] + [num] * (num < TOKENS[-1])
    print(f"{num:,} positions; degrees to the gradient of the whole vocabulary, by tokens")
    print_table(list(measure(scene, CHOICES, tokens=tokens, draws=options.draws)))


if __name__ == "__main__":
    main()
