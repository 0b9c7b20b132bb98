"""A line of `metrics.jsonl` as metrics, for what the process exports and for a run's curves."""

from collections.abc import Iterator, Mapping

from shared.config.run import Config
from shared.run import exported, exporter
from shared.run.exported import Metric
from shared.run.metrics import StepMetrics


def export_line(line: StepMetrics, config: Config, *, steps_in_line: int) -> None:
    """Set what the trainer exports; the line covers `steps_in_line` steps."""
    export = exporter.current()
    for metric, labels, value in measured(line, config, steps_in_line=steps_in_line):
        gone = metric == exported.WEIGHT and not value  # a domain that is done
        export.set(metric, None if gone else value, **labels)
    for name, domain in line.domains.items():
        export.add(exported.TOKENS, domain.tokens, domain=name)


def measured(
    line: StepMetrics, config: Config, *, steps_in_line: int
) -> Iterator[tuple[Metric, Mapping[str, str], float | None]]:
    """Gauges, their labels beside the run, and their values; None for what is not there."""
    steps, tokens = max(1, steps_in_line), max(1, line.tokens)
    of_run = {
        exported.STEP: line.step,
        exported.PROGRESS: line.step / config.steps,
        exported.ETA: seconds_left(line, config, steps_in_line),
        exported.LOSS: line.loss,
        exported.STUDENT_SPEED: line.tokens_per_s,
        exported.CAPTURED_MASS: line.captured_mass,
        exported.GRAD_NORM: line.grad_norm,
        exported.LEARNING_RATE: line.lr,
        exported.WIRE_BYTES: line.wire_bytes / tokens,
        exported.CACHE_HITS: line.cache_hits / line.units if line.units else None,
        exported.RETRIED: line.retried_units,
        exported.STEP_TIME: line.seconds / steps,
        exported.STEP_WAIT: line.teacher_wait_s / steps,
        exported.STEP_WRITING: line.text_wait_s / steps,
        exported.STEP_COMPUTE: line.compute_s / steps,
        exported.STEP_OPTIMISER: line.optimiser_s / steps,
        exported.STEP_REST: (line.rest_s + line.balancing_s) / steps,
        exported.EXPERT_LOAD: None if line.experts is None else line.experts.max_load,
    }
    yield from ((metric, {}, value) for metric, value in of_run.items())
    for name, domain in line.domains.items():
        yield exported.KL, {"domain": name}, domain.kl
        yield exported.WEIGHT, {"domain": name}, domain.weight
        yield exported.SELECTED, {"domain": name}, domain.selected_share


def seconds_left(line: StepMetrics, config: Config, steps_in_line: int) -> float:
    """Training time of the steps after a line, as fast as in it."""
    return (config.steps - line.step) * line.seconds / max(1, steps_in_line)
