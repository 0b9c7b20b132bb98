"""A line of `metrics.jsonl` as what the process exports, where it exports anything."""

from shared.config.run import Config
from shared.run import exported, exporter
from shared.run.metrics import StepMetrics


def export_line(line: StepMetrics, config: Config, *, steps_in_line: int) -> None:
    """Set what the trainer exports; the line covers `steps_in_line` steps."""
    export = exporter.current()
    steps, tokens = max(1, steps_in_line), max(1, line.tokens)
    values = {
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
        exported.STEP_COMPUTE: line.compute_s / steps,
        exported.STEP_OPTIMISER: line.optimiser_s / steps,
        exported.STEP_REST: line.rest_s / steps,
    }
    for metric, value in values.items():
        export.set(metric, value)
    for name, domain in line.domains.items():
        export.set(exported.KL, domain.kl, domain=name)
        export.set(exported.WEIGHT, domain.weight or None, domain=name)
        export.add(exported.TOKENS, domain.tokens, domain=name)


def seconds_left(line: StepMetrics, config: Config, steps_in_line: int) -> float:
    """Training time of the steps after a line, as fast as in it."""
    return (config.steps - line.step) * line.seconds / max(1, steps_in_line)
