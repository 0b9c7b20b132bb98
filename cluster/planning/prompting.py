"""What the teacher of a run is shown: the prompts of its domains, and whether they fit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from cluster.planning.handshake import Handshake
from cluster.planning.row_prompting import by_row_of
from cluster.planning.tasks.classes import class_openings, refuse_unread_words
from shared.config.adaptive_losses import reads_pairs
from shared.config.run import Config
from shared.config.source import TokenSources
from shared.config.tasks.task import Tagging
from shared.data.prepared import PreparedDomain
from shared.data.rollouts import longest_text
from shared.data.row_store import RowStore
from shared.errors import ConfigError, HandshakeError
from shared.prompts.prefix import DocumentOpenings, Opening, opening
from shared.prompts.prompts import Prompt, PromptSet, read_prompts
from shared.prompts.row_prompts import RowOpenings, overlong
from shared.text.documents import Kind
from shared.text.sources import LeftOut, kinds_of

LEAST_CONTEXT = 32  # tokens of a row that is worth training on


@dataclass(frozen=True, slots=True)
class Showing:
    """What the teacher is shown and the student is not; empty without prompts."""

    prompts: str = ""  # digest
    of_domains: Mapping[str, Opening] = field(default_factory=dict)
    by_row: Mapping[str, RowOpenings] = field(default_factory=dict)  # after the domain's prompt
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)  # rows that are not read
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # on a domain's texts

    @property
    def openings(self) -> Mapping[str, DocumentOpenings]:
        """What the documents of each domain begin with."""
        return {**self.of_domains, **self.by_row}


def showing_of(config: Config, hands: Handshake) -> Showing:
    """The prompts of a config, by domain and by row, as what documents begin with.

    Raises ConfigError for a file that cannot be used and for a domain whose documents begin in
    more than one way, DataError for a chat template that has no place for a prompt.
    """
    if isinstance(config.task, Tagging):
        refuse_unread_words(config, hands)
        return Showing()  # the teacher reads rows of its own
    if config.task.classifies:
        return _of_classes(config, hands)
    prompts = PromptSet({})
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, domains=config.domains)
    of_domains = {
        name: _of_domain(name, prompts.of(name), config, hands)
        for name in config.domains
        if prompts.of(name)
    }
    found = {
        name: by_row_of(name, domain, config, hands, prompt=prompts.of(name))
        for name, domain in config.domains.items()
        if "teacher_prompt" in domain.columns
    }
    by_row = {name: own.openings for name, own in found.items()}
    digest = prompts.id
    if by_row:
        digest = _digest(digest, {name: own.openings for name, own in found.items()})
    left_out = {name: own.left_out for name, own in found.items()}
    return Showing(digest, of_domains, by_row, left_out)


def _of_classes(config: Config, hands: Handshake) -> Showing:
    """What each teacher reads in place of a row's text."""
    refuse_unread_words(config, hands)
    read = {name: class_openings(name, config, hands) for name in config.domains}
    by_row = {name: own.openings for name, own in read.items()}
    notes = {name: own.notes for name, own in read.items()}
    return Showing(_digest("", by_row), by_row=by_row, notes=notes)


def _digest(prompts: str, by_row: Mapping[str, RowOpenings]) -> str:
    named = [prompts, {name: own.digest for name, own in by_row.items()}]
    return xxhash.xxh3_128_hexdigest(json.dumps(named, sort_keys=True).encode())


def _of_domain(name: str, prompt: Prompt, config: Config, hands: Handshake) -> Opening:
    """What every document of a domain begins with after its prompt."""
    tokenizer = hands.load_tokenizer()
    kinds: list[Kind] = ["pair"]
    if not reads_pairs(config.losses):
        kinds = [*kinds_of(config.domains[name], root=Path(config.paths.root))]
    if config.data.unfit == "drop" and "teacher_prompt" in config.domains[name].columns:
        kinds = [kind for kind in kinds if kind != "text"] or kinds  # which is left out
    found = _only([opening(prompt, tokenizer, kind) for kind in kinds], name)
    if config.data.loss_on == "everything" and len(found.plain_ids) > 1:
        raise ConfigError(
            f"data.loss_on is everything, so domain {name} would learn what the chat "
            "template puts before its text, which the teacher sees after a prompt; set "
            "data.loss_on=responses"
        )
    return found


def refuse_overlong(
    showing: Showing,
    domain: PreparedDomain,
    *,
    teacher_context: int | None,
    context: int,
    source: TokenSources | None = None,
) -> None:
    """Refuse a prompt that does not fit its teacher's context before a domain's longest document,
    or before a row's, or before what models of a `source` may write within `data.context`.

    Raises HandshakeError.
    """
    if teacher_context is None or domain.name not in showing.openings:
        return
    openings = showing.openings[domain.name]
    if isinstance(openings, RowOpenings):
        written = 0 if source is None else source.max_new_tokens
        bounds = {"teacher_context": teacher_context, "context": context, "written": written}
        if (found := overlong(openings, **bounds)) is not None:
            _refuse_row(*found, domain.name, teacher_context=teacher_context)
        return
    prompt = openings.longest
    paths = (domain.train_path, domain.validation_path)
    longest = max(RowStore.open(path).longest_document() for path in paths)
    if (room := teacher_context - prompt) < longest:
        lower = f", or set data.context={room} or lower" if room >= LEAST_CONTEXT else ""
        raise HandshakeError(
            f"the prompt of domain {domain.name} has {prompt} tokens and its longest document "
            f"{longest}, together more than the {teacher_context} that the teacher reads; "
            f"shorten the prompt{lower}"
        )
    if source is None or room >= min(context, longest + source.max_new_tokens):
        return
    written = longest_text(RowStore.open(domain.train_path), source, context=context)
    if written > room:
        raise HandshakeError(
            f"the prompt of domain {domain.name} has {prompt} tokens, and a text that models write "
            f"up to {written} with its own, together more than the {teacher_context} that the "
            "teacher reads; shorten the prompt, or lower source.max_new_tokens or data.context"
        )


def _refuse_row(where: str, needed: int, domain: str, *, teacher_context: int) -> None:
    raise HandshakeError(
        f"{where} has {needed} tokens with what domains.{domain}.columns.teacher_prompt shows "
        f"before it, more than the {teacher_context} that the teacher reads; shorten what is "
        "shown, leave the row out, or set data.unfit=drop"
    )


def _only(openings: list[Opening], domain: str) -> Opening:
    if len({(tuple(o.plain_ids), tuple(o.shown_ids)) for o in openings}) != 1:
        raise ConfigError(
            f"domain {domain} has both plain text and conversations, which a prompt would open "
            "differently; make them two domains"
        )
    return openings[0]
