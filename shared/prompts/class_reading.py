"""How teachers other than language models are asked about the class of a text, or of its words: a
classifier reads it by its own tokenizer, and soft labels are of a class, whatever the text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shared.config.tasks.task import Classification, Tagging
from shared.errors import ConfigError, HandshakeError
from shared.in_words import named
from shared.targets.asks.classes import ClassAsk, HeadLogProbs, SoftLabels
from shared.text.framing import with_offsets

Word = tuple[int, int]  # its first character, and that after its last
A = TypeVar("A", bound=ClassAsk, contravariant=True)


@dataclass(frozen=True, slots=True)
class Read:
    """What a teacher reads of a text."""

    ids: list[int]  # its own
    is_cut: bool = False  # whether the text lost its end


class ClassReading(Protocol[A]):
    """One teacher and the classes of a task."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What decides, beside the task, what it reads."""
        ...

    def ask(self) -> Any:
        """What it is asked about every row, a `ClassAsk`. Raises ConfigError for classes that it
        cannot tell apart."""
        ...

    def read(self, texts: Sequence[str], ask: A, /) -> list[Read]:
        """What it reads of each text. Raises ConfigError."""
        ...


@dataclass(frozen=True, slots=True)
class OwnHead:
    """A classifier; satisfies `ClassReading`. Texts are framed as its tokenizer does."""

    task: Classification | Tagging
    load_tokenizer: Callable[[], Any]  # the teacher's, a fast one of transformers
    teacher: str  # for messages
    known: tuple[str, ...]  # the classes of its head, in their order
    tokenizer_digest: str
    limit: int | None  # tokens that it reads at most; None: no limit

    @property
    def identity(self) -> tuple[str, int | None, str]:
        """See `ClassReading`."""
        return self.tokenizer_digest, self.limit, "own head"

    def ask(self) -> HeadLogProbs:
        """See `ClassReading`; its head must know the task's classes, in any order, and no other."""
        wanted, known = self.task.classes, self.known
        if len(set(known)) < len(known):
            raise ConfigError(
                f"the classifier {self.teacher} has two classes of one name in id2label of its "
                "config.json; name them apart, or name another teacher"
            )
        missing = [label for label in wanted if label not in known]
        others = [label for label in known if label not in wanted]
        if missing or others:
            said = f"not {named(missing)}" if missing else f"{named(others)} is no class here"
            raise ConfigError(
                f"the classifier {self.teacher} tells {named(known)} apart, and {said}; name the "
                "classes in id2label of its config.json as the rows do, or name another teacher"
            )
        return HeadLogProbs(tuple(wanted))

    def read(self, texts: Sequence[str], ask: HeadLogProbs) -> list[Read]:
        """See `ClassReading`; a text loses its end where it is longer than the teacher reads."""
        tokenizer = self.load_tokenizer()
        found = [Read(ids) for ids in _framed(tokenizer, texts)]
        most = min(filter(None, (self.limit, tokenizer.model_max_length)))
        for number, read in enumerate(found):
            if len(read.ids) > most:
                (ids,) = _framed(tokenizer, [texts[number]], truncation=True, max_length=most)
                found[number] = Read(ids, is_cut=True)
        return found

    def with_words(
        self, text: str, words: Sequence[Word], *, where: str
    ) -> tuple[list[int], list[int]]:
        """What it reads of a text, and of each word, its first character and that after its last,
        the first token. Raises HandshakeError where it does not read all of them."""
        tokenizer = self.load_tokenizer()
        ((ids, offsets),) = with_offsets(tokenizer, [text])
        most = min(filter(None, (self.limit, tokenizer.model_max_length)))
        if len(ids) > most:
            raise HandshakeError(
                f"{where} has {len(ids)} tokens as {self.teacher} reads it, which reads {most}; "
                "leave the row out, or lower data.context"
            )
        found = []
        for first, after in words:
            held = (n for n, (a, b) in enumerate(offsets) if a < b and a < after and b > first)
            if (token := next(held, None)) is None:
                raise HandshakeError(
                    f"{where}: the tokenizer of {self.teacher} has no token for "
                    f"{text[first:after]!r}; leave the row out, or name another teacher"
                )
            found.append(token)
        return ids, found


@dataclass(frozen=True, slots=True)
class OwnClasses:
    """A teacher that answers about the class that a row has; satisfies `ClassReading`. Texts are
    framed as the tokenizer of the model does whose embeddings it begins with."""

    task: Classification | Tagging
    load_tokenizer: Callable[[], Any]
    tokenizer_digest: str

    @property
    def identity(self) -> tuple[str, str]:
        """See `ClassReading`."""
        return self.tokenizer_digest, "own classes"

    def ask(self) -> SoftLabels:
        """See `ClassReading`."""
        return SoftLabels(tuple(self.task.classes))

    def read(self, texts: Sequence[str], ask: SoftLabels) -> list[Read]:
        """See `ClassReading`; whole texts."""
        return [Read(ids) for ids in _framed(self.load_tokenizer(), texts)]


def _framed(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    plain = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), **plain, **options)["input_ids"]
