"""summary.json: its names are frozen, its numbers follow their definitions."""

import json
import re
import socket
from pathlib import Path

import pytest
import yaml

from cluster.builtin.corpus import FOLDER
from cluster.report.measurement import Failures
from cluster.report.page import write_report
from cluster.report.summary import final_table, summarise
from cluster.report.text import COLUMNS
from shared.config.file import dump
from shared.errors import ConfigError
from shared.mixture.weight_log import WeightEntry, write_entry
from shared.run.metrics import DomainMetrics, StepMetrics, append_metrics
from tests.cluster.run_dirs import write_run

NONE = Failures(teacher_restarts=0, student_restarts=0, retried_units=0)


def two_lines(directory: Path) -> Path:
    """A run of 20 steps in two lines of unequal size, one domain, two weight entries."""
    write_run(directory, domains=("math", "law"), steps=0)
    (directory / "weight_log.jsonl").unlink()
    write_entry(directory / "weight_log.jsonl", ("math", "law"), WeightEntry(0, 0, 0, (0.5, 0.5)))
    write_entry(directory / "weight_log.jsonl", ("math", "law"), WeightEntry(1, 8, 10, (0.7, 0.3)))
    write_entry(directory / "weight_log.jsonl", ("math", "law"), WeightEntry(2, 18, 20, (0.9, 0.1)))
    for step, tokens, seconds in ((10, 100, 1.0), (20, 300, 3.0)):
        part = DomainMetrics(
            kl=1.0, tokens=tokens // 2, sequences=step, weight=0.5, epochs=step / 8
        )
        line = StepMetrics(
            step=step,
            loss=1.0,
            lr=1e-3,
            grad_norm=1.0,
            tokens=tokens,
            captured_mass=0.9 if step == 10 else 0.98,
            domains={"math": part, "law": part},
            seconds=seconds,
            teacher_wait_s=0.2,
            units=5,
            wire_bytes=4_000,
            cache_hits=1,
        )
        append_metrics(directory / "metrics.jsonl", line)
    return directory


def test_the_names_of_summary_json_are_those_other_programs_read(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir)
    summarise(run_dir, status="finished", failures=NONE)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary) == [
        "status",
        "steps",
        "tokens",
        "tokens_per_s",
        "teacher_wait_fraction",
        "wire_bytes_per_token",
        "cache_hit_rate",
        "captured_mass",
        "phases",
        "domains",
        "teachers",
        "failures",
        "start",
    ]
    assert list(summary["domains"]["code"]) == [
        "teacher_nll",
        "student_nll_before",
        "student_nll_after",
        "kl_kind",
        "kl_before",
        "kl_after",
        "weight_first",
        "weight_last",
        "sequences",
        "epochs",
        "text",
    ]
    assert list(summary["failures"]) == ["teacher_restarts", "student_restarts", "retried_units"]
    assert sorted(path.name for path in run_dir.iterdir() if "summary" in path.name) == [
        "summary.json"
    ]


def test_what_became_of_the_text_is_in_the_summary_and_the_report(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir)
    counts = dict(zip(COLUMNS, (43, 5, 1200, 987, 20, 0, 3, 1), strict=True))
    held_out = counts | {"dropped": 77, "notes": ["files that are not read: LICENSE"]}
    notes = ["fields that are not read: id 43"]
    text = {"code": counts | {"notes": notes, "held_out": False, "validation": held_out}}
    (run_dir / "text.json").write_text(json.dumps(text))
    summary = summarise(run_dir, status="finished", failures=NONE)
    assert summary["domains"]["code"]["text"] == text["code"]
    assert summary["domains"]["legal"]["text"] is None
    page = write_report(run_dir).read_text()
    cells = re.sub(r"<td[^>]*>", "<td>", page)
    assert "<td>1,200</td><td>987</td><td>20</td>" in cells
    assert "code: fields that are not read: id 43" in page
    assert "<td>987</td><td>77</td>" in cells
    assert "validation</th>" in page
    assert "code, validation: files that are not read: LICENSE" in page
    (run_dir / "text.json").write_text(json.dumps({"code": counts | {"notes": notes}}))
    assert "validation</th>" not in write_report(run_dir).read_text()  # an older run folder


def test_a_baseline_that_is_not_asked_for_any_more_is_not_compared_with(tmp_path: Path):
    """It may have taken fewer steps than the run, which goes on without it."""
    config = write_run(tmp_path / "run", baseline=True)
    assert "hard labels" in final_table(tmp_path / "run")
    without = config.model_copy(update={"baseline": False})
    (tmp_path / "run" / "config.yaml").write_text(dump(without))
    assert "hard labels" not in final_table(tmp_path / "run")


def test_each_teacher_is_summed_up_over_its_domains(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, domains=("code", "law", "maths"), teachers=("big", "small"))
    summary = summarise(run_dir, status="finished", failures=NONE)
    big, small = summary["teachers"]["big"], summary["teachers"]["small"]
    assert (big["model"], big["domains"]) == ("models/big", ["code", "maths"])
    assert (small["model"], small["domains"]) == ("models/small", ["law"])
    assert big["tokens"] + small["tokens"] == summary["tokens"]
    kls = {name: domain["kl_after"] for name, domain in summary["domains"].items()}
    assert small["kl_after"] == kls["law"]
    assert big["kl_after"] == pytest.approx((kls["code"] + kls["maths"]) / 2)  # as many tokens
    assert big["wait_fraction"] == pytest.approx(summary["teacher_wait_fraction"] / 2)
    bytes_of = [one["tokens"] * one["wire_bytes_per_token"] for one in (big, small)]
    assert bytes_of[0] == pytest.approx(bytes_of[1])
    assert sum(bytes_of) == pytest.approx(summary["tokens"] * summary["wire_bytes_per_token"])
    lines = final_table(run_dir).split("\n\n")[1].splitlines()
    assert lines[0].startswith("By teacher")
    assert lines[-1].split()[:3] == ["small", f"{small['kl_before']:.3f}", f"{kls['law']:.3f}"]
    assert lines[-1].split()[-1] == "law"


def test_epochs_are_those_of_the_last_line_and_phases_those_that_began(tmp_path: Path):
    """The last entry of the log takes effect after the last step."""
    run_dir, names = two_lines(tmp_path / "run"), ("math", "law")
    assert summarise(run_dir, status="finished", failures=NONE)["domains"]["math"]["epochs"] == 2.5
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"progressive": {}}))
    (run_dir / "weight_log.jsonl").unlink()
    for index, (at, phase) in enumerate(((0, 0), (5, 1), (10, 1), (20, 2))):
        entry = WeightEntry(index, max(0, at - 2), at, (0.5, 0.5), phase=phase)
        write_entry(run_dir / "weight_log.jsonl", names, entry)
    assert summarise(run_dir, status="finished", failures=NONE)["phases"] == [0, 5]


def test_a_teachers_kl_is_over_the_tokens_of_all_its_domains_or_none(tmp_path: Path):
    """Domains of unlike size count by their tokens; one that was not compared leaves no mean."""
    run_dir = tmp_path / "run"
    write_run(run_dir, domains=("code", "law", "maths"), teachers=("big", "small"))
    path = run_dir / "evaluations.json"
    told = json.loads(path.read_text())
    told["after"]["code"] |= {"tokens": 100, "kl": 1.0}
    told["after"]["maths"] |= {"tokens": 300, "kl": 2.0}
    told["before"]["maths"]["kl"] = None
    path.write_text(json.dumps(told))
    big = summarise(run_dir, status="finished", failures=NONE)["teachers"]["big"]
    assert (big["kl_before"], big["kl_after"]) == (None, 1.75)


def test_a_teacher_of_many_domains_has_a_line_of_100_columns(tmp_path: Path):
    domains = tuple(f"domain-number-{i}" for i in range(12))
    write_run(tmp_path / "run", domains=domains, teachers=("a-teacher-of-a-long-name", "b"))
    lines = final_table(tmp_path / "run").split("\n\n")[1].splitlines()
    assert max(map(len, lines)) == 100


def test_ratios_divide_the_sums_of_the_run_not_the_means_of_its_lines(tmp_path: Path):
    summary = summarise(two_lines(tmp_path / "run"), status="finished", failures=NONE)
    assert (summary["steps"], summary["tokens"]) == (20, 400)
    assert summary["tokens_per_s"] == pytest.approx(400 / 4.0)
    assert summary["teacher_wait_fraction"] == pytest.approx(0.4 / 4.0)
    assert summary["wire_bytes_per_token"] == pytest.approx(8_000 / 400)
    assert summary["cache_hit_rate"] == pytest.approx(2 / 10)
    assert summary["captured_mass"] == pytest.approx((0.9 * 100 + 0.98 * 300) / 400)


def test_the_last_weight_is_the_one_the_last_step_was_drawn_with(tmp_path: Path):
    math = summarise(two_lines(tmp_path / "run"), status="finished", failures=NONE)["domains"][
        "math"
    ]
    assert (math["weight_first"], math["weight_last"]) == (0.5, 0.7)
    assert math["sequences"] == 30


def test_a_step_done_twice_counts_once(tmp_path: Path):
    run_dir = two_lines(tmp_path / "run")
    again = (run_dir / "metrics.jsonl").read_text().splitlines()[-1]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(again + "\n")
    assert summarise(run_dir, status="finished", failures=NONE)["tokens"] == 400


def test_status_and_failures_are_recorded_as_told(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, steps=100, finished=False)
    told = Failures(teacher_restarts=2, student_restarts=1, retried_units=7)
    summary = summarise(run_dir, status="failed", failures=told)
    assert (summary["status"], summary["failures"]) == ("failed", told)
    assert summary["domains"]["code"]["student_nll_after"] is None


def test_without_a_teacher_its_numbers_are_null(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, teacher=False)
    summarise(run_dir, status="finished", failures=NONE)
    summary = json.loads((run_dir / "summary.json").read_text())
    code = summary["domains"]["code"]
    assert summary["captured_mass"] is None
    assert (code["teacher_nll"], code["kl_before"], code["kl_kind"]) == (None, None, "none")


def test_a_number_that_is_not_finite_becomes_null_and_the_file_stays_json(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir)
    evaluations = json.loads((run_dir / "evaluations.json").read_text())
    evaluations["after"]["code"]["kl"] = float("nan")
    (run_dir / "evaluations.json").write_text(json.dumps(evaluations))
    summarise(run_dir, status="finished", failures=NONE)
    text = (run_dir / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["domains"]["code"]["kl_after"] is None


def test_baseline_json_has_the_same_shape_and_both_students(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, baseline=True)
    summary = summarise(run_dir, status="finished", failures=NONE)
    baseline = json.loads((run_dir / "baseline.json").read_text())
    assert set(baseline) - set(summary) == {"students"}
    assert baseline["students"]["code"] == {
        "distilled_nll": summary["domains"]["code"]["student_nll_after"],
        "hard_labels_nll": baseline["domains"]["code"]["student_nll_after"],
        "distilled_kl": summary["domains"]["code"]["kl_after"],
        "hard_labels_kl": baseline["domains"]["code"]["kl_after"],
    }


def test_a_baseline_without_a_config_of_its_own_has_its_runs(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, baseline=True)
    (run_dir / "baseline" / "config.yaml").unlink()
    alone = summarise(run_dir / "baseline", status="failed", failures=NONE)
    summarise(run_dir, status="finished", failures=NONE)
    baseline = json.loads((run_dir / "baseline.json").read_text())
    assert baseline["status"] == "failed"
    assert {name: baseline[name] for name in alone} == alone


@pytest.mark.parametrize("baseline", [False, True])
def test_the_table_fits_100_columns_whatever_the_domains_are_called(tmp_path: Path, baseline: bool):
    run_dir = tmp_path / "run"
    names = tuple(f"a domain with quite a long name {i}" for i in range(30))
    write_run(run_dir, domains=names, baseline=baseline)
    table = final_table(run_dir).split("\n\n")[0].splitlines()
    rows = [line for line in table if line.startswith("a domain")]
    assert len(rows) == 30
    assert max(len(line) for line in table) <= 100
    assert len({len(line) for line in rows}) == 1


def test_the_table_says_which_student_is_lower_and_where(tmp_path: Path):
    run_dir = tmp_path / "run"
    write_run(run_dir, baseline=True)
    evaluations = json.loads((run_dir / "evaluations.json").read_text())
    evaluations["after"]["legal"]["student_nll"] = 9.0
    (run_dir / "evaluations.json").write_text(json.dumps(evaluations))
    table = final_table(run_dir)
    assert "Lower KL to the teacher: distilled student in every domain." in table
    assert (
        "Lower NLL: distilled student in code, reference, mathematics; hard labels in legal."
        in table
    )
    assert "KL to the teacher fell by 70 % or more in every domain." in table


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (3.0, "did not fall in legal."),
        (1.0, "did not fall in legal."),
        (0.996, "fell in every domain, by less than 1 % in legal."),
        (0.95, "fell by 5 % or more in every domain."),
    ],
)
def test_what_training_changed_where_it_changed_least(tmp_path: Path, share: float, said: str):
    run_dir = tmp_path / "run"
    write_run(run_dir)
    evaluations = json.loads((run_dir / "evaluations.json").read_text())
    before, after = (evaluations[when]["legal"] for when in ("before", "after"))
    after["kl"] = share * before["kl"]
    (run_dir / "evaluations.json").write_text(json.dumps(evaluations))
    assert f"KL to the teacher {said}" in final_table(run_dir).splitlines()


def test_only_a_run_of_the_built_in_models_is_told_what_comes_after_the_demo(tmp_path: Path):
    run_dir = tmp_path / "run"
    config = write_run(run_dir)
    assert "Next" not in final_table(run_dir)
    built_in = Path(config.paths.cache).expanduser() / FOLDER / "0123" / "student-4567"
    student = config.student.model_copy(update={"model": str(built_in)})
    (run_dir / "config.yaml").write_text(dump(config.model_copy(update={"student": student})))
    assert "init my.yaml" in final_table(run_dir)
    assert "recipes, configs to start from" in final_table(run_dir)


def test_a_directory_that_is_no_run_is_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.yaml"):
        final_table(tmp_path)


def test_a_job_whose_folder_is_gone_still_ends_with_table_and_report(tmp_path: Path, monkeypatch):
    run, here = tmp_path / "run", tmp_path / "here"
    write_run(run)
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    assert str(run / "report.html") in final_table(run)
    assert write_report(run).exists()


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, "scp -r {host}:{export} ."),
        ({"KUBERNETES_SERVICE_HOST": "1"}, "kubectl cp {host}:{export} export"),
    ],
)
def test_the_last_line_of_a_job_fetches_its_student(
    tmp_path: Path, monkeypatch, variables, command
):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    said = final_table(tmp_path / "run")
    assert "Fetch it" not in said
    assert "Numbers   run/summary.json" in said
    for name, value in {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", **variables}.items():
        monkeypatch.setenv(name, value)
    said = command.format(host=socket.gethostname(), export=tmp_path / "run" / "export")
    lines = final_table(tmp_path / "run").splitlines()
    assert lines[-1] == f"Fetch it  {said}"
    assert f"Numbers   {tmp_path}/run/summary.json" in lines
