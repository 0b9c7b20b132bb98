"""Tasks of lm-evaluation-harness (the extra `eval`) on models loaded from their folders.

A task is one by name, of those the package brings, or a YAML file of one's own.
"""

import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.evaluation.statistics import Estimate
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError
from shared.in_words import shortened
from shared.loading import first_line
from shared.run.run_dir import write_atomically

PACKAGE = "lm_eval"
FILES = (".yaml", ".yml")
BATCH = 8  # requests of one forward pass
SEED = 1234  # of few-shot examples: the harness's own
NAME_WIDTH, METRIC_WIDTH, CELL_WIDTH = 26, 23, 17


@dataclass(frozen=True, slots=True)
class TaskResults:
    """tasks.json: by task, metric and model."""

    of: str  # the run, or the folder of a model
    harness: str  # version
    limit: int | None  # examples of a task, at most
    tasks: dict[str, dict[str, dict[str, Estimate]]]

    def write(self, path: Path) -> Path:
        """Write the whole file or nothing; returns its path."""
        write_atomically(path, self.text())
        return path

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """A line for each metric of each task, at most 100 columns."""
        models = dict.fromkeys(m for t in self.tasks.values() for k in t.values() for m in k)
        heads = "".join(f"{name:>{CELL_WIDTH}}" for name in models)
        lines = [f"{'task':<{NAME_WIDTH}}{'metric':<{METRIC_WIDTH}}{heads}"]
        for task, metrics in self.tasks.items():
            shown = shortened(task, NAME_WIDTH - 2)
            for metric, found in metrics.items():
                cells = "".join(f"{_cell(found.get(name)):>{CELL_WIDTH}}" for name in models)
                label = f"{shortened(metric, METRIC_WIDTH - 1):<{METRIC_WIDTH}}"
                lines.append(f"{shown:<{NAME_WIDTH}}{label}{cells}")
                shown = ""
        lines += ["", f"lm-evaluation-harness {self.harness}; ± its standard errors."]
        if self.limit is not None:
            lines.append(f"At most {self.limit} examples of a task: no numbers to publish.")
        return "\n".join(lines)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = "-" if estimate.error is None else f"{estimate.error:.3f}"
    return f"{estimate.value:.3f} ± {error}"


@dataclass(frozen=True, slots=True)
class Harness:
    """Tasks that are there with their data."""

    loaded: Any  # as lm_eval has them
    version: str

    @staticmethod
    def of(tasks: Sequence[str]) -> "Harness":
        """Find tasks and load their data. Raises ConfigError without the extra, for a task that
        there is none of, and for one that cannot be set up."""
        if find_spec(PACKAGE) is None:
            raise ConfigError(
                f"--task {tasks[0]} needs the extra `eval`, which is not installed; "
                "pip install 'tutelage[eval]'"
            )
        lm_eval, library = import_module(PACKAGE), import_module(f"{PACKAGE}.tasks")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for task in tasks:
            if Path(task).suffix in FILES and not Path(task).is_file():
                raise ConfigError(f"--task is {task}, a file that is not there; correct the path")
        named = [task for task in tasks if not _is_file(task)]
        manager = library.TaskManager(
            include_defaults=bool(named)
        )  # the index of all takes a while
        for task in named:
            _refuse_unknown(task, manager.all_tasks, lm_eval.__version__)
        with _refused(tasks, "cannot be set up; is its data there, or the network?"):
            loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return Harness(loaded, lm_eval.__version__)

    def run(self, model: Teacher, *, limit: int | None) -> dict[str, dict[str, Estimate]]:
        """By task and metric, what one model comes to. Raises ConfigError for a model or a task
        that does not work."""
        evaluate, lm = import_module(f"{PACKAGE}.evaluator").evaluate, _loaded(model)
        with _refused(list(self.loaded["tasks"]), f"cannot be run on {model.model}"):
            found = evaluate(lm=lm, task_dict=self.loaded, limit=limit, log_samples=False)
        return {
            name: _estimates(told) for name, told in found["results"].items() if _estimates(told)
        }


def run_tasks(
    of: str, tasks: Sequence[str], models: Mapping[str, Teacher], *, limit: int | None
) -> TaskResults:
    """Run tasks on models by name, one after the other. Raises what `Harness` does."""
    harness = Harness.of(tasks)
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for name, model in models.items():
        loaded = model.model if model.adapter is None else f"{model.model} + {model.adapter}"
        print(f"{name}: {loaded}", flush=True)
        for task, metrics in harness.run(model, limit=limit).items():
            for metric, estimate in metrics.items():
                found.setdefault(task, {}).setdefault(metric, {})[name] = estimate
    return TaskResults(of, harness.version, limit, found)


def _is_file(task: str) -> bool:
    return Path(task).suffix in FILES


def _refuse_unknown(task: str, known: Sequence[str], version: str) -> None:
    if task in known:
        return
    near = difflib.get_close_matches(task, known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f"--task is {task!r}, which is no task of lm-evaluation-harness {version}{meant} and no "
        "YAML file; `lm-eval ls tasks` lists those by name"
    )


@contextmanager
def _refused(tasks: Sequence[str], what: str):
    """Say in a sentence what a task, a program of its author's, raises."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"--task {', '.join(tasks)} {what} ({first_line(error)})") from error


def _loaded(model: Teacher) -> Any:
    """A model as lm_eval asks it, with the tokenizer of its own folder."""
    import torch
    from transformers import AutoTokenizer

    from teacher_service.engine.loading import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = load_model(model.model, **model.loading, device=device)
    own = found.adapter_folder if _has_tokenizer(found.adapter_folder) else None
    tokenizer = AutoTokenizer.from_pretrained(
        own or model.model,
        revision=None if own else model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": BATCH, "backend": "causal"}
    return import_module(f"{PACKAGE}.models.huggingface").HFLM(pretrained=found.model, **options)


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (folder / "tokenizer_config.json").exists()


def _estimates(told: Mapping[str, Any]) -> dict[str, Estimate]:
    """Metrics of one task, as "acc" or "exact_match, strict" where it was filtered so."""
    found = {}
    for key, value in told.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error: Any = told.get(f"{metric}_stderr,{chosen}")
        label = metric if chosen == "none" else f"{metric}, {chosen}"
        found[label] = Estimate(float(value), float(error) if _is_number(error) else None)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
