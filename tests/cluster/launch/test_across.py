"""Live runs across tokenizers: the teacher's answers are about its own rows, stored and learnt."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from shared.across.token_pair import TokenPair
from shared.data.row_store import RowStore
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from shared.store.target_store import stored_answers
from tests import tiny
from tests.cluster.jobs import WORDS, write_job
from tests.cluster.planning.test_across import FEW, pair  # noqa: F401


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory, pair: tiny.Pair) -> Path:  # noqa: F811
    """A config whose run has learnt what a capture wrote."""
    tmp_path = tmp_path_factory.mktemp("across")
    store = str(tmp_path / "store")
    targets = {"store": store, "top_k": 32}
    losses = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]
    job = write_job(tmp_path, pair, cross_tokenizer="grouped", targets=targets, losses=losses)
    assert main(["capture", str(job)]) == 0
    assert main(["run", str(job), "targets.teacher_free=true"]) == 0
    return job


def test_what_is_captured_across_tokenizers_is_learnt_without_a_teacher(job: Path) -> None:
    answers = stored_answers(job.parent / "store")
    assert answers
    assert all(each.question.ask.shared_vocab == FEW for each in answers)
    run = RunDir(job.parent / "runs" / "job")
    lines = read_metrics(run.metrics)
    assert len(lines) == 3
    assert all(line.cache_hits == line.units > 0 for line in lines)
    assert all(0 < line.captured_mass < 1 for line in lines if line.captured_mass is not None)
    shares = [line.domains[name].compared_share for line in lines for name in WORDS]
    assert all(share is not None and 0 < share <= 1 for share in shares)
    said = [line for line in (run.logs / "progress.log").read_text().splitlines() if "loss" in line]
    assert all(
        f"{line.compared_share:.0%} of tokens compared" in text
        for line, text in zip(lines, said, strict=True)
        if line.compared_share is not None
    )
    evaluated = json.loads((run.path / "evaluations.json").read_text())
    for name in WORDS:
        before, after = (evaluated[when][name] for when in ("before", "after"))
        assert before["kl_kind"] == "grouped"
        assert 0 < after["kl"] < before["kl"]
        assert before["teacher_nll"] > 0
    found = TokenPair.read(run.token_pair)
    assert found.overlap > 256
    assert found.group_V is not None


@pytest.mark.drill
def test_an_evaluation_counts_the_students_tokens(job: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunDir(job.parent / "runs" / "job")
    evaluated = json.loads((run.path / "evaluations.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(run.path), "--json", "--generate", "0"]) == 0
    found = json.loads(capsys.readouterr().out)["domains"]
    files = list((job.parent / "cache" / "rows").glob("*/validation.arrow"))
    tokens = {int(RowStore.open(path).num_loss_tokens) for path in files}
    for name in WORDS:
        assert found[name]["tokens"] in tokens
        nats = evaluated["before"][name]["teacher_nll"] * found[name]["tokens"]
        bits = nats / found[name]["bytes"] / 0.6931471805599453
        told = found[name]["models"]["teacher"]["bits_per_byte"]
        assert (told["value"] if isinstance(told, dict) else told) == pytest.approx(bits, rel=1e-3)


@pytest.mark.drill
def test_a_teacher_of_longer_tokens_teaches_by_rank(
    ray_cluster,
    tmp_path: Path,
    pair: tiny.Pair,  # noqa: F811
) -> None:
    losses = [{"kind": "total_variation", "weight": 2.0}, {"kind": "cross_entropy"}]
    back = tiny.Pair(teacher=pair.student, student=pair.teacher)
    assert main(["run", str(write_job(tmp_path, back, cross_tokenizer="uld", losses=losses))]) == 0
    lines = read_metrics(RunDir(tmp_path / "runs" / "job").metrics)
    assert lines[-1].terms["total_variation"] < lines[0].terms["total_variation"]
