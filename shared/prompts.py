"""Prompts that a teacher is shown and a student is not: an instruction and worked examples.

`prompts.json` is what `tutelage prompts optimise` writes and what training reads.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import xxhash

FORMAT = 1  # of prompts.json


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example; without a prompt, plain text of the domain."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands before every document of a domain; an empty one is no prompt."""

    instruction: str = ""
    examples: tuple[Example, ...] = ()

    @staticmethod
    def from_dict(fields: Mapping) -> "Prompt":
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        examples = tuple(Example(**example) for example in fields["examples"])
        return Prompt(fields["instruction"], examples)

    def __bool__(self) -> bool:
        return bool(self.instruction or self.examples)

    @property
    def id(self) -> str:
        """Digest of the content; "" for no prompt."""
        if not self:
            return ""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())

    def text(self) -> str:
        """The prompt as plain text, as it stands before a document without a chat template.

        Blocks are parted by an empty line; an example's prompt and response by a newline, as
        documents of pairs are.
        """
        shown = [f"{e.prompt}\n{e.response}" if e.prompt else e.response for e in self.examples]
        blocks = [self.instruction] if self.instruction else []
        return "".join(f"{block}\n\n" for block in (*blocks, *shown))
