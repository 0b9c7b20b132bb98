"""`tutelage report RUN RUN ...`: what differs between runs, and what each gave and cost."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.report.comparison import compare
from cluster.report.record import read_record
from tests.cluster.run_dirs import write_run


def made(folder: Path, name: str, *, domains=("code", "law"), steps=300, **options) -> Path:
    """A made-up run under a name, with options of its config changed."""
    write_run(folder / name, domains=domains, steps=steps)
    path = folder / name / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"name": name} | options, sort_keys=False))
    return folder / name


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Two runs that differ in steps and temperature."""
    losses = [{"kind": "forward_kl", "temperature": 2.0}]
    warm = made(tmp_path, "warm", losses=losses, steps=200)
    return [str(made(tmp_path, "plain")), str(warm)]


def test_options_that_differ_are_named_with_their_values_and_no_others(runs):
    differing = compare([Path(run) for run in runs]).differing()
    assert list(differing) == ["losses"]
    plain, warm = differing["losses"]
    assert "'temperature': 1.0" in plain
    assert "'temperature': 2.0" in warm


def test_a_job_and_a_run_from_the_same_folder_name_the_same_models(tmp_path):
    copy = str(tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1")
    runs = []
    for name, root in (("job", copy), ("own", str(tmp_path))):
        runs.append(made(tmp_path, name, paths={"root": root}))
        path = runs[-1] / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["student"]["model"] = f"{root}/models/student"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert compare(runs).differing() == {}


def test_each_number_is_that_of_its_run(runs, capsys):
    assert main(["report", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("KL to the teacher"))
    assert lines[head + 1].split() == ["domain", "plain", "warm"]
    records = [read_record(Path(run)) for run in runs]
    for line, domain in zip(lines[head + 2 :], ("code", "law"), strict=False):
        assert line.split() == [domain, *(f"{r.after[domain].kl:.3f}" for r in records)]
    (tokens,) = [line for line in lines if line.startswith("loss tokens")]
    told = [sum(line.tokens for line in record.lines) for record in records]
    assert tokens.split()[2:] == [f"{count:,}" for count in told]


def test_the_page_has_both_runs_and_loads_nothing(runs, tmp_path, capsys):
    assert main(["report", *runs]) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert str(tmp_path / "comparison.html") in capsys.readouterr().out
    assert page.count("<svg") >= 3
    for name in ("plain", "warm", "KL, code", "KL, law"):
        assert name in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_the_lowest_of_a_line_is_marked(runs, tmp_path):
    path = Path(runs[1]) / "evaluations.json"
    told = json.loads(path.read_text())
    told["after"]["law"]["kl"] = 1e-3
    path.write_text(json.dumps(told))
    assert main(["report", *runs, "--to", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert 'class="lower">0.001</td>' in page


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [made(tmp_path / place, "run") for place in ("a", "b")]
    assert list(compare(folders).runs) == ["a/run", "b/run"]


def test_domains_that_one_run_lacks_are_blank_there(tmp_path, capsys):
    one, two = made(tmp_path, "one", domains=("code",)), made(tmp_path, "two", domains=("law",))
    assert main(["report", str(one), str(two)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (only,) = [line for line in lines if line[:1] and line[0].startswith("domains.code")]
    assert only[0] == "domains.code", "one line of a domain, with its training text"
    assert only[2:] == ["-"]
    assert [line[2] for line in lines if line[:1] == ["code"]] == ["-", "-"]
    assert [line[1] for line in lines if line[:1] == ["law"]] == ["-", "-"]


def test_other_validation_text_is_no_comparison_and_is_said(runs, capsys):
    path = Path(runs[1]) / "evaluations.json"
    told = json.loads(path.read_text())
    told["after"]["law"]["tokens"] += 1
    path.write_text(json.dumps(told))
    assert main(["report", *runs]) == 0
    assert "Not the same validation text in every run: law." in capsys.readouterr().out


def test_a_run_under_way_is_compared_as_far_as_it_is(tmp_path, capsys):
    begun = made(tmp_path, "begun", steps=300)
    for left in ("evaluations.json", "metrics.jsonl"):
        (begun / left).unlink()
    assert main(["report", str(begun), str(made(tmp_path, "done"))]) == 0
    (steps,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("steps")]
    assert steps.split() == ["steps", "0", "300"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{0}", "{0}"], "is named twice"),
        (["{0}", "nowhere"], "holds no run"),
        (["{0}", "{1}", "--to", "{0}/metrics.jsonl"], "NAME.html"),
        (["{0}", "--to", "page.html"], "compares several runs"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, said, runs, capsys):
    before = (Path(runs[0]) / "metrics.jsonl").read_bytes()
    assert main(["report", *(part.format(*runs) for part in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert (Path(runs[0]) / "metrics.jsonl").read_bytes() == before
