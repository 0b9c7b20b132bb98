"""How hard each training row is, from simple to complex (AKD, Saxena, Janzen and Maass, WiML 2024).

Before training, rows are scored once by the teacher, and for `gap` by the student as it starts,
through services of the same kind as training uses. What a model said of a domain's rows is kept in
the cache, so that no later run asks again. The measures are ours.

R rows of a domain in file order   D documents of them that have loss   N positions with loss of a
unit
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from tqdm import tqdm

from cluster.planning.preparation import Prepared
from shared.config.weighting import Statistic
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import ConfigError, DataError
from shared.locking import alone
from shared.run.plan import OpenReader
from shared.run.run_dir import write_atomically
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import Question
from shared.targets.reader import answered
from shared.targets.soft_targets import SoftTargets
from shared.text.digests import digest_file

Measure = Literal["teacher_nll", "teacher_entropy", "gap", "length"]
Quantity = Literal["nll", "entropy"]
FORMAT = 2  # counts up when scores are computed in another way


@dataclass(frozen=True, slots=True)
class ScoringModel:
    """A model that rows are scored by."""

    role: Literal["teacher", "student"]  # a teacher's readers show it the run's prompts
    identity: Mapping[str, str]  # everything that may change a score
    serve: Callable[[], AbstractContextManager[OpenReader]] | None  # None: only what is stored


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model said of the documents of rows, in order."""

    nats_D: np.ndarray  # summed over loss tokens, float64
    tokens_D: np.ndarray  # with loss, int64, never 0
    row_D: np.ndarray  # int64

    def by_document(self) -> np.ndarray:
        """Means over loss tokens [D]."""
        return self.nats_D / self.tokens_D

    def by_row(self, num_rows: int) -> np.ndarray:
        """Means over loss tokens [R]; 0 of a row without any."""
        nats_R, tokens_R = (
            np.bincount(self.row_D, weights=value_D, minlength=num_rows)
            for value_D in (self.nats_D, self.tokens_D)
        )
        return nats_R / np.maximum(tokens_R, 1)

    def fields(self) -> dict[str, list[float]]:
        """As JSON takes it."""
        return {name: getattr(self, name).tolist() for name in self.__slots__}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Scored":
        """The inverse of `fields`. Raises KeyError, TypeError or ValueError for other fields."""
        kinds = zip(cls.__slots__, (np.float64, np.int64, np.int64), strict=True)
        return cls(*(np.array(fields[name], kind) for name, kind in kinds))

    @staticmethod
    def joined(parts: Sequence["Scored"]) -> "Scored":
        """Those of several units, in order."""
        empty = Scored(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        names = Scored.__slots__
        return Scored(*(np.concatenate([getattr(p, n) for p in (empty, *parts)]) for n in names))

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        state = xxhash.xxh3_128()
        for name in self.__slots__:
            state.update(getattr(self, name).tobytes())
        return state.hexdigest()


def scores(
    prepared: Prepared,
    measure: Measure,
    *,
    teachers: Mapping[str, ScoringModel],
    student: ScoringModel | None,
) -> dict[str, np.ndarray]:
    """Difficulty of every training row by domain, float64 [R]; higher is harder.

    `length` is loss tokens, the others are nats per loss token: the NLL of the label by the
    domain's teacher, its entropy, or by how much the student's NLL exceeds the teacher's. Raises
    ConfigError where scores are not stored and nobody is there to score.
    """
    if measure == "length":
        return {d.name: _lengths(d) for d in prepared.domains}
    quantity = "entropy" if measure == "teacher_entropy" else "nll"
    found = {
        domain: scored_R
        for name, teacher in teachers.items()
        for domain, scored_R in _by_row(prepared.taught_by(name), teacher, quantity).items()
    }
    if measure == "gap":
        assert student is not None, "a run has a student"
        own = _by_row(prepared, student, "nll")
        found = {name: own[name] - nll_R for name, nll_R in found.items()}
    return found


def _by_row(prepared: Prepared, model: ScoringModel, quantity: Quantity) -> dict[str, np.ndarray]:
    found = _scored(prepared, model, quantity)
    return {d.name: found[d.name].by_row(d.num_rows) for d in prepared.domains}


STATISTICS: Mapping[Statistic, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "lower_quartile": partial(np.quantile, q=0.25),
    "median": np.median,
    "upper_quartile": partial(np.quantile, q=0.75),
}


def centre_of(
    prepared: Prepared, statistic: Statistic, *, teachers: Mapping[str, ScoringModel]
) -> float:
    """A statistic of the teachers' NLL of all training documents of all domains, each one's the
    mean over its loss tokens, nats; says it. A document that is cut into rows counts once for each
    part, as it is weighed. Raises ConfigError as `scores` does, DataError where a score is no
    number."""
    value_D = np.concatenate(
        [
            scored.by_document()
            for name, teacher in teachers.items()
            for scored in _scored(prepared.taught_by(name), teacher, "nll").values()
        ]
    )
    centre = float(STATISTICS[statistic](value_D))
    if not math.isfinite(centre):
        raise DataError(
            f"the teacher's NLL of a training document is no number, so that weighting.centre "
            f"{statistic} is none; set weighting.centre=running, or look at the teacher"
        )
    print(
        f"weighting.centre: the {statistic.replace('_', ' ')} of the teacher's NLL of "
        f"{len(value_D):,} documents is {centre:.3f} nats a token",
        flush=True,
    )
    return centre


def _lengths(domain: PreparedDomain) -> np.ndarray:
    return RowStore.open(domain.train_path).loss_tokens().astype(np.float64)


def _scored(prepared: Prepared, model: ScoringModel, quantity: Quantity) -> dict[str, Scored]:
    """A quantity of every domain from the cache, or scored and kept there; safe with several
    processes at once."""
    shared_vocab = min(facts.shared_vocab for facts in prepared.teachers.values())
    with_entropy = quantity == "entropy"
    question = Question(
        LikeliestIds(1, shared_vocab, encoding="fp32", entropy=with_entropy),
        prefix=prepared.showing.prompts if model.role == "teacher" else "",
    )
    paths = {d.name: _path(prepared, d, model, question) for d in prepared.domains}
    missing = [d for d in prepared.domains if _kept(paths[d.name]) is None]
    if missing:
        if model.serve is None:
            raise ConfigError(_nothing_stored(prepared, model, missing[0]))
        started, num_rows = time.monotonic(), sum(d.num_rows for d in missing)
        with model.serve() as open_reader:
            for domain in missing:
                print(
                    f"the {model.role} scores {domain.num_rows:,} rows of {domain.name}", flush=True
                )
                path = _rows_path(domain, model)
                score = partial(_score, prepared, path, domain.name, open_reader, question)
                _keep(paths[domain.name], score)
        print(
            f"the {model.role} scored {num_rows:,} rows for their difficulty in "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )
    return {d.name: _read(paths[d.name]) for d in prepared.domains}


def _nothing_stored(prepared: Prepared, model: ScoringModel, domain: PreparedDomain) -> str:
    phases = prepared.config.progressive is not None
    way_out = "progressive.difficulty=length" if phases else "weighting.centre=running"
    return (
        f"no scores by this {model.role} of the rows of {domain.name} are kept in paths.cache "
        f"{prepared.config.paths.cache}, and with targets.teacher_free nobody scores them; "
        f"`tutelage capture CONFIG` does, or set {way_out}"
    )


def _rows_path(domain: PreparedDomain, model: ScoringModel) -> str:
    """The training rows that a model reads."""
    return (domain.read_by_teacher if model.role == "teacher" else domain.paths)["train"]


def _score(
    prepared: Prepared, path: str, name: str, open_reader: OpenReader, question: Question
) -> Scored:
    """What `question` asks about every document of a file, units in its order, under a bar."""
    config, store = prepared.config, RowStore.open(path)
    bar = tqdm(
        total=len(store),
        desc=f"scoring {name}",
        unit="row",
        disable=not sys.stderr.isatty(),
    )
    parts, done, reader = [], 0, open_reader(0)
    try:
        units = store.units(config.batch.micro_batch)
        for rows, answer in answered(reader, units, question, ahead=2 * config.service.in_flight):
            parts.append(_of_unit(rows, answer, first_row=done))
            done += len(rows)
            bar.update(len(rows))
    finally:
        reader.close()
        bar.close()
    return Scored.joined(parts)


def _of_unit(rows: Rows, answer: SoftTargets, *, first_row: int) -> Scored:
    """NLL of the label, or entropy, of the documents of a unit, whose rows count from
    `first_row`."""
    arrays, starts = answer.arrays(), rows.column("doc_starts")
    value_N = -arrays.label_logprob_N if arrays.entropy_N is None else arrays.entropy_N
    pairs = zip(rows.column("loss_mask"), starts, strict=True)
    tokens = [np.add.reduceat(mask, first, dtype=np.int64) for mask, first in pairs]
    tokens_D = np.concatenate([np.zeros(0, np.int64), *tokens])
    document_N = np.repeat(np.arange(len(tokens_D)), tokens_D)
    nats_D = np.bincount(document_N, weights=value_N, minlength=len(tokens_D))
    row_D = first_row + np.repeat(np.arange(len(rows)), [len(first) for first in starts])
    has_loss_D = tokens_D > 0
    return Scored(nats_D[has_loss_D], tokens_D[has_loss_D], row_D[has_loss_D])


def _path(
    prepared: Prepared, domain: PreparedDomain, model: ScoringModel, question: Question
) -> Path:
    """Named by all that decides a score, but not by the size of a unit: it moves a score by the
    rounding of one forward pass only."""
    decides = {
        "format": FORMAT,
        "rows": digest_file(Path(_rows_path(domain, model))),
        "model": dict(model.identity),
        "spec": question.as_dict(),
    }
    key = xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())
    return Path(prepared.config.paths.cache).expanduser() / "difficulty" / f"{key}.json"


def _keep(path: Path, score: Callable[[], Scored]) -> None:
    """Score and write, unless another process did so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_suffix(".lock"), making="scores of the training rows"):
        if _kept(path) is None:
            found = score()
            kept = {"digest": found.digest, "scores": found.fields()}
            write_atomically(path, json.dumps(kept))


def _kept(path: Path) -> Scored | None:
    """What is kept of a whole file; None where it is absent or damaged."""
    try:
        kept = json.loads(path.read_text())
        found = Scored.from_fields(kept["scores"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if kept["digest"] == found.digest else None


def _read(path: Path) -> Scored:
    found = _kept(path)
    if found is None:
        raise ConfigError(f"{path} vanished or is damaged; run the same command again")
    return found
