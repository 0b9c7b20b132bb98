"""The main job on every kind of question: what it costs, and what a store of its answers gives."""

import contextlib
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.cli import main
from shared.run.run_dir import RunDir
from shared.store.target_store import stored_answers
from shared.targets.soft_targets import SoftTargets
from tests.cluster.jobs import write_job
from tests.tiny import VOCAB


def test_last_states_teach_the_whole_vocabulary_live_and_from_a_store(
    ray_cluster, tmp_path, tiny_pair, capsys
):
    """Two widths of 4 bytes a number, and the label; without the head nothing is learnt."""
    targets = {"exact": "last_hidden", "store": str(tmp_path / "store")}
    losses = [{"kind": "reverse_kl"}, {"kind": "atkd"}, {"kind": "cross_entropy"}]
    job = write_job(tmp_path, tiny_pair, targets=targets, losses=losses, steps=4)
    assert main(["run", str(job), "name=live"]) == 0
    assert "a token costs 196 bytes from the teacher" in capsys.readouterr().out
    alone = "targets.teacher_free=true"
    assert main(["run", str(job), "name=stored", alone]) == 0
    live, stored = (RunDir(tmp_path / "runs" / name) for name in ("live", "stored"))
    weights = [(r.export / "model.safetensors").read_bytes() for r in (live, stored)]
    assert weights[0] == weights[1]
    summary = json.loads(live.summary.read_text())
    assert summary["wire_bytes_per_token"] == pytest.approx(196, abs=2)
    assert summary["captured_mass"] == 1
    assert {domain["kl_kind"] for domain in summary["domains"].values()} == {"full"}
    (head,) = (tmp_path / "cache" / "heads").glob("*.safetensors")
    head.unlink()
    assert main(["run", str(job), "name=headless", alone]) == 2
    assert "needs the teacher's head" in capsys.readouterr().err


def test_hidden_states_are_projected_by_the_teacher(ray_cluster, tmp_path, tiny_pair, capsys):
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_states", "layers": {1: 1, 3: 2}}]
    store = tmp_path / "store"
    hidden = {"width": 8, "encoding": "int8", "calibration_rows": 6}
    targets = {"selector": "top_k", "top_k": 16, "store": str(store), "hidden": hidden}
    job = write_job(tmp_path, tiny_pair, losses=losses, targets=targets, steps=2)
    assert main(["run", str(job)]) == 0
    said = capsys.readouterr().out
    assert "fitting the projection of hidden states to 8 dimensions" in said
    assert "hidden states 24" in said  # bytes per token: two layers of 8 numbers and a step
    training_and_validation = {16, VOCAB}
    asks = [answers.question.ask for answers in stored_answers(store)]
    assert {ask.num_ids for ask in asks} == training_and_validation
    narrow = json.loads(RunDir(tmp_path / "runs" / "job").summary.read_text())
    assert main(["run", str(job), "name=raw", "targets.hidden.raw=true"]) == 0
    raw = json.loads(RunDir(tmp_path / "runs" / "raw").summary.read_text())
    (total,) = re.findall(r"a token costs (\d+) bytes", said)
    assert narrow["wire_bytes_per_token"] == pytest.approx(int(total), abs=2)
    # In two layers 48 numbers of a byte become 8.
    saved = raw["wire_bytes_per_token"] - narrow["wire_bytes_per_token"]
    assert saved == pytest.approx(2 * (48 - 8), abs=1)


@pytest.fixture(scope="module")
def drawn(ray_cluster, tmp_path_factory, tiny_pair) -> tuple[Path, str]:
    """A config whose run on drawn ids has filled a store, and what it said. Weights follow the KL
    of the domains, which is estimated from the same draws."""
    tmp_path = tmp_path_factory.mktemp("drawn")
    store = {"store": str(tmp_path / "store"), "store_ids": "plain"}
    targets = {"selector": "threshold", "top_k": 16, **store}
    job = write_job(
        tmp_path,
        tiny_pair,
        targets=targets,
        mixture={"policy": "odm", "interval": 2, "lag_steps": 1},
        losses=[{"kind": "forward_kl", "temperature": 0.5}],  # sharp enough to have a head
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["run", str(job)]) == 0
    return job, said.getvalue()


def test_a_run_on_drawn_ids_fills_a_store(drawn, capsys):
    job, said = drawn
    assert "threshold: 16 ids, the most likely exactly and the rest drawn by probability" in said
    asks = [answers.question.ask for answers in stored_answers(job.parent / "store")]
    found = {(ask.selector, ask.num_ids) for ask in asks}
    assert found == {("threshold", 16), ("top_k", VOCAB)}
    assert kept_as(job.parent / "store") == {"threshold": pa.uint16()}
    first = RunDir(job.parent / "runs" / "job")
    assert 0 < json.loads(first.summary.read_text())["captured_mass"] < 1
    other = ["name=other", "targets.seed=3", "targets.teacher_free=true"]
    assert main(["run", str(job), *other]) == 2
    assert "asked is threshold 16 of 512 ids at temperature 0.5" in capsys.readouterr().err


@pytest.mark.drill
def test_a_store_of_drawn_ids_repeats_the_run_that_filled_it(drawn):
    job, _ = drawn
    assert main(["run", str(job), "name=warm", "targets.teacher_free=true"]) == 0
    first, warm = (RunDir(job.parent / "runs" / name) for name in ("job", "warm"))
    weights = [(run.export / "model.safetensors").read_bytes() for run in (first, warm)]
    assert weights[0] == weights[1]
    assert first.weight_log.read_text() == warm.weight_log.read_text()


def kept_as(store: Path) -> dict[str, pa.DataType]:
    """The type in which ids lie in a store, by selector; those of the whole vocabulary do not."""
    found = {}
    for file in store.rglob("*.arrow"):
        answers = SoftTargets(pa.ipc.open_file(file).read_all())
        if "top_ids" in answers.table.column_names:
            kind = answers.table.schema.field("top_ids").type
            while hasattr(kind, "value_type"):
                kind = kind.value_type
            found[answers.question.ask.selector] = kind
    return found


def test_a_student_that_names_ids_is_answered_about_them(ray_cluster, tmp_path, tiny_pair, capsys):
    losses = [{"kind": "reverse_kl"}]
    targets = {"top_k": 16, "student_ids": 16, "encoding": "fp32"}
    job = write_job(tmp_path, tiny_pair, losses=losses, targets=targets, steps=2)
    assert main(["run", str(job)]) == 0
    said = capsys.readouterr().out
    assert "the 16 likeliest ids of the student, the 16 most likely others and the exact" in said
    assert "targets.student_ids 16: the student reads every row once more" in said
    assert "64 bytes a token go to the teacher" in said
    run = RunDir(tmp_path / "runs" / "job")
    (total,) = re.findall(r"a token costs (\d+) bytes .*log-probabilities 128,", said)
    summary = json.loads(run.summary.read_text())
    assert summary["wire_bytes_per_token"] == pytest.approx(int(total), abs=2)
