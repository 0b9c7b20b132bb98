"""The command line. Each command is a function of the same name elsewhere; heavy imports wait.

Exit codes: 0 done, 2 the user's input, 1 the rest.
"""

import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from cluster import active_verbs, export_verbs, job_verbs, monitor_verbs, watching_verbs
from cluster.arguments import Address, ConfigPath, Fresh, Overrides, Service, Store
from cluster.session import interrupts
from shared.errors import StoppedError, TutelageError, reason_of

app = typer.Typer(
    name="tutelage",
    help="Distil a large language model into a small one. Options of a config are overridden by "
    "trailing arguments such as steps=100 or optimiser.lr=1e-3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
teacher = typer.Typer(
    help="A teacher service that outlives a run.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(teacher, name="teacher")
prompts = typer.Typer(
    help="What a teacher is shown and a student is not.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(prompts, name="prompts")

cache = typer.Typer(
    help="Stored answers: what there is, what is sound, what may go.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache, name="cache")
app.add_typer(job_verbs.jobs, name="jobs")
app.add_typer(monitor_verbs.monitor, name="monitor")

SHOWN_CHARS = 120  # of a path in a sentence
INTERRUPTED = 130  # what typer makes of Ctrl-C


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    address: Address = None,
) -> None:
    """Distil: teacher, student, report. The same command again continues an unfinished run."""
    from cluster.commands import runs

    runs.run(config, overrides or [], fresh=fresh, address=address)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    service: Service = None,
    fresh: Fresh = False,
    address: Address = None,
) -> None:
    """Like run, with a teacher that `tutelage teacher up` started."""
    from cluster.commands import runs

    runs.train(config, overrides or [], service=service, fresh=fresh, address=address)


app.command()(active_verbs.active)
app.command()(job_verbs.submit)
app.command()(job_verbs.manifests)


@teacher.command("up")
def teacher_up(
    config: ConfigPath,
    overrides: Overrides = None,
    service: Service = None,
    address: Address = None,
) -> None:
    """Start the config's teacher; it serves until `teacher down`."""
    from cluster.commands import teachers

    teachers.up(config, overrides or [], service=service, address=address)


@teacher.command("scale")
def teacher_scale(
    replicas: Annotated[int, typer.Argument(help="How many replicas serve from now on.")],
    service: Service = None,
    address: Address = None,
) -> None:
    """Add or remove replicas while students train."""
    from cluster.commands import teachers

    teachers.scale(replicas, service=service, address=address)


@teacher.command("status")
def teacher_status(service: Service = None, address: Address = None) -> None:
    """What serves, and how much it has done."""
    from cluster.commands import teachers

    teachers.status(service=service, address=address)


@teacher.command("down")
def teacher_down(
    service: Service = None,
    address: Address = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All services, and the cluster `teacher up` started.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also while commands use it; they wait or end then.")
    ] = False,
) -> None:
    """Stop a teacher service that nobody uses."""
    from cluster.commands import teachers

    teachers.down(service=service, address=address, everything=everything, force=force)


@prompts.command("optimise")
def prompts_optimise(
    config: ConfigPath,
    overrides: Overrides = None,
    service: Service = None,
    address: Address = None,
) -> None:
    """Search for the prompts under which the teacher does best.

    The same command continues.
    """
    from cluster.commands.prompts import optimise

    kept = "Interrupted; the scores so far are kept, and the same command goes on."
    with interrupts.interrupted_as(lambda: kept):
        optimise(config, overrides or [], service=service, address=address)


@app.command()
def capture(
    config: ConfigPath,
    overrides: Overrides = None,
    service: Service = None,
    address: Address = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Every row, not only those the steps draw.")
    ] = False,
) -> None:
    """Ask the teacher all that a run will ask, and keep it.

    Answers go to targets.store; the same command goes on.
    """
    from cluster.commands import runs

    runs.capture(config, overrides or [], service=service, address=address, all_rows=all_rows)


@cache.command("ls")
def cache_ls(store: Store) -> None:
    """A line per teacher and question: rows, tokens, bytes, last use."""
    from cluster.commands import cache

    cache.ls(store)


@cache.command("verify")
def cache_verify(
    store: Store,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is damaged.")] = False,
) -> None:
    """Compare every checksum.

    A list and exit code 2 where files are damaged.
    """
    from cluster.commands import cache

    cache.check(store, delete=delete)


@cache.command("gc")
def cache_gc(
    store: Store,
    older_than: Annotated[
        str | None, typer.Option(help="Remove questions not used for so long, as 30d or 12h.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Remove answers of models with this in their name.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="Remove the question whose folder begins so.")
    ] = None,
    keep_free: Annotated[
        str | None,
        typer.Option(help="Remove what was used longest ago until so much is free, as 50GB."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove leftovers, and what the options choose.

    Damaged files and second copies, too; never what a live process uses.
    """
    from cluster.commands import cache

    cache.gc(
        store,
        older_than=older_than,
        teacher=teacher,
        question=question,
        keep_free=keep_free,
        dry_run=dry_run,
    )


app.command("eval")(watching_verbs.evaluate)


app.command()(export_verbs.export)


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders.")],
    to: Annotated[
        Path | None, typer.Option(help="The page of several runs; default: comparison.html.")
    ] = None,
) -> None:
    """Write report.html again and print its table.

    Of several runs, a page that compares them.
    """
    from cluster.commands import runs

    if len(run) > 1:
        runs.compare(run, to=to)
    elif to is not None:
        raise typer.BadParameter("--to is for the page that compares several runs")
    else:
        runs.report(run[0])


app.command()(watching_verbs.status)
app.command()(watching_verbs.doctor)
app.command()(watching_verbs.plan)


@app.command()
def selftest(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; default: a tiny pair.")
    ] = None,
    overrides: Overrides = None,
    service: Service = None,
    address: Address = None,
) -> None:
    """Prove that a pair learns what it should, and say how fast.

    Masks, losses, payload, speed.
    """
    from cluster.commands import selftest

    selftest.selftest(config, overrides or [], service=service, address=address)


@app.command()
def init(
    to: Annotated[Path, typer.Argument(metavar="[FILE]")] = Path("my.yaml"),
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="One of `tutelage recipes`.")
    ] = "starter",
) -> None:
    """Write a first config, with comments, or a notebook.

    FILE.ipynb is the notebook; an existing file stays.
    """
    from cluster.commands import runs

    runs.init(to, recipe=recipe)


@app.command()
def recipes() -> None:
    """The configs that `tutelage init --recipe` writes, a line each."""
    from cluster.commands import runs

    runs.recipes()


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tutelage {version('tutelage')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Say which one this is.", callback=_print_version)
    ] = False,
) -> None:
    """`--debug` is taken out of the arguments by `main`, wherever it stands."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; every mistake is one sentence on stderr."""
    with interrupts.handling():
        return _done(arguments)


def _done(arguments: list[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        code = app(args=[a for a in given if a != "--debug"], standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except TyperException as error:
        shown = error.format_message()
        stop = "" if shown.endswith((".", "?")) else "."
        _say(shown if "\n" in shown else f"{shown}{stop} Try --help.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say(interrupts.UNSAVED)
        return 1
    except StoppedError as stop:
        _say(str(stop))
        return stop.exit_code
    except TutelageError as error:
        if debug:
            traceback.print_exc()
        _say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except OSError as error:
        if debug:
            traceback.print_exc()
        if error.errno is None:
            return _fault(error)
        place = "a file" if error.filename is None else _shown(error.filename)
        _say(
            f"StorageError: {place} cannot be used: {reason_of(error)}; give access, free space, "
            "or name another place"
        )
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fault(error)
    return 0


def _fault(error: Exception) -> int:
    """Say that an error is ours and where its traceback is; returns the exit code."""
    _say(f"{type(error).__name__}, a fault of Tutelage; the traceback is in {_kept(error)}")
    return 1


def _shown(path: object) -> str:
    """A path of an error, not longer than a line."""
    text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _kept(error: Exception) -> Path:
    """A file with the traceback, since the terminal shows one sentence."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = "".join(traceback.format_exception(error))
    for folder in (cache / "tutelage" / "logs", Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            return folder / name
    print(text, file=sys.stderr)
    return Path("what is printed above")
