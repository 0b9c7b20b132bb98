"""RunPlan: everything a student worker is told, resolved once by the driver before it starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from shared.config.run import Config
from shared.data.passes import TOGETHER, Passes
from shared.data.prepared import PreparedDomain
from shared.mixture.weight_log import ControllerClient
from shared.prompts.prefix import DocumentOpenings
from shared.run.start import StartClock
from shared.targets.generation import OpenGenerator, OpenTeachers
from shared.targets.lessons import OpenModules
from shared.targets.question import Question
from shared.targets.reader import TargetReader
from shared.targets.routing import RoutingReader, RunReader


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A resolved run; plain values only, so it pickles small."""

    config: Config  # model, adapter and store paths are absolute here
    run_dir: str
    domains: tuple[PreparedDomain, ...]  # config order
    training_question: Question | None  # None: no loss needs a teacher
    validation_question: Question | None  # None: no teacher to compare with
    kl_kind: str  # "full", "bucketed-K", "aligned", "grouped" or "none"
    teacher: dict[str, str] | None  # the engine's fingerprint
    packed: bool  # whether the student keeps packed documents apart
    passes: Passes = TOGETHER  # what the lines of its units may share
    mode: Literal["train", "evaluate"] = "train"
    replays: bool = False  # weights come from another run's log, and nobody asks for reports
    teacher_weights: int = 0  # how many it has; 0: it has none, or they are not known
    teacher_width: int | None = None  # of the hidden states it ships; None: no loss asks for them
    # By domain; what the teacher is shown and the student is not. Readers do it.
    openings: Mapping[str, DocumentOpenings] = field(default_factory=dict)
    # Of the teacher's NLL of all training documents, nats per token, where the weighting asks for
    # it.
    scored_centre: float | None = None
    special_ids: tuple[int, ...] = ()  # that stay where documents are changed, where any are
    token_pair: str | None = None  # file of the `TokenPair` of a teacher of another tokenizer
    ends: tuple[int, ...] = ()  # ids that end what models write to learn from, where any do
    # By teacher, where there are several: the plan of what each teaches alone. Each is asked the
    # questions of its part in place of the run's.
    parts: "Mapping[str, RunPlan]" = field(default_factory=dict)

    @staticmethod
    def joined(
        config: Config, domains: tuple[PreparedDomain, ...], parts: "Mapping[str, RunPlan]"
    ) -> "RunPlan":
        """The plan of a run from those of its teachers' parts, whose names are the teachers'.

        The run's question in training is that of the teacher with the fewest ids, in validation
        that with the widest answers.
        """
        first, *others = parts.values()
        if not others:
            return first
        training = [part.training_question for part in parts.values() if part.training_question]
        validation = [
            part.validation_question for part in parts.values() if part.validation_question
        ]
        compared = len(validation) == len(parts)
        ordered = {d.name: d for part in parts.values() for d in part.domains}
        return replace(
            first,
            config=config,
            domains=tuple(ordered[domain.name] for domain in domains),
            training_question=min(training, key=_shared_vocab) if training else None,
            validation_question=max(validation, key=_is_bulky) if compared else None,
            teacher=None,
            teacher_width=None,
            parts=parts,
        )

    @property
    def by_teacher(self) -> "Mapping[str, RunPlan]":
        """The plan of what each teacher teaches; of the only one, the run's."""
        return self.parts or {next(iter(self.config.teachers)): self}

    def kl_kind_of(self, domain: str) -> str:
        """ "full", "bucketed-K", "aligned", "grouped" or "none"."""
        return self.by_teacher[self.config.teacher_of(domain)].kl_kind

    @property
    def draws(self) -> int:
        """Draws of a row that take turns from epoch to epoch; 1 where no ids are drawn."""
        if self.training_question is None:
            return 1
        return self.training_question.ask.num_draws(self.config.targets.draws)


OpenReader = Callable[[int], TargetReader]  # rank -> reader of one teacher; picklable
OpenRunReader = Callable[[int], RunReader]  # rank -> reader of all of them; picklable
OpenController = Callable[[], ControllerClient]  # called on rank 0 only; picklable
Work = Callable[..., None]  # called as `student_trainer.loop.run_plan` is; picklable


def open_routing(rank: int, *, plan: RunPlan, readers: Mapping[str, OpenReader]) -> RunReader:
    """A reader of all teachers of a plan, from ways to each."""
    if not plan.parts:
        (open_reader,) = readers.values()
        return open_reader(rank)
    questions = {name: _questions(plan, part) for name, part in plan.parts.items()}
    teachers_of = {name: plan.config.teachers_of(name) for name in plan.config.domains}
    opened = {name: open_reader(rank) for name, open_reader in readers.items()}
    return RoutingReader(opened, teachers_of=teachers_of, questions=questions)


def _shared_vocab(question: Question) -> int:
    return question.ask.shared_vocab


def _is_bulky(question: Question) -> bool:
    return question.ask.is_bulky


def _questions(plan: RunPlan, part: RunPlan) -> dict[Question, Question]:
    """The run's questions -> those of a part."""
    pairs = (
        (plan.training_question, part.training_question),
        (plan.validation_question, part.validation_question),
    )
    return {asked: own for asked, own in pairs if asked is not None and own is not None}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What workers are given once it is known; they come up and load the student before."""

    plan: RunPlan
    open_reader: OpenRunReader | None
    open_controller: OpenController
    clock: StartClock = field(default_factory=StartClock)
    work: Work | None = None  # in place of what the plan's mode says
    open_generator: OpenGenerator | None = None  # where the student writes rows itself
    open_teachers: OpenTeachers | None = None  # where teachers write rows
    open_modules: OpenModules | None = None  # where a teacher's modules learn beside the student
