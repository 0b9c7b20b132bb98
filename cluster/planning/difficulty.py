"""How hard each training row is, from simple to complex (AKD, Saxena, Janzen and Maass, WiML 2024).

Before training, rows are scored once by the teacher, and for `gap` by the student as it starts,
through services of the same kind as training uses. What a model said of a domain's rows is kept in
the cache, so that no later run asks again. The measures are ours.

R rows of a domain in file order   N positions with loss of a unit
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from filelock import FileLock
from tqdm import tqdm

from cluster.planning.preparation import Prepared
from shared.config.weighting import Statistic
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import ConfigError, DataError
from shared.run.plan import OpenReader
from shared.run.run_dir import write_atomically
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import Question
from shared.targets.reader import answered
from shared.targets.soft_targets import SoftTargets
from shared.text.digests import digest_file

Measure = Literal["teacher_nll", "teacher_entropy", "gap", "length"]
Quantity = Literal["nll", "entropy"]
FORMAT = 1  # counts up when a row's scores are computed in another way


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that rows are scored by."""

    role: Literal["teacher", "student"]  # a teacher's readers show it the run's prompts
    identity: Mapping[str, str]  # everything that may change a score
    serve: Callable[[], AbstractContextManager[OpenReader]] | None  # None: only what is stored


def scores(
    prepared: Prepared, measure: Measure, *, teachers: Mapping[str, Asked], student: Asked | None
) -> dict[str, np.ndarray]:
    """Difficulty of every training row by domain, float64 [R]; higher is harder.

    `length` is loss tokens, the others are nats per loss token: the NLL of the label by the
    domain's teacher, its entropy, or by how much the student's NLL exceeds the teacher's. Raises
    ConfigError where scores are not stored and nobody is there to score.
    """
    if measure == "length":
        return {d.name: _lengths(d) for d in prepared.domains}
    quantity = "entropy" if measure == "teacher_entropy" else "nll"
    found: dict[str, np.ndarray] = {}
    for name, teacher in teachers.items():
        found |= _scored(prepared.taught_by(name), teacher, quantity)
    if measure == "gap":
        assert student is not None, "a run has a student"
        own = _scored(prepared, student, "nll")
        found = {name: own[name] - nll_R for name, nll_R in found.items()}
    return found


STATISTICS: Mapping[Statistic, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "lower_quartile": partial(np.quantile, q=0.25),
    "median": np.median,
    "upper_quartile": partial(np.quantile, q=0.75),
}


def centre_of(prepared: Prepared, statistic: Statistic, *, teachers: Mapping[str, Asked]) -> float:
    """A statistic of the teachers' NLL of all training rows of all domains, each row's the mean
    over its loss tokens, nats; says it. Raises ConfigError as `scores` does, DataError where a
    score is no number."""
    found = scores(prepared, "teacher_nll", teachers=teachers, student=None)
    value_R = np.concatenate([*found.values()])
    centre = float(STATISTICS[statistic](value_R))
    if not math.isfinite(centre):
        raise DataError(
            f"the teacher's NLL of a training row is no number, so that weighting.centre "
            f"{statistic} is none; set weighting.centre=running, or look at the teacher"
        )
    print(
        f"weighting.centre: the {statistic.replace('_', ' ')} of the teacher's NLL of "
        f"{len(value_R):,} rows is {centre:.3f} nats a token",
        flush=True,
    )
    return centre


def _lengths(domain: PreparedDomain) -> np.ndarray:
    return RowStore.open(domain.train_path).loss_tokens().astype(np.float64)


def _scored(prepared: Prepared, model: Asked, quantity: Quantity) -> dict[str, np.ndarray]:
    """A quantity of every domain from the cache, or scored and kept there; safe with several
    processes at once."""
    shared_vocab = min(facts.shared_vocab for facts in prepared.teachers.values())
    with_entropy = quantity == "entropy"
    question = Question(
        LikeliestIds(1, shared_vocab, encoding="fp32", entropy=with_entropy),
        prefix=prepared.showing.prompts if model.role == "teacher" else "",
    )
    paths = {d.name: _path(prepared, d, model, question) for d in prepared.domains}
    missing = [d for d in prepared.domains if _kept(paths[d.name], d) is None]
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
                _keep(paths[domain.name], domain, score)
        print(
            f"the {model.role} scored {num_rows:,} rows for their difficulty in "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )
    return {d.name: _read(paths[d.name], d) for d in prepared.domains}


def _nothing_stored(prepared: Prepared, model: Asked, domain: PreparedDomain) -> str:
    phases = prepared.config.progressive is not None
    way_out = "progressive.difficulty=length" if phases else "weighting.centre=running"
    return (
        f"no scores by this {model.role} of the rows of {domain.name} are kept in paths.cache "
        f"{prepared.config.paths.cache}, and with targets.teacher_free nobody scores them; "
        f"`tutelage capture CONFIG` does, or set {way_out}"
    )


def _rows_path(domain: PreparedDomain, model: Asked) -> str:
    """The training rows that a model reads."""
    return (domain.read_by_teacher if model.role == "teacher" else domain.paths)["train"]


def _score(
    prepared: Prepared, path: str, name: str, open_reader: OpenReader, question: Question
) -> np.ndarray:
    """What `question` asks about every row of a file [R], units in its order, under a bar."""
    config, store = prepared.config, RowStore.open(path)
    bar = tqdm(
        total=len(store),
        desc=f"scoring {name}",
        unit="row",
        disable=not sys.stderr.isatty(),
    )
    parts, reader = [np.zeros(0)], open_reader(0)
    try:
        units = store.units(config.batch.micro_batch)
        for rows, answer in answered(reader, units, question, ahead=2 * config.service.in_flight):
            parts.append(_means(rows, answer))
            bar.update(len(rows))
    finally:
        reader.close()
        bar.close()
    return np.concatenate(parts)


def _means(rows: Rows, answer: SoftTargets) -> np.ndarray:
    """Mean NLL of the label, or mean entropy, of each row of a unit."""
    arrays, num_R = answer.arrays(), rows.num_loss_tokens()
    value_N = -arrays.label_logprob_N if arrays.entropy_N is None else arrays.entropy_N
    row_N = np.repeat(np.arange(len(rows)), num_R)
    sums_R = np.bincount(row_N, weights=value_N, minlength=len(rows))
    return sums_R / np.maximum(num_R, 1)


def _path(prepared: Prepared, domain: PreparedDomain, model: Asked, question: Question) -> Path:
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


def _keep(path: Path, domain: PreparedDomain, score: Callable[[], np.ndarray]) -> None:
    """Score and write, unless another process did so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if _kept(path, domain) is None:
            value_R = score()
            kept = {"digest": _digest(value_R), "scores": value_R.tolist()}
            write_atomically(path, json.dumps(kept))


def _kept(path: Path, domain: PreparedDomain) -> np.ndarray | None:
    """Scores of a whole file [R]; None where it is absent or damaged."""
    try:
        kept = json.loads(path.read_text())
        value_R = np.array(kept["scores"], np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = value_R.shape == (domain.num_rows,) and kept["digest"] == _digest(value_R)
    return value_R if whole else None


def _read(path: Path, domain: PreparedDomain) -> np.ndarray:
    value_R = _kept(path, domain)
    if value_R is None:
        raise ConfigError(f"{path} vanished or is damaged; run the same command again")
    return value_R


def _digest(value_R: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(value_R.tobytes())
