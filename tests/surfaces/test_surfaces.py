"""What users have written into configs and scripts; a change here is a decision."""

import typer.main

from cluster.cli import app
from shared.config.messages import option_paths


def test_the_options_of_a_config_are_those_on_record(request):
    recorded = (request.path.parent / "config_options.txt").read_text().split()
    assert list(option_paths()) == recorded


def test_the_verbs_are_those_on_record():
    group = typer.main.get_group(app)
    assert set(group.commands) == {
        "run",
        "active",
        "train",
        "submit",
        "jobs",
        "manifests",
        "capture",
        "cache",
        "teacher",
        "prompts",
        "eval",
        "export",
        "report",
        "status",
        "selftest",
        "doctor",
        "plan",
        "init",
        "monitor",
        "recipes",
    }
    teacher = group.commands["teacher"]
    assert set(teacher.commands) == {"up", "scale", "status", "down"}  # type: ignore[attr-defined]
    assert set(group.commands["jobs"].commands) == {"ls", "logs", "stop"}  # type: ignore[attr-defined]
    assert set(group.commands["prompts"].commands) == {"optimise"}  # type: ignore[attr-defined]
    assert set(group.commands["cache"].commands) == {"ls", "verify", "gc"}  # type: ignore[attr-defined]
