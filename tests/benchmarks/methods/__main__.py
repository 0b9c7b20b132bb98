"""Do the methods work on real text? The cells of one table, its numbers and its plot.

`python -m tests.benchmarks.methods run --to FOLDER` trains every cell that has no record yet,
`sweep` the cells that explain them, `check` compares the first loss of recorded cells with the code
as it is, and `publish` writes tables and plot into the project. One process, one JSON per cell.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared.config.run import Config
from shared.errors import ConfigError, TutelageError
from shared.run.run_dir import write_atomically
from tests.benchmarks.methods.cells import CELLS, SWEEPS, Cell, config_of, described, every_cell

REFERENCE = Path(__file__).resolve().parents[4] / "shared"


def chosen(
    names: Sequence[str], default: Sequence[Cell], settings: Sequence[str] = ()
) -> list[Cell]:
    """Cells by name, all with the same settings on top, `a.b=c` each.

    Raises ConfigError for a name that no cell has.
    """
    known = every_cell()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no cell {unknown[0]}; choose among {', '.join(known)}")
    cells = [known[name] for name in names] or list(default)
    on_top = dict(setting.split("=", 1) for setting in settings)
    return [replace(cell, options=cell.options | on_top) for cell in cells]


def record_path(folder: Path, cell: Cell, seed: int) -> Path:
    """Where a cell's record lies."""
    return folder / "cells" / f"{cell.name}-{seed}.json"


def is_current(path: Path, cell: Cell, seed: int) -> bool:
    """Whether a record is there, of the config as it is now; in an older record an option that is
    new counts as its default."""
    if not path.exists():
        return False
    try:
        recorded = Config.model_validate(json.loads(path.read_text())["config"])
    except ValueError:  # an option is gone
        return False
    return described(recorded) == described(config_of(cell, seed))


def run(cells: Sequence[Cell], seeds: Sequence[int], *, folder: Path, root: Path) -> None:
    """Train the cells that have no current record yet, seed by seed."""
    asked = [(cell, seed) for seed in seeds for cell in cells]
    todo = [pair for pair in asked if not is_current(record_path(folder, *pair), *pair)]
    if not todo:
        return
    from tests.benchmarks.methods.running import run_cell
    from tests.benchmarks.methods.workplace import Workplace

    place = Workplace(folder, root=root)
    for number, (cell, seed) in enumerate(todo, start=1):
        start = time.perf_counter()
        path = record_path(folder, cell, seed)
        record = run_cell(cell, seed, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1))
        seconds = time.perf_counter() - start
        print(f"{number}/{len(todo)} {cell.name}, seed {seed}: {seconds:.0f} s", flush=True)


def check(cells: Sequence[Cell], seed: int, *, folder: Path, root: Path) -> bool:
    """Print the recorded cells whose rows or first loss are no longer the same."""
    from tests.benchmarks.methods.running import differences_to
    from tests.benchmarks.methods.workplace import Workplace

    place, same = Workplace(folder, root=root), True
    for cell in cells:
        path = record_path(folder, cell, seed)
        if not path.exists():
            continue
        found = ["its config"] if not is_current(path, cell, seed) else []
        found += differences_to(json.loads(path.read_text()), cell, seed, place)
        print(f"{cell.name}: {', '.join(found) or 'the same'}", flush=True)
        same = same and not found
    return same


def main() -> int:
    """Parse the command line and do one thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("run", "sweep", "check", "publish"))
    parser.add_argument("--to", type=Path, required=True, help="folder of records, kept")
    parser.add_argument("--cells", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="options of all cells, as a.b=c")
    parser.add_argument("--root", type=Path, default=REFERENCE, help="where models and data lie")
    options = parser.parse_args()
    folder, root = options.to.absolute(), options.root.absolute()
    swept = [cell for cells in SWEEPS.values() for cell in cells]
    try:
        cells = chosen(options.cells, swept if options.verb == "sweep" else CELLS, options.set)
        if options.verb == "publish":
            from tests.benchmarks.methods.publishing import publish, read_records

            publish(read_records(folder))
        elif options.verb == "check":
            return 0 if check(cells, options.seeds[0], folder=folder, root=root) else 1
        else:
            run(cells, options.seeds, folder=folder, root=root)
    except TutelageError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
