"""What the export of metrics costs the process that trains: a line, and setting all again.

Real gauges and counters of Ray, in a driver of a private cluster, with as many domains as asked.

    python -m tests.benchmarks.exporting [--domains 10] [--times 300]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
import ray.util.metrics

from shared.config.mixture import FixedMixture
from shared.config.run import Config
from shared.run.exporter import EVERY_S, Exporter, current, exporting
from shared.run.metrics import DomainMetrics, StepMetrics
from student_trainer.metrics.exported import export_line
from tests.cluster.run_dirs import controlled


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one core, medians."""

    line_ms: float  # a line of metrics
    refresh_ms: float  # all gauges set again, once every EVERY_S

    @property
    def share(self) -> float:
        """Of the time of a process that writes a line a second."""
        return (self.line_ms / 1.0 + self.refresh_ms / EVERY_S) / 1000


def measure(*, domains: int, times: int) -> Cost:
    """On the cluster that this process is connected to."""
    names = tuple(f"domain-{number}" for number in range(domains))
    config = controlled(FixedMixture(), domains=names)
    with exporting(ray.util.metrics, run="bench"):
        lines = [_timed(lambda step=step: _export(step, names, config)) for step in range(times)]
        export: Exporter = current()
        refreshes = [_timed(export.refresh) for _ in range(times)]
    return Cost(statistics.median(lines), statistics.median(refreshes))


def _export(step: int, names: tuple[str, ...], config: Config) -> None:
    domains = {name: DomainMetrics(1.0 + step, 4096, 8, 1 / len(names)) for name in names}
    line = StepMetrics(
        step=step,
        loss=1.0,
        lr=1e-3,
        grad_norm=1.0,
        tokens=4096 * len(names),
        captured_mass=0.9,
        domains=domains,
        seconds=1.0,
        units=8,
    )
    export_line(line, config, steps_in_line=1)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, default=10)
    parser.add_argument("--times", type=int, default=300)
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    cost = measure(domains=options.domains, times=options.times)
    print(
        f"{options.domains} domains: a line {cost.line_ms:.2f} ms, all gauges set again "
        f"{cost.refresh_ms:.2f} ms every {EVERY_S:g} s; {cost.share:.3%} of a core at a line a "
        "second"
    )


if __name__ == "__main__":
    main()
