"""How near each selector's gradient comes to that of the whole vocabulary, at what bytes.

`python -m tests.benchmarks.targets.selectors` prints a table for each scene: the reference pair, V
= 4,096; a pair with the largest vocabulary that the text bears, V = 65,536, trained first if
`--folder` does not hold it; synthetic logits, V = 151,936. Forward KL at temperature 1. The angle
is between the gradients of the student's head; a bias stays as tokens grow, a variance averages
out. Beside the selectors stand the two presets of `approximated`.

N positions with loss   V ids   D student width   K ids kept per position   n positions of a part
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.config.losses import ForwardKL
from shared.targets.draws import uniforms
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets, TeacherTargets
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses
from teacher_service.scoring.answering import encode
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead, Selection, select
from tests.answers import changed, decoded, question_of
from tests.benchmarks.targets.approximated import BUDGET, DEFAULT, bucketed, renormalised
from tests.benchmarks.targets.scenes import (
    REFERENCE,
    Scene,
    read_pair,
    reference_models,
    synthetic_scene,
)
from tests.benchmarks.targets.wide_pair import wide_pair
from tests.drawn import row_of

Name = Literal[
    "whole", "renormalised", "top_k", "sampled", "threshold", "polynomial_zero", "polynomial_bucket"
]
DRAWN, POLYNOMIAL = ("sampled", "threshold"), ("polynomial_zero", "polynomial_bucket")
PRESETS = {preset.top_k: preset for preset in (BUDGET, DEFAULT)}
PART = 64  # positions at a time: a head with as many columns stands for their logits
SCENES = ("reference", "wide", "synthetic")


class Choice(NamedTuple):
    """A way to choose ids and to write them."""

    name: Name
    size: int  # ids of a position
    encoding: Literal["fp16", "int8"] = "fp16"


POLYNOMIALS = tuple(Choice(name, size) for size in PRESETS for name in POLYNOMIAL)
CHOICES = (
    Choice("renormalised", 32),
    Choice("top_k", 32),
    Choice("top_k", 64),
    Choice("sampled", 50),
    Choice("sampled", 100),
    *(Choice("threshold", size) for size in (32, 48, 64, 128)),
    *(Choice("threshold", size, "int8") for size in (48, 64, 160)),
    *POLYNOMIALS,
)


@dataclass(frozen=True)
class Result:
    """One choice on so many tokens, the mean over draws."""

    choice: Choice
    distinct: float  # ids per position
    num_bytes: float  # per position, without what a row costs
    tokens: int
    angle: float  # degrees to the gradient of the whole vocabulary
    norm: float  # over that gradient's


def measure(
    scene: Scene, choices: Sequence[Choice], *, tokens: Sequence[int], draws: int
) -> Iterator[Result]:
    """Every choice on the first so many tokens, in ascending order."""
    scene = scene.take(torch.arange(tokens[-1]))
    wholes_VD = gradients(scene, Choice("whole", scene.vocab), seed=0, tokens=tokens).grads_VD
    for choice in choices:
        found = [
            gradients(scene, choice, seed=seed, tokens=tokens)
            for seed in range(draws if choice.name in DRAWN else 1)
        ]
        for place, num in enumerate(tokens):
            grads_VD = [one.grads_VD[place] for one in found]
            whole_VD = wholes_VD[place]
            yield Result(
                choice=choice,
                distinct=float(np.mean([one.distinct for one in found])),
                num_bytes=float(np.mean([one.num_bytes for one in found])),
                tokens=num,
                angle=float(np.mean([_angle(grad_VD, whole_VD) for grad_VD in grads_VD])),
                norm=float(np.mean([float(g.norm() / whole_VD.norm()) for g in grads_VD])),
            )


def _angle(one_VD: Tensor, other_VD: Tensor) -> float:
    one, other = one_VD.flatten().double(), other_VD.flatten().double()
    cosine = (one @ other) / (one.norm() * other.norm())
    return float(torch.rad2deg(cosine.clamp(-1, 1).acos()))


@dataclass(frozen=True)
class Gradients:
    """Those of the student's head [V, D] after so many tokens, and what the targets cost."""

    grads_VD: list[Tensor]
    num_bytes: float
    distinct: float


def gradients(scene: Scene, choice: Choice, *, seed: int, tokens: Sequence[int]) -> Gradients:
    """The gradient as the trainer forms it, summed part by part over positions."""
    targets, num_bytes, distinct = answered(scene, choice, seed=seed)
    sum_VD = torch.zeros(scene.vocab, scene.student_ND.shape[1])
    found = []
    for start, stop in zip([0, *tokens[:-1]], tokens, strict=True):
        for first in range(start, stop, PART):
            rows = slice(first, min(first + PART, stop))
            sum_VD.addmm_(_logits_gradient(scene, targets, rows), scene.student_ND[rows])
        found.append(sum_VD.clone())
    return Gradients(found, num_bytes, distinct)


def _logits_gradient(scene: Scene, targets: Targets | None, rows: slice) -> Tensor:
    """That of forward KL in the student's logits [V, n]; without targets, all ids are the
    teacher's."""
    weight_Vn = scene.student_NV[rows].T.contiguous().requires_grad_()
    found = token_losses(
        torch.eye(weight_Vn.shape[1]),
        Head(weight_Vn),
        label_N=scene.label_N[rows],
        terms=terms_of([ForwardKL()]),
        targets=_whole(scene.teacher_NV[rows]) if targets is None else _part(targets, rows),
    )
    found.loss.backward()
    assert weight_Vn.grad is not None
    return weight_Vn.grad


def _whole(logits_nV: Tensor) -> TeacherTargets:
    num, vocab = logits_nV.shape
    nothing_n1 = torch.full((num, 1), -torch.inf)
    ids_nV = torch.arange(vocab).expand(num, -1)
    return TeacherTargets(ids_nV, logits_nV.log_softmax(1), nothing_n1, (1.0,))


def _part(targets: Targets, rows: slice) -> Targets:
    names = ("ids_NK", "logprobs_NK", "log_weights_NK", "log_tail_NS", "log_tail_N", "entropy_N")
    kept = {n: getattr(targets, n)[rows] for n in names if hasattr(targets, n)}
    return replace(targets, **kept)


def answered(scene: Scene, choice: Choice, *, seed: int) -> tuple[Targets | None, float, float]:
    """What the loss is given, bytes of a position, and distinct ids of one."""
    if choice.name == "whole":
        return None, np.nan, scene.vocab
    if choice.name in POLYNOMIAL:
        preset = PRESETS[choice.size]
        fits = [preset.fit(logits_nV) for logits_nV in scene.teacher_NV.split(PART)]
        ids_NK, logprobs_NK = (torch.cat(parts) for parts in zip(*fits, strict=True))
        form = renormalised if choice.name == "polynomial_zero" else bucketed
        return form(ids_NK, logprobs_NK), preset.num_bytes(scene.vocab), choice.size
    answer = asked(scene, choice, seed=seed)
    ids_NK = decoded(answer).ids_NK
    distinct = 1 + float((np.diff(ids_NK, axis=1) > 0).sum(1).mean())
    return _targets(answer, choice.name), _bytes(answer), distinct


def asked(scene: Scene, choice: Choice, *, seed: int) -> SoftTargets:
    """The teacher's answer about all positions, as one row."""
    num, vocab = len(scene.label_N), scene.vocab
    rows, drawn = row_of(num), choice.name in DRAWN
    count = choice.size if choice.name == "sampled" else 1
    uniform_NU = torch.from_numpy(uniforms(rows, seed=seed, count=count))
    parts = [
        _selection(scene, choice, slice(first, first + PART), uniform_NU)
        for first in range(0, num, PART)
    ]
    spec = question_of(choice.size, vocab, encoding=choice.encoding)
    if drawn:
        spec = changed(spec, selector=choice.name, seed=seed, entropy=True)
    return SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=rows.hashes(),
        num_targets_R=np.array([num]),
        columns=encode(_joined(parts), spec),
    )


def _selection(scene: Scene, choice: Choice, rows: slice, uniform_NU: Tensor) -> Selection:
    """Of the positions of a part: a head that holds their logits, times an identity."""
    logits_nV = scene.teacher_NV[rows]
    asked_of = (
        torch.eye(len(logits_nV)),
        ScoringHead(logits_nV.T.contiguous()),
        scene.label_N[rows],
    )
    kept = {"num_ids": choice.size, "shared_vocab": scene.vocab}
    if choice.name in DRAWN:
        return draw(*asked_of, uniform_NU=uniform_NU[rows], selector=choice.name, **kept)  # type: ignore[arg-type]
    return select(*asked_of, **kept)


def _joined(parts: Sequence[Selection]) -> Selection:
    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Selection(
        ids_NK=column("ids_NK"),
        logprobs_NK=column("logprobs_NK"),
        log_tail_NS=column("log_tail_NS"),
        label_logprob_N=column("label_logprob_N"),
        entropy_N=None if parts[0].entropy_N is None else column("entropy_N"),
    )


def _targets(answer: SoftTargets, name: Name) -> Targets:
    arrays = decoded(answer)
    ids_NK, logprobs_NK = (torch.tensor(a) for a in (arrays.ids_NK, arrays.logprobs_NK))
    tail_NS = torch.tensor(arrays.log_tail_NS)
    if arrays.entropy_N is not None:
        return DrawnTargets(ids_NK, logprobs_NK, tail_NS[:, 0], torch.tensor(arrays.entropy_N), 1.0)
    return TeacherTargets(ids_NK, logprobs_NK, tail_NS, (1.0,), renormalised=name == "renormalised")


def _bytes(answer: SoftTargets) -> float:
    table = answer.table
    columns = [table.column(n) for n in table.column_names if n != "row_hash"]
    num = len(answer.arrays().label_logprob_N)
    return sum(column.combine_chunks().flatten().nbytes for column in columns) / num


def print_table(found: Sequence[Result]) -> None:
    """One line per choice, the angles side by side."""
    tokens = sorted({result.tokens for result in found})
    heads = ("selector", "ids", "log-p", "distinct", "bytes", *(f"{n:,}" for n in tokens), "norm")
    print(f"| {' | '.join(heads)} |")
    print("| --- " * len(heads) + "|")
    for choice in dict.fromkeys(result.choice for result in found):
        own = {r.tokens: r for r in found if r.choice == choice}
        last = own[tokens[-1]]
        encoding = "fit" if choice.name in POLYNOMIAL else choice.encoding
        angles = " | ".join(f"{own[n].angle:.1f}" for n in tokens)
        print(
            f"| `{choice.name}` | {choice.size} | {encoding} | {last.distinct:.0f} | "
            f"{last.num_bytes:.0f} | {angles} | {last.norm:.3f} |",
            flush=True,
        )


def made(name: str, folder: Path, cache: Path, *, rows: int) -> Scene:
    """A scene of the tables, in a random order of positions."""
    models = wide_pair(REFERENCE, folder) if name == "wide" else reference_models(REFERENCE)
    scene = read_pair(REFERENCE, cache, models, rows=rows).scene
    if name == "synthetic":
        return synthetic_scene(scene, num=1024)
    return scene.shuffled(1024 if name == "wide" else 2048)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", nargs="*", choices=SCENES, default=SCENES)
    parser.add_argument("--rows", type=int, default=2, help="validation rows of each domain")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the pair that is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary)
        for name in options.scenes:
            scene = made(name, options.folder or cache, cache, rows=options.rows)
            num = len(scene.label_N)
            tokens = [n for n in (128, 512) if n < num] + [num]
            print(f"\nV = {scene.vocab:,}, {num:,} positions; degrees to the whole gradient")
            print_table(list(measure(scene, CHOICES, tokens=tokens, draws=options.draws)))


if __name__ == "__main__":
    main()
