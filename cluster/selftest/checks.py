"""What `selftest` tests, in a student worker's place: each check a name, a verdict, a sentence.

Whatever has a verdict can fail: a teacher that is off by one position, a loss in the wrong
direction, a micro-batch that counts too much, an answer that the way changed. Speeds have none.

N positions with loss   D width of the student   L losses
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch

from cluster.selftest.subject import FINE, Subject, answers, subject_of
from shared.config.losses import ForwardKL, Loss, ReverseKL
from shared.config.models.student import FullTraining
from shared.config.models.student import Student as StudentConfig
from shared.data.layout import lay_out
from shared.data.rows import Rows
from shared.run.plan import OpenReader, RunPlan
from shared.targets.asks.drawn_ids import DrawnIds
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.registry import loss_names, terms_of
from student_trainer.losses.terms.divergences import DIVERGENCES, Laws
from student_trainer.losses.terms.token_adaptive import PARTS
from student_trainer.losses.token_losses import token_losses
from student_trainer.models.teacher_head import load_teacher_heads
from student_trainer.objective import Objective
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.audit import load_engine

MEASURED_S = 2.0  # how long each side's speed is measured
SHOWN = 10  # positions in the picture
SMALL = 1e-4  # nats per token, or their slope: a hundredth of it is float32's rounding
SURE = 4  # standard errors that chance does not exceed


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the selftest; `said` may go on over further lines."""

    name: str
    ok: bool | None  # None: no verdict, of what is measured alone or cannot be tested
    said: str


def examine(plan: RunPlan, open_reader: OpenReader) -> list[Check]:
    """All checks, models loaded one after the other."""
    subject = subject_of(plan, open_reader)
    try:
        found = [direction(), remote_equals_local(subject)]
        found += same_model(subject)
        found += own_student(subject)
        return found
    finally:
        subject.reader.close()


def direction() -> Check:
    """Two distributions of five outcomes whose KL is published in both directions."""
    p, q = (
        torch.tensor([x]).log() for x in ([0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.3, 0.2, 0.1, 0.1])
    )
    targets = TeacherTargets(torch.arange(5)[None], p, torch.full((1, 1), -math.inf), (1.0,))
    losses = token_losses(
        q, Head(torch.eye(5)), label_N=torch.zeros(1, dtype=torch.int64),
        terms=terms_of([ForwardKL(), ReverseKL()]), targets=targets,
    )  # fmt: skip
    forward, reverse = (float(value_N) for value_N in losses.terms.values())
    ok = abs(forward - 0.0965101) < 1e-6 and abs(reverse - 0.0952430) < 1e-6
    said = f"forward KL {forward:.6f} of 0.096510 nats, reverse {reverse:.6f} of 0.095243"
    return Check("direction", ok, said)


def remote_equals_local(subject: Subject) -> Check:
    """The teacher loaded in this process scores the same unit."""
    teacher = next(iter(subject.config.teachers.values()))
    here = teacher.model_copy(update={"gpus": subject.config.student.gpus})
    engine = load_engine(here, cache=subject.config.paths.cache)
    local = engine.score(subject.rows, subject.question)
    name = "remote equals local"
    pair = (targets.arrays().label_logprob_N for targets in (subject.whole, local))
    error = float(np.abs(np.subtract(*pair)).max(initial=0))
    same_machine = subject.whole.described["teacher"] == local.described["teacher"]
    if same_machine and subject.whole.table.equals(local.table):
        return Check(name, True, f"the same bits at {subject.tokens} positions")
    ok = error <= subject.tolerance["logprob"] and not (same_machine and here.gpus == 0)
    return Check(name, ok, f"log-probabilities of the labels differ by up to {error:.1e} nats")


def same_model(subject: Subject) -> list[Check]:
    """The student is the teacher: nothing to learn, and each position predicts the same token."""
    teacher = next(iter(subject.config.teachers.values()))
    names = ("student := teacher", "mask and shift")
    if teacher.adapter is not None or subject.in_few_bits:
        said = "not tested: a teacher with an adapter or quantised weights trains as no student"
        picture = mask_picture(subject)
        return [Check(names[0], None, said), Check(names[1], mask_is_sound(subject.rows), picture)]
    twin = StudentConfig(
        model=teacher.model,
        revision=teacher.revision,
        dtype=teacher.dtype,
        trust_remote_code=teacher.trust_remote_code,
        train=FullTraining(),
        gpus=subject.config.student.gpus,
    )
    losses = stationary_losses(subject.config.losses)
    objective = objective_of(subject, twin, losses)
    nll, kl = evaluated(objective, subject)
    kl_ok, kl_said = abs(kl) <= subject.tolerance["kl"], f"KL {kl:.1e} nats per token"
    if subject.question.ask.is_estimate:
        mean, error = drawn_kl(objective, subject)
        kl_ok &= abs(mean) <= SURE * error + subject.tolerance["kl"]
        kl_said += f", from drawn ids {mean:.1e} with a standard error of {error:.1e}"
    kl_said += f", at an NLL of {nll:.2f}"
    losses_ok, losses_said = losses_vanish(objective, subject, losses)
    shift = label_error(objective, subject)
    said = f"{shift:.1e} nats between what either model says of the next token"
    return [
        Check(names[0], kl_ok and losses_ok, f"{kl_said}; {losses_said}"),
        Check(
            names[1],
            mask_is_sound(subject.rows) and shift <= subject.tolerance["logprob"],
            f"{said}\n{mask_picture(subject)}",
        ),
    ]


def own_student(subject: Subject) -> list[Check]:
    """What needs the student that trains: normalisation and speed."""
    objective = objective_of(subject, subject.config.student, subject.config.losses)
    return [split_invariance(objective, subject), payload(subject), *speeds(objective, subject)]


def objective_of(subject: Subject, student: StudentConfig, losses: Sequence[Loss]) -> Objective:
    """A student and its losses, without an engine around it."""
    config = subject.config.model_copy(update={"student": student, "losses": list(losses)})
    loaded = CAUSAL_LM.load(config, device=subject.device)
    heads = load_teacher_heads(subject.plan, subject.device)
    width = subject.plan.teacher_width
    objective = Objective(loaded, config, teacher_width=width, teacher_heads=heads)
    return objective.to(subject.device).eval()


@torch.no_grad()
def evaluated(objective: Objective, subject: Subject) -> tuple[float, float]:
    """NLL of the labels and KL to the teacher, nats per token."""
    batch = subject.layouts.batch(subject.rows, subject.ranked)
    (nll_kl_2G,) = objective(batch, mode="evaluate")
    nll, kl = (float(x) for x in nll_kl_2G.sum(1) / subject.tokens)
    return nll, kl


@torch.no_grad()
def drawn_kl(objective: Objective, subject: Subject) -> tuple[float, float]:
    """Mean of the KL estimated from the ids drawn at the first row's positions, nats per token,
    and its standard error; the estimate is right on average over draws alone."""
    row, answer = subject.rows.part(slice(0, 1)), subject.single[0]
    arrays, ask = answer.arrays(), answer.question.ask
    assert isinstance(ask, DrawnIds), "ids are drawn"
    assert arrays.entropy_N is not None, "what draws is asked for the entropy too"
    (logits_NV,) = objective(subject.layouts.batch(row, answer), mode="logits")
    scaled_NV = logits_NV[:, : ask.shared_vocab].double() / ask.temperature
    ids_NK = torch.from_numpy(arrays.kept["ids_NK"].astype(int))
    log_q_NK = scaled_NV.log_softmax(-1).cpu().gather(1, ids_NK)
    weights_NK = np.exp(arrays.kept["log_weights_NK"].astype(np.float64))
    kl_N = -(weights_NK * log_q_NK.numpy()).sum(axis=1) - arrays.entropy_N
    return float(kl_N.mean()), float(kl_N.std() / math.sqrt(max(1, len(kl_N) - 1)))


def laws_of(loss: Loss) -> list[Laws]:
    """What a divergence declares, or each part of atkd; nothing of any other loss."""
    declared = (DIVERGENCES | PARTS).items()
    return [entry.laws for name, entry in declared if name.partition(":")[0] == loss.kind]


def stationary_losses(losses: Sequence[Loss]) -> list[Loss]:
    """Those with laws, without weight where their gradient is not 0 at p = q."""
    return [
        loss
        if all(laws.zero_gradient for laws in laws_of(loss))
        else loss.model_copy(update={"weight": 0.0})
        for loss in losses
        if laws_of(loss)
    ]


def losses_vanish(
    objective: Objective, subject: Subject, losses: Sequence[Loss]
) -> tuple[bool, str]:
    """Whether the losses of an objective whose student is its teacher are 0, and the gradient of
    their weighted sum, where their laws say so."""
    if not losses:
        return True, "no divergence among its losses"
    if subject.question.ask.is_estimate:
        return True, "with drawn ids a loss vanishes on average alone"
    if subject.config.targets.renormalised:
        return True, "no loss vanishes, as renormalised leaves out the teacher's tail"
    (value_L, slope), (far_L, far_slope) = (
        values_and_slope(objective, subject, shift=shift) for shift in (0, 1)
    )
    zero_L = [all(laws.zero_value for laws in laws_of(loss)) for loss in losses]
    share_L = np.abs(value_L) / np.maximum(np.abs(far_L), SMALL)
    value, slope = share_L.max(initial=0, where=zero_L), slope / np.maximum(far_slope, SMALL)
    found = {"value": (value, zero_L), "gradient": (slope, [loss.weight > 0 for loss in losses])}
    parts = [
        f"{what} {share:.1e} ({', '.join(compress(loss_names(losses), looked_at_L))})"
        for what, (share, looked_at_L) in found.items()
        if any(looked_at_L)
    ]
    said = f"{' and '.join(parts)} of what one position off has"
    return bool(np.max([value, slope]) <= subject.tolerance["share"]), said


def values_and_slope(
    objective: Objective, subject: Subject, *, shift: int
) -> tuple[np.ndarray, float]:
    """The losses [L] of an objective, nats per token, and the norm of their weighted sum's
    gradient in the head's input, where every position has the state of the one `shift` before."""
    states: list[torch.Tensor] = []

    def moved(module: torch.nn.Module, inputs: tuple) -> tuple:
        states.append(inputs[0].detach().roll(shift, 0).requires_grad_())
        return (states[-1], *inputs[1:])

    objective.requires_grad_(False)
    with objective.loss_head.register_forward_pre_hook(moved):
        # What weighs the positions looks at the moved states too.
        (batch,) = subject.batches([(subject.rows, subject.whole)], objective)
        loss, sums, _ = objective(batch, multiplier=1 / subject.tokens)
    (slope_ND,) = torch.autograd.grad(loss, states[-1:])
    found = objective.loss_head.layout.losses_in(sums.cpu().numpy() / subject.tokens)
    return np.array(list(found.values())), float(slope_ND.float().norm())


@torch.no_grad()
def label_error(objective: Objective, subject: Subject) -> float:
    """Largest difference, at the first row's positions, between the log-probability of the label
    that the student's side computes and the one that the teacher's side shipped."""
    row, answer = subject.rows.part(slice(0, 1)), subject.single[0]
    batch = subject.layouts.batch(row, answer)
    (logits_NV,) = objective(batch, mode="logits")
    own_N = logits_NV.float().log_softmax(-1).gather(1, batch["label_N"][:, None])[:, 0]
    return float((own_N - batch["label_logprob_N"]).abs().max())


def mask_is_sound(rows: Rows) -> bool:
    """Whether every position with loss has a next token in its own document."""
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    for ids, starts, mask in zip(*columns, strict=True):
        following = np.flatnonzero(mask) + 1
        if (following >= len(ids)).any() or np.isin(following, starts).any():
            return False
    return True


def mask_picture(subject: Subject) -> str:
    """Some positions of the first row: the token read, whether it has loss, what it predicts."""
    from transformers import AutoTokenizer

    student = subject.config.student
    tokenizer: Any = AutoTokenizer.from_pretrained(
        student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
    )
    row = subject.rows.part(slice(0, 1))
    (ids,), (mask,) = row.column("input_ids"), row.column("loss_mask")
    first = max(0, int(np.flatnonzero(mask)[0]) - SHOWN // 3) if mask.any() else 0
    label_N = iter(lay_out(row, packed=subject.plan.packed).label_N[int(mask[:first].sum()) :])
    lines = [f"          {row.names()[0]:<10}  {'token':<16}  predicts"]
    for place in range(first, min(first + SHOWN, len(ids))):
        predicted = repr(tokenizer.decode([next(label_N)])) if mask[place] else "- (no loss)"
        token = repr(tokenizer.decode([int(ids[place])]))
        lines.append(f"          {place:>10}  {token:<16}  {predicted}")
    return "\n".join(lines)


def split_invariance(objective: Objective, subject: Subject) -> Check:
    """Rows as one micro-batch and one by one: the same loss and the same gradient norm."""
    count = len(subject.rows)
    cuts = [
        [(subject.rows, subject.whole)],
        [(subject.rows.part(slice(i, i + 1)), subject.single[i]) for i in range(count)],
    ]
    (one, one_norm), (other, other_norm) = (learnt(objective, subject, cut) for cut in cuts)
    errors = [abs(a - b) / max(abs(a), 1e-9) for a, b in ((one, other), (one_norm, other_norm))]
    ok = max(errors) <= subject.tolerance["loss"] and math.isfinite(one)
    said = (
        f"{count} rows at once or one by one: loss {one:.4f} and {other:.4f}, gradient norm "
        f"{one_norm:.4g} and {other_norm:.4g}"
    )
    return Check("micro-batch split", ok, said)


def learnt(
    objective: Objective, subject: Subject, cut: Sequence[tuple[Rows, SoftTargets]]
) -> tuple[float, float]:
    """Loss of a step cut into units, and the norm of its gradient."""
    objective.zero_grad(set_to_none=True)
    total = 0.0
    for batch in subject.batches(cut, objective):
        loss, *_ = objective(batch, multiplier=1 / subject.tokens)
        loss.backward()
        total += float(loss.detach())
    found = [p.grad.float().norm() for p in objective.parameters() if p.grad is not None]
    return total, float(torch.stack(found).norm()) if found else 0.0


def payload(subject: Subject) -> Check:
    """Bytes per token, as the answers are, and how much of the teacher they hold."""
    ask, size = subject.question.ask, subject.whole.num_bytes / max(1, subject.tokens)
    kept = subject.whole.arrays().kept
    mass = float(ask.captured_mass(kept).mean())
    sound = ask.mass_is_sound(mass) and ask.miss_of_weights(kept) <= FINE["loss"]
    return Check(
        "payload",
        sound and subject.tokens > 0,
        f"{size:.0f} bytes per token; {ask.mass_in_words(mass)}",
    )


def speeds(objective: Objective, subject: Subject) -> list[Check]:
    """Loss tokens per second of a replica and of a worker, and which of them would hold the other
    up: a measurement and a prediction from it, neither right nor wrong."""
    config = subject.config
    ((name, served),) = config.teachers.items()
    replicas = served.fewest
    teacher = teacher_speed(subject) / replicas
    student = student_speed(objective, subject)
    ratio = student / teacher
    needed = max(1, math.ceil(ratio * config.most_workers - 1e-9))
    slower = "teacher" if needed > replicas else "student"
    said = (
        f"the {slower}; {ratio:.2f} replicas per worker keep pace: "
        f"teachers.{name}.replicas={needed} for student.workers={config.most_workers}, now "
        f"{replicas}"
    )
    both = f"teacher {teacher:,.0f} a replica, student {student:,.0f} a worker"
    return [Check("tokens/s", None, both), Check("bottleneck", None, said)]


def teacher_speed(subject: Subject) -> float:
    """Of all replicas together, with a few units under way."""
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_S:
        done += len(list(answers(subject.reader, [subject.rows] * 8, subject.question)))
    return done * subject.tokens / (time.perf_counter() - started)


def student_speed(objective: Objective, subject: Subject) -> float:
    """Forward and backward of a unit, without the optimiser and the other workers."""
    unit = [(subject.rows, subject.whole)]
    learnt(objective, subject, unit)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_S:
        learnt(objective, subject, unit)
        done += 1
    return done * subject.tokens / (time.perf_counter() - started)
