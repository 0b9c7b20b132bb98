"""Metrics that a run exports while it is at work, for Prometheus: each is defined here and nowhere
else.

Their values are those of `metrics.jsonl` and of what services know of themselves; dashboards and
the documentation are made from this table.
"""

import re
from dataclasses import dataclass
from typing import Literal

LABELS = ("run", "service", "domain", "replica")
PREFIX = "tutelage_"  # of every name here
EXPORT_PREFIX = "ray_"  # which Ray puts before it
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Kind = Literal["gauge", "counter"]
Setter = Literal["trainer", "driver", "pool", "replica", "registry", "controller"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; a counter only grows, also beyond the process that counts."""

    name: str
    unit: str
    help: str
    setter: Setter  # the process part that sets it
    labels: tuple[str, ...] = ("run",)
    kind: Kind = "gauge"
    joins: Literal["max", "sum"] = "max"  # series of several processes with the same labels

    @property
    def exported(self) -> str:
        """Its name in a scrape of Ray's export, and in queries."""
        return f"{EXPORT_PREFIX}{self.name}" + "_total" * (self.kind == "counter")

    @property
    def short(self) -> str:
        """Its name without the prefix."""
        return self.name.removeprefix(PREFIX)

    @property
    def description(self) -> str:
        """What a scrape says of it."""
        return f"{self.help} ({self.unit})"


class Table:
    """Metrics by name, in the order of their definition."""

    def __init__(self) -> None:
        self._by_name: dict[str, Metric] = {}

    def define(
        self,
        name: str,
        unit: str,
        help: str,
        setter: Setter,
        labels: tuple[str, ...] = ("run",),
        kind: Kind = "gauge",
        joins: Literal["max", "sum"] = "max",
    ) -> Metric:
        """A further metric; `name` comes without the prefix.

        Raises ValueError for a name that is defined, one that Prometheus does not take, and labels
        that there are none of.
        """
        metric = Metric(PREFIX + name, unit, help, setter, labels, kind, joins)
        if metric.name in self._by_name:
            raise ValueError(f"the metric {metric.name} is defined twice; give one another name")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"a metric is named {name!r}; letters a to z, digits and _ are what names are of"
            )
        if unknown := set(labels) - set(LABELS):
            raise ValueError(
                f"the metric {metric.name} has the label {min(unknown)!r}; labels are "
                f"{', '.join(LABELS)}"
            )
        self._by_name[metric.name] = metric
        return metric

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All of them."""
        return tuple(self._by_name.values())


TABLE = Table()
_define = TABLE.define
_OF_DOMAIN = ("run", "domain")
_OF_CLIENT = ("run", "service")
_OF_REPLICA = ("service", "replica")

STEP = _define("step", "steps", "optimiser updates done", "trainer")
PROGRESS = _define("progress", "0 to 1", "share of the run's steps that are done", "trainer")
ETA = _define("eta_seconds", "s", "training time left, as fast as in the last line", "trainer")
LOSS = _define("loss", "nats per loss token", "all losses, weighted", "trainer")
KL = _define(
    "domain_kl",
    "nats per loss token",
    "KL(teacher || student) on training text",
    "trainer",
    _OF_DOMAIN,
)
WEIGHT = _define(
    "domain_weight", "0 to 1", "target share of loss tokens, in force", "trainer", _OF_DOMAIN
)
SELECTED = _define(
    "domain_selected",
    "0 to 1",
    "share of loss tokens that a weighting lets count",
    "trainer",
    _OF_DOMAIN,
)
TOKENS = _define(
    "loss_tokens", "tokens", "loss tokens learnt from", "trainer", _OF_DOMAIN, "counter", "sum"
)
STUDENT_SPEED = _define(
    "student_tokens_per_second", "tokens/s", "loss tokens that the student learns from", "trainer"
)
CAPTURED_MASS = _define(
    "captured_mass", "0 to 1", "teacher's probability on the ids it ships", "trainer"
)
GRAD_NORM = _define("grad_norm", "1", "norm of the gradient before clipping", "trainer")
LEARNING_RATE = _define("learning_rate", "1", "learning rate of the last step", "trainer")
WIRE_BYTES = _define(
    "wire_bytes_per_token", "bytes per loss token", "answers of teachers and stores", "trainer"
)
CACHE_HITS = _define(
    "cache_hit_rate", "0 to 1", "units that a store of targets answered", "trainer"
)
RETRIED = _define(
    "retried_units", "units", "units of the last line sent again after a failure", "trainer"
)
EXPERT_LOAD = _define(
    "expert_load", "even shares", "tokens of a mixture's busiest expert", "trainer"
)
STEP_TIME = _define("step_seconds", "s", "a step, mean over the last line", "trainer")
STEP_WAIT = _define(
    "step_wait_seconds", "s", "part of a step that waits for answers, mean over ranks", "trainer"
)
STEP_WRITING = _define(
    "step_writing_seconds", "s", "part of a step that waits for text to be written", "trainer"
)
STEP_COMPUTE = _define(
    "step_compute_seconds", "s", "part of a step in forward and backward passes", "trainer"
)
STEP_OPTIMISER = _define(
    "step_optimiser_seconds", "s", "part of a step in the optimiser", "trainer"
)
STEP_REST = _define(
    "step_rest_seconds", "s", "part of a step that is none of the others", "trainer"
)
STUDENT_RESTARTS = _define(
    "student_restarts", "restarts", "times that the student's workers were started again", "driver"
)
WORKERS_WANTED = _define(
    "student_workers_wanted",
    "workers",
    "workers that the student has where there is room",
    "driver",
)
WORKERS_PRESENT = _define(
    "student_workers_present", "workers", "workers of the student that are up", "driver"
)
QUEUE_AGE = _define(
    "queue_age_seconds", "s", "age of the oldest unit not answered yet", "pool", _OF_CLIENT
)
UNITS_IN_FLIGHT = _define(
    "units_in_flight",
    "units",
    "units sent and not answered yet",
    "pool",
    _OF_CLIENT,
    joins="sum",
)
BYTES_IN_FLIGHT = _define(
    "bytes_in_flight",
    "bytes",
    "units sent, and answers not taken yet",
    "pool",
    _OF_CLIENT,
    joins="sum",
)
REPLICAS_WANTED = _define(
    "replicas_wanted", "replicas", "replicas that a service shall have", "registry", ("service",)
)
REPLICAS_PRESENT = _define(
    "replicas_present", "replicas", "replicas that serve", "registry", ("service",)
)
REPLICA_UP = _define("replica_up", "0 or 1", "whether a replica serves", "registry", _OF_REPLICA)
REPLICA_RESTARTS = _define(
    "replica_restarts", "restarts", "times that a replica was restarted", "registry", _OF_REPLICA
)
TEACHER_SPEED = _define(
    "teacher_tokens_per_second",
    "tokens/s",
    "tokens that a replica reads or writes",
    "replica",
    _OF_REPLICA,
)
REPLICA_BUSY = _define(
    "replica_busy", "0 to 1", "share of the time that a replica computes", "replica", _OF_REPLICA
)
DECIDED_WEIGHT = _define(
    "decided_weight", "0 to 1", "target share last decided", "controller", _OF_DOMAIN
)
METRICS = TABLE.metrics
