"""`tutelage eval` on real runs: its table, its file, and another run beside."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from cluster.evaluation.generations import read_generations
from cluster.evaluation.scores import scores
from cluster.evaluation.statistics import ratio
from shared.run.document_sums import DocumentSums
from tests.cluster.evaluation.test_generating import LIMIT, written_by
from tests.cluster.jobs import WORDS, write_job


@pytest.fixture(scope="module")
def runs(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """The folder of a run on plain text and on prompts with responses, `one`, and of that on hard
    labels, `two`."""
    job = write_job(tmp_path_factory.mktemp("eval"), tiny_pair, steps=2, baseline=True)
    rows = [
        {"prompt": f"say {n}", "response": " ".join(str(n + k) for k in range(8))}
        for n in range(60)
    ]
    (job.parent / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["run", str(job), "name=one"]) == 0
    (job.parent / "runs" / "one" / "baseline").rename(job.parent / "runs" / "two")
    return job.parent / "runs"


@pytest.fixture(scope="module")
def told(runs) -> list[str]:
    """What the evaluation of one says, beside the other."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        limit = ["--max-new-tokens", str(LIMIT)]
        assert main(["eval", str(runs / "one"), "--compare", str(runs / "two"), *limit]) == 0
    return said.getvalue().splitlines()


def test_teacher_and_both_students_stand_in_one_table(runs, told) -> None:
    lines = told
    assert max(map(len, lines[lines.index(next(x for x in lines if "bits/byte" in x)) :])) <= 100
    written = read_generations(runs / "one" / "generations.jsonl")
    assert {g.domain for g in written} == set(WORDS)
    assert all(set(g.models) == {"teacher", "before", "after"} for g in written)
    said = [g for g in written if g.domain == "numbers"]
    assert said[0].models["after"].text == written_by(runs / "one" / "export", said[0].prompt)
    found = json.loads((runs / "one" / "eval.json").read_text())
    assert {n: d["prompts"] for n, d in found["domains"].items()} == {
        "letters": 0,
        "numbers": len(said),
    }
    by_model = found["domains"]["numbers"]["models"]
    for name, scored in ((name, by_model[name]) for name in ("teacher", "before", "after")):
        f1 = [scores(g.models[name].text.split("\n\n")[0], g.right).token_f1 for g in said]
        assert scored["token_f1"]["value"] == pytest.approx(sum(f1) / len(said))
    summary = json.loads((runs / "one" / "summary.json").read_text())["domains"]
    assert set(found["domains"]) == set(WORDS)
    for name, domain in found["domains"].items():
        assert list(domain["models"]) == ["teacher", "before", "after", "two"]
        models, of_run = domain["models"], summary[name]
        assert models["teacher"]["nll"]["value"] == pytest.approx(of_run["teacher_nll"])
        assert models["before"]["nll"]["value"] == pytest.approx(of_run["student_nll_before"])
        assert models["after"]["kl"]["value"] == pytest.approx(of_run["kl_after"], abs=1e-6)
        shown = f"{models['after']['nll']['value']:.3f} ± {models['after']['nll']['error']:.3f}"
        assert any(shown in line for line in lines)
        bits = models["after"]["nll"]["value"] * domain["tokens"] / math.log(2) / domain["bytes"]
        assert models["after"]["bits_per_byte"]["value"] == pytest.approx(bits)
        assert 0 < models["after"]["ece"]["value"] < 1
        assert models["teacher"]["kl"] is None


def test_another_run_is_compared_pair_by_pair(runs, told) -> None:
    """By what its own end measured, where nothing was evaluated since."""
    found = json.loads((runs / "one" / "eval.json").read_text())
    one = DocumentSums.read(runs / "one" / "documents/latest.arrow")
    two = DocumentSums.read(runs / "two" / "documents/after.arrow")
    for name, domain in found["domains"].items():
        assert list(domain["models"])[-1] == "two"
        tokens_D = one.of(name).column("tokens")
        expected = ratio(
            one.of(name).column("student_nll") - two.of(name).column("student_nll"), tokens_D
        )
        paired = domain["differences"]["after - two"]["nll"]
        assert paired["value"] == pytest.approx(expected.value)
        assert paired["error"] == pytest.approx(expected.error)
        nlls = [domain["models"][model]["nll"] for model in ("after", "two")]
        assert paired["value"] == pytest.approx(nlls[0]["value"] - nlls[1]["value"])
        apart = math.hypot(nlls[0]["error"], nlls[1]["error"])  # of two independent measurements
        assert paired["error"] != pytest.approx(apart, rel=0.1)


def test_a_run_with_other_validation_text_is_refused(runs, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs / "one", other)
    path = other / "documents" / "after.arrow"
    (other / "documents" / "latest.arrow").unlink(missing_ok=True)
    table = DocumentSums.read(path).table
    place = table.schema.get_field_index("content")
    moved = np.roll(table.column("content").to_numpy(), 1)
    DocumentSums(table.set_column(place, table.schema.field("content"), [moved])).write(path)
    capsys.readouterr()
    assert main(["eval", str(runs / "one"), "--compare", str(other), "--generate", "0"]) == 2
    assert "has other validation text of domain" in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_so_is_refused(runs, tmp_path, capsys) -> None:
    shutil.copytree(runs / "one", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "documents")
    assert main(["eval", str(runs / "one"), "--compare", str(tmp_path / "old")]) == 2
    assert f"run `tutelage eval {tmp_path / 'old'}` first" in capsys.readouterr().err
    assert main(["eval", str(runs / "one"), "--compare", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
