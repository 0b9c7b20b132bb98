"""What a command goes through, told as it begins: `2 of 5: training the built-in models, once`.

Stages have names; a command says at its start which it will come to, and whoever begins one names
it. Their progress lines say how much time is left, as soon as a stage knows its own pace; one that
repeats another is as long.
"""

import time
from collections.abc import Sequence

from shared.config.run import Config

SENTENCES = {
    "corpus": "building the built-in corpus and its tokenizer, once; some ten seconds",
    "models": "training the built-in models, once",
    "start": "starting: rows, cluster, teacher; a minute, and longer where much text is new",
    "students": "training the student",
    "baseline": "training the baseline on hard labels alone, on the same rows",
}

AS_LONG_AS = {"baseline": ("students", "the student")}

_expected: list[str] = []
_began: dict[str, float] = {}


def expect(names: Sequence[str]) -> None:
    """Number the stages of this process's command, in order."""
    _expected[:] = names
    _began.clear()


def begin(name: str) -> None:
    """Print the sentence of a stage, with its number where the command expects it, and how long it
    will take where one like it has just been."""
    place = f"{_expected.index(name) + 1} of {len(_expected)}: " if name in _expected else ""
    print(f"{place}{SENTENCES[name]}{_length(name)}", flush=True)
    _began[name] = time.monotonic()


def _length(name: str) -> str:
    like, called = AS_LONG_AS.get(name, ("", ""))
    if like not in _began:
        return ""
    return f"; about {time.monotonic() - _began[like]:.0f} s, as {called} took"


def stages_of_run(config: Config) -> list[str]:
    """Names of what `tutelage run` goes through once its models and text are there."""
    return ["start", "students", *(["baseline"] if config.baseline else [])]
