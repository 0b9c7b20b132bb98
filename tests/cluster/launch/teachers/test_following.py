"""A teacher that is the student some steps ago, through the command line."""

import pytest

from cluster.cli import main
from tests.cluster.jobs import write_job


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("train", [], "follow_student gives it the weights of one run's student"),
        ("teacher up", [], "follow_student gives it the weights of one run's student"),
        ("run", ["losses=[{kind: cross_entropy}]"], "follow_student is set, but no loss asks"),
        ("run", ["targets.store=answers"], "which keeps answers for any"),
        ("run", ["teachers.tiny.dtype=bfloat16"], "dtype is bfloat16, and the student has float32"),
        ("run", ["teachers.tiny.follow_student.lag=-1"], "teachers.tiny.follow_student.lag"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path, tiny_pair, capsys, verb, options, said
):
    itself = {"model": str(tiny_pair.student), "cpus": 0.25, "follow_student": {"lag": 2}}
    job = write_job(tmp_path, tiny_pair, teachers={"tiny": itself})
    assert main([*verb.split(), str(job), *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
