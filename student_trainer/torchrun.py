"""Train without Ray: `torchrun --nproc-per-node N -m student_trainer.torchrun PLAN_FILE`.

For students that need no live teacher and no controller: they learn from a target store on disk or
from the text alone, under fixed weights. A plan file is JSON, written by `write_plan`.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shared.config.mixture import AdaptiveMixture
from shared.config.run import Config
from shared.data.passes import Passes
from shared.data.prepared import PreparedDomain
from shared.errors import ConfigError, TutelageError
from shared.mixture.decisions import decision_index, first_entry, next_entry
from shared.mixture.weight_log import DomainReport, WeightEntry, WeightLog, read_log, write_entry
from shared.prompts.prefix import PromptedReader
from shared.prompts.row_prompts import openings_from_json
from shared.run.plan import OpenRunReader, RunPlan, open_routing
from shared.run.run_dir import RunDir
from shared.store.readers import StoreReader
from shared.targets.question import Question
from shared.targets.reader import TargetReader
from student_trainer.loop import run_plan

log = logging.getLogger(__name__)

QUESTIONS = ("training_question", "validation_question")  # fields of a plan


@dataclass(frozen=True, slots=True)
class StandingWeights:
    """The decisions of a run with fixed weights, on its phases alone; satisfies
    `ControllerClient`."""

    plan: RunPlan

    def observe(self, report: DomainReport) -> None:
        """Decide about the phase, once for each step; decisions are kept in the weight log."""
        config, entries = self.plan.config, self._log().entries
        if decision_index(config, report.step) == len(entries):
            entry = next_entry(config, entries, report, weights=entries[0].weights, factors=None)
            write_entry(self._path, config.domains, entry)

    def entry(self, index: int) -> WeightEntry:
        """Entry `index` of the run's weight log."""
        return self._log().entries[index]

    def peek(self, index: int) -> WeightEntry | None:
        """Entry `index`, None where it is not decided yet."""
        entries = self._log().entries
        return entries[index] if index < len(entries) else None

    @property
    def _path(self) -> Path:
        return RunDir(Path(self.plan.run_dir)).weight_log

    def _log(self) -> WeightLog:
        """The log so far, begun where it is new."""
        config = self.plan.config
        if not self._path.exists():
            weights, domains = _fixed_weights(self.plan), tuple(config.domains)
            first = first_entry(weights, factors=None, report=None, domains=domains)
            write_entry(self._path, domains, first)
        return read_log(self._path, config.domains)


def _fixed_weights(plan: RunPlan) -> tuple[float, ...]:
    """Shares of loss tokens in config order. Raises ConfigError for mixtures that move them."""
    mixture = plan.config.mixture
    if isinstance(mixture, AdaptiveMixture):
        raise ConfigError(
            f"mixture.policy is {mixture.policy}, which needs a controller; use `tutelage run`, "
            "or fixed weights"
        )
    return mixture.shares({domain.name: domain.natural_weight for domain in plan.domains})


def write_plan(path: Path, plan: RunPlan) -> None:
    """Write a plan as JSON."""
    path.write_text(json.dumps(_fields(plan)))


def _fields(plan: RunPlan) -> dict[str, Any]:
    openings = {name: opening.to_json() for name, opening in plan.openings.items()}
    config = plan.config.model_dump(mode="json")
    parts = {name: _fields(part) | {"config": None} for name, part in plan.parts.items()}
    questions = {name: getattr(plan, name) for name in QUESTIONS}
    return asdict(replace(plan, parts={})) | {
        **{name: question and question.as_dict() for name, question in questions.items()},
        "config": config,
        "openings": openings,
        "parts": parts,
    }


def read_plan(path: Path) -> RunPlan:
    """The inverse of `write_plan`."""
    fields = json.loads(path.read_text())
    config = Config.model_validate(fields["config"])
    parts = {
        name: _plan(config.taught_by(name), part, parts={})
        for name, part in fields["parts"].items()
    }
    return _plan(config, fields, parts=parts)


def _plan(config: Config, fields: dict[str, Any], *, parts: dict[str, RunPlan]) -> RunPlan:
    domains = tuple(PreparedDomain(**domain) for domain in fields["domains"])
    openings = {name: openings_from_json(one) for name, one in fields["openings"].items()}
    specs = {name: fields[name] and Question.from_dict(fields[name]) for name in QUESTIONS}
    found: dict[str, Any] = {
        "config": config,
        "domains": domains,
        "openings": openings,
        "parts": parts,
    }
    found |= {name: tuple(fields[name]) for name in ("ends", "special_ids") if name in fields}
    if "passes" in fields:
        found["passes"] = Passes.from_dict(fields["passes"])
    named: dict[str, Any] = fields | specs | found
    return RunPlan(**named)


def _plateau_without_teacher(plan: RunPlan, store: str | None) -> bool:
    """Whether phases would end by a gap that nobody measures."""
    progressive = plan.config.progressive
    watched = progressive is not None and progressive.plateau is not None
    return watched and (store is None or plan.validation_question is None)


def _open_reader(plan: RunPlan, store: str | None) -> OpenRunReader | None:
    if store is None:
        return None
    readers = {
        name: partial(_open_stored, store=store, part=part)
        for name, part in plan.by_teacher.items()
    }
    return partial(open_routing, plan=plan, readers=readers)


def _open_stored(rank: int, *, store: str, part: RunPlan) -> TargetReader:
    return PromptedReader(StoreReader(store, teacher=part.teacher), part.openings)


def main(plan_file: str) -> int:
    """Run a plan file; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = read_plan(Path(plan_file))
    store = plan.config.targets.store if plan.config.needs_teacher else None
    try:
        if plan.config.needs_teacher and store is None:
            raise ConfigError("targets.store is not set, and there is no teacher here to ask")
        if _plateau_without_teacher(plan, store):
            raise ConfigError(
                "progressive.plateau compares with the teacher on validation text, and there is "
                "none here to ask; set progressive.max_steps and progressive.plateau=null"
            )
        run_plan(plan, _open_reader(plan, store), lambda: StandingWeights(plan))
    except TutelageError as error:
        log.error("%s", error)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
