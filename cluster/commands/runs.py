"""Commands on configs and run folders: what the command line calls, with its printing."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from cluster.builtin.models import resolve_builtin, stages_to_build
from cluster.planning.loading import load, read
from cluster.report.stages import expect, stages_of_run
from shared.config.run import Config
from shared.errors import CheckpointError, ConfigError
from shared.run.run_dir import RunDir
from shared.run.start import StartClock

STARTER = Path(__file__).parents[1] / "recipes" / "starter.yaml"


def run(
    path: Path, overrides: Sequence[str], *, fresh: bool = False, address: str | None = None
) -> None:
    """`tutelage run`."""
    clock = StartClock()
    clock.mark("began")
    config = read(path, overrides)
    expect([*stages_to_build(config), *stages_of_run(config)])
    config = resolve_builtin(config)
    from cluster.launch import driver

    driver.run(config, fresh=fresh, address=address, clock=clock)


def train(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> None:
    """`tutelage train`."""
    clock = StartClock()
    clock.mark("began")
    config = load(path, overrides)
    from cluster.launch import driver

    driver.train(config, service=service, fresh=fresh, address=address, clock=clock)


def capture(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    address: str | None = None,
    all_rows: bool = False,
) -> None:
    """`tutelage capture`."""
    config = load(path, overrides)
    from cluster.launch import capture as capturing

    captured = capturing.capture(config, service=service, address=address, all_rows=all_rows)
    for name, done in captured.items():
        print((f"{name}\n" if len(captured) > 1 else "") + done.lines())
    given = "".join(f" {o}" for o in overrides if not o.startswith("targets.teacher_free="))
    print(f"Train     tutelage run {path}{given} targets.teacher_free=true")


def evaluate(run: Path, *, service: str | None = None, address: str | None = None) -> None:
    """`tutelage eval`: a line per domain."""
    run_dir = RunDir(run.absolute())
    config = _config_of(run_dir)
    from cluster.launch import driver

    path = driver.evaluate(config, service=service, address=address)
    print(f"{'domain':<18}{'teacher':>10}{'student':>10}{'KL':>10}   nats per token")
    for name, domain in json.loads(path.read_text()).items():
        cells = (domain["teacher_nll"], domain["student_nll"], domain["kl"])
        print(f"{name:<18}" + "".join(f"{'-' if c is None else f'{c:.3f}':>10}" for c in cells))
    print(f"\nNumbers   {path}")


def export(run: Path, *, to: Path | None = None) -> None:
    """`tutelage export`: the newest whole checkpoint, loaded again and compared first."""
    run_dir = RunDir(run.absolute())
    config = _config_of(run_dir)
    if to is not None and to.exists():
        raise ConfigError(f"{to} exists already; name a new folder with --to")
    from student_trainer.state.checkpoint import latest_checkpoint, step_of
    from student_trainer.state.export import export_checkpoint, exported_step
    from student_trainer.tasks.causal_lm import CAUSAL_LM

    checkpoint = latest_checkpoint(run_dir.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet; train first, with `tutelage run`")
    if exported_step(run_dir.export) != step_of(checkpoint):
        export_checkpoint(checkpoint, config=config, run_dir=run_dir, kind=CAUSAL_LM.model)
    if to is not None:
        shutil.copytree(run_dir.export, to)
    print(f"step {step_of(checkpoint)} is in {to or run_dir.export}")


def report(run: Path) -> None:
    """`tutelage report`."""
    from cluster.report.page import write_report
    from cluster.report.summary import final_table

    run_dir = RunDir(run.absolute())
    _config_of(run_dir)
    write_report(run_dir.path)
    print(final_table(run_dir.path))


def init(to: Path) -> None:
    """`tutelage init`."""
    if to.exists():
        raise ConfigError(f"{to} exists already; name another file: tutelage init FILE")
    try:
        to.write_text(STARTER.read_text())
    except OSError as error:
        raise ConfigError(f"{to} cannot be written: {error.strerror}; name another file") from None
    print(f"{to} is a first config; change it, then: tutelage run {to}")


def _config_of(run_dir: RunDir) -> Config:
    """The recorded config of a run, at home where the folder is now."""
    config = run_dir.recorded_config()
    paths = config.paths.model_copy(update={"runs": str(run_dir.path.parent)})
    prompts = config.prompts and str(run_dir.prompts)
    update = {"paths": paths, "name": run_dir.path.name, "prompts": prompts}
    return config.model_copy(update=update)
