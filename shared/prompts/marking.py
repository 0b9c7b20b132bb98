"""What a model reads and writes that marks entities: a text again, those of one type between marks.

One row asks about one type (CLLMFS, arXiv 2408.12834, whose appendix writes `<<< X >>>`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config.domains import Domain
from shared.config.tasks.task import TEXT, TYPE
from shared.errors import DataError
from shared.text.documents import Document
from shared.text.framing import Encoded, LossOn, Tokenizer, encode
from shared.text.sources import Silent, Split, nothing
from shared.text.special_tokens import SpecialTokens
from shared.text.tagged import Span, read_episode, spans_of

OPENS, CLOSES = "<<< ", " >>>"


def marked(text: str, spans: Iterable[Span]) -> str:
    """A text with spans of it, which do not overlap, between marks."""
    for span in sorted(spans, reverse=True):
        inside = f"{OPENS}{text[span.start : span.end]}{CLOSES}"
        text = f"{text[: span.start]}{inside}{text[span.end :]}"
    return text


@dataclass(frozen=True, slots=True)
class MarkFraming:
    """How texts and entities become rows of a prompt and the text with marks."""

    types: tuple[str, ...]
    template: str
    loss_on: LossOn
    special_tokens: SpecialTokens
    shots: int | None = None
    episode: int = 0

    @property
    def identity(self) -> Any:
        """What decides rows beside their text."""
        return ["marking", self.types, self.template, self.shots, self.episode]

    def asked(self, text: str, name: str) -> str:
        """The prompt about one type."""
        return self.template.replace(TYPE, name).replace(TEXT, text)

    def read(
        self, domain: Domain, split: Split, *, root: Path, silent: Silent = nothing
    ) -> Iterator[Document]:
        """A document for each type of each row of a split; of training rows those of the episode.
        Raises DataError for a type that is not known, and a text with a mark in it."""
        told = {"root": root, "shots": self.shots, "seed": self.episode, "silent": silent}
        for row in read_episode(domain, split, **told):
            _refuse_marks(row)
            spans = spans_of(row)
            _refuse_unknown(row, spans, self.types)
            text = row.prompt.strip()
            off = len(row.prompt) - len(row.prompt.lstrip())
            for name in self.types:
                own = [Span(s.start - off, s.end - off, name) for s in spans if s.type == name]
                yield Document(
                    "pair", row.where, prompt=self.asked(text, name), response=marked(text, own)
                )

    def encode(
        self,
        documents: Iterable[Document],
        *,
        tokenizer: Tokenizer,
        context: int,
        cut: Callable[[], None] | None,
    ) -> Iterator[Encoded]:
        """As prompts and responses of a language model; `data.too_long` says what becomes of those
        beyond `context`."""
        return encode(
            iter(documents),
            tokenizer=tokenizer,
            loss_on=self.loss_on,
            special_tokens=self.special_tokens,
        )


def _refuse_marks(row: Document) -> None:
    for mark in (OPENS.strip(), CLOSES.strip()):
        if mark in row.prompt:
            raise DataError(
                f"{row.where}: its text has {mark} in it, by which entities are marked; write it "
                "otherwise, or leave the row out"
            )


def _refuse_unknown(row: Document, spans: Sequence[Span], types: Sequence[str]) -> None:
    unknown = next((span.type for span in spans if span.type not in types), None)
    if unknown is not None:
        raise DataError(
            f"{row.where} has an entity of type {unknown!r}, which is not among task.types or "
            "those of the training rows; correct it, or leave it out"
        )
