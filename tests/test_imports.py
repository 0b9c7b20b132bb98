"""Which package may import what."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "teacher_service", "student_trainer", "cluster")
RAY = {
    "teacher_service/service/replicas/actor.py",
    "teacher_service/service/replicas/environments.py",
    "teacher_service/service/replicas/ranks.py",
    "teacher_service/service/asking.py",
    "teacher_service/service/registry.py",
    "teacher_service/service/pool.py",
    "teacher_service/service/roster.py",
    "teacher_service/service/replicas/placing.py",
    "teacher_service/service/replicas/naming.py",
    "teacher_service/service/replicas/nodes.py",
    "teacher_service/service/kept.py",
    "teacher_service/service/replicas/launching.py",
    "teacher_service/service/scaler.py",
    "teacher_service/service/service.py",
    "student_trainer/worker.py",
}
MOST_MODULES = 15  # of a folder
HEAVY = {"torch", "ray", "transformers", "datasets", "deepspeed", "peft", "bitsandbytes"}

# Imports the named modules while others are barred.
ISOLATED = """
import sys
class Bar:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {barred}:
            raise ImportError(f"{{name}} must not be imported")
sys.meta_path.insert(0, Bar())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""

# Prints the packages that are imported with the named modules.
LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_a_folder_holds_few_enough_modules_to_look_through(package):
    named = "test_*.py" if package == "tests" else "*.py"
    files = [p for p in (ROOT / package).rglob(named) if p.name != "__init__.py"]
    held = Counter(path.parent.relative_to(ROOT) for path in files)
    assert {str(folder): n for folder, n in held.items() if n > MOST_MODULES} == {}


def imported(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Names a file imports, modules or what is in them, at the top only or anywhere; typing-only
    imports are left out."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level else ast.walk(_without_type_checking(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_type_checking(tree: ast.Module) -> ast.Module:
    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            named = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if named else self.generic_visit(node)

    return Strip().visit(tree)


def modules_of_ours() -> dict[str, Path]:
    """By the names under which they are imported."""
    files = [p for package in PACKAGES for p in sources(package) if p.name != "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def test_no_modules_import_one_another_in_a_circle():
    """Late imports are imports; those of types alone are none."""
    ours = modules_of_ours()
    graph = {name: {*imported(path)} & set(ours) for name, path in ours.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@cache
def tops(path: Path, *, module_level: bool = False) -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in imported(path, module_level=module_level))


@pytest.mark.parametrize("path", sources("shared"), ids=lambda path: path.stem)
def test_shared_never_imports_torch_or_ray_nor_heavy_libraries_at_the_top(path):
    assert not tops(path) & {"torch", "ray"}
    assert not tops(path, module_level=True) & HEAVY


def test_ray_is_imported_in_its_few_places_alone():
    outside = [p for package in PACKAGES[:3] for p in sources(package) if "ray" in tops(p)]
    assert {str(p.relative_to(ROOT)) for p in outside} <= RAY


def test_what_runs_in_an_environment_of_its_own_imports_nothing_of_ours():
    worker = ROOT / "teacher_service/engine/vllm/worker.py"
    assert tops(worker, module_level=True) & {"numpy", "pyarrow"}
    assert not tops(worker) & {*PACKAGES}
    assert not tops(worker, module_level=True) & (HEAVY | {"vllm", "pydantic", "xxhash"})


def test_packages_depend_downwards():
    barred = {
        "shared": {"teacher_service", "student_trainer", "cluster"},
        "teacher_service": {"student_trainer", "cluster"},
        "student_trainer": {"teacher_service", "cluster"},
    }
    for package, upper in barred.items():
        for path in sources(package):
            assert not tops(path) & upper, path
    for path in (path for package in PACKAGES for path in sources(package)):
        assert "tests" not in tops(path), path


def isolated(*modules: str, barred: set[str]) -> subprocess.CompletedProcess[str]:
    script = ISOLATED.format(barred=sorted(barred))
    command = [sys.executable, "-c", script, *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shared_works_where_torch_and_ray_are_absent():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources("shared")
        if path.name != "__init__.py"
    ]
    outcome = isolated(*modules, barred=HEAVY)
    assert outcome.returncode == 0, outcome.stderr


def test_losses_and_scoring_work_with_torch_alone():
    losses = [p for p in sources("student_trainer/losses") if p.name != "__init__.py"]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in losses]
    others = (HEAVY - {"torch"}) | {"pyarrow", "pydantic", "yaml", "xxhash", "typer", "accelerate"}
    outcome = isolated(*modules, "teacher_service.scoring.scoring", barred=others)
    assert outcome.returncode == 0, outcome.stderr


def test_the_command_line_starts_without_heavy_imports():
    outcome = isolated("cluster.cli", barred=HEAVY | {"pyarrow", "numpy"})
    assert outcome.returncode == 0, outcome.stderr


# Processes of their own, many to a run, which start as fast as what they import.
STARTED = {
    (
        "cluster.control.controller",
        "teacher_service.service.registry",
        "student_trainer.worker",
    ): HEAVY - {"ray"},
    ("cluster.launch.teachers.serving", "cluster.launch.students.training"): HEAVY
    - {"ray"},  # of the driver
    ("teacher_service.engine.audit", "student_trainer.loop", "student_trainer.state.reload"): {
        "peft",
        "bitsandbytes",
        "ray",
    },
}


@pytest.mark.parametrize("modules", STARTED)
def test_processes_start_without_what_they_may_never_need(modules):
    command = [sys.executable, "-c", LOADED, *modules]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not STARTED[modules] & set(outcome.stdout.splitlines()[-1].split())
