"""Prompts that a teacher is shown and a student is not: an instruction and worked examples.

`prompts.json` is what `tutelage prompts optimise` writes and what training reads:
`{"format": 1, "domains": {NAME: {"prompt": {"instruction", "examples"}, "id", ...}}}`, where
further keys of a domain are for people.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import ConfigError

FORMAT = 1  # of prompts.json
REWRITE = "write it with `tutelage prompts optimise`"


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
        return _digest(asdict(self)) if self else ""

    def entry(self) -> dict[str, Any]:
        """What prompts.json says about a domain with this prompt, for a writer to add to."""
        return {"prompt": asdict(self), "id": self.id}

    def text(self) -> str:
        """The prompt as plain text, as it stands before a document without a chat template.

        Blocks are parted by an empty line; an example's prompt and response by a newline, as
        documents of pairs are.
        """
        shown = [f"{e.prompt}\n{e.response}" if e.prompt else e.response for e in self.examples]
        blocks = [self.instruction] if self.instruction else []
        return "".join(f"{block}\n\n" for block in (*blocks, *shown))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run by domain; a domain that is not named has none."""

    prompts: Mapping[str, Prompt]

    def of(self, domain: str) -> Prompt:
        """A domain's prompt, empty where it has none."""
        return self.prompts.get(domain, Prompt())

    @property
    def id(self) -> str:
        """Digest over the prompts that are not empty; "" where all are."""
        ids = {domain: prompt.id for domain, prompt in self.prompts.items() if prompt}
        return _digest(ids) if ids else ""

    def to_dict(self) -> dict[str, Any]:
        """The content of prompts.json."""
        domains = {domain: prompt.entry() for domain, prompt in self.prompts.items()}
        return {"format": FORMAT, "domains": domains}


def read_prompts(path: str | Path, *, domains: Collection[str] | None = None) -> PromptSet:
    """The prompts of a file, which may name no domain but `domains` where they are given.

    Raises ConfigError for a file that is missing, torn or of another kind, for a domain that is
    not among `domains`, and for a prompt that was changed under its id.
    """
    entries = _entries(Path(path))
    prompts = {domain: _prompt(path, domain, entry) for domain, entry in entries.items()}
    unknown = sorted(set(prompts) - set(prompts if domains is None else domains))
    if unknown:
        raise ConfigError(
            f"{path} has a prompt for {unknown[0]}, which is none of the domains "
            f"{', '.join(domains or ())}; take it out, or name the domain as there"
        )
    return PromptSet(prompts)


def _entries(path: Path) -> Mapping[str, Any]:
    """What the file says about each domain."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {REWRITE}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is no whole JSON file ({error}); repair it, or {REWRITE}"
        ) from None
    entries = content.get("domains") if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or "format" not in content:
        raise ConfigError(f"{path} is no file of prompts: it lacks format and domains; {REWRITE}")
    if content["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {content['format']}, this version reads {FORMAT}; {REWRITE}"
        )
    return entries


def _prompt(path: str | Path, domain: str, entry: Any) -> Prompt:
    try:
        prompt, recorded = Prompt.from_dict(entry["prompt"]), entry["id"]
        _refuse_all_but_strings(prompt)
    except (TypeError, KeyError):
        raise ConfigError(
            f"{path}: the entry of domain {domain} is not a prompt of instruction and examples "
            f"with its id; {REWRITE}"
        ) from None
    if recorded != prompt.id:
        raise ConfigError(
            f"{path}: the prompt of domain {domain} has the id {prompt.id!r}, recorded is "
            f"{recorded!r}; it was changed by hand: record the new id, or {REWRITE}"
        )
    return prompt


def _refuse_all_but_strings(prompt: Prompt) -> None:
    strings = [part for example in prompt.examples for part in (example.prompt, example.response)]
    if not all(isinstance(string, str) for string in [prompt.instruction, *strings]):
        raise TypeError


def _digest(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
