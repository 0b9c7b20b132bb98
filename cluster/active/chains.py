"""Explanations step by step, and how unsure a student is of them (ELAD, arXiv 2402.13098).

A step is a line; the last one has the answer. From each prefix of a student's own explanation it
draws n answers. With f_i the share of the most frequent one after i steps, the uncertainty of a
prefix is U_i = 1 - f_i. Within an explanation it is the mean of U_i over all prefixes, that of no
step among them; between explanations the entropy of the answers that n drawn from the question
alone come to, over ln n. Both are 0 for a student that always says the same, at most 1, and their
sum chooses. The paper's formulas are not public: these are reconstructed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Chain:
    """A student's explanation of one training prompt."""

    key: str  # of the prompt's document
    steps: tuple[str, ...]  # as they were written
    within: float
    between: float

    @property
    def uncertainty(self) -> float:
        """What questions are chosen by."""
        return self.within + self.between


def steps_of(text: str) -> tuple[str, ...]:
    """Lines that say something, as they stand there."""
    return tuple(line for line in text.split("\n") if line.strip())


def final_answer(text: str, marker: str) -> str:
    """What follows the last marker; without one, the last line."""
    before, found, after = text.rpartition(marker)
    lines = (after if found else before + after).strip().split("\n")
    return " ".join((lines[0] if found else lines[-1]).split())


def uncertainty(answers: Sequence[str]) -> float:
    """One less the share of the most frequent answer."""
    return 1 - max(Counter(answers).values()) / len(answers)


def entropy(answers: Sequence[str]) -> float:
    """Of the answers' shares, over ln of how many answers there are: 0 to 1."""
    shares = [count / len(answers) for count in Counter(answers).values()]
    return max(0.0, -sum(p * math.log(p) for p in shares) / math.log(len(answers)))


def chain_of(
    key: str,
    written: np.ndarray,
    text: str,
    drawn: Sequence[Sequence[np.ndarray]],
    *,
    tokenizer: Any,
    marker: str,
) -> Chain:
    """From the ids that a student wrote, what of them is its answer, and the ids that it drew after
    each of `prefixes`."""
    answers = [
        [
            final_answer(
                tokenizer.decode(np.concatenate([written[:size], ids]), skip_special_tokens=True),
                marker,
            )
            for ids in draws
        ]
        for size, draws in zip(prefixes(written, tokenizer), drawn, strict=True)
    ]
    within = sum(map(uncertainty, answers)) / len(answers)
    return Chain(key, steps_of(text), within, entropy(answers[0]))


def prefixes(written: np.ndarray, tokenizer: Any) -> list[int]:
    """Numbers of tokens after which a line has just ended: 0 first, never all of them."""
    found, lines = [0], 0
    for size in range(1, len(written)):
        ended = tokenizer.decode(written[:size], skip_special_tokens=True).count("\n")
        if ended > lines:
            found.append(size)
            lines = ended
    return found
