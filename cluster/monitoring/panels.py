"""The Grafana dashboard of runs and teacher services, made from the table of exported metrics."""

import json
from dataclasses import dataclass
from typing import Any

from shared.run import exported
from shared.run.exported import Metric

UID = "tutelage"
WIDTH, HEIGHT, PER_ROW = 8, 8, 3  # of 24 columns
RATE_WINDOW = "1m"  # holds several scrapes of Ray's default, every 10 s
_UNITS = {"s": "s", "bytes": "bytes", "0 to 1": "percentunit", "0 or 1": "bool"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph; metrics that are stacked are parts of a whole."""

    title: str
    metrics: tuple[Metric, ...]
    stacked: bool = False


SECTIONS = {
    "Learning": (
        Panel("Loss", (exported.LOSS,)),
        Panel("KL by domain", (exported.KL,)),
        Panel("Mixture", (exported.WEIGHT,), stacked=True),
        Panel("Mixture last decided", (exported.DECIDED_WEIGHT,), stacked=True),
        Panel("Tokens that a weighting lets count", (exported.SELECTED,)),
        Panel("Gradient norm", (exported.GRAD_NORM,)),
        Panel("Learning rate", (exported.LEARNING_RATE,)),
        Panel("Captured mass", (exported.CAPTURED_MASS,)),
        Panel("Busiest expert", (exported.EXPERT_LOAD,)),
        Panel("Loss tokens per second by domain", (exported.TOKENS,), stacked=True),
    ),
    "Progress": (
        Panel("Steps", (exported.STEP,)),
        Panel("Progress", (exported.PROGRESS,)),
        Panel("Time left", (exported.ETA,)),
        Panel(
            "Where a step's time goes",
            (
                exported.STEP_WAIT,
                exported.STEP_WRITING,
                exported.STEP_COMPUTE,
                exported.STEP_OPTIMISER,
                exported.STEP_REST,
            ),
            stacked=True,
        ),
        Panel("Step", (exported.STEP_TIME,)),
        Panel("Student's speed", (exported.STUDENT_SPEED,)),
        Panel("Student's workers", (exported.WORKERS_WANTED, exported.WORKERS_PRESENT)),
    ),
    "Teachers": (
        Panel("Teachers' speed", (exported.TEACHER_SPEED,), stacked=True),
        Panel("Replicas", (exported.REPLICAS_WANTED, exported.REPLICAS_PRESENT)),
        Panel("Replicas at work", (exported.REPLICA_BUSY,)),
        Panel("Replicas that serve", (exported.REPLICA_UP,)),
        Panel("Oldest unit", (exported.QUEUE_AGE,)),
        Panel("Units under way", (exported.UNITS_IN_FLIGHT,)),
        Panel("Bytes under way", (exported.BYTES_IN_FLIGHT,)),
        Panel("Bytes per loss token", (exported.WIRE_BYTES,)),
        Panel("Answered by a store", (exported.CACHE_HITS,)),
    ),
    "Failures": (
        Panel("Restarts of replicas", (exported.REPLICA_RESTARTS,)),
        Panel("Restarts of the student", (exported.STUDENT_RESTARTS,)),
        Panel("Units sent again", (exported.RETRIED,)),
    ),
}


def query(metric: Metric) -> str:
    """What a panel asks Prometheus for: one series for each set of a metric's labels."""
    chosen = ", ".join(
        f'{label}=~"${label}"' for label in ("run", "service") if label in metric.labels
    )
    series = f"{metric.exported}{{{chosen}}}"
    if metric.kind == "counter":
        series = f"rate({series}[{RATE_WINDOW}])"
    return f"{metric.joins} by ({', '.join(metric.labels)}) ({series})"


def dashboard() -> str:
    """The dashboard as Grafana reads it from a file."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, shown in SECTIONS.items():
        panels.append(_described(len(panels), title, "row", x=0, y=top, w=24, h=1))
        top += 1
        for place, panel in enumerate(shown):
            row, column = divmod(place, PER_ROW)
            panels.append(_graph(panel, len(panels), x=column * WIDTH, y=top + row * HEIGHT))
        top += -(-len(shown) // PER_ROW) * HEIGHT
    described = {
        "title": "Tutelage",
        "uid": UID,
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [_source(), _choice(exported.STEP), _choice(exported.REPLICAS_WANTED)]
        },
        "panels": panels,
    }
    return json.dumps(described, indent=1) + "\n"


def _graph(panel: Panel, number: int, *, x: int, y: int) -> dict[str, Any]:
    first = panel.metrics[0]
    drawn = {
        "unit": "short" if first.kind == "counter" else _UNITS.get(first.unit, "short"),
        "custom": {
            "fillOpacity": 30 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        },
    }
    described = "; ".join(f"{metric.help} ({metric.unit})" for metric in panel.metrics)
    return _described(number, panel.title, "timeseries", x=x, y=y, w=WIDTH, h=HEIGHT) | {
        "description": described,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": drawn, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "expr": query(metric),
                "legendFormat": _legend(panel, metric),
            }
            for n, metric in enumerate(panel.metrics)
        ],
    }


def _legend(panel: Panel, metric: Metric) -> str:
    labels = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    several = len(panel.metrics) > 1
    return f"{labels} {metric.short}" if several else labels


def _described(number: int, title: str, kind: str, **place: int) -> dict[str, Any]:
    return {"id": number + 1, "title": title, "type": kind, "gridPos": place}


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2}


def _choice(metric: Metric) -> dict[str, Any]:
    """A choice among the values of a metric's first label; all at first."""
    label = metric.labels[0]
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({metric.exported}, {label})",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
