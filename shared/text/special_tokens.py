"""Special tokens that stand in text: control tokens there, or the characters they are written with.

A mark inside a token's text keeps a tokenizer from finding it; the marks' own tokens are dropped.
"""

import re
from typing import Any, Literal

SpecialTokens = Literal["auto", "text", "control"]
MARK = "\ufdd0"  # no character: in no text, and in no vocabulary


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of a tokenizer's special tokens, ascending."""
    added = tokenizer.added_tokens_decoder.items()
    return tuple(sorted(number for number, token in added if token.special))


class Specials:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        found = {t.content: t for t in added if t.special and len(t.content) > 1}
        parts = [_pattern_of(found[text]) for text in sorted(found, reverse=True)]
        self.pattern = re.compile("|".join(parts)) if parts else None
        self.bos: str | None = getattr(tokenizer, "bos_token", None)
        self.eos: str | None = getattr(tokenizer, "eos_token", None)

    def count(self, text: str) -> int:
        """How many stand in a text."""
        return 0 if self.pattern is None else len(self.pattern.findall(text))

    def frames(self, text: str) -> bool:
        """Whether a text is framed already: a special token opens it, or eos ends it."""
        if self.pattern is None:
            return False
        return self.pattern.match(text.lstrip()) is not None or self.closes(text)

    def opens(self, text: str) -> bool:
        """Whether a text begins with bos, whitespace aside."""
        return self.bos is not None and text.lstrip().startswith(self.bos)

    def closes(self, text: str) -> bool:
        """Whether a text ends with eos, whitespace aside."""
        return self.eos is not None and text.rstrip().endswith(self.eos)

    def marked(self, value: Any) -> Any:
        """A text, or the texts of lists and objects, with every special token marked."""
        if isinstance(value, str):
            if self.pattern is None or self.pattern.search(value) is None:
                return value
            return self.pattern.sub(_marked, value)
        if isinstance(value, list | tuple):
            return [self.marked(one) for one in value]
        if isinstance(value, dict):
            return {key: self.marked(one) for key, one in value.items()}
        return value


def _pattern_of(token: Any) -> str:
    """Where a tokenizer finds a token: within a word not, where it asks for words of its own."""
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if getattr(token, "single_word", False) else text


def _marked(found: re.Match[str]) -> str:
    return found[0][0] + MARK + found[0][1:]
