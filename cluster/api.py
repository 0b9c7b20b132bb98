"""Tutelage from Python, as in a notebook: the command line's verbs as functions.

    from cluster import api as tutelage

    run = tutelage.run("my.yaml", {"steps": 200})
    run.summary()["domains"]["math"]["kl_after"]

A verb prints what its command prints. Where a command would end with a sentence, it raises: a
UserError for what the caller can mend, another TutelageError for the rest. An interruption, as by
a notebook's stop button, first lets the step under way be saved. `overrides` are options by their
dotted names; `address` is that of a Ray cluster as on the command line. Where the caller has joined
a cluster by `ray.init`, that one is used, and stays.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.commands import active as rounds
from cluster.commands import exports, jobs, prompts, runs, teachers
from cluster.commands import plan as plans
from cluster.commands import selftest as selftests
from cluster.commands.cache import check as cache_verify
from cluster.commands.cache import gc as cache_gc
from cluster.commands.cache import ls as cache_ls
from cluster.commands.doctor import doctor
from cluster.commands.evaluate import PROMPTS, evaluate
from cluster.commands.jobs import logs as jobs_logs
from cluster.commands.jobs import ls as jobs_ls
from cluster.commands.jobs import stop as jobs_stop
from cluster.commands.manifests import write as manifests
from cluster.commands.monitor import up as monitor_up
from cluster.commands.runs import init, recipes
from cluster.commands.status import status
from cluster.commands.tasks import evaluate_tasks
from cluster.commands.teachers import down as teacher_down
from cluster.commands.teachers import scale as teacher_scale
from cluster.commands.teachers import status as teacher_status
from cluster.evaluation.harness import TaskResults
from cluster.report.measurement import Summary
from cluster.report.standing import Standing, read_standing
from cluster.session.interrupts import handled, handling
from cluster.sizing.estimate import Estimate
from shared.config.run import Config
from shared.errors import ConfigError
from shared.mixture.weight_log import WeightLog, read_log
from shared.run.metrics import DomainEvaluation, StepMetrics, read_metrics
from shared.run.run_dir import RunDir, read_written

__all__ = [
    "Run",
    "active",
    "cache_gc",
    "cache_ls",
    "cache_verify",
    "capture",
    "compare",
    "doctor",
    "init",
    "jobs_logs",
    "jobs_ls",
    "jobs_stop",
    "manifests",
    "monitor_up",
    "plan",
    "prompts_optimise",
    "recipes",
    "run",
    "selftest",
    "status",
    "submit",
    "teacher_down",
    "teacher_scale",
    "teacher_status",
    "teacher_up",
    "train",
]

Options = Mapping[str, Any]  # by dotted names, as {"optimiser.lr": 1e-3}


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder, as `runs/NAME`: at work, finished, or stopped."""

    path: Path

    @property
    def files(self) -> RunDir:
        """Where everything in the folder is."""
        return RunDir(self.path.absolute())

    @property
    def config(self) -> Config:
        """What the run was asked for. Raises ConfigError where the folder holds no run."""
        return self.files.recorded_config()

    def summary(self) -> Summary:
        """Its outcome, by domain and by teacher. Raises ConfigError where it has none yet."""
        if not self.files.summary.exists():
            raise ConfigError(f"{self.path} has no summary yet; a run writes it when it ends")
        return cast(Summary, read_written(self.files.summary))

    def metrics(self) -> list[StepMetrics]:
        """What was measured at each logged step, in order; losses in nats per loss token."""
        return read_metrics(self.files.metrics)

    def weights(self) -> WeightLog:
        """Each decision about the domains' weights."""
        return read_log(self.files.weight_log, self.config.domains)

    def standing(self) -> Standing:
        """Where it stands at this moment."""
        return read_standing(self.files)

    def evaluate(
        self,
        *,
        service: str | None = None,
        address: str | None = None,
        compare: str | Path | None = None,
        generate: int = PROMPTS,
        max_new_tokens: int | None = None,
    ) -> dict[str, DomainEvaluation]:
        """Compare its export with its teacher, as it began and with another run's, on validation
        text, and let the models write on `generate` prompts a domain; returns the student's
        numbers by domain, `eval.json` has all."""
        with _interruptible():
            other = None if compare is None else Path(compare)
            evaluate(
                self.path,
                service=service,
                address=address,
                compare=other,
                generate=generate,
                max_new_tokens=max_new_tokens,
            )
        found = read_written(self.files.path / "evaluation.json")
        return {name: DomainEvaluation.from_dict(domain) for name, domain in found.items()}

    def evaluate_tasks(
        self, task: Sequence[str], *, also: Sequence[str] = (), limit: int | None = None
    ) -> TaskResults:
        """Run tasks of lm-evaluation-harness (the extra `eval`), by name or YAML file, on its
        export, and on the `teacher` or the student `before` where `also` names them; the path may
        be that of a model's folder, too. Returns what `tasks.json` has."""
        with _interruptible():
            return evaluate_tasks(self.path, task, also=also, limit=limit)

    def export(self, *, to: str | Path | None = None, merge: bool = False) -> Path:
        """Its newest checkpoint as a folder that transformers or peft load, `merge`: adapters in
        the base; returns the folder."""
        exports.export(self.path, to=None if to is None else Path(to), merge=merge)
        return Path(to or (self.files.merged if merge else self.files.export))

    def report(self) -> Path:
        """Write its page again, print the table; returns the page."""
        runs.report(self.path)
        return self.files.report


def run(
    config: str | Path,
    overrides: Options | None = None,
    *,
    fresh: bool = False,
    address: str | None = None,
) -> Run:
    """Distil: teacher, student, report. The same call again continues an unfinished run."""
    with _interruptible():
        found = runs.run(Path(config), _spelt(overrides), fresh=fresh, address=address)
    return Run(found.path)


def train(
    config: str | Path,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> Run:
    """Like `run`, with a teacher that `teacher_up` started."""
    with _interruptible():
        found = runs.train(
            Path(config), _spelt(overrides), service=service, fresh=fresh, address=address
        )
    return Run(found.path)


def capture(
    config: str | Path,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    address: str | None = None,
    all_rows: bool = False,
) -> None:
    """Ask the teacher all that a run will ask and keep it in targets.store."""
    with _interruptible():
        runs.capture(
            Path(config), _spelt(overrides), service=service, address=address, all_rows=all_rows
        )


def prompts_optimise(
    config: str | Path,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """Search for the prompts under which the teacher does best; the same call continues."""
    with _interruptible():
        prompts.optimise(Path(config), _spelt(overrides), service=service, address=address)


def active(
    config: str | Path,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> Path:
    """Rounds in which the teacher writes what the student is trained on; the same call continues.
    Returns the folder, in which `export` is the best round's student and `rounds.json` has the
    numbers."""
    with _interruptible():
        found = rounds.active(
            Path(config), _spelt(overrides), service=service, fresh=fresh, address=address
        )
    return found.path


def selftest(
    config: str | Path | None = None,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """Prove that a pair, by default a tiny one, learns what it should. Raises SelftestError where
    a check fails."""
    with _interruptible():
        selftests.selftest(
            None if config is None else Path(config),
            _spelt(overrides),
            service=service,
            address=address,
        )


def plan(
    config: str | Path,
    overrides: Options | None = None,
    *,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    memory: str | None = None,
    price: float | None = None,
    probe: bool = False,
    address: str | None = None,
) -> Estimate:
    """What a run takes of memory, wire, disk, time and money; reads no weights, but with `probe`,
    which takes the first steps and measures them. Raises ConfigError where it has no room."""
    with _interruptible():
        return plans.plan(
            Path(config),
            _spelt(overrides),
            gpu=gpu,
            gpu_memory=gpu_memory,
            memory=memory,
            price=price,
            probe=probe,
            address=address,
        )


def compare(folders: Sequence[str | Path], *, to: str | Path | None = None) -> Path:
    """Runs beside each other: print the table, write a page; returns the page."""
    return runs.compare([Path(folder) for folder in folders], to=None if to is None else Path(to))


def teacher_up(
    config: str | Path,
    overrides: Options | None = None,
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """Start the config's teachers; they serve until `teacher_down`."""
    with _interruptible():
        teachers.up(Path(config), _spelt(overrides), service=service, address=address)


def submit(
    config: str | Path,
    overrides: Options | None = None,
    *,
    address: str | None = None,
    detach: bool = False,
    fresh: bool = False,
) -> None:
    """Run a config as a job of the cluster whose dashboard is at `address`."""
    with _interruptible():
        jobs.submit(Path(config), _spelt(overrides), address=address, detach=detach, fresh=fresh)


def _spelt(overrides: Options | None) -> list[str]:
    """Options as on the command line; JSON is YAML."""
    return [f"{name}={json.dumps(value, default=str)}" for name, value in (overrides or {}).items()]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Answer signals as a command does, where Python lets a thread do so."""
    if handled() or threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling():
        yield
