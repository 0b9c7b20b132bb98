"""What a teacher reads of a row: its text, or the text once for each word asked about."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shared.config.run import Config
from shared.config.tasks.task import Tagging
from shared.text.tagged import WORD, read_tagged
from student_trainer.tasks.task import ModelKind
from teacher_service.engine.classes.verbaliser import TOKENS_AT_ONCE

ROWS = 200  # of each domain, whose words are counted


@dataclass(frozen=True, slots=True)
class Reading:
    """Of a scoring unit."""

    texts: float  # of a row
    lines: int  # read at one time, a text each
    units: float  # what the lines are to be read so often

    def in_words(self, teacher: str) -> Iterator[str]:
        """What is not plain of it."""
        if self.texts != 1:
            yield (
                f"{teacher} reads a text once for each of its words, {self.texts:.0f} in the mean "
                "of the first rows"
            )


def reading_of(config: Config, kind: ModelKind, *, tokens: int) -> Reading:
    """How a teacher reads a scoring unit of rows of so many tokens; `kind` is what it is. Raises
    DataError for rows that are none of the task."""
    rows = config.batch.micro_batch
    if not isinstance(config.task, Tagging) or kind.labels:
        return Reading(1, rows, 1.0)
    texts = min(_words_of_a_row(config), tokens)
    lines = max(1, min(math.ceil(rows * texts), TOKENS_AT_ONCE // tokens))
    return Reading(texts, lines, rows * texts / lines)


def _words_of_a_row(config: Config) -> float:
    """In the mean of the first training rows."""
    root = Path(config.paths.root)
    words = [
        len(WORD.findall(document.prompt))
        for domain in config.domains.values()
        for document in islice(read_tagged(domain, "train", root=root), ROWS)
    ]
    return max(1.0, sum(words) / max(1, len(words)))
