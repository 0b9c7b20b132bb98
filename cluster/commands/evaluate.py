"""`tutelage eval`: a run's student, before and after, and its teacher on validation text."""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from cluster.commands.runs import config_of
from cluster.commands.tasks import is_model
from cluster.evaluation.results import Results, compared, results_of
from cluster.evaluation.table import table
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.run_dir import RunDir

PROMPTS = 32  # of a domain, on which the models write


def evaluate(
    run: Path,
    *,
    service: str | None = None,
    address: str | None = None,
    compare: Path | None = None,
    generate: int = PROMPTS,
    max_new_tokens: int | None = None,
    as_json: bool = False,
) -> Results:
    """Measure, beside the student of another run where one is named, and let the models write on
    `generate` prompts a domain, those that write from text alone; write `eval.json` into the run's
    folder, and print it."""
    if is_model(run):
        raise ConfigError(
            f"{run} holds a model and no run, so that there is no validation text to measure it "
            "on; name a run's folder, or a task with --task"
        )
    run_dir = RunDir(run.absolute())
    config = config_of(run_dir)
    _refuse_elsewhere(run_dir, config)
    other = None if compare is None else compared(compare, run_dir, config.domains)
    from cluster.launch import driver
    from cluster.launch.generating import GenerationLimits, student_tokenizer

    # What is said meanwhile is no part of the JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        limits = GenerationLimits(generate if _writes(config) else 0, max_new_tokens)
        prepared = driver.evaluate(config, limits, service=service, address=address)
        tokenizer = None if config.task.classifies else student_tokenizer(config)
        unit = config.task.unit
        results = results_of(run_dir, prepared.domains, tokenizer, other, per=unit)
    path = results.write(run_dir.path)
    print(results.text().rstrip() if as_json else f"{table(results)}\n\nNumbers   {path}")
    if not as_json and run_dir.generations.exists():
        print(f"Texts     {run_dir.generations}\nPage      tutelage report {run}")
    return results


def _writes(config: Config) -> bool:
    """Whether models of a run's task write from text alone."""
    return not (config.task.classifies or config.task.sees)


def _refuse_elsewhere(run_dir: RunDir, config: Config) -> None:
    """Raise ConfigError where a job's models are looked for in another folder than its own."""
    if config.paths.root == run_dir.recorded_config().paths.root:
        return
    for model in (config.student.model, *(teacher.model for teacher in config.teachers.values())):
        if Path(model).is_absolute() and not Path(model).is_dir():
            raise ConfigError(
                f"{run_dir.path} was a job, whose folder Ray has removed, and there is no {model}; "
                "call this in the folder that the job was submitted from"
            )
