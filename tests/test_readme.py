"""The documents say what the code says. Run as a module it writes the parts that are generated."""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.manifests.facts import RAY
from shared.config.run import Config
from shared.run.exported import METRICS
from student_trainer.losses.terms.divergences import DIVERGENCES, Laws
from student_trainer.losses.terms.token_adaptive import PARTS
from tests.documents import (
    DOCUMENTS,
    PACKAGES,
    PROGRAMS,
    ROOT,
    VLLM,
    blocks,
    command_blocks,
    fences,
)

README = ROOT / "README.md"
LARGEST_README = 14 * 1024  # bytes
DIVERGENCE_TABLE = ROOT / "student_trainer" / "README.md"
METRIC_TABLE = ROOT / "cluster" / "README.md"
OPTION_TABLE = ROOT / "cluster" / "README.md"


CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def examples() -> list[str]:
    """Names of the parts of CONTRIBUTING.md that are copied from the suite: a file and what of
    it."""
    return re.findall(r"<!-- (example [^:]+): begin -->", CONTRIBUTING.read_text())


def example(name: str) -> str:
    """Classes and functions of a file as they stand there."""
    _, path, *wanted = name.split()
    text = (ROOT / path).read_text()
    found = {
        node.name: node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    parts = [_with_decorators(text, found[one]) for one in wanted]
    return "\n".join(["```python", "\n\n\n".join(parts), "```", ""])


def _with_decorators(text: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def section(document: Path, name: str) -> str:
    """What stands between the marks of a part of a document."""
    found = re.search(
        rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", document.read_text(), re.S
    )
    assert found, f"{document.relative_to(ROOT)} has no part {name!r}"
    return found[1]


def modules(package: str) -> list[Path]:
    """Every module of a package, without those that only mark a folder."""
    files = sorted((ROOT / package).rglob("*.py"), key=lambda f: (f.parent, f.name))
    return [f for f in files if f.name != "__init__.py"]


def file_list(package: str) -> str:
    """One line per module of a package: its path and the first sentence of its docstring."""
    names = {str(file.relative_to(ROOT / package)): purpose(file) for file in modules(package)}
    width = max(map(len, names))
    return "\n".join(["```", *(f"{n:<{width}}  {said}" for n, said in names.items()), "```", ""])


def divergence_table() -> str:
    """One line per divergence of the registry: its formula, its laws, its source."""
    head = ("kind", "per position", "parameters", *LAWS, "swaps p and q", "at most", "source")
    rows = [head, ("---",) * len(head)]
    for kind, entry in (DIVERGENCES | PARTS).items():
        laws = ("yes" if getattr(entry.laws, law) else "no" for law in LAWS.values())
        parameters = ", ".join(f"`{name}`" for name in entry.parameters)
        bound = entry.laws.bound.text if entry.laws.bound else ""
        cells = (f"`{kind}`", entry.formula, parameters, *laws, swaps(entry.laws), bound)
        rows.append((*cells, entry.source))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def metric_table() -> str:
    """One line per metric that is exported: its name in a scrape, its unit, its labels."""
    head = ("metric", "unit", "what", "labels", "set by")
    rows = [head, ("---",) * len(head)]
    for metric in METRICS:
        cells = (f"`{metric.exported}`", metric.unit, metric.help)
        rows.append((*cells, ", ".join(metric.labels), metric.setter))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# Columns of the table of divergences and the laws they show.
LAWS = {
    "lower bound": "lower_bound",
    "rises with k": "monotone",
    "0 at p = q": "zero_value",
    "gradient 0 at p = q": "zero_gradient",
}


def swaps(laws: Laws) -> str:
    """Where teacher and student may be swapped."""
    if laws.symmetric_at is None:
        return "no"
    at = ", ".join(f"{name} {value}" for name, value in laws.symmetric_at.items())
    return f"at {at}" if at else "yes"


def purpose(file: Path) -> str:
    """The first sentence of a module, in the width of a line."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    sentence = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0]
    return sentence.rstrip(".")


def options(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every option of the config by its path, NAME standing for keys of maps."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        for kind in sections(field.annotation):
            middle = "NAME." if "dict[" in str(field.annotation) else ""
            for path, inner in options(kind, f"{prefix}{name}.{middle}").items():
                found.setdefault(path, inner)
    return found


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The parts of the config that an annotation mentions, in order."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [kind for part in get_args(annotation) for kind in sections(part)]


def default_text(field: FieldInfo) -> str:
    """A default as the README writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        return ", ".join(entry.kind for entry in value) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def named_files(document: Path) -> set[Path]:
    """Files of the project that a document names in backticks or links to."""
    text = document.read_text()
    quoted = re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests)/[\w/.]+)`", text)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    return {ROOT / name for name in quoted} | {document.parent / name for name in linked}


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= LARGEST_README


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_listed_with_its_purpose(package):
    listed = section(ROOT / package / "README.md", "files")
    assert listed == file_list(package), "run `python -m tests.test_readme` to write it anew"


@pytest.mark.parametrize("name", examples())
def test_an_example_of_contributing_is_a_part_of_the_suite(name):
    assert section(CONTRIBUTING, name) == example(name), "run `python -m tests.test_readme`"


def test_every_seam_has_an_example():
    titles = re.findall(r"^## Add a (\w+)", CONTRIBUTING.read_text(), re.M)
    assert titles == ["loss", "policy", "source", "question", "task"]
    assert len(examples()) == len(titles)


def test_the_divergences_and_their_laws_are_those_of_the_registry():
    listed = section(DIVERGENCE_TABLE, "divergences")
    assert listed == divergence_table(), "run `python -m tests.test_readme`"


def test_the_metrics_are_those_of_the_table():
    listed = METRIC_TABLE.read_text().partition("<!-- metrics: begin -->\n")[2]
    assert listed.startswith(metric_table() + "<!-- metrics: end -->"), (
        "run `python -m tests.test_readme`"
    )


def test_every_option_of_the_table_exists_with_that_default():
    known = options(Config)
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in section(OPTION_TABLE, "options").splitlines()
    ]
    stated = {name.strip("`"): (default, meaning) for name, default, meaning in rows[2:]}
    assert len(stated) > 30
    for name, (default, meaning) in stated.items():
        assert name in known, name
        assert default == default_text(known[name]), name
        assert meaning == (known[name].description or meaning), name


def test_the_parts_of_a_config_that_are_shown_are_valid():
    shown = [text for document in DOCUMENTS for text in blocks(document, "yaml")]
    rest = {"name": "x", "steps": 1, "teachers": {"t": {"model": "m"}}, "student": {"model": "m"}}
    configs = [Config.model_validate(rest | yaml.safe_load(text)) for text in shown]
    assert {"math", "chat"} in [set(config.domains) for config in configs]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document):
    assert [name for name in named_files(document) if not name.exists()] == []


def test_the_readme_leads_to_every_document():
    linked = {path.resolve() for path in named_files(README)}
    assert set(DOCUMENTS) - {README} <= linked


def test_every_command_of_the_readme_is_known_to_the_command_line():
    cli = pytest.importorskip("cluster.cli")
    from typer.main import get_command

    command: Any = get_command(cli.app)
    groups = {name: found.commands for name, found in command.commands.items() if is_group(found)}
    known = set(command.commands) - set(groups)
    known |= {f"{name} {verb}" for name, verbs in groups.items() for verb in verbs}
    pattern = rf"^\| `tutelage ((?:(?:{'|'.join(groups)}) )?[a-z]+)"
    assert set(re.findall(pattern, README.read_text(), re.M)) == known


def test_every_command_block_is_made_of_programs_that_a_test_runs():
    found = command_blocks()
    assert {program for block in found for program in block.programs} == set(PROGRAMS)


def test_every_other_block_is_generated_or_of_a_test():
    """Parts of configs are validated above, those of CONTRIBUTING.md are copied from the suite, and
    `tests/cluster/test_api.py` runs what is typed in Python."""
    typed = {block.text for block in command_blocks()}
    written = [file_list(package) for package in PACKAGES] + list(map(example, examples()))
    others = [
        text
        for document in DOCUMENTS
        for kind, text in fences(document)
        if text not in typed and kind != "yaml" and f"```{kind}\n{text}```\n" not in written
    ]
    told = (
        "┌── controller actor (DDK) ──",
        "Validation text, nats per token",
        "from cluster import api",
    )
    assert len(others) == len(told)
    for text, begins in zip(others, told, strict=True):
        assert begins in re.sub("─+", "──", text.partition("\n")[0]), text


def test_an_environment_for_vllm_has_the_ray_of_ours():
    (block,) = [found for found in command_blocks() if found.programs & set(VLLM)]
    assert f"ray=={RAY}" in {word for words in block.commands for word in words}


def test_every_tutelage_line_of_the_documents_is_one_that_the_command_line_takes():
    cli = pytest.importorskip("cluster.cli")
    from typer.main import get_command

    lines = [words for block in command_blocks() for words in block.commands]
    taken = [words[1:] for words in lines if words[0] == "tutelage"]
    assert len(taken) > 5
    for words in taken:
        command: Any = get_command(cli.app)
        rest = list(words)
        while is_group(command):
            command = command.commands[rest.pop(0)]
        command.make_context("tutelage", rest)  # raises where an option is unknown


def test_every_make_target_of_the_documents_exists():
    lines = [words for block in command_blocks() for words in block.commands]
    targets = {words[1] for words in lines if words[0] == "make"}
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def is_group(command: Any) -> bool:
    """Whether a command only holds others."""
    return hasattr(command, "commands")


def write(document: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a part of a document."""
    before, begin, rest = document.read_text().partition(f"<!-- {name}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    document.write_text(before + begin + text + end + after)


if __name__ == "__main__":
    for package in PACKAGES:
        write(ROOT / package / "README.md", "files", file_list(package))
    write(DIVERGENCE_TABLE, "divergences", divergence_table())
    write(METRIC_TABLE, "metrics", metric_table())
    for one in examples():
        write(CONTRIBUTING, one, example(one))
