"""Time, bytes and money of a run, from what a step computes and ships; pure functions of sizes."""

from dataclasses import dataclass, replace

from cluster.sizing.measured import Probe
from shared.config.run import Config
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.asks.last_states import LastStates
from shared.targets.payload import BYTES, bytes_per_token
from shared.targets.question import ASKED_BY, HiddenAsk, Question

TOP_K = (16, 64, 256)
HEAD_PRODUCTS = {True: 3, False: 2}  # in the loss, by whether the head learns
# Of a GPU's peak, what training and scoring with plain kernels reach: a rule of thumb, not
# measured here.
UTILISATION = 0.4
SECONDS_PER_HOUR = 3600
MASTER_AND_MOMENTS = 12  # bytes of a weight that learns, in a checkpoint


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker and a replica compute in a step, in operations."""

    student: float  # of one worker
    teacher: float  # of all scoring units of all workers
    update_bytes: int  # that the optimiser reads and writes


@dataclass(frozen=True, slots=True)
class Speed:
    """Operations a second that one process reaches."""

    student: float
    teacher: float


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step of each side by itself, and what follows from them."""

    student_s: float
    teacher_s: float  # with one replica
    replicas: int  # at most, where their number follows the need
    workers: int
    waited_s: float | None = None  # of a step for the teacher, measured; None: by operations

    @property
    def replicas_per_worker(self) -> float:
        """Replicas that keep one worker busy."""
        return self.teacher_s / self.student_s / self.workers

    @property
    def step_s(self) -> float:
        """Of the slower side, or as it was measured."""
        if self.waited_s is not None:
            return self.student_s + self.waited_s
        return max(self.student_s, self.teacher_s / self.replicas)

    @property
    def busy_replicas(self) -> int:
        """Least replicas that never let the workers wait."""
        return max(1, -int(-self.teacher_s // self.student_s))


@dataclass(frozen=True, slots=True)
class Payload:
    """One way to ask a teacher."""

    name: str
    bytes_per_token: float
    chosen: bool
    head_bytes: int = 0  # that each worker reads once


def pace(work: Work, speed: Speed, config: Config) -> StepSeconds:
    """From operations to seconds."""
    replicas = min(teacher.most for teacher in config.teachers.values())
    return StepSeconds(
        student_s=work.student / speed.student,
        teacher_s=work.teacher / speed.teacher,
        replicas=replicas,
        workers=config.most_workers,
    )


def measured_pace(probe: Probe, config: Config) -> StepSeconds:
    """From measured seconds; where a teacher may have more replicas than were measured, its workers
    wait as much less."""
    step = probe.student[0].step
    student_s = step["seconds"] - step["wait"]
    seconds = {name: probe.teacher_s(name) for name in probe.teachers}
    most = {name: config.teachers[name].most for name in seconds}
    slowest = max(seconds, key=lambda name: seconds[name] / most[name], default=None)
    teacher_s = 0.0 if slowest is None else seconds[slowest]
    replicas = 1 if slowest is None else most[slowest]
    waited_s = step["wait"]
    if any(config.teachers[name].fewest < most[name] for name in seconds):
        waited_s = min(waited_s, max(0.0, teacher_s / replicas - student_s))
    return StepSeconds(student_s, teacher_s, replicas, config.most_workers, waited_s)


def payloads(
    config: Config,
    question: Question,
    *,
    shared_vocab: int,
    teacher_width: int,
    hidden_width: int,
    head_bytes: int,
    dtype: str,
) -> list[Payload]:
    """The configured way first, then numbers of ids, the whole distribution, and the states of one
    layer beside them."""

    def cost(asked: Question) -> float:
        return sum(bytes_per_token(asked, hidden_width=hidden_width).values())

    def priced(name: str, asked: Question, head: int = 0) -> Payload:
        return Payload(name, cost(asked), asked == question, head)

    states_type = "bf16" if dtype == "bfloat16" else "fp32"
    whole = LastStates(shared_vocab, "other", states_type, teacher_width)
    if isinstance(question.ask, LastStates):
        whole = question.ask
    found = [
        *(
            priced(f"{ask.selector} {ask.num_ids}", replace(question, ask=ask))
            for ask in _asks(config, shared_vocab)
        ),
        priced("exact: last_hidden", replace(question, ask=whole), head_bytes),
    ]
    if not question.hidden.layers:
        states = HiddenAsk((0,), config.targets.hidden.encoding)
        found.append(priced("one layer's hidden states too", replace(question, hidden=states)))
    if not any(one.chosen for one in found):
        found.insert(0, priced(question.ask.in_words(), question))
    return found


def _asks(config: Config, shared_vocab: int) -> list[LikeliestIds]:
    """Likeliest ids and, where the losses take drawn ones, those, in several sizes."""
    selectors = {config.selector_for(shared_vocab), "top_k"} - {"renormalised"}
    sizes = sorted({*TOP_K, config.targets.top_k} & set(range(1, shared_vocab + 1)))
    found = []
    for selector in sorted(selectors):
        for size in sizes:
            targets = config.targets.model_copy(update={"top_k": size, "exact": None})
            temperatures = config.temperatures
            asked = ASKED_BY[selector].asked(  # type: ignore[index]
                targets, shared_vocab=shared_vocab, temperatures=temperatures
            )
            found.append(asked)
    return found


def checkpoint_bytes(*, weight_bytes: int, trained: int) -> int:
    """Of one checkpoint, about: what learns with its float32 copy and two moments."""
    return min(weight_bytes, trained * BYTES["float32"]) + trained * MASTER_AND_MOMENTS


def cost(*, seconds: float, gpus: float, price: float) -> float:
    """Money of all GPUs for so long, at a price an hour of each."""
    return gpus * price * seconds / SECONDS_PER_HOUR


def gpus_of(config: Config) -> float:
    """GPUs that a run holds."""
    hosted = [*config.teachers.values()]
    if config.rollouts.serves:
        hosted.append(config.rollouts.served(config.student))
    return sum(one.most * one.gpus for one in hosted) + config.most_workers * config.student.gpus
