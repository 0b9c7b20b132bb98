"""Train without Ray: `torchrun --nproc-per-node N -m student_trainer.torchrun PLAN_FILE`.

For students that need no live teacher and no controller: they learn from a target store on disk or
from the text alone, under fixed weights. A plan file is JSON, written by `write_plan`.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from shared.config import Config
from shared.config_mixture import AdaptiveMixture
from shared.domains import DomainReport, WeightEntry, write_entry
from shared.errors import ConfigError, TutelageError
from shared.plan import PreparedDomain, RunPlan
from shared.run_dir import RunDir
from shared.soft_targets import TargetSpec
from shared.target_store import StoreReader
from student_trainer.loop import run_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StandingWeights:
    """The one entry of a run with fixed weights; satisfies `ControllerClient`."""

    plan: RunPlan

    def observe(self, report: DomainReport) -> None:
        """Nothing is decided from reports."""

    def entry(self, index: int) -> WeightEntry:
        """Entry 0, written to the run's weight log where that is new."""
        assert index == 0, "fixed weights are decided once"
        entry = WeightEntry(0, decided_at=0, effective_from=0, weights=fixed_weights(self.plan))
        path = RunDir(Path(self.plan.run_dir)).weight_log
        if not path.exists():
            write_entry(path, self.plan.config.domains, entry)
        return entry

    def peek(self, index: int) -> WeightEntry:
        """Entry 0, which is known from the start."""
        return self.entry(index)


def fixed_weights(plan: RunPlan) -> tuple[float, ...]:
    """Shares of loss tokens in config order, sum 1. Raises ConfigError for other mixtures."""
    mixture = plan.config.mixture
    if isinstance(mixture, AdaptiveMixture):
        raise ConfigError(
            f"mixture.policy is {mixture.policy}, which needs a controller; use `tutelage run`, "
            "or fixed weights"
        )
    match mixture.weights:
        case "natural":
            shares = [domain.natural_weight for domain in plan.domains]
        case "uniform":
            shares = [1.0 for _ in plan.domains]
        case asked:
            shares = [asked[domain.name] for domain in plan.domains]
    return tuple(share / sum(shares) for share in shares)


def write_plan(path: Path, plan: RunPlan) -> None:
    """Write a plan as JSON."""
    fields = asdict(plan) | {"config": plan.config.model_dump(mode="json")}
    path.write_text(json.dumps(fields))


def read_plan(path: Path) -> RunPlan:
    """The inverse of `write_plan`."""
    fields = json.loads(path.read_text())
    fields["config"] = Config.model_validate(fields["config"])
    fields["domains"] = tuple(PreparedDomain(**domain) for domain in fields["domains"])
    for name in ("target_spec", "evaluation_spec"):
        fields[name] = fields[name] and TargetSpec.from_dict(fields[name])
    return RunPlan(**fields)


def main(plan_file: str) -> int:
    """Run a plan file; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = read_plan(Path(plan_file))
    store = plan.config.targets.store if plan.config.needs_teacher else None
    try:
        if plan.config.needs_teacher and store is None:
            raise ConfigError("targets.store is not set, and there is no teacher here to ask")
        open_reader = (lambda rank: StoreReader(store, teacher=plan.teacher)) if store else None
        run_plan(plan, open_reader, lambda: StandingWeights(plan))
    except TutelageError as error:
        log.error("%s", error)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
