"""What the teacher of a run is shown: the prompts of its domains, and whether they fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.planning.handshake import Handshake
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.errors import ConfigError, HandshakeError
from shared.prompts.prefix import Opening, opening
from shared.prompts.prompts import read_prompts
from shared.text.sources import kinds_of

LEAST_CONTEXT = 32  # tokens of a row that is worth training on


@dataclass(frozen=True, slots=True)
class Showing:
    """What the teacher is shown and the student is not; empty without prompts."""

    prompts: str = ""  # digest
    openings: Mapping[str, Opening] = field(default_factory=dict)  # by domain


def showing_of(config: Config, hands: Handshake) -> Showing:
    """The prompts of a config as what documents begin with.

    Raises ConfigError for a file that cannot be used and for a domain whose documents begin in
    more than one way, DataError for a chat template that has no place for a prompt.
    """
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
    showing: Showing, domain: PreparedDomain, *, teacher_context: int | None
) -> None:
    """Refuse a prompt that does not fit its teacher's context before a domain's longest document.

    Raises HandshakeError.
    """
    if teacher_context is None or domain.name not in showing.openings:
        return
    prompt = len(showing.openings[domain.name].shown_ids)
    paths = (domain.train_path, domain.validation_path)
    longest = max(RowStore.open(path).longest_document() for path in paths)
    if (room := teacher_context - prompt) < longest:
        lower = f", or set data.context={room} or lower" if room >= LEAST_CONTEXT else ""
        raise HandshakeError(
            f"the prompt of domain {domain.name} has {prompt} tokens and its longest document "
            f"{longest}, together more than the {teacher_context} that the teacher reads; "
            f"shorten the prompt{lower}"
        )


def _only(openings: list[Opening], domain: str) -> Opening:
    if len({(tuple(o.plain_ids), tuple(o.shown_ids)) for o in openings}) != 1:
        raise ConfigError(
            f"domain {domain} has both plain text and conversations, which a prompt would open "
            "differently; make them two domains"
        )
    return openings[0]
