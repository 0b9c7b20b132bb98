"""What the teacher of a run is shown: the prompts of its domains, and whether they fit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from cluster.planning.handshake import Handshake
from cluster.planning.row_prompting import row_openings_of
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.errors import ConfigError, HandshakeError
from shared.prompts.prefix import DocumentOpenings, Opening, opening
from shared.prompts.prompts import read_prompts
from shared.prompts.row_prompts import RowOpenings, overlong
from shared.text.sources import kinds_of

LEAST_CONTEXT = 32  # tokens of a row that is worth training on


@dataclass(frozen=True, slots=True)
class Showing:
    """What the teacher is shown and the student is not; empty without prompts."""

    prompts: str = ""  # digest
    openings: Mapping[str, DocumentOpenings] = field(default_factory=dict)  # by domain


def showing_of(config: Config, hands: Handshake) -> Showing:
    """The prompts of a config, by domain and by row, as what documents begin with.

    Raises ConfigError for a file that cannot be used and for a domain whose documents begin in
    more than one way, DataError for a chat template that has no place for a prompt.
    """
    whole = _of_domains(config, hands)
    digests, openings = {}, dict(whole.openings)
    for name, domain in config.domains.items():
        if "teacher_prompt" not in domain.columns:
            continue
        if name in openings:
            raise ConfigError(
                f"prompts has one for domain {name}, which has domains.{name}.columns."
                "teacher_prompt for each row too; take it out of the file, or leave the column out"
            )
        by_row = row_openings_of(name, domain, config, hands)
        digests[name], openings[name] = by_row.digest, by_row
    if not digests:
        return whole
    named = json.dumps([whole.prompts, digests], sort_keys=True)
    return Showing(xxhash.xxh3_128_hexdigest(named.encode()), openings)


def _of_domains(config: Config, hands: Handshake) -> Showing:
    if config.prompts is None:
        return Showing()
    prompts = read_prompts(config.prompts, domains=config.domains)
    root = Path(config.paths.root)
    openings = {}
    for name, domain in config.domains.items():
        if prompt := prompts.of(name):
            found = [
                opening(prompt, hands.load_tokenizer(), kind)
                for kind in kinds_of(domain, root=root)
            ]
            openings[name] = _only(found, name)
            if config.data.loss_on == "everything" and len(openings[name].plain_ids) > 1:
                raise ConfigError(
                    f"data.loss_on is everything, so domain {name} would learn what the chat "
                    "template puts before its text, which the teacher sees after a prompt; set "
                    "data.loss_on=responses"
                )
    return Showing(prompts.id, openings)


def refuse_overlong(
    showing: Showing,
    domain: PreparedDomain,
    *,
    teacher_context: int | None,
    context: int,
    written: int = 0,
) -> None:
    """Refuse a prompt that does not fit its teacher's context before a domain's longest document,
    or before a row's, to whose prompt models may write so many tokens within `data.context`.

    Raises HandshakeError.
    """
    if teacher_context is None or domain.name not in showing.openings:
        return
    openings = showing.openings[domain.name]
    if isinstance(openings, RowOpenings):
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


def _refuse_row(where: str, needed: int, domain: str, *, teacher_context: int) -> None:
    raise HandshakeError(
        f"{where} has {needed} tokens with what domains.{domain}.columns.teacher_prompt shows "
        f"before it, more than the {teacher_context} that the teacher reads; shorten what is "
        "shown, or leave the row out"
    )


def _only(openings: list[Opening], domain: str) -> Opening:
    if len({(tuple(o.plain_ids), tuple(o.shown_ids)) for o in openings}) != 1:
        raise ConfigError(
            f"domain {domain} has both plain text and conversations, which a prompt would open "
            "differently; make them two domains"
        )
    return openings[0]
