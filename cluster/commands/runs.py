"""Commands on configs and run folders: what the command line calls, with its printing."""

import difflib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from cluster.builtin.models import stages_to_build
from cluster.planning.loading import load, made, read
from cluster.report.stages import expect, stages_of_run
from cluster.submission.ignore_file import NAME as IGNORE_FILE
from cluster.submission.ignore_file import write_ignore_file
from shared.config.paths import recovered
from shared.config.run import Config
from shared.errors import ConfigError, reason_of
from shared.run.run_dir import RunDir
from shared.run.start import StartClock

RECIPES = Path(__file__).parents[1] / "recipes"
STARTER = "starter"
NOTEBOOK = RECIPES / "quickstart.ipynb"


def run(
    path: Path, overrides: Sequence[str], *, fresh: bool = False, address: str | None = None
) -> RunDir:
    """`tutelage run`; returns the run's directory."""
    clock = StartClock()
    clock.mark("began")
    config = read(path, overrides)
    if config.stages:
        from cluster.launch import staging

        return staging.run(config, fresh=fresh, address=address)
    building = stages_to_build(config)
    expect([*building, *stages_of_run(config)])
    from cluster.launch import driver, staging

    if not fresh:
        staging.refuse_staged(config)
    config = made(config)
    if building:  # which is no part of a start: it is done once
        clock = StartClock()
        clock.mark("began")
    return driver.run(config, fresh=fresh, address=address, clock=clock)


def train(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> RunDir:
    """`tutelage train`; returns the run's directory."""
    clock = StartClock()
    clock.mark("began")
    config = read(path, overrides)
    from cluster.launch import driver, staging

    if config.stages:
        return staging.train(config, service=service, fresh=fresh, address=address)
    if not fresh:
        staging.refuse_staged(config)
    return driver.train(made(config), service=service, fresh=fresh, address=address, clock=clock)


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
    from cluster.launch.repeating import refuse_unsound

    captured = capturing.capture(config, service=service, address=address, all_rows=all_rows)
    for name, done in captured.items():
        print((f"{name}\n" if len(captured) > 1 else "") + done.lines())
    refuse_unsound(config.teachers, {name: done.again for name, done in captured.items()})
    given = "".join(f" {o}" for o in overrides if not o.startswith("targets.teacher_free="))
    print(f"Train     tutelage run {path}{given} targets.teacher_free=true")


def report(run: Path) -> None:
    """`tutelage report`."""
    from cluster.report.page import write_report
    from cluster.report.summary import final_table

    run_dir = RunDir(run.absolute())
    config_of(run_dir)
    write_report(run_dir.path)
    print(final_table(run_dir.path))


def compare(folders: Sequence[Path], *, to: Path | None = None) -> Path:
    """`tutelage report RUN RUN ...`: runs beside each other, as a table and a page, whose path it
    returns."""
    from cluster.report.comparison import compare, comparison_table, write_comparison

    compared = compare([folder.absolute() for folder in folders])
    page = to or folders[0].absolute().parent / "comparison.html"
    print(comparison_table(compared))
    write_comparison(compared, page)
    print(f"\nPage      {page}")
    return page


def init(to: Path, *, recipe: str = STARTER) -> None:
    """`tutelage init`: a recipe, or where the file is to end in .ipynb the notebook."""
    is_notebook = to.suffix == NOTEBOOK.suffix
    found = NOTEBOOK if is_notebook else _recipe(recipe)
    text = found.read_text().replace(f"cluster/recipes/{found.name}", str(to))
    try:
        if to.exists():
            raise ConfigError(f"{to} exists already; name another file: tutelage init FILE")
        to.write_text(text)
        ignoring = write_ignore_file(to.absolute().parent)
    except OSError as error:
        raise ConfigError(
            f"{to} cannot be written: {reason_of(error)}; name another file"
        ) from None
    if is_notebook:
        print(f"{to} is a notebook; pip install 'tutelage[notebook]', then: jupyter lab {to}")
    else:
        verb = "active" if "\nactive:" in text else "run"
        print(f"{to} is a first config; change it, then: tutelage {verb} {to}")
    if ignoring:
        print(f"{to.parent / IGNORE_FILE} keeps runs and .venv out of git and out of jobs")


def recipes() -> None:
    """`tutelage recipes`: a line for each, from its first comment."""
    found = _recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:<{width}}  {_first_sentence(path.read_text())}")
    print("\ntutelage init FILE --recipe NAME writes one")


def _first_sentence(text: str) -> str:
    """Of the comment that opens a recipe."""
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.strip("# ") for line in comment).partition(". ")[0].rstrip(".")


def _recipes() -> dict[str, Path]:
    """The recipes of the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _recipe(name: str) -> Path:
    """Raises ConfigError for a name there is no recipe of."""
    found = _recipes()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--recipe is {name!r}, which there is none of; did you mean {near}? There are "
            f"{', '.join(found)}"
        )
    return found[name]


def config_of(run_dir: RunDir) -> Config:
    """The recorded config of a run, at home where the folder is now; what a job of a cluster read
    from its working folder is read from the current one."""
    config = recovered(run_dir.recorded_config())
    paths = config.paths.model_copy(update={"runs": str(run_dir.path.parent)})
    prompts = config.prompts and str(run_dir.prompts)
    update = {"paths": paths, "name": run_dir.path.name, "prompts": prompts}
    return config.model_copy(update=update)
