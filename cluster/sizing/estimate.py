"""The estimate of a run: memory of every process, rates, time and cost, from its config alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cluster.sizing.asked import Asked, ask_of, asked_of, decoded, price
from cluster.sizing.bounds import bounds_of
from cluster.sizing.kinds import image_note, teacher_kind
from cluster.sizing.measured import Probe
from cluster.sizing.memory import (
    MOVED_HEAD_PRODUCTS,
    Activations,
    Bounds,
    Memory,
    ModelSizes,
    StudentSetting,
    Writing,
    student_memory,
    teacher_memory,
    with_moved_copy,
)
from cluster.sizing.rates import (
    HEAD_PRODUCTS,
    MASTER_AND_MOMENTS,
    Payload,
    Speed,
    StepSeconds,
    Work,
    checkpoint_bytes,
    measured_pace,
    pace,
    payloads,
)
from cluster.sizing.reading import Reading, reading_of
from cluster.sizing.tracing import module_sizes, student_sizes, teacher_sizes
from cluster.sizing.writers import (
    COPIES,
    before_training,
    copies_memory,
    in_vllm,
    in_words,
    kept_batches,
    students_writing,
    teachers_writing,
)
from shared.config.run import Config
from shared.data.layout import padded_length
from shared.in_words import in_bytes
from shared.targets.payload import BYTES, bytes_per_token
from student_trainer.tasks.registry import task_of
from student_trainer.weighing.weighed import weighers_of


@dataclass(frozen=True, slots=True)
class Side:
    """The processes of one kind."""

    name: str  # "student", "rollouts" or the teacher's
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
    pace: StepSeconds | None = None  # None: no speed is known
    probe: Probe | None = None  # None: nothing is measured
    copies: Side | None = None  # of the student, that write; None: its workers do, or nobody
    notes: tuple[str, ...] = field(default=())

    @property
    def sides(self) -> tuple[Side, ...]:
        """Student, its copies that write, and teachers."""
        return (self.student, *([self.copies] if self.copies else []), *self.teachers)


def estimate(config: Config, *, tokens: int | None = None) -> Estimate:
    """The estimate of a resolved config, for rows of so many tokens; by default, of its context.

    Reads config.json files, and tokenizers where they are there; no weights. Raises ConfigError.
    """
    tokens = padded_length(tokens or config.data.context)
    micro_batch, student = config.batch.micro_batch, config.student
    size = {"lines": micro_batch, "tokens": tokens}
    own, learning = student_sizes(student, **size, seed=config.seed, kind=task_of(config).model)
    moves = any(loss.moves for loss in config.losses)
    learning = with_moved_copy(learning) if moves else learning
    names = [] if config.targets.teacher_free else [*config.teachers]
    taught = [_taught(config, name, own, tokens) for name in names]
    sides = [one.side for one in taught]
    dearest = max((one.asked for one in taught), key=price, default=None)
    products = HEAD_PRODUCTS[own.trains_head] + config.weighting.head_products
    products += MOVED_HEAD_PRODUCTS * moves
    teaching = sum(one.flops for one in taught) / len(config.teachers)
    units = config.accumulation * config.most_workers
    work = Work(
        student=config.accumulation * (learning.flops + products * learning.head_flops),
        teacher=units * teaching if config.needs_teacher else 0.0,
        update_bytes=own.trained * MASTER_AND_MOMENTS,
    )
    writing = students_writing(config)
    rows = max((side.sizes.vocabulary for side in sides), default=own.vocabulary)
    on_gpu = student.gpus > 0
    bounds = bounds_of(config, ask_of(dearest), own, teacher_rows=rows, on_gpu=on_gpu)
    memory, with_fewest = (
        _student_memory(
            _of_workers(config, n), own, learning, bounds, dearest, sides, tokens, writing
        )
        for n in (config.most_workers, config.fewest_workers)
    )
    chunk = None if dearest is not None and dearest.is_whole else bounds.chunk_rows
    count, model = config.most_workers, student.model
    return Estimate(
        config=config,
        tokens=tokens,
        student=Side("student", model, count, student.gpus, own, learning, memory, chunk),
        teachers=tuple(sides),
        copies=_copies(config, own, learning, writing),
        wire=_wire(config, dearest, tokens),
        payloads=tuple(_payloads(config, dearest, sides)),
        work=work,
        checkpoint_bytes=checkpoint_bytes(weight_bytes=own.weight_bytes, trained=own.trained),
        notes=(
            *_with_fewest(config, with_fewest, memory),
            *before_training(config),
            *_of_writing(config, own, writing, taught),
            *(said for one in taught for said in one.reading.in_words(one.side.name)),
            *([image_note(config)] if config.task.sees else []),
            *_untraced([("student", learning), *((s.name, s.activations) for s in sides)]),
        ),
    )


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


@dataclass(frozen=True, slots=True)
class _Taught:
    """What one teacher takes."""

    side: Side
    asked: Asked
    reading: Reading
    writing: Writing | None
    flops: float  # of one scoring unit, and of what its modules learn from it


def _taught(config: Config, name: str, own: ModelSizes, tokens: int) -> _Taught:
    teacher, rows = config.teachers[name], config.batch.micro_batch
    kind = teacher_kind(config, teacher)
    reading = reading_of(config, kind, tokens=tokens)
    lines = reading.lines
    sizes, scoring = teacher_sizes(name, teacher, lines=lines, tokens=tokens, kind=kind)
    asked_in_one = _positions(config, tokens) / reading.texts / tokens
    flops, count = reading.units * (scoring.flops + asked_in_one * scoring.head_flops), 0
    if teacher.online_modules is not None:
        modules = teacher.online_modules
        count, learning = module_sizes(name, teacher, modules, lines=lines, tokens=tokens)
        flops += learning.flops + HEAD_PRODUCTS[False] * learning.head_flops
        scoring = max(scoring, learning, key=lambda one: one.most_bytes)
    asked = asked_of(config.taught_by(name), sizes, own)
    on_gpu, head_rows = teacher.gpus > 0, sizes.vocabulary
    bounds = bounds_of(config, ask_of(asked), own, teacher_rows=head_rows, on_gpu=on_gpu)
    writing = teachers_writing(name, teacher, config)
    memory = teacher_memory(
        sizes,
        scoring,
        bounds,
        answer_bytes=rows * _positions(config, tokens) * price(asked),
        writing=writing,
        kept_batches=kept_batches(config, teacher),
        modules=count,
    )
    chunk = None if asked.is_whole else bounds.scoring_rows
    side = Side(name, teacher.model, teacher.most, teacher.gpus, sizes, scoring, memory, chunk)
    return _Taught(side, asked, reading, writing, flops)


def _copies(
    config: Config, own: ModelSizes, learning: Activations, writing: Writing | None
) -> Side | None:
    """The copies of the student that write."""
    memory = copies_memory(config, own, writing)
    if memory is None:
        return None
    served = config.rollouts.served(config.student)
    return Side(COPIES, served.model, served.most, served.gpus, own, learning, memory, None)


def _student_memory(
    config: Config,
    own: ModelSizes,
    learning: Activations,
    bounds: Bounds,
    asked: Asked | None,
    teachers: list[Side],
    tokens: int,
    writing: Writing | None,
) -> Memory:
    student = config.student
    heads = 0
    if config.targets.exact is not None:
        heads = sum(
            side.sizes.vocabulary * side.sizes.width * BYTES[config.teachers[side.name].dtype]
            for side in teachers
        )
    positions = config.batch.micro_batch * _positions(config, tokens)
    setting = StudentSetting(
        zero=student.zero,
        workers=config.most_workers,
        dtype_bytes=BYTES[student.dtype],
        positions=positions,
        answer_bytes=decoded(asked),
        answers=config.accumulation if weighers_of(config.losses) else 1,
        on_gpu=student.gpus > 0,
        teacher_head_bytes=heads,
        writing=None if config.rollouts.serves else writing,
    )
    return student_memory(own, learning, setting, bounds)


def _wire(config: Config, asked: Asked | None, tokens: int) -> Wire | None:
    if asked is None or asked.question is None:
        return None
    found = bytes_per_token(asked.question, hidden_width=asked.hidden_width)
    positions = _positions(config, tokens)
    total, per_step = sum(found.values()), config.batch.rows_per_step * positions
    unit = config.batch.micro_batch * positions * total
    return Wire(
        bytes_per_token=found,
        tokens_per_step=per_step,
        store_bytes=config.steps * per_step * total,
        object_store_bytes=config.most_workers * config.service.in_flight * unit,
        shared_vocab=asked.shared_vocab,
        vocab_is_known=asked.is_known,
    )


def _payloads(config: Config, asked: Asked | None, teachers: list[Side]) -> list[Payload]:
    if asked is None or asked.question is None or config.task.classifies:
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


def _positions(config: Config, tokens: int) -> int:
    """Positions with loss of a row of so many tokens, at most."""
    return 1 if config.task.unit == "row" else tokens


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


def _of_writing(
    config: Config, own: ModelSizes, writing: Writing | None, taught: list[_Taught]
) -> Iterator[str]:
    """What is not in parts and rates where models write what is learnt."""
    if not config.source.is_dataset:
        yield (
            "what models write to learn from is counted as rows of full length; the time of "
            "writing it is not"
        )
    yield from in_words("the student", writing)
    for one in taught:
        yield from in_vllm(one.side.name, config.teachers[one.side.name])
        batches = max(1, kept_batches(config, config.teachers[one.side.name]))
        yield from in_words(one.side.name, one.writing, batches=batches)
    if config.rollouts.serves:
        served = config.rollouts.served(config.student)
        yield (
            f"{served.most} x {served.gpus:g} GPUs and {served.cpus:g} CPUs for copies of the "
            f"student that write, each with {in_bytes(own.weight_bytes)} of weights; every step "
            f"pushes {in_bytes(own.trained_bytes)} to them, the weights that train"
        )
        yield from in_vllm("a copy", served)


def _untraced(pairs: list[tuple[str, Activations]]) -> list[str]:
    return [
        f"the code of {name} cannot be followed without numbers; its activations are those of a "
        "plain transformer of its size"
        for name, activations in pairs
        if not activations.traced
    ]
