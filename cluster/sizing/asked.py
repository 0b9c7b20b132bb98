"""What a teacher is asked in training, and what a position's answer takes."""

from dataclasses import dataclass
from pathlib import Path

from cluster.planning.handshake import describe_teacher, training_question
from cluster.sizing.memory import ModelSizes
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import UserError
from shared.targets.asks.ask import Ask
from shared.targets.asks.classes import ClassAsk, HeadLogProbs
from shared.targets.asks.drawn_ids import DrawnIds
from shared.targets.asks.head_location import ShippedHead, StatesEncoding
from shared.targets.asks.kept_ids import KeptIds
from shared.targets.asks.last_states import LastStates
from shared.targets.payload import BYTES, bytes_per_token
from shared.targets.question import Question

LAYOUT_BYTES = 56  # of a position in a batch: seven whole numbers of 8 bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
STATES: dict[str, StatesEncoding] = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Asked:
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


def asked_of(config: Config, teacher: ModelSizes, student: ModelSizes) -> Asked:
    """The question that training asks of the one teacher of `config`."""
    if config.task.classifies:
        classes = HeadLogProbs(tuple(config.task.classes))
        size = classes.shared_vocab
        return Asked(training_question(config, size, classes=classes), size, True, 0)
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
    return Asked(question, vocabulary, found is not None, width)


def _named_ids(config: Config, name: str, teacher: Teacher) -> int | None:
    """Ids that a pair's tokenizer names; None where a folder holds no tokenizer."""
    for folder in (Path(teacher.model), Path(config.student.model)):
        if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
            return None
    try:
        return describe_teacher(name, teacher, cache=Path(config.paths.cache)).identity.num_ids
    except UserError:
        return None


def ask_of(asked: Asked | None) -> Ask | None:
    """What a teacher is asked at each position; None where nobody asks it."""
    return None if asked is None or asked.question is None else asked.question.ask


def price(asked: Asked) -> float:
    """Bytes of a token's answer."""
    if asked.question is None:
        return 0.0
    return sum(bytes_per_token(asked.question, hidden_width=asked.hidden_width).values())


def decoded(asked: Asked | None) -> float:
    """Bytes of a position's answer in a batch."""
    if asked is None or asked.question is None:
        return LAYOUT_BYTES
    ask, hidden = asked.question.ask, asked.question.hidden
    size = LAYOUT_BYTES + 4.0 * (1 + asked.question.ask.with_entropy)
    if isinstance(ask, KeptIds):
        masses = 1 if isinstance(ask, DrawnIds) else 4
        size += ask.num_ids * (8 + 4) + 4 * masses
    elif isinstance(ask, ClassAsk):
        size += 4 * ask.shared_vocab
    elif isinstance(ask, LastStates):
        size += ask.width * (2 if ask.states == "bf16" else 4)
    return size + len(hidden.layers) * asked.hidden_width * (2 if hidden.encoding == "bf16" else 4)
