"""The estimate of a run: memory of every process, rates, time and cost, from its config alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.planning.handshake import describe_teacher, training_question
from cluster.sizing.bounds import bounds_of
from cluster.sizing.measured import Probe
from cluster.sizing.memory import (
    Activations,
    Bounds,
    Memory,
    ModelSizes,
    StudentSetting,
    student_memory,
    teacher_memory,
)
from cluster.sizing.rates import (
    HEAD_PRODUCTS,
    MASTER_AND_MOMENTS,
    Pace,
    Payload,
    Speed,
    Work,
    checkpoint_bytes,
    measured_pace,
    pace,
    payloads,
)
from cluster.sizing.tracing import student_sizes, teacher_sizes
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.data.layout import padded_length
from shared.errors import UserError
from shared.in_words import in_bytes
from shared.targets.asks.ask import Ask
from shared.targets.asks.drawn_ids import DrawnIds
from shared.targets.asks.head_location import ShippedHead, StatesEncoding
from shared.targets.asks.kept_ids import KeptIds
from shared.targets.asks.last_states import LastStates
from shared.targets.payload import BYTES, bytes_per_token
from shared.targets.question import Question
from student_trainer.weighing.weighed import weighers_of

LAYOUT_BYTES = 56  # of a position in a batch: seven whole numbers of 8 bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
STATES: dict[str, StatesEncoding] = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Side:
    """The processes of one kind."""

    name: str  # "student" or the teacher's
    model: str
    processes: int
    gpus: float  # of each
    sizes: ModelSizes
    activations: Activations
    memory: Memory
    chunk_rows: int | None  # of logits at one time; None: all ids are asked, of every position


@dataclass(frozen=True, slots=True)
class Wire:
    """What travels from the teachers, and what stays."""

    bytes_per_token: Mapping[str, float]  # by what they hold
    tokens_per_step: int  # with loss, at most
    store_bytes: float  # of a store, if no row comes twice
    object_store_bytes: float  # under way at one time
    shared_vocab: int
    vocab_is_known: bool  # else the rows of the smaller head stand for it

    @property
    def total_per_token(self) -> float:
        """Bytes of a token's answer."""
        return sum(self.bytes_per_token.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes."""

    config: Config
    tokens: int  # of a row, padding included
    student: Side
    teachers: tuple[Side, ...]
    wire: Wire | None  # None: no loss asks a teacher
    payloads: tuple[Payload, ...]
    work: Work
    checkpoint_bytes: int
    pace: Pace | None = None  # None: no speed is known
    probe: Probe | None = None  # None: nothing is measured
    notes: tuple[str, ...] = field(default=())

    @property
    def sides(self) -> tuple[Side, ...]:
        """Student and teachers."""
        return (self.student, *self.teachers)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one teacher is asked."""

    question: Question | None
    shared_vocab: int
    is_known: bool
    hidden_width: int

    @property
    def is_whole(self) -> bool:
        """Whether answers name every id of every position."""
        ask = None if self.question is None else self.question.ask
        return isinstance(ask, KeptIds) and ask.num_ids >= self.shared_vocab


def estimate(config: Config, *, tokens: int | None = None) -> Estimate:
    """The estimate of a resolved config, for rows of so many tokens; by default, of its context.

    Reads config.json files, and tokenizers where they are there; no weights. Raises ConfigError.
    """
    tokens = padded_length(tokens or config.data.context)
    micro_batch, student = config.batch.micro_batch, config.student
    own, learning = student_sizes(student, lines=micro_batch, tokens=tokens, seed=config.seed)
    sides, asked, teaching = _of_teachers(config, own, tokens)
    dearest = max(asked, key=_price, default=None)
    units = config.accumulation * config.most_workers
    products = HEAD_PRODUCTS[own.trains_head]
    work = Work(
        student=config.accumulation * (learning.flops + products * learning.head_flops),
        teacher=units * teaching if config.needs_teacher else 0.0,
        update_bytes=own.trained * MASTER_AND_MOMENTS,
    )
    rows = max((side.sizes.vocabulary for side in sides), default=own.vocabulary)
    on_gpu = student.gpus > 0
    bounds = bounds_of(config, _ask(dearest), own, teacher_rows=rows, on_gpu=on_gpu)
    memory, with_fewest = (
        _student_memory(_of_workers(config, n), own, learning, bounds, dearest, sides, tokens)
        for n in (config.most_workers, config.fewest_workers)
    )
    chunk = None if dearest is not None and dearest.is_whole else bounds.chunk_rows
    chosen = _payloads(config, dearest, sides)
    return Estimate(
        config=config,
        tokens=tokens,
        student=Side(
            "student",
            student.model,
            config.most_workers,
            student.gpus,
            own,
            learning,
            memory,
            chunk,
        ),
        teachers=tuple(sides),
        wire=_wire(config, dearest, tokens),
        payloads=tuple(chosen),
        work=work,
        checkpoint_bytes=checkpoint_bytes(weight_bytes=own.weight_bytes, trained=own.trained),
        notes=(*_notes(config, own, learning, sides), *_with_fewest(config, with_fewest, memory)),
    )


def _of_teachers(
    config: Config, own: ModelSizes, tokens: int
) -> tuple[list[Side], list[_Asked], float]:
    """The teachers' processes, what each is asked, and the operations of a unit in their mean."""
    micro_batch = config.batch.micro_batch
    sides, questions, teaching = [], [], 0.0
    taught = {} if config.targets.teacher_free else config.teachers
    for name, teacher in taught.items():
        sizes, scoring = teacher_sizes(name, teacher, lines=micro_batch, tokens=tokens)
        asked = _asked(config.taught_by(name), sizes, own)
        unit = micro_batch * tokens * _price(asked)
        ask, rows = _ask(asked), sizes.vocabulary
        bounds = bounds_of(config, ask, own, teacher_rows=rows, on_gpu=teacher.gpus > 0)
        memory = teacher_memory(sizes, scoring, bounds, answer_bytes=unit)
        copies, gpus = teacher.most, teacher.gpus
        chunk = None if asked.is_whole else bounds.scoring_rows
        sides.append(Side(name, teacher.model, copies, gpus, sizes, scoring, memory, chunk))
        questions.append(asked)
        teaching += (scoring.flops + scoring.head_flops) / len(config.teachers)
    return sides, questions, teaching


def with_speed(found: Estimate, speed: Speed) -> Estimate:
    """The same with the time of a step, at the operations a second that processes reach."""
    if not found.teachers:
        speed = replace(speed, teacher=speed.student)
    return replace(found, pace=pace(found.work, speed, found.config))


def with_probe(found: Estimate, probe: Probe) -> Estimate:
    """The same with what a probe measured in place of what sizes say."""
    return replace(found, probe=probe, pace=measured_pace(probe, found.config))


def seconds_of(found: Estimate) -> float | None:
    """Seconds of a run: of its steps and, where they are measured, of its evaluations and
    checkpoints. None where no speed is known."""
    if found.pace is None:
        return None
    beside = found.probe.whole_run_s(found.config) if found.probe is not None else 0.0
    return found.pace.step_s * found.config.steps + beside


def _asked(config: Config, teacher: ModelSizes, student: ModelSizes) -> _Asked:
    """The question that training asks of the one teacher of `config`."""
    ((name, section),) = config.teachers.items()
    found = _named_ids(config, name, section)
    rows = min(teacher.vocabulary, student.vocabulary)
    vocabulary = rows if found is None else min(found, rows)
    head = None
    if config.targets.exact is not None:
        states = STATES[section.dtype]
        head_bytes = teacher.vocabulary * teacher.width * BYTES[section.dtype]
        head = ShippedHead("to be shipped", states, teacher.width, head_bytes)
    payload = config.targets.hidden
    width = teacher.width if payload.raw else min(teacher.width, payload.width)
    question = training_question(config, vocabulary, head=head)
    return _Asked(question, vocabulary, found is not None, width)


def _named_ids(config: Config, name: str, teacher: Teacher) -> int | None:
    """Ids that a pair's tokenizer names; None where a folder holds no tokenizer."""
    for folder in (Path(teacher.model), Path(config.student.model)):
        if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            return None
    try:
        return describe_teacher(name, teacher, cache=Path(config.paths.cache)).identity.num_ids
    except UserError:
        return None


def _ask(asked: _Asked | None) -> Ask | None:
    return None if asked is None or asked.question is None else asked.question.ask


def _price(asked: _Asked) -> float:
    """Bytes of a token's answer."""
    if asked.question is None:
        return 0.0
    return sum(bytes_per_token(asked.question, hidden_width=asked.hidden_width).values())


def _decoded(asked: _Asked | None) -> float:
    """Bytes of a position's answer in a batch."""
    if asked is None or asked.question is None:
        return LAYOUT_BYTES
    ask, hidden = asked.question.ask, asked.question.hidden
    size = LAYOUT_BYTES + 4.0 * (1 + asked.question.ask.with_entropy)
    if isinstance(ask, KeptIds):
        masses = 1 if isinstance(ask, DrawnIds) else 4
        size += ask.num_ids * (8 + 4) + 4 * masses
    elif isinstance(ask, LastStates):
        size += ask.width * (2 if ask.states == "bf16" else 4)
    return size + len(hidden.layers) * asked.hidden_width * (2 if hidden.encoding == "bf16" else 4)


def _student_memory(
    config: Config,
    own: ModelSizes,
    learning: Activations,
    bounds: Bounds,
    asked: _Asked | None,
    teachers: list[Side],
    tokens: int,
) -> Memory:
    student = config.student
    heads = 0
    if config.targets.exact is not None:
        heads = sum(
            side.sizes.vocabulary * side.sizes.width * BYTES[config.teachers[side.name].dtype]
            for side in teachers
        )
    positions = config.batch.micro_batch * tokens
    setting = StudentSetting(
        zero=student.zero,
        workers=config.most_workers,
        dtype_bytes=BYTES[student.dtype],
        positions=positions,
        answer_bytes=_decoded(asked),
        answers=config.accumulation if weighers_of(config.losses) else 1,
        on_gpu=student.gpus > 0,
        teacher_head_bytes=heads,
    )
    return student_memory(own, learning, setting, bounds)


def _wire(config: Config, asked: _Asked | None, tokens: int) -> Wire | None:
    if asked is None or asked.question is None:
        return None
    found = bytes_per_token(asked.question, hidden_width=asked.hidden_width)
    total, per_step = sum(found.values()), config.batch.rows_per_step * tokens
    unit = config.batch.micro_batch * tokens * total
    return Wire(
        bytes_per_token=found,
        tokens_per_step=per_step,
        store_bytes=config.steps * per_step * total,
        object_store_bytes=config.most_workers * config.service.in_flight * unit,
        shared_vocab=asked.shared_vocab,
        vocab_is_known=asked.is_known,
    )


def _payloads(config: Config, asked: _Asked | None, teachers: list[Side]) -> list[Payload]:
    if asked is None or asked.question is None:
        return []
    teacher = max((side.sizes for side in teachers), key=lambda sizes: sizes.width)
    dtype = next(iter(config.teachers.values())).dtype
    return payloads(
        config,
        asked.question,
        shared_vocab=asked.shared_vocab,
        teacher_width=teacher.width,
        hidden_width=asked.hidden_width,
        head_bytes=teacher.vocabulary * teacher.width * BYTES[dtype],
        dtype=dtype,
    )


def _of_workers(config: Config, number: int) -> Config:
    """The config with a fixed number of workers."""
    student = config.student.model_copy(update={"workers": number})
    return config.model_copy(update={"student": student})


def _with_fewest(config: Config, fewest: Memory, most: Memory) -> Iterator[str]:
    """What differs where a run of several numbers of workers goes on with the fewest."""
    if config.fewest_workers < config.most_workers:
        yield (
            f"all of this is for {config.most_workers} workers; with {config.fewest_workers}, the "
            f"fewest, a worker takes {in_bytes(fewest.total)} in place of {in_bytes(most.total)}"
        )


def _copies(config: Config, own: ModelSizes) -> str:
    """What copies of the student that write hold, and are sent."""
    served = config.rollouts.served(config.student)
    return (
        f"{served.most} x {served.gpus:g} GPUs and {served.cpus:g} CPUs for copies of the student "
        f"that write, each with {in_bytes(own.weight_bytes)} of weights; every step pushes "
        f"{in_bytes(own.trained_bytes)} to them, the weights that train"
    )


def _notes(
    config: Config, own: ModelSizes, learning: Activations, teachers: list[Side]
) -> list[str]:
    uncounted = (
        "what models write to learn from is counted as rows of full length; the time and the "
        "memory of writing it are not"
    )
    written = [] if config.source.is_dataset else [uncounted]
    if config.rollouts.serves:
        written.append(_copies(config, own))
    pairs = [("student", learning), *((side.name, side.activations) for side in teachers)]
    return written + [
        f"the code of {name} cannot be followed without numbers; its activations are those of a "
        "plain transformer of its size"
        for name, activations in pairs
        if not activations.traced
    ]
