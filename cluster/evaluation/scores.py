"""How near a written answer is to the right one: exact match, token F1 and Rouge-L, 0 to 1.

Exact match and token F1 compare words as SQuAD does (Rajpurkar et al. 2016): lower case, without
punctuation and English articles. Rouge-L (Lin 2004) is the F-measure of the package rouge-score,
without stemming.
"""

import re
import string
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE = "rouge_score"
WITHOUT_ROUGE = "Rouge-L is left out: it needs the extra `eval`, pip install 'tutelage[eval]'"


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one answer."""

    exact_match: float
    token_f1: float
    rouge_l: float | None  # None without the package


def scores(written: str, right: str) -> Scores:
    """An answer against the right one."""
    words, right_words = _words(written), _words(right)
    return Scores(
        exact_match=float(words == right_words),
        token_f1=_f1(words, right_words),
        rouge_l=_rouge_l(written, right) if has_rouge() else None,
    )


def has_rouge() -> bool:
    """Whether the package for Rouge-L is installed."""
    return find_spec(ROUGE) is not None


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


def _rouge_l(written: str, right: str) -> float:
    return float(_scorer().score(right, written)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    module: Any = import_module(f"{ROUGE}.rouge_scorer")  # slow, and of an extra
    return module.RougeScorer(["rougeL"])
