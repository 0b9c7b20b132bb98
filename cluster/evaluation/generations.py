"""What teacher and students wrote on the same openings: kept as JSON lines in a run's folder, and
what its scores come to.

P openings of a domain with a right answer
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from cluster.evaluation.scores import Scores
from cluster.evaluation.statistics import Estimate, Measures, ratio
from shared.errors import CheckpointError
from shared.run.run_dir import write_atomically

SCORES = ("exact_match", "token_f1", "rouge_l")


@dataclass(frozen=True, slots=True)
class Written:
    """What one model wrote."""

    text: str
    cut: bool  # it came to the limit of tokens before it ended
    scores: Scores | None = None  # None where nothing is right or wrong


@dataclass(frozen=True, slots=True)
class Generation:
    """One opening, what is right to follow, and what models wrote; a line of the file."""

    domain: str
    key: str  # of the opening's document
    prompt: str
    right: str
    max_new_tokens: int
    step: int | None  # updates behind the student after training
    models: dict[str, Written] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        """Whether there is a right answer."""
        return any(written.scores is not None for written in self.models.values())

    @staticmethod
    def from_dict(fields: Mapping) -> "Generation":
        """From a line of the file."""
        models = {
            name: Written(
                written["text"],
                written["cut"],
                None if written["scores"] is None else Scores(**written["scores"]),
            )
            for name, written in fields["models"].items()
        }
        return Generation(**{**fields, "models": models})


def write_generations(path: Path, generations: Iterable[Generation]) -> None:
    """Write the whole file or nothing."""
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in generations)
    write_atomically(path, "".join(lines))


def read_generations(path: Path) -> list[Generation]:
    """What `write_generations` wrote, nothing where it wrote none. Raises CheckpointError for a
    damaged file."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [Generation.from_dict(json.loads(line)) for line in text.split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} cannot be read; remove it, and `tutelage eval` writes it again"
        ) from None


def with_scores(measured: Measures, generations: Sequence[Generation], model: str) -> Measures:
    """The measures of a model with those of what it wrote, where it wrote anything that is right or
    wrong."""
    written = [g.models[model] for g in generations if g.is_scored and model in g.models]
    if not written:
        return measured
    return replace(
        measured,
        **{name: _mean([_value(one, name) for one in written]) for name in SCORES},
        cut=sum(one.cut for one in written),
    )


def with_differences(
    measured: Measures,
    generations: Sequence[Generation],
    others: Sequence[Generation],
    *,
    model: str,
    other: str,
) -> Measures:
    """Differences of two models with those of their scores, paired by opening; as they are where
    the two did not write on the same openings."""
    pairs = paired(generations, others, model=model, other=other)
    if not pairs:
        return measured
    return replace(
        measured,
        **{
            name: _mean([_value(one, name) - _value(two, name) for one, two in pairs])
            for name in SCORES
        },
    )


def paired(
    generations: Sequence[Generation], others: Sequence[Generation], *, model: str, other: str
) -> list[tuple[Written, Written]]:
    """What two models wrote on each opening with a right answer; nothing where openings or room
    differ."""
    known = {(g.key, g.max_new_tokens): g.models.get(other) for g in others if g.is_scored}
    found = [
        (g.models.get(model), known.get((g.key, g.max_new_tokens)))
        for g in generations
        if g.is_scored
    ]
    pairs = [(one, two) for one, two in found if one is not None and two is not None]
    return pairs if len(pairs) == len(found) == len(known) else []


def _value(written: Written, name: str) -> float:
    value = None if written.scores is None else getattr(written.scores, name)
    return np.nan if value is None else value


def _mean(values_P: Sequence[float]) -> Estimate | None:
    """The mean over openings; None where one is not known."""
    return ratio(np.array(values_P, np.float64), np.ones(len(values_P)))
