"""RunRecord: what a run has written so far, read back for the summary, the table and the report.

Knows nothing of models or processes; a run that has only just begun reads as well as a finished
one, with empty parts.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from cluster.report.text import TextSummary, read_text
from shared.config.run import Config
from shared.errors import DamagedError
from shared.mixture.weight_log import WeightLog, read_log
from shared.run.metrics import DomainEvaluation, StepMetrics, read_metrics
from shared.run.run_dir import RunDir, read_written

Evaluations = dict[str, DomainEvaluation]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The files of a run directory as values. Domains are in config order."""

    directory: Path
    config: Config
    lines: tuple[StepMetrics, ...]
    log: WeightLog
    before: Evaluations  # empty until the student has been evaluated
    after: Evaluations
    baseline: "RunRecord | None"  # the same student on hard labels alone, where the config asks
    text: dict[str, TextSummary] = field(default_factory=dict)  # by domain

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in config order."""
        return tuple(self.config.domains)

    @property
    def steps(self) -> int:
        """Optimiser updates done, as of the last metrics line."""
        return self.lines[-1].step if self.lines else 0

    def weights(self, block: int) -> dict[str, float]:
        """The weights a block was drawn with; empty before the log has its first entry."""
        if not self.log.entries:
            return {}
        return dict(zip(self.domains, self.log.ruling(block).weights, strict=True))


def read_record(directory: Path) -> RunRecord:
    """Read a run directory, or the baseline's inside it, which has its run's config.

    Raises ConfigError if there is no readable config.yaml, DamagedError for a file that is not what
    was written.
    """
    files = RunDir(directory)
    inside = directory.name == files.baseline.path.name and not files.config.exists()
    config = RunDir(directory.parent if inside else directory).recorded_config()
    evaluations = directory / "evaluations.json"
    baseline = files.baseline.path
    return RunRecord(
        directory=directory,
        config=config,
        lines=tuple(read_metrics(files.metrics)),
        log=read_log(files.weight_log, config.domains),
        before=_evaluations(evaluations, "before"),
        after=_evaluations(evaluations, "after"),
        baseline=read_record(baseline) if config.baseline and baseline.is_dir() else None,
        text=read_text(RunDir(directory.parent if inside else directory)),
    )


def _evaluations(path: Path, when: str) -> Evaluations:
    fields = read_written(path).get(when)
    try:
        return {name: DomainEvaluation.from_dict(found) for name, found in (fields or {}).items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"{path} is damaged: {when} is no evaluation ({type(error).__name__}: {error}); put a "
            "copy of it back, or remove it"
        ) from None


def finite(value: float | None) -> float | None:
    """The value, or None where there is none that JSON and plots can show."""
    return value if value is not None and math.isfinite(value) else None
