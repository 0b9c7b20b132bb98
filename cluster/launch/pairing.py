"""Preferences that models write before a run: after the same prompts of training text, the teacher
the chosen response, and the student as it begins the rejected one (LLaVA-MoD, arXiv 2408.15881,
names pairs of chosen and rejected responses; who writes them is our choice).

What each wrote lies in the run's folder, part by part, before the next one writes, and rows are
made of that, so that a run which is killed at any point and gone on with learns the same pairs:

    pairs/
      chosen.IDENTITY.N.arrow   what the teacher wrote, a line for each prompt of a part of a domain
      rejected.IDENTITY.N.arrow what the student did
      rows.N.arrow              both as rows of preferences of the domain that comes N-th, from 0
      counts.json               of prompts, pairs and tokens, by domain

P prompts of a domain
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import xxhash

from cluster.launch.teachers.serving import (
    own_services,
    pool_settings,
    served_student,
    starting_student,
    student_served,
)
from cluster.launch.writing import Replicas
from cluster.planning.preparation import Launch, Prepared
from shared.config.adaptive_losses import writes_pairs
from shared.data.prepared import PreparedDomain
from shared.data.rollouts import RowPrompt
from shared.data.row_store import RowStore, write_rows
from shared.data.written_pairs import pair_prompts, pair_rows
from shared.errors import DataError, not_kept
from shared.prompts.prefix import shown_prompts
from shared.run.plan import RunPlan
from shared.run.run_dir import write_atomically
from shared.targets.generation import Continuations, GenerationSpec, Generator, Openings
from student_trainer.sources.generated.arrow_files import write_table
from student_trainer.sources.generated.continuing import spec_of
from teacher_service.service.pool import GenerationPool

Answer = Literal["chosen", "rejected"]
PART = 1_024  # prompts after which what is written is kept


@dataclass(frozen=True, slots=True)
class Writing:
    """A model that writes responses."""

    identity: Mapping[str, str]  # everything that may change them
    serve: Callable[[], AbstractContextManager[Generator]]


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of a domain's prompts."""

    prompts: int
    pairs: int
    alike: int  # prompts after which both wrote the same, which is no pair
    without_room: int  # documents whose prompt leaves no room for two responses
    chosen_cut: int  # responses that did not come to an end
    rejected_cut: int
    teacher_tokens: int  # written
    student_tokens: int


def with_pairs(launch: Launch, plan: RunPlan) -> RunPlan:
    """The plan with rows of the pairs that its models write, where they write any; its teachers are
    up. Raises TutelageErrors of the services, and what `paired_domains` does."""
    if not writes_pairs(launch.config.losses):
        return plan
    services, own = launch.services or own_services(launch), launch.services is None
    teachers = {}
    for name, part in plan.by_teacher.items():
        fingerprint = part.teacher or {}
        writing = partial(_replicas, launch, services[name], fingerprint, own=own)
        teachers[name] = Writing(fingerprint, writing)
    student = Writing(starting_student(launch).identity, partial(_student, launch))
    folder = launch.run_dir.path / "pairs"
    return replace(plan, domains=paired_domains(launch.prepared, folder, teachers, student))


@contextmanager
def _replicas(
    launch: Launch, service: str, fingerprint: dict[str, str], *, own: bool
) -> Iterator[Generator]:
    client = str(launch.run_dir.path)
    settings = pool_settings(launch.config, service, teacher=fingerprint, client=client, own=own)
    with closing(GenerationPool(0, **settings)) as pool:
        yield Replicas(pool, launch.config.source.batch_rows)


@contextmanager
def _student(launch: Launch) -> Iterator[Generator]:
    model = served_student(launch.config)
    with (
        student_served(launch, model, purpose="to write rejected responses") as served,
        _replicas(launch, *served, own=True) as generator,
    ):
        yield generator


def paired_domains(
    prepared: Prepared, folder: Path, teachers: Mapping[str, Writing], student: Writing
) -> tuple[PreparedDomain, ...]:
    """The domains with pairs in place of their training rows, by the teacher of each, of several
    the one of the largest weight; validation rows stay and are never gone on from.

    Raises DataError for a domain without a prompt that has room for two responses, or without a
    pair, StorageError where the folder cannot be written.
    """
    config = prepared.config
    numbered = enumerate(prepared.domains)
    domains = [_Domain.of(prepared, domain, folder, number) for number, domain in numbered]
    with ExitStack() as stack:
        authors = {name: _Author(writing, stack) for name, writing in teachers.items()}
        by_domain = [authors[config.teacher_of(domain.name)] for domain in domains]
        pairs = zip(domains, by_domain, strict=True)
        chosen = [domain.texts("chosen", author) for domain, author in pairs]
        author = _Author(student, stack)
        rejected = [domain.texts("rejected", author) for domain in domains]
    told = zip(domains, chosen, rejected, strict=True)
    found = [domain.paired(*texts) for domain, *texts in told]
    counts = {domain.name: asdict(count) for domain, (_, count) in zip(domains, found, strict=True)}
    write_atomically(folder / "counts.json", json.dumps(counts, indent=1) + "\n")
    return tuple(domain for domain, _ in found)


@dataclass(slots=True)
class _Author:
    """A model that is served from the first text that it writes until a stack is left."""

    writing: Writing
    stack: ExitStack
    _generator: Generator | None = None

    @property
    def generator(self) -> Generator:
        """Its way to write."""
        if self._generator is None:
            self._generator = self.stack.enter_context(self.writing.serve())
        return self._generator


@dataclass(frozen=True, slots=True)
class _Domain:
    """A domain and its prompts."""

    prepared: Prepared
    domain: PreparedDomain
    folder: Path
    number: int
    num_documents: int
    prompts: Sequence[RowPrompt]

    @staticmethod
    def of(prepared: Prepared, domain: PreparedDomain, folder: Path, number: int) -> "_Domain":
        """Find the prompts. Raises DataError where there are none."""
        config, store = prepared.config, RowStore.open(domain.train_path)
        documents = store.take(range(len(store))).documents()
        prompts = pair_prompts(documents, config.source, context=config.data.context)
        if not prompts:
            raise DataError(
                f"domain {domain.name} has no prompt that leaves room for two responses in "
                f"data.context {config.data.context}; raise it, or give shorter prompts"
            )
        return _Domain(prepared, domain, folder, number, len(documents), prompts)

    @property
    def name(self) -> str:
        """Of the domain."""
        return self.domain.name

    def texts(self, answer: Answer, author: _Author) -> Continuations:
        """What a model writes after the prompts, in their order; of the parts that it wrote before
        it writes none again. Raises StorageError."""
        openings, parts = self._openings(answer), list(self._parts())
        key = self._key(author, openings, [spec for spec, _ in parts])
        paths = [self.folder / f"{answer}.{key}.{number}.arrow" for number in range(len(parts))]
        found = [_kept(path, len(at)) for path, (_, at) in zip(paths, parts, strict=True)]
        who = "the teacher" if answer == "chosen" else "the student"
        missing = sum(len(at) for (_, at), one in zip(parts, found, strict=True) if one is None)
        if missing:
            print(f"{who} writes after {missing:,} prompts of {self.name}", flush=True)
        for number, (spec, at) in enumerate(parts):
            if found[number] is None:
                written = author.generator.generate(openings.at(at), spec)
                self._keep(written, paths[number], who)
                found[number] = written
                missing -= len(at)
                if missing:
                    print(f"{who} has {missing:,} to go", flush=True)
        order = np.argsort(np.concatenate([at for _, at in parts]), kind="stable")
        return Continuations.joined([one for one in found if one is not None]).at(order.tolist())

    def _parts(self) -> Iterator[tuple[GenerationSpec, list[int]]]:
        """Prompts of one room, `PART` at most, and how they are gone on from."""
        for room, at in self._by_room().items():
            spec = self._spec(room)
            for first in range(0, len(at), PART):
                yield spec, at[first : first + PART]

    def _key(self, author: _Author, openings: Openings, specs: Sequence[GenerationSpec]) -> str:
        """Names all that decides what a model writes, part by part."""
        decides = {
            "model": dict(author.writing.identity),
            "openings": [digest.hex() for digest in openings.hashes()],
            "specs": [spec.as_dict() for spec in specs],
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(decides, sort_keys=True).encode())

    def _keep(self, written: Continuations, path: Path, who: str) -> None:
        try:
            write_table(path, written.table)
        except OSError as error:
            raise not_kept(f"what {who} wrote for pairs", self.folder, error) from None

    def paired(
        self, chosen: Continuations, rejected: Continuations
    ) -> tuple[PreparedDomain, Counts]:
        """The domain with rows of the pairs; says how many there are. Raises DataError where there
        are none, and StorageError."""
        config, num_prompts = self.prepared.config, len(self.prompts)
        texts = [answer.written() for answer in (chosen, rejected)]
        rows, num_pairs = pair_rows(self.prompts, *texts, context=config.data.context)
        sizes = [sum(map(len, ids)) for ids in texts]
        cut = [answer.stopped().count(False) for answer in (chosen, rejected)]
        alike, without = num_prompts - num_pairs, self.num_documents - num_prompts
        counts = Counts(num_prompts, num_pairs, alike, without, *cut, *sizes)
        print(
            f"pairs of {self.name}: {num_pairs:,} after {num_prompts:,} prompts, {counts.alike:,} "
            f"left out in which both wrote the same, {without:,} documents without room for two; "
            f"the teacher wrote {sizes[0]:,} tokens, the student {sizes[1]:,}, and {cut[0]:,} and "
            f"{cut[1]:,} of their responses were cut",
            flush=True,
        )
        if not num_pairs:
            raise DataError(
                f"teacher and student wrote the same after all {num_prompts:,} prompts of domain "
                f"{self.name}, so that neither is preferred; take another student, or raise "
                "source.temperature"
            )
        path = self.folder / f"rows.{self.number}.arrow"
        draft = path.with_name(f".{path.name}.draft")
        try:
            write_rows(draft, domain=self.name, rows=rows)
            draft.replace(path)
        except OSError as error:
            raise not_kept("rows of pairs", self.folder, error) from None
        size = {"num_rows": len(rows), "num_loss_tokens": rows.num_loss_tokens}
        return replace(self.domain, train_path=str(path), **size), counts

    def _openings(self, answer: Answer) -> Openings:
        """As the model is shown them: the teacher with the run's prompts. Both draw for
        themselves."""
        ids = [prompt.input_ids for prompt in self.prompts]
        domains = [self.name] * len(ids)
        if answer == "chosen":
            ids = shown_prompts(ids, domains, self.prepared.showing.openings)
        names = [f"{self.name}, document {prompt.row}" for prompt in self.prompts]
        openings = Openings.build(names=names, input_ids=ids)
        return openings.with_draws([f"{answer}/{self.name}/{one.row}" for one in self.prompts])

    def _by_room(self) -> dict[int, list[int]]:
        """Lines of the prompts that have the same room."""
        found: dict[int, list[int]] = {}
        for line, prompt in enumerate(self.prompts):
            found.setdefault(prompt.room, []).append(line)
        return dict(sorted(found.items()))

    def _spec(self, room: int) -> GenerationSpec:
        vocab = min(facts.shared_vocab for facts in self.prepared.teachers.values())
        return spec_of(self.prepared.config, room, ends=self.prepared.ends, vocab=vocab)


def _kept(path: Path, count: int) -> Continuations | None:
    """What a model wrote before after `count` prompts; None where it has not, or the file is
    damaged, and it writes anew."""
    try:
        with pa.memory_map(str(path)) as source:
            found = Continuations(pa.ipc.open_file(source).read_all())
    except (OSError, pa.ArrowException):
        return None
    return found if len(found.table) == count else None
