"""The command line's verbs from Python, and the notebook that uses them."""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.main import get_command

from cluster import api, cli
from shared.config.file import load_config, resolve
from shared.errors import ConfigError, UserError
from tests.cluster.jobs import WORDS, write_job
from tests.documents import ROOT, blocks

# Verbs on a run's folder are methods; of several runs, a function.
FUNCTIONS = {
    "eval": [api.Run.evaluate, api.Run.evaluate_tasks],
    "export": [api.Run.export],
    "report": [api.Run.report, api.compare],
    "status": [api.status, api.Run.standing],
}
NAMED = {"path": "config", "where": "store"}
# What is for a terminal alone: it is printed as JSON, watched, named in the folder's place.
OF_A_TERMINAL = {"run", "as_json", "watch"}


def verbs() -> Iterator[tuple[str, set[str]]]:
    """Each verb of the command line with its parameters, a group's as GROUP_VERB."""
    root = get_command(cli.app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts = {"": command} | dict(getattr(command, "commands", {}))
        if len(parts) > 1:
            del parts[""]
        for part, verb in parts.items():
            whole = "_".join(filter(None, (name, part)))
            yield whole, {p.name for p in verb.params} - {"help"}


@pytest.mark.parametrize(("verb", "options"), list(verbs()), ids=[verb for verb, _ in verbs()])
def test_every_verb_of_the_command_line_is_a_function_with_its_options(verb, options):
    assert verb in api.__all__ or verb in FUNCTIONS
    functions = FUNCTIONS.get(verb) or [getattr(api, verb)]
    parameters = [name for found in functions for name in inspect.signature(found).parameters]
    given = {NAMED.get(name, name) for name in parameters}
    assert options - OF_A_TERMINAL <= given


def test_overrides_are_spelt_as_on_the_command_line(tmp_path, tiny_pair):
    values = {
        "optimiser.lr": 1e-05,
        "name": "3",
        "targets.store": None,
        "baseline": True,
        "paths.runs": tmp_path / "more: runs",
    }
    config = resolve(load_config(write_job(tmp_path, tiny_pair), api._spelt(values)))
    assert (config.optimiser.lr, config.name, config.targets.store) == (1e-05, "3", None)
    assert config.baseline
    assert config.paths.runs == str(tmp_path / "more: runs")


@pytest.fixture(scope="module")
def executed(ray_cluster, tmp_path_factory, tiny_pair) -> tuple[Path, nbformat.NotebookNode]:
    """The folder of a job, and the notebook that has run it, on this process's cluster."""
    import ray

    folder = tmp_path_factory.mktemp("job")
    job = write_job(folder, tiny_pair, name="mine", steps=4).rename(folder / "my.yaml")
    written = folder / "first.ipynb"
    assert cli.main(["init", str(written)]) == 0
    notebook = nbformat.read(written, as_version=4)
    (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    given.source += f"\nCONFIG, OVERRIDES = {str(job)!r}, {{'optimiser.lr': 3e-4}}"
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    return folder, notebook


@pytest.fixture(scope="module")
def done(executed) -> api.Run:
    """What it ran."""
    return api.Run(executed[0] / "runs" / "mine")


def test_the_notebook_runs_and_plots(executed):
    _, notebook = executed
    shown = [kind for cell in notebook.cells for kind in _kinds(cell)]
    assert shown.count("image/png") == 1
    assert "text/html" in shown  # the table of the outcome
    said = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "KL to the teacher" in said


def _kinds(cell: nbformat.NotebookNode) -> list[str]:
    """The kinds of what a cell shows."""
    return [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]


def test_the_example_of_the_document_finds_the_run_that_is_there(executed, done):
    (shown,) = blocks(ROOT / "cluster" / "README.md", "python")
    named: dict[str, Any] = {}
    with chdir(executed[0]):
        exec(shown.replace("math", next(iter(WORDS))), named)
    assert named["run"].path == done.path


def test_a_run_is_an_object_with_what_was_measured(done):
    assert done.path.name == "mine"
    assert done.config.optimiser.lr == 3e-4
    assert set(done.summary()["domains"]) == set(WORDS)
    assert [line.step for line in done.metrics()] == [2, 4]
    assert len(done.weights().entries) >= 1
    assert done.standing()["state"] == "finished"
    assert done.report() == done.files.report


def test_runs_are_compared_on_a_page(done, tmp_path):
    shutil.copytree(done.path, tmp_path / "other")
    page = api.compare([done.path, tmp_path / "other"], to=str(tmp_path / "both.html"))
    assert page == tmp_path / "both.html"
    assert all(name in page.read_text() for name in ("mine", "other"))


def test_an_evaluation_gives_the_numbers_of_the_summary(done):
    measured = done.evaluate(generate=0)
    for name, domain in done.summary()["domains"].items():
        assert measured[name].student_nll == pytest.approx(domain["student_nll_after"], abs=1e-6)
        assert measured[name].kl == pytest.approx(domain["kl_after"], abs=1e-6)


def test_an_export_goes_where_it_is_asked_to(done, tmp_path):
    assert done.export() == done.files.export
    assert (done.export(to=str(tmp_path / "student")) / "model.safetensors").exists()


def test_what_a_caller_can_mend_is_raised_with_its_sentence(done, tmp_path):
    with pytest.raises(UserError, match=r"optimizer is not an option. Did you mean optimiser"):
        api.run(done.files.config, {"optimizer.lr": 1e-3})
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.yaml"):
        _ = api.Run(tmp_path).config
    with pytest.raises(ConfigError, match="has no summary yet"):
        api.Run(tmp_path).summary()
