"""A target store with a damaged file: a run stops and names it, or mends it and learns the same."""

import pytest

from cluster.cli import main
from shared.store.target_store import Location
from shared.store.upkeep import questions
from tests.cluster.jobs import write_job
from tests.drills.evidence import assert_same

pytestmark = pytest.mark.drill


def test_a_damaged_file_is_named_or_its_rows_are_asked_again_to_the_same_end(
    ray_cluster, tiny_pair, tmp_path, capsys
):
    targets = {"store": str(tmp_path / "store"), "top_k": 16}
    job = write_job(tmp_path, tiny_pair, log_every=1, targets=targets)
    assert main(["run", str(job), "name=whole"]) == 0
    (training,) = (
        question
        for question in questions(Location.of(tmp_path / "store"))
        if question.answers.question.ask.num_ids == 16
    )
    (file,) = training.files
    path = file.place.local
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1  # among the answers
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["run", str(job), "name=free", "targets.teacher_free=true"]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said
    assert "tutelage cache verify" in said
    assert main(["cache", "verify", str(job)]) == 2
    assert main(["run", str(job), "name=mended"]) == 0
    assert path.with_name(f"{path.name}.damaged").exists()
    assert main(["cache", "gc", str(job)]) == 0
    assert main(["cache", "verify", str(job)]) == 0
    assert main(["capture", str(job)]) == 0  # what was read of the file before it was set aside
    assert main(["run", str(job), "name=free", "targets.teacher_free=true"]) == 0
    for name in ("mended", "free"):
        assert_same(tmp_path / "runs" / name, tmp_path / "runs" / "whole")
