"""Who writes in a run, and what it keeps for that: workers, copies of the student, teachers."""

import math
from collections.abc import Iterator

from cluster.sizing.memory import Memory, ModelSizes, Writing, copy_memory
from cluster.sizing.tracing import writing_of
from shared.config.adaptive_losses import writes_pairs
from shared.config.models.engines import VLLM_SHARE
from shared.config.models.student import Student
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.data.layout import padded_length
from shared.in_words import counted, in_bytes
from teacher_service.engine.generation.lock_step import MOST_BETWEEN

COPIES = "rollouts"  # the copies of the student that write, as the config calls them


def students_writing(config: Config) -> Writing | None:
    """What the student keeps where it writes, whoever hosts it."""
    if not config.source.writes:
        return None
    return _writing("student", config.student, config)


def teachers_writing(name: str, teacher: Teacher, config: Config) -> Writing | None:
    """What a teacher keeps that writes, before training or in it, or has a share in every token of
    the student's."""
    if not (config.source.teachers_write or writes_pairs(config.losses)):
        return None
    return _writing(f"teachers.{name}", teacher, config)


def kept_batches(config: Config, teacher: Teacher) -> int:
    """Batches whose states a replica keeps between two questions: of every worker that it serves
    the one under way and the one before it, and what is finished within the steps between, where
    texts have their full length."""
    if not config.source.teacher_mix:
        return 0
    served = math.ceil(config.most_workers / teacher.fewest)
    finished = (MOST_BETWEEN - 1) // config.source.max_new_tokens
    return min(MOST_BETWEEN + 1, 2 * served + finished)


def copies_memory(config: Config, own: ModelSizes, writing: Writing | None) -> Memory | None:
    """The parts of a copy of the student that writes; None where its workers do, or nobody."""
    if writing is None or not config.rollouts.serves:
        return None
    return copy_memory(own, writing)


def in_words(who: str, writing: Writing | None, *, batches: int = 1) -> Iterator[str]:
    """How many texts one process writes at once, and what it keeps of them."""
    if writing is None:
        return
    kept = in_bytes(batches * writing.states_bytes)
    keeps = f", and keeps {batches} batches" if batches > 1 else ""
    yield (
        f"{who} writes {writing.lines} texts of up to {writing.tokens:,} tokens at once{keeps}, "
        f"whose keys and values are {kept}"
    )


def in_vllm(who: str, asked: Teacher) -> Iterator[str]:
    """That the parts of a process are not those of the library that computes in it."""
    if asked.engine != "vllm":
        return
    takes = "keeps keys and values beside the weights"
    if asked.gpus:
        takes = (
            f"takes {100 * VLLM_SHARE * min(1.0, asked.gpus):.0f} % of each GPU, whatever they are"
        )
    yield f"{who} computes in vLLM: the parts above are what transformers would take; vLLM {takes}"


def before_training(config: Config) -> Iterator[str]:
    """What models read or write before the first step, which no rate and no time has."""
    untimed = "before the first step; the time of that is not counted"
    if writes_pairs(config.losses):
        yield f"the teacher and the student write after every prompt of training text {untimed}"
    if config.augmentation.mask:
        times = counted(config.augmentation.copies, "time")
        yield f"the teacher reads all training text {times} to fill masks {untimed}"


def _writing(section: str, asked: Student | Teacher, config: Config) -> Writing:
    tokens, source = padded_length(config.data.context), config.source
    opening = max(1, config.data.context - source.max_new_tokens)
    return writing_of(section, asked, lines=source.batch_rows, opening=opening, tokens=tokens)
