"""The text that rounds are made of: one domain's training rows, and the validation rows that no
prompt may hold.

What is shown to the teacher is taken from training rows alone, of which those whose prompt stands
in the validation text are none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from cluster.active.filtering import Row, Sieve, plain, same
from cluster.evaluation.items import Item, usable_items
from shared.config.domains import Domain
from shared.config.run import Config
from shared.config.verbs.active import PGKD, Active
from shared.errors import ConfigError, DataError
from shared.text.documents import Document
from shared.text.framing import content_key
from shared.text.sources import Split, read_documents, sources_of


@dataclass(frozen=True, slots=True)
class Material:
    """A domain's prompts with responses, by key."""

    config: Config
    domain: str
    tokenizer: Any
    train: Mapping[str, Document]  # none with a prompt of the validation text
    validation: Mapping[str, Document]
    held: frozenset[str]  # validation text of all domains, as `same` has prompts
    classes: tuple[str, ...]  # different responses of `train`, sorted; of PGKD

    @property
    def settings(self) -> Active:
        """What is asked of the rounds."""
        assert self.config.active is not None, "material is of a config with active teaching"
        return self.config.active

    def row(self, key: str) -> Row:
        """A training row, to be shown. There is none for a key of the validation text."""
        return Row(self.train[key].prompt, self.train[key].response)

    @property
    def digests(self) -> dict[str, str]:
        """What the text is known by: other text makes other rounds."""
        return {
            part: xxhash.xxh3_128_hexdigest("".join(sorted(rows)).encode())
            for part, rows in (("train", self.train), ("validation", self.validation))
        }

    def train_items(self, number: int) -> list[Item]:
        """Training prompts that a round's student answers, others in every round."""
        drawn = self._drawn(self.train, self.settings.train_prompts, f"train/{number}")
        return self._refusing_none(drawn, "train")

    def validation_items(self) -> list[Item]:
        """Validation prompts that the student of every round answers, always the same."""
        drawn = self._drawn(self.validation, self.settings.validation_prompts, "validation")
        return self._refusing_none(drawn, "validation")

    def shots(self, count: int) -> list[str]:
        """Keys of training rows that stand in every prompt."""
        return self._ordered(self.train, "shots")[:count]

    def sieve(self, earlier: Iterable[Row]) -> Sieve:
        """What decides about rows, where `earlier` ones were kept."""
        return Sieve(
            training=frozenset(same(document.prompt) for document in self.train.values()),
            validation=self.held,
            classes=frozenset(self.classes),
            written={same(row.prompt) for row in earlier},
        )

    def fits(self, row: Row) -> bool:
        """Whether a row is learnt whole."""
        document = Document("pair", "", prompt=row.prompt, response=row.response)
        return any(usable_items([document], self.config, self.domain, self.tokenizer))

    def _ordered(self, keys: Iterable[str], use: str) -> list[str]:
        seed = self.config.seed
        return sorted(keys, key=lambda k: xxhash.xxh3_64_intdigest(f"{seed}/{use}/{k}".encode()))

    def _drawn(self, among: Mapping[str, Document], count: int, use: str) -> list[Item]:
        documents = (among[key] for key in self._ordered(among, use))
        found = usable_items(documents, self.config, self.domain, self.tokenizer)
        return [item for item, _ in zip(found, range(count), strict=False)]

    def _refusing_none(self, items: list[Item], part: str) -> list[Item]:
        if not items:
            raise DataError(
                f"domains.{self.domain}.{part} has no prompt whose response fits data.context "
                f"{self.config.data.context}; raise it, or give shorter rows"
            )
        return items


def material_of(config: Config, tokenizer: Any) -> Material:
    """Read the domain that grows. Raises ConfigError and DataError for one that cannot."""
    settings = config.active
    assert settings is not None, "the command refuses a config without active teaching"
    if settings.domain is None and len(config.domains) > 1:
        raise ConfigError(
            f"active.domain is not set, and there are several: {', '.join(config.domains)}; name "
            "the one that grows"
        )
    name = settings.domain or next(iter(config.domains))
    domain, root = config.domains[name], Path(config.paths.root)
    if domain.validation is None:
        raise ConfigError(
            f"domains.{name} names no validation text, so that it would be held out of training "
            "text, which grows with every round; split the text, and name the part as validation"
        )
    validation = _pairs(name, domain, "validation", root)
    held = _held(config)
    every = _pairs(name, domain, "train", root)
    train = {key: document for key, document in every.items() if same(document.prompt) not in held}
    if not train:
        raise DataError(
            f"every prompt of domains.{name}.train stands in its validation text, too; split it"
        )
    is_classed = isinstance(settings, PGKD)
    classes = _classes(name, train.values(), settings) if is_classed else ()
    return Material(config, name, tokenizer, train, validation, held, classes)


def _held(config: Config) -> frozenset[str]:
    """Everything of the validation text of all domains that a prompt could be: prompts, texts, and
    turns that are not the assistant's."""
    found = set[str]()
    for domain in config.domains.values():
        sources = sources_of(domain, "validation")
        root = Path(config.paths.root)
        for document in read_documents(sources, root=root, columns=domain.columns):
            turns = (m.content for m in document.messages if m.role != "assistant")
            found |= {same(text) for text in (document.prompt, document.text, *turns)}
    return frozenset(found - {""})


def _pairs(name: str, domain: Domain, part: Split, root: Path) -> dict[str, Document]:
    """Prompts with responses by key, each once. Raises ConfigError for text without any."""
    read = read_documents(sources_of(domain, part), root=root, columns=domain.columns)
    found = {
        f"{content_key(document):016x}": document
        for document in read
        if document.kind == "pair" and document.response.strip()
    }
    if not found:
        raise ConfigError(
            f"domains.{name}.{part} has no rows of prompt and response, which alone are answered "
            "rightly or wrongly; name another domain in active.domain"
        )
    return found


def _classes(name: str, rows: Iterable[Document], settings: PGKD) -> tuple[str, ...]:
    counts = Counter(plain(document.response) for document in rows)
    if len(counts) > settings.max_classes:
        raise ConfigError(
            f"domain {name} has {len(counts)} different responses, more than active.max_classes "
            f"{settings.max_classes}, so that they are no classes; raise it if they are"
        )
    if len(counts) < 2:
        raise ConfigError(
            f"every row of domain {name} has the response {next(iter(counts))!r}, so that there is "
            "nothing to mix up; give rows of other classes"
        )
    return tuple(sorted(counts))
