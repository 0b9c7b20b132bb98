"""What a model is asked to write, and what it wrote: token ids in, token ids out.

Both are Arrow tables, a row each; the answer describes itself in its metadata, as SoftTargets do.

T tokens of an opening   U tokens of its continuation   W the same and the id that ended it
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from shared.errors import TeacherError
from shared.targets.weights import WeightsRef

SCHEMA_VERSION = 1
METADATA_KEY = b"tutelage.continuations"

TokenIds = Sequence[int] | np.ndarray

OPENINGS = pa.schema({"name": pa.string(), "input_ids": pa.list_(pa.int32())})
DRAW = "draw"  # a further column, where an opening is continued more than once
FORCED = "forced"  # a further column, where the first tokens of a continuation are given
OWN = "own_logprobs"  # a further column, where a partner has a share in what is drawn
NO_END = -1  # in place of the id that ended a continuation
# Fields that questions and answers name only where they are not at their defaults.
LATER_FIELDS = ("top_p", "min_new_tokens", "vocab", "logprobs", "weights")
CANARY = "canary"  # a further column, of models whose weights change


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """How to go on; with the opening and the teacher it determines the continuation."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()  # any of them ends a continuation and is left out of it
    temperature: float = 0.0  # 0: the most likely token, always
    seed: int = 0
    top_p: float = 1.0  # only the likeliest ids that hold so much are drawn from
    min_new_tokens: int = 0  # before it no stop id is drawn
    vocab: int | None = None  # ids from this one on are never written; None: the model's own
    logprobs: bool = False  # ask for log-probabilities, and for the ids that ended continuations
    weights: WeightsRef | None = None  # of a model whose weights change; draws do not depend on it

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes."""
        later = {field.name: field.default for field in fields(self) if field.name in LATER_FIELDS}
        named = asdict(self).items()
        return {name: value for name, value in named if later.get(name) != value}

    @staticmethod
    def from_dict(fields: Mapping) -> "GenerationSpec":
        """The inverse of `as_dict` after a trip through JSON."""
        found = {**fields, "stop_ids": tuple(fields["stop_ids"])}
        if found.get("weights") is not None:
            found["weights"] = WeightsRef(**found["weights"])
        return GenerationSpec(**found)

    def in_words(self) -> str:
        """The question as a message names it."""
        least = f"at least {self.min_new_tokens} and " if self.min_new_tokens else ""
        cut = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        of = f" with weights of version {self.weights.version}" if self.weights else ""
        return (
            f"{least}at most {self.max_new_tokens} tokens at temperature "
            f"{self.temperature:g}{cut}, seed {self.seed}, up to any of ids "
            f"{list(self.stop_ids)}{of}"
        )


@dataclass(frozen=True, slots=True)
class Openings:
    """Token ids to be continued; what a generation request carries."""

    table: pa.Table

    @staticmethod
    def build(*, names: Sequence[str], input_ids: Sequence[TokenIds]) -> "Openings":
        """One entry of each argument per opening; names are for messages."""
        columns = [pa.array(list(names), pa.string()), _lists(input_ids)]
        return Openings(pa.Table.from_arrays(columns, schema=OPENINGS))

    def __len__(self) -> int:
        return self.table.num_rows

    def with_draws(self, draws: Sequence[str]) -> "Openings":
        """The same openings, each with the name of its draw: of one opening and seed, every draw
        gives another continuation."""
        return Openings(self.table.append_column(DRAW, pa.array(list(draws), pa.string())))

    def with_forced(self, tokens: Sequence[TokenIds]) -> "Openings":
        """The same openings, each with the tokens that its continuation begins with, whatever they
        are: they are taken in place of draws, and their log-probabilities are answered as those of
        draws are."""
        return Openings(self.table.append_column(FORCED, _lists(tokens)))

    @property
    def are_forced(self) -> bool:
        """Whether first tokens are given."""
        return FORCED in self.table.column_names

    def forced(self) -> list[np.ndarray]:
        """The tokens that each continuation begins with, int32."""
        return _arrays(self.table.column(FORCED))

    def at(self, lines: Sequence[int]) -> "Openings":
        """The openings of these lines, in their order."""
        return Openings(self.table.take(pa.array(lines, pa.int64())).combine_chunks())

    def names(self) -> list[str]:
        """The name of each opening, for messages."""
        return self.table.column("name").to_pylist()

    def ids(self) -> list[np.ndarray]:
        """Token ids of each opening, int32 [T]."""
        return _arrays(self.table.column("input_ids"))

    def hashes(self) -> list[bytes]:
        """16 bytes per opening over its token ids, and the name of its draw where it has one."""
        draws = [b""] * len(self)
        if DRAW in self.table.column_names:
            draws = [draw.encode() for draw in self.table.column(DRAW).to_pylist()]
        pairs = zip(self.ids(), draws, strict=True)
        return [xxhash.xxh3_128_digest(ids.tobytes() + draw) for ids, draw in pairs]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn beside the tokens of continuations."""

    logprobs: list[np.ndarray]  # float32 [W] each, nats, of the distribution drawn from
    end_ids: list[int]  # `NO_END` where the tokens were used up
    own_logprobs: list[np.ndarray] | None = None  # the model's own, where a partner had a share


@dataclass(frozen=True, slots=True)
class Continuations:
    """A model's answer to one batch of openings."""

    table: pa.Table

    @staticmethod
    def build(
        openings: Openings,
        spec: GenerationSpec,
        *,
        teacher: Mapping[str, str],
        output_ids: Sequence[TokenIds],
        stopped: Sequence[bool],
        drawn: Drawn | None = None,
    ) -> "Continuations":
        """Continuations in the order of their openings; `stopped` where a stop id ended one, and
        `drawn` where the spec asks for log-probabilities."""
        assert spec.logprobs == (drawn is not None), "log-probabilities come where they are asked"
        columns = {
            "opening_hash": pa.array(openings.hashes(), pa.binary(16)),
            "output_ids": _lists(output_ids),
            "stopped": pa.array(list(stopped), pa.bool_()),
        }
        if drawn is not None:
            columns["logprobs"] = pa.array(drawn.logprobs, pa.list_(pa.float32()))
            columns["end_id"] = pa.array(drawn.end_ids, pa.int32())
            if drawn.own_logprobs is not None:
                columns[OWN] = pa.array(drawn.own_logprobs, pa.list_(pa.float32()))
        described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": spec.as_dict(),
        }
        metadata = {METADATA_KEY: json.dumps(described)}
        return Continuations(pa.table(columns).replace_schema_metadata(metadata))

    def at(self, lines: Sequence[int]) -> "Continuations":
        """Those of these lines, in their order."""
        return Continuations(self.table.take(pa.array(lines, pa.int64())).combine_chunks())

    def with_canary(self, logprobs: np.ndarray) -> "Continuations":
        """The same with what the model says of a fixed text beside every row: log-probabilities,
        nats, float32."""
        column = pa.array([logprobs] * self.table.num_rows, pa.list_(pa.float32()))
        return Continuations(self.table.append_column(CANARY, column))

    def canaries(self) -> list[np.ndarray]:
        """What `with_canary` put beside each row."""
        return _floats(self.table.column(CANARY))

    @property
    def described(self) -> dict:
        """Schema version, teacher fingerprint and spec, from the Table's own metadata."""
        return json.loads((self.table.schema.metadata or {})[METADATA_KEY])

    @property
    def num_bytes(self) -> int:
        """Bytes of the serialised Table."""
        return self.table.nbytes

    def ids(self) -> list[np.ndarray]:
        """Token ids of each continuation, int32 [U], without what stopped it."""
        return _arrays(self.table.column("output_ids"))

    def stopped(self) -> list[bool]:
        """Whether each came to a stop id before its tokens were used up."""
        return self.table.column("stopped").to_pylist()

    def written(self) -> list[np.ndarray]:
        """Token ids of each continuation with the one that ended it, where one did, int32 [W]; of
        answers with log-probabilities."""
        ends = self.table.column("end_id").to_pylist()
        return [
            ids if end == NO_END else np.append(ids, np.int32(end))
            for ids, end in zip(self.ids(), ends, strict=True)
        ]

    def logprobs(self) -> list[np.ndarray]:
        """Log-probabilities of `written` under the law that it was drawn from, float32 [W]: after
        temperature, top-p and the ban on early ends; 0 where the likeliest is always taken."""
        return _floats(self.table.column("logprobs"))

    def own_logprobs(self) -> list[np.ndarray] | None:
        """The same under the law of the model alone; None where no partner had a share."""
        if OWN not in self.table.column_names:
            return None
        return _floats(self.table.column(OWN))

    @staticmethod
    def joined(parts: Sequence["Continuations"]) -> "Continuations":
        """Answers to the parts of one batch of openings, in their order."""
        table = pa.concat_tables([part.table for part in parts]).combine_chunks()
        return Continuations(table.replace_schema_metadata(parts[0].table.schema.metadata))

    def check(
        self, openings: Openings, spec: GenerationSpec, teacher: Mapping[str, str] | None = None
    ) -> None:
        """Refuse an answer to other openings, another question or from another teacher.

        Raises TeacherError; the pool retries the unit elsewhere.
        """
        described = self.described
        if described["schema_version"] != SCHEMA_VERSION:
            raise TeacherError(
                f"the answer has schema version {described['schema_version']}, this is "
                f"{SCHEMA_VERSION}; restart the teacher service with this version"
            )
        if self.table.column("opening_hash").to_pylist() != openings.hashes():
            raise TeacherError(f"the answer does not continue {', '.join(openings.names())}")
        answered = GenerationSpec.from_dict(described["spec"])
        if answered != spec:
            raise TeacherError(
                f"the answer is to {answered.in_words()}, asked was {spec.in_words()}"
            )
        if openings.are_forced and not self._begins(openings):
            raise TeacherError(
                f"the answer does not begin as asked after {', '.join(openings.names())}"
            )
        if teacher is not None and described["teacher"] != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")

    def _begins(self, openings: Openings) -> bool:
        """Whether each continuation begins with what is given, up to its end."""
        pairs = zip(self.ids(), openings.forced(), strict=True)
        return all((ids[: len(given)] == given[: len(ids)]).all() for ids, given in pairs)


class Generator(Protocol):
    """Continues openings: a teacher's engine, or a student at work on itself."""

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch. Raises UserError for what can never be answered."""
        ...


@dataclass(frozen=True, slots=True)
class Partner:
    """Another generator with a share in the law that each token is drawn from."""

    generator: Generator
    openings: Openings  # as it is shown them, line by line
    share: float  # above 0

    def at(self, lines: Sequence[int]) -> "Partner":
        """The same for the openings of these lines."""
        return Partner(self.generator, self.openings.at(lines), self.share)

    def generate(self, forced: Sequence[TokenIds], spec: GenerationSpec) -> Continuations:
        """What it makes of texts that begin so, and writes where they end. Raises what `Generator`
        does, and TeacherError for an answer to something else."""
        openings = self.openings.with_forced(forced)
        answer = self.generator.generate(openings, spec)
        answer.check(openings, spec)
        return answer


class MixedGenerator(Generator, Protocol):
    """A generator that writes with a partner."""

    def generate_mixed(
        self, openings: Openings, spec: GenerationSpec, partner: Partner
    ) -> Continuations:
        """Continue one batch; each token is drawn from the partner's share of its law, and the
        rest of the model's own. The partner is asked once a token. Raises what both raise."""
        ...


class RemoteGenerator(Generator, Protocol):
    """A generator in other processes, asked by a thread beside the one that learns."""

    def waiting(self) -> AbstractContextManager[None]:
        """Report the time of a `with` as waited for their answers."""
        ...

    def close(self) -> None:
        """Let go of them."""
        ...


OpenTeachers = Callable[[int], Mapping[str, RemoteGenerator]]  # rank -> by teacher; picklable


class OpenGenerator(Protocol):
    """How a trainer comes by a generator around its own model; picklable."""

    def __call__(self, model: Any, *, device: Any, dtype: str, batch_rows: int) -> Generator:
        """A generator that continues at most `batch_rows` openings at once, with the weights that
        the model has when it is asked; where `model` is None, with those that a request names."""
        ...


def _lists(ids: Sequence[TokenIds]) -> pa.ListArray:
    return pa.array([np.asarray(each, np.int32) for each in ids], pa.list_(pa.int32()))


def _floats(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [np.asarray(scalar.values.to_numpy(), np.float32) for scalar in column]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [np.asarray(scalar.values.to_numpy(), np.int32) for scalar in column]
