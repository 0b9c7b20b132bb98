"""Options of two configs of one run: which differ, which may, and how a sentence says it."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from shared.config.paths import without_job_folder
from shared.config.run import Config

# Options that may change between two commands on one run: where, how fast and how far, not what is
# learnt.
PASSING = (
    "steps",
    "paths",
    "prompts",  # where they lie; what they say is compared
    "log_every",
    "checkpoints",
    "service",
    "baseline",
    "trackers",
    "student.max_restarts",
    "student.workers",
    "student.zero",
    "student.activation_checkpointing",
    "student.gpus",
    "student.cpus",
    "batch.micro_batch",
    "source.batch_rows",
    "rollouts.replicas",
    "rollouts.gpus",
    "rollouts.cpus",
    "rollouts.python",
    "targets.ids",
    "targets.store",
    "targets.store_ids",
    "targets.teacher_free",
    "mixture.deadline_s",
    "prompt_search",
    "active",
)
PASSING_OF_A_TEACHER = ("replicas", "gpus", "cpus", "python")
MOST_SHOWN = 60  # characters of a value in a sentence


def differing_options(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Options that decide what is learnt and differ, as `a.b`, with the old and the new value; None
    where one has no such option. A job's copy of a working folder lies elsewhere each time."""
    changed = changed_options(old, new)
    if changed.get("steps") and old.decision_interval != new.decision_interval:
        # Decisions of phases lie where they would have been, had the run always been as long.
        intervals = (old.decision_interval, new.decision_interval)
        changed["progressive.interval"] = intervals
    elif old.decision_interval == new.decision_interval:
        changed.pop("progressive.interval", None)
    return {name: values for name, values in changed.items() if not _passing(name)}


def changed_options(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """All options that differ, as `a.b`, with the old and the new value."""
    before, after = (dict(leaves(c.model_dump(mode="json"))) for c in (old, new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    groups = {name.rpartition(".")[0] for name in names}  # {} on one side has no options
    return {name: (before.get(name), after.get(name)) for name in names if name not in groups}


def in_words(name: str, before: Any, after: Any) -> str:
    """An option with its old and its new value, long ones from shortly before they differ."""
    texts = [v if isinstance(v, str) else json.dumps(v) for v in (before, after)]
    start = 0
    if max(map(len, texts)) > MOST_SHOWN:
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        start = max(0, sum(1 for _ in alike) - MOST_SHOWN // 2)
    was, now = ("..." * bool(start) + text[start:][:MOST_SHOWN] for text in texts)
    return f"{name} ({was}, now {now})"


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of nested values as `a.b`, with their values."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from leaves(value, f"{prefix}{name}.")
    else:
        yield prefix.removesuffix("."), _at_home(values)


def _at_home(value: Any) -> Any:
    """A value with the paths in it as they are outside a job."""
    if isinstance(value, dict):
        return {name: _at_home(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return without_job_folder(value) if isinstance(value, str) else value


def _passing(name: str) -> bool:
    parts = name.split(".")
    if parts[0] == "teachers" and not {*parts[2:]}.isdisjoint(PASSING_OF_A_TEACHER):
        return True
    return any(name == option or name.startswith(f"{option}.") for option in PASSING)
