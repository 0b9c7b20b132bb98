"""`tutelage eval --task`: tasks of lm-evaluation-harness on a run's export, on its teacher, on the
student before training, or on the folder of any model."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from cluster.commands.runs import config_of
from cluster.evaluation.harness import TaskResults, run_tasks
from cluster.planning.tasks.classes import (
    ENTITIES_IN_SUMMARY,
    refuse_classifier,
    refuse_entities,
)
from cluster.planning.tasks.images import refuse_images
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.run_dir import RunDir, locked

TASKS = "tasks.json"
ALSO = ("teacher", "before")
WITHOUT_TASK = "without --task it is measured on its validation rows"
ADAPTER, MODEL = "adapter_config.json", "config.json"


def evaluate_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    also: Sequence[str] = (),
    limit: int | None = None,
    as_json: bool = False,
) -> TaskResults:
    """Run tasks on the export of a run, and on models named in `also`, or on the model that a
    folder holds; write `tasks.json` into a run's folder, and print them."""
    run_dir = RunDir(folder.absolute())
    for name in also:
        if name not in ALSO:
            raise ConfigError(f"--also is {name!r}; it is one of {' and '.join(ALSO)}")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        models = _of_folder(folder, also) if is_model(folder) else _of_run(run_dir, also)
        results = run_tasks(folder.absolute().name, tasks, models, limit=limit)
    print(results.text().rstrip() if as_json else results.table())
    if not is_model(folder):
        path = results.write(run_dir.path / TASKS)
        if not as_json:
            print(f"\nNumbers   {path}")
    return results


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model, and no run."""
    names = (ADAPTER, MODEL)
    return not RunDir(folder).config.exists() and any((folder / name).exists() for name in names)


def _of_run(run_dir: RunDir, also: Sequence[str]) -> Mapping[str, Teacher]:
    """The models of a run by name. Raises ConfigError for a run that has learnt nothing yet."""
    config = config_of(run_dir)
    refuse_entities(config, "`tutelage eval --task`", ENTITIES_IN_SUMMARY)
    refuse_classifier(config, "`tutelage eval --task`", WITHOUT_TASK)
    refuse_images(config, "`tutelage eval --task`", WITHOUT_TASK)
    from cluster.launch.generating import exported_student
    from cluster.launch.teachers.serving import served_student
    from student_trainer.state.export import newest_export
    from student_trainer.tasks.causal_lm import CAUSAL_LM

    with locked(run_dir):
        export = newest_export(run_dir, config, CAUSAL_LM.model)
    if export is None:
        raise ConfigError(
            f"{run_dir.path} has neither a checkpoint nor an export yet; train first, with "
            "`tutelage run`"
        )
    models = _teachers(config) if "teacher" in also else {}
    if "before" in also:
        models["before"] = served_student(config)
    return models | {"after": exported_student(config, export)}


def _teachers(config: Config) -> dict[str, Teacher]:
    teachers = config.teachers
    return dict(teachers) if len(teachers) > 1 else {"teacher": next(iter(teachers.values()))}


def _of_folder(folder: Path, also: Sequence[str]) -> Mapping[str, Teacher]:
    """The model in a folder: whole, or adapters on the base that they name."""
    if also:
        raise ConfigError(f"--also {also[0]} is of a run, and {folder} holds a model alone")
    if not (folder / ADAPTER).exists():
        return {"model": Teacher(model=str(folder), dtype=_dtype(str(folder)))}
    base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    return {"model": Teacher(model=base, adapter=str(folder), dtype=_dtype(base))}


def _dtype(model: str):
    """The dtype that a model's weights are in, float32 for those in others."""
    import torch
    from transformers import AutoConfig

    try:
        asked = AutoConfig.from_pretrained(model).get_text_config().dtype
    except Exception:  # loading it says why
        asked = None
    return "bfloat16" if asked == torch.bfloat16 else "float32"
