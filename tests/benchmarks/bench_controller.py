"""What one update of the domain weights costs: a report out, a decided entry back at every rank.

A DDK controller in an actor of a private Ray cluster, asked through the client that rank 0 holds;
the entry is on disk, flushed, before it comes back. The sums of all ranks are added up in the
trainer, two numbers per domain, so the controller sees one report whatever the number of ranks.
In a run rank 0 alone asks for the entry and tells the others; here every rank asks, each through a
client of its own, in threads of one process.

    python -m tests.benchmarks.bench_controller [--domains 1000] [--decisions 100] [--ranks 64]
"""

import argparse
import statistics
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from cluster.control.controller import (
    ControllerPlan,
    RayControllerClient,
    open_controller,
    start_controller,
    stop_controller,
)
from shared.config.mixture import DDKMixture
from shared.mixture.weight_log import DomainReport
from tests.cluster.run_dirs import controlled

NAMESPACE = "bench"
DEADLINE_S = 120.0
MIXTURE = DDKMixture(interval=10)


@dataclass(frozen=True)
class Result:
    """Milliseconds from a report until the last rank has the entry; `hand_over` is the part in
    which the student cannot train."""

    domains: int
    decisions: int
    ranks: int
    median_ms: float
    worst_ms: float
    hand_over_median_ms: float
    hand_over_worst_ms: float


def measure(*, domains: int, decisions: int, ranks: int, folder: Path) -> Result:
    """Decisions in a row on the cluster that this process is connected to; log in `folder`."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    plan = ControllerPlan(
        config=controlled(MIXTURE, domains=tuple(f"domain-{i:04}" for i in range(domains))),
        natural=(1 / domains,) * domains,
        log_path=str(folder / "weight_log.jsonl"),
    )
    actor = start_controller(plan, name=name, namespace=NAMESPACE, deadline_s=DEADLINE_S)
    try:
        clients = [
            open_controller(name, namespace=NAMESPACE, deadline_s=DEADLINE_S) for _ in range(ranks)
        ]
        with ThreadPoolExecutor(ranks) as pool:
            pairs = [_update(clients, pool, index, domains) for index in range(decisions)]
    finally:
        stop_controller(name, namespace=NAMESPACE)
        del actor
    hand_over_ms, update_ms = zip(*pairs, strict=True)
    return Result(
        domains=domains,
        decisions=decisions,
        ranks=ranks,
        median_ms=statistics.median(update_ms),
        worst_ms=max(update_ms),
        hand_over_median_ms=statistics.median(hand_over_ms),
        hand_over_worst_ms=max(hand_over_ms),
    )


def _update(
    clients: list[RayControllerClient], pool: ThreadPoolExecutor, index: int, domains: int
) -> tuple[float, float]:
    """Milliseconds until the report is handed over, and until the last rank has the entry."""
    report = _report(MIXTURE.interval * index, domains)
    start = time.perf_counter()
    clients[0].observe(report)
    handed_over = time.perf_counter()
    entries = list(pool.map(lambda client: client.entry(index), clients))
    done = time.perf_counter()
    assert all(entry.decided_at == report.step for entry in entries)
    return 1000 * (handed_over - start), 1000 * (done - start)


def _report(step: int, domains: int) -> DomainReport:
    """A student that lags by up to a nat, differently at each step."""
    gaps_D = np.random.default_rng(step).uniform(0.0, 1.0, domains)
    return DomainReport(
        step=step,
        student_nll_sums=tuple((1000 * (2.0 + gaps_D)).tolist()),
        num_tokens=(1000,) * domains,
        teacher_nlls=(2.0,) * domains,
    )


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=64)
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            domains=options.domains,
            decisions=options.decisions,
            ranks=options.ranks,
            folder=Path(folder),
        )
    print(
        f"{found.domains} domains, {found.decisions} decisions, {found.ranks} ranks: from the "
        f"report until the last rank has the entry it takes "
        f"{found.median_ms:.1f} ms (worst {found.worst_ms:.1f}), of which handing the report over "
        f"{found.hand_over_median_ms:.1f} ms (worst {found.hand_over_worst_ms:.1f})"
    )


if __name__ == "__main__":
    main()
