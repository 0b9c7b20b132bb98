"""Names, units and file format of what a run measures.

One line of `metrics.jsonl` per logged step covers the steps since the line before. Lines are keyed
by step; where a step occurs twice, after a resume, the last one counts.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.run.run_dir import write_atomically


@dataclass(slots=True)
class DomainMetrics:
    """One domain over the steps of a line, all ranks."""

    # Nats per loss token: bucketed at temperature 1, of drawn ids unbiased and at theirs; None
    # without a teacher.
    kl: float | None
    tokens: int  # loss tokens
    sequences: int  # rows
    weight: float  # target share of loss tokens at the line's last step
    epochs: float | None = None  # rows drawn since the first step over the domain's rows
    # Of a token-adaptive loss (ATKD), means per loss token; None without one.
    hard_share: float | None = None
    uncertainty: float | None = None  # 1 - probability of the label
    tkd: float | None = None  # nats
    dkd: float | None = None  # nats; counts as 0 where uncertainty < 1e-5
    # Of a weighting, means per loss token; None without one.
    selected_share: float | None = None  # 0 to 1: those that count in any loss
    mean_weight: float | None = None  # in losses that ask the teacher; 0 of those left out
    teacher_confidence: float | None = None  # LLKD's c, 0 to 1
    student_uncertainty: float | None = None  # LLKD's u, 0 to 1
    teacher_nll: float | None = None  # that of instance weights, nats
    changed_share: float | None = None  # 0 to 1: of changed documents, where a policy selects them
    kept_share: float | None = None  # of them, those that it kept
    # Across tokenizers: 0 to 1, those that are compared with what the teacher says, by their next
    # token or within a span of several; None with one tokenizer.
    compared_share: float | None = None


@dataclass(slots=True)
class TeacherMetrics:
    """One teacher over the steps of a line, all ranks."""

    kl: float | None  # as of its domains, mean per loss token of theirs
    tokens: int  # loss tokens of its domains
    wait_s: float  # seconds of training that waited for it, mean over ranks
    units: int  # scoring units answered
    wire_bytes: int
    retried_units: int = 0
    cache_hits: int = 0


@dataclass(slots=True)
class RolloutMetrics:
    """What the student wrote and learnt from over the steps of a line, all ranks; what several
    steps learn (`source.updates`) counts in each of them."""

    rollouts: int  # texts that were learnt
    tokens: int  # of them, all with loss
    ended: float | None  # share that came to an end by itself; None without any
    lag: float | None  # steps between the weights that wrote and the step that learnt, mean
    # Of a token, its probability now over that with which it was drawn, mean; 1 without a lag, at
    # temperature 1 and top-p 1.
    importance_ratio: float | None
    unanswered: int  # rows whose prompt left no room for an answer
    empty: int = 0  # texts that ended at once


@dataclass(slots=True)
class TextMetrics:
    """What teachers wrote and the student learnt from over the steps of a line, all ranks."""

    texts: int
    tokens: int  # of them, all with loss
    ended: float | None  # share that came to an end by itself; None without any
    unanswered: int  # rows whose prompt left no room for an answer
    empty: int  # texts that ended at once


@dataclass(slots=True)
class ModulesMetrics:
    """What a teacher's modules learnt over the steps of a line."""

    version: int  # steps that have taught them
    nll: float  # of the labels before each update, nats per loss token, mean over steps
    # Their divergence from the student before each update, on its likeliest ids and one bucket;
    # None where they do not learn from it.
    student_kl: float | None


@dataclass(slots=True)
class ExpertMetrics:
    """How the routers of a mixture used its experts over the steps of a line, all ranks; of all
    tokens but padding."""

    shares: list[list[float]]  # of a layer's choices those of each expert, by layer, 4 digits
    max_load: float  # of the busiest expert of any layer, in even shares; 1: all alike
    entropy: float  # of a layer's shares, over that of even ones, mean over layers; 0 to 1


@dataclass(slots=True)
class BalanceMetrics:
    """How the steps of what sees and of what says move what the student says, as measured last."""

    # KL that the vision part's step makes over that of the language part's; None where this is 0.
    kappa: float | None
    vision_factor: float  # of the learning rate of the vision part, for steps after the line
    language_factor: float


@dataclass(slots=True)
class StepMetrics:
    """One line of `metrics.jsonl`."""

    step: int  # optimiser updates done
    loss: float  # nats per loss token, all terms weighted
    lr: float
    grad_norm: float  # of the last step, before clipping
    tokens: int  # loss tokens of the line's steps
    # Teacher mass on the kept ids, with `threshold` on those kept exactly; mean per loss token.
    captured_mass: float | None
    # Student mass outside them, which reverse KL and JSD see as one bucket; None without a teacher.
    unseen_mass: float | None = None
    teacher_share: float | None = None  # TAID's t for the step after the line; None without it
    # Of `source.adaptive`, for steps drawn after the line; None without it.
    student_share: float | None = None
    terms: dict[str, float] = field(default_factory=dict)  # each loss unweighted, nats per token
    domains: dict[str, DomainMetrics] = field(default_factory=dict)
    phase: int | None = None  # in force at the last step, from 0; None without phases
    rollouts: RolloutMetrics | None = None  # None where the student writes nothing
    texts: TextMetrics | None = None  # None where teachers write nothing
    modules: ModulesMetrics | None = None  # None where a teacher has none that learn
    experts: ExpertMetrics | None = None  # None where no routers are balanced
    # Of the rows that the teacher takes for a class, the share that a weighting learns; of classes
    # that it took a row for. None where nothing is weighed by class.
    selected_by_class: dict[str, float] | None = None
    balance: BalanceMetrics | None = None  # None where nothing is kept in step
    # What follows depends on the machine, not on the run.
    seconds: float = 0.0  # training wall time without start-up, evaluation and checkpoints
    teacher_wait_s: float = 0.0  # of that time, mean over ranks
    compute_s: float = 0.0  # in forward and backward passes, without waiting; mean over ranks
    optimiser_s: float = 0.0  # mean over ranks
    balancing_s: float = 0.0  # in which the balance was measured, on rank 0
    writing_s: float = 0.0  # in which the student wrote; mean over ranks
    tokens_written: int = 0  # in that time, by all ranks, for these steps or later ones
    teacher_writing_s: float = 0.0  # in which teachers wrote; mean over ranks
    teacher_tokens_written: int = 0  # in that time, for all ranks, for these steps or later ones
    pushed_bytes: int = 0  # of weights in that time, to copies of the student that write
    # In which texts of either were waited for, since ranks wrote them or they were not there yet;
    # mean over ranks. None in lines written without it: all the time that writing took.
    writing_wait_s: float | None = None
    units: int = 0  # scoring units answered
    wire_bytes: int = 0  # serialised Tables, all ranks
    retried_units: int = 0
    cache_hits: int = 0
    teachers: dict[str, TeacherMetrics] = field(default_factory=dict)  # those asked
    workers: int | None = None  # that took the last step; None in lines written without it

    @property
    def tokens_per_s(self) -> float:
        """Loss tokens per second of training wall time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def selected_share(self) -> float | None:
        """Share of loss tokens that a weighting lets count; None without one."""
        return self._share((d.selected_share, d.tokens) for d in self.domains.values())

    @property
    def compared_share(self) -> float | None:
        """Share of loss tokens that are compared with the teacher's; None with one tokenizer."""
        return self._share((d.compared_share, d.tokens) for d in self.domains.values())

    def _share(self, shares: Iterable[tuple[float | None, int]]) -> float | None:
        """That of all loss tokens, from those of domains with their tokens."""
        known = [share * tokens for share, tokens in shares if share is not None]
        return sum(known) / max(1, self.tokens) if known else None

    @property
    def rest_s(self) -> float:
        """What is left of `seconds`: drawing rows, and waiting for weights to be decided."""
        known = self.teacher_wait_s + self.compute_s + self.optimiser_s + self.balancing_s
        return max(0.0, self.seconds - known - self.text_wait_s)

    @property
    def text_wait_s(self) -> float:
        """Part of `seconds` in which nothing was done but wait for text to be written."""
        if self.writing_wait_s is None:
            return self.writing_s + self.teacher_writing_s
        return self.writing_wait_s


MACHINE_FIELDS = (
    "seconds",
    "teacher_wait_s",
    "compute_s",
    "optimiser_s",
    "balancing_s",
    "writing_s",
    "tokens_written",
    "teacher_writing_s",
    "teacher_tokens_written",
    "pushed_bytes",
    "writing_wait_s",
    "units",
    "wire_bytes",
    "retried_units",
    "cache_hits",
    "teachers",
    "workers",
)


@dataclass(slots=True)
class ClassScores:
    """How well a model tells the classes of validation rows apart."""

    accuracy: float
    macro_f1: float
    calibration_error: float  # expected, over 15 bins of confidence
    weights: int | None = None  # of the model; None: it has none, or they are not known
    # From one row to its answer, median; of a teacher through its service. None: not measured, or
    # answered from disk.
    row_ms: float | None = None


@dataclass(slots=True)
class SpanScores:
    """How well a model finds entities of a type: whole spans, each with its type."""

    span_f1: float
    precision: float
    recall: float


@dataclass(slots=True)
class TagScores(SpanScores):
    """How well a model finds the entities of validation rows, all types together."""

    types: dict[str, SpanScores]  # of each that rows have or the model said


@dataclass(slots=True)
class DomainEvaluation:
    """One domain's validation text, nats per loss token, of which a row with a class has one and
    a word with a tag too."""

    student_nll: float
    teacher_nll: float | None
    kl: float | None  # KL(teacher || student)
    kl_kind: str  # "full", "bucketed-K", "aligned", "grouped" or "none"
    tokens: int
    student_scores: ClassScores | TagScores | None = None  # None: the task has no classes
    # None: it has none, or there is no teacher.
    teacher_scores: ClassScores | TagScores | None = None

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "DomainEvaluation":
        """The inverse of `dataclasses.asdict`, through JSON too."""
        scores = {n: fields.get(n) for n in ("student_scores", "teacher_scores")}
        found = {name: value and _scores(value) for name, value in scores.items()}
        return DomainEvaluation(**{**fields, **found})


def _scores(fields: Mapping[str, Any]) -> ClassScores | TagScores:
    if "types" not in fields:
        return ClassScores(**fields)
    types = {name: SpanScores(**own) for name, own in fields["types"].items()}
    return TagScores(**{**fields, "types": types})


def append_metrics(path: Path, line: StepMetrics) -> None:
    """Append one line to `metrics.jsonl`, on its own also where a full disk tore the last one."""
    with path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(asdict(line)).encode() + b"\n")


def drop_metrics_after(path: Path, step: int) -> None:
    """Take out the lines of steps after `step`, which a resumed run takes again, and torn ones."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    kept = [line for line in lines if (done := _step_of(line)) is not None and done <= step]
    if len(kept) < len(lines):
        write_atomically(path, b"".join(line + b"\n" for line in kept).decode())


def _step_of(line: bytes) -> int | None:
    try:
        return json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError):
        return None


def read_metrics(path: Path) -> list[StepMetrics]:
    """The lines of a run in step order, the last attempt at each step; a line that is torn, or
    that a damaged disk made no text, is skipped."""
    by_step: dict[int, StepMetrics] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if _step_of(line) is None:
            continue
        fields = json.loads(line)
        fields["domains"] = {n: DomainMetrics(**d) for n, d in fields["domains"].items()}
        written = fields.get("rollouts")
        fields["rollouts"] = written and RolloutMetrics(**written)
        texts = fields.get("texts")
        fields["texts"] = texts and TextMetrics(**texts)
        modules = fields.get("modules")
        fields["modules"] = modules and ModulesMetrics(**modules)
        experts = fields.get("experts")
        fields["experts"] = experts and ExpertMetrics(**experts)
        balance = fields.get("balance")
        fields["balance"] = balance and BalanceMetrics(**balance)
        asked = fields.get("teachers", {}).items()
        fields["teachers"] = {name: TeacherMetrics(**values) for name, values in asked}
        by_step[fields["step"]] = StepMetrics(**fields)
    return [by_step[step] for step in sorted(by_step)]
