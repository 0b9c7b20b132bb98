"""`tutelage eval` on real runs: its table, its file, and another run beside."""

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
    """The folder of two runs on one corpus: plain text, and prompts with responses."""
    job = write_job(tmp_path_factory.mktemp("eval"), tiny_pair)
    rows = [
        {"prompt": f"say {n}", "response": " ".join(str(n + k) for k in range(8))}
        for n in range(200)
    ]
    (job.parent / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lr in (("one", "3e-3"), ("two", "1e-4")):
        asked = [f"name={name}", f"optimiser.lr={lr}", "steps=4", "baseline=false"]
        assert main(["run", str(job), *asked]) == 0
    return job.parent / "runs"


def evaluated(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["eval", *arguments, "--generate", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_teacher_and_both_students_stand_in_one_table(runs, capsys) -> None:
    capsys.readouterr()
    assert main(["eval", str(runs / "one"), "--max-new-tokens", str(LIMIT)]) == 0
    lines = capsys.readouterr().out.splitlines()
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
    for name, told in found["domains"]["numbers"]["models"].items():
        f1 = [scores(g.models[name].text.split("\n\n")[0], g.right).token_f1 for g in said]
        assert told["token_f1"]["value"] == pytest.approx(sum(f1) / len(said))
    summary = json.loads((runs / "one" / "summary.json").read_text())["domains"]
    assert set(found["domains"]) == set(WORDS)
    for name, domain in found["domains"].items():
        assert list(domain["models"]) == ["teacher", "before", "after"]
        models, told = domain["models"], summary[name]
        assert models["teacher"]["nll"]["value"] == pytest.approx(told["teacher_nll"])
        assert models["before"]["nll"]["value"] == pytest.approx(told["student_nll_before"])
        assert models["after"]["kl"]["value"] == pytest.approx(told["kl_after"], abs=1e-6)
        shown = f"{models['after']['nll']['value']:.3f} ± {models['after']['nll']['error']:.3f}"
        assert any(shown in line for line in lines)
        bits = models["after"]["nll"]["value"] * domain["tokens"] / math.log(2) / domain["bytes"]
        assert models["after"]["bits_per_byte"]["value"] == pytest.approx(bits)
        assert 0 < models["after"]["ece"]["value"] < 1
        assert models["teacher"]["kl"] is None


def test_another_run_is_compared_pair_by_pair(runs, capsys) -> None:
    evaluated(capsys, str(runs / "two"))
    found = evaluated(capsys, str(runs / "one"), "--compare", str(runs / "two"))
    one, two = (
        DocumentSums.read(runs / name / "documents/latest.arrow") for name in ("one", "two")
    )
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
        assert paired["error"] < math.hypot(nlls[0]["error"], nlls[1]["error"])


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
