"""The methods' table: cells on a tiny pair, statistics against known numbers, the documents."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.config.run import Config
from tests.benchmarks.methods import publishing
from tests.benchmarks.methods.calibration import calibration_error
from tests.benchmarks.methods.cells import (
    CELLS,
    COMPARISONS,
    ON_POLICY,
    ON_POLICY_COMPARISONS,
    OWN,
    SPARSE_COMPARISONS,
    SWEPT_COMPARISONS,
    WEIGHTED_COMPARISONS,
    config_of,
    every_cell,
)
from tests.benchmarks.methods.statistics import (
    estimate,
    mean_kl,
    mean_recovered,
    paired,
    recovered,
    worst_gap,
)
from tests.benchmarks.methods.writing import distinct_2

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["steps=5", "data.context=64", "data.validation_rows=2", "targets.top_k=16"]
SMALL += ["batch={rows_per_step: 4, micro_batch: 4}"]
SMALL += ["progressive={phases: 2, max_steps: 2, plateau: null, interval: 2}"]


def record(cell: str, seed: int, *, after: float) -> dict:
    domain = {"nll_before": 5.0, "nll_after": after, "teacher_nll": 3.0, "kl_after": after / 10}
    other = {**domain, "nll_after": 4.0}
    return {"cell": cell, "seed": seed, "domains": {"math": domain, "code": other}}


def test_an_interval_is_students_t():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # 2 degrees
    assert not estimate([-1.0, 1.0, 3.0]).excludes_zero
    assert estimate([1.0, 1.1, 1.2]).excludes_zero


def test_one_seed_has_no_interval_and_supports_no_claim():
    found = estimate([0.3])
    assert math.isnan(found.half_width)
    assert not found.excludes_zero


def test_differences_are_paired_by_seed():
    records = [record("a", seed, after=3.5 + seed) for seed in (0, 1, 2)]
    records += [record("b", seed, after=3.25 + seed) for seed in (2, 1, 0, 7)]
    found = paired(records, "a", "b", worst_gap)
    assert found is not None
    assert found.num_seeds == 3
    assert found.mean == pytest.approx(0.25 * 2 / 3)  # the other domain's gap is larger for seed 0
    assert paired(records, "a", "c", worst_gap) is None


def test_what_is_measured_of_a_record():
    one = record("a", 0, after=3.5)
    assert recovered(one["domains"]["math"]) == pytest.approx(0.75)
    assert mean_recovered(one) == pytest.approx((0.75 + 0.5) / 2)
    assert mean_kl(one) == pytest.approx(0.35)
    assert worst_gap(one) == pytest.approx(1.0)


def test_the_calibration_error_of_known_predictions():
    """Four at .9 of which two are right, and two at .5 of which one is."""
    confidence_N = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    correct_N = torch.tensor([True, True, False, False, True, False])
    error = calibration_error(confidence_N, correct_N)
    assert error == pytest.approx((4 * 0.4 + 2 * 0.0) / 6)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_every_cell_is_a_config_of_equal_tokens_and_every_comparison_names_two():
    cells = every_cell()
    assert len(cells) >= len(CELLS)
    configs = {name: config_of(cell, 1) for name, cell in cells.items()}
    bases = {cell.base: configs[name] for name, cell in cells.items() if name in ("kd", OWN.name)}
    for name, config in configs.items():
        base = bases[cells[name].base]
        assert config.seed == 1
        assert (config.domains, config.batch) == (base.domains, base.batch), name
    assert {config_of(cell, 0).steps for cell in CELLS} == {configs["kd"].steps}
    alike = (cell for cell in ON_POLICY if not cell.name.endswith("-long"))
    assert {config_of(cell, 0).steps for cell in alike} == {configs[OWN.name].steps}
    assert all(
        cell in cells and against in cells
        for cell, against in (
            *COMPARISONS,
            *SWEPT_COMPARISONS,
            *WEIGHTED_COMPARISONS,
            *SPARSE_COMPARISONS,
            *ON_POLICY_COMPARISONS,
        )
    )


@pytest.fixture(scope="module")
def tiny_root(tiny_pair, tmp_path_factory) -> Path:
    """A reference folder with tiny models and text made up of few words."""
    root = tmp_path_factory.mktemp("reference")
    (root / "models").mkdir()
    (root / "models" / "teacher-6m").symlink_to(tiny_pair.teacher)
    (root / "models" / "student-base-1m").symlink_to(tiny_pair.student)
    words = random.Random(0)
    for name in Config.model_validate(config_of(CELLS[0], 0)).domains:
        (root / "data" / name).mkdir(parents=True)
        for part, count in (("train", 30), ("valid", 6)):
            texts = (
                " ".join(words.choices([name, "one", "two", part], k=16)) for _ in range(count)
            )
            lines = [json.dumps({"text": text}) for text in texts]
            (root / "data" / name / f"made.{part}.jsonl").write_text("\n".join(lines))
    return root


def methods(*arguments: object, code: int = 0) -> str:
    """What the module's command line prints before it ends with an exit code."""
    command = [sys.executable, "-m", "tests.benchmarks.methods", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == code, done.stderr[-3000:] + done.stdout
    return done.stdout


@pytest.mark.benchmark
def test_cells_are_recorded_once_and_share_what_the_teacher_said(tiny_root, tmp_path):
    asked = [
        "--to",
        tmp_path,
        "--root",
        tiny_root,
        "--cells",
        "kd",
        "atkd",
        "akd-soft",
        "--seeds",
        0,
    ]
    printed = methods("run", *asked, "--set", *SMALL)
    assert [line.split(":")[0] for line in printed.splitlines() if " seed " in line] == [
        "1/3 kd, seed 0",
        "2/3 atkd, seed 0",
        "3/3 akd-soft, seed 0",
    ]
    records = {r["cell"]: r for r in publishing.read_records(tmp_path)}
    assert all(0 <= r["calibration_error"] <= 1 for r in records.values())
    first, second, shown = records["kd"], records["atkd"], records["akd-soft"]
    assert first["teacher_tokens"] == first["tokens"] == second["tokens"] > 0
    assert second["teacher_tokens"] == 0
    assert shown["teacher_tokens"] > 0  # it answers under another prompt
    for name, domain in first["domains"].items():
        other = second["domains"][name]
        assert shown["domains"][name]["kl_before"] == domain["kl_before"]
        assert all(math.isfinite(value) for value in domain.values())
        assert domain["nll_before"] == other["nll_before"]
        assert domain["nll_after"] != other["nll_after"]
    assert len(first["losses"]) == first["steps"] == 5
    assert not any((tmp_path / "runs").iterdir())

    assert methods("run", *asked, "--set", *SMALL) == ""
    changed = methods("check", *asked, "--set", *SMALL, "targets.top_k=2", code=1).splitlines()
    told = [line for line in changed if "phases" not in line]
    assert [line.split(", its first loss")[0] for line in told] == [
        "kd: its config",
        "atkd: its config",
        "akd-soft: its config",
    ]

    page = publishing.page(publishing.read_records(tmp_path))
    assert "| (g) ATKD, uniform \u2212 (b) forward KL, uniform |" in page


@pytest.mark.benchmark
def test_cells_of_experts_train_a_mixture(tiny_root, tmp_path):
    asked = ["--to", tmp_path, "--root", tiny_root, "--seeds", 0, "--set", *SMALL]
    printed = methods("run", *asked, "--cells", "kd", "sparse-1", "sparse-alone")
    assert "upcycled to 4 experts in one layer in 2, 1 a token" in printed
    assert "upcycled to 4 experts in one layer in 2, 2 a token" in printed
    records = {r["cell"]: r for r in publishing.read_records(tmp_path)}
    dense, *mixtures = (records[name] for name in ("kd", "sparse-1", "sparse-alone"))
    for name, domain in dense["domains"].items():
        for mixture in mixtures:
            found = mixture["domains"][name]
            assert found["nll_before"] == pytest.approx(domain["nll_before"], abs=1e-5)
            assert found["nll_after"] != domain["nll_after"]


@pytest.mark.benchmark
def test_a_cell_of_the_students_own_text_is_measured_by_what_it_writes(tiny_root, tmp_path):
    for name in ("sql", "math"):
        for part in ("train", "valid"):
            lines = [
                json.dumps({"prompt": f"{name} {n} one two", "response": "one two"})
                for n in range(30)
            ]
            (tiny_root / "data" / name / f"pairs.{part}.jsonl").write_text("\n".join(lines))
    small = ["steps=3", "data.validation_rows=2", "student.model=models/student-base-1m"]
    small.append("evaluation.far_student=say")  # a pair of random weights
    place = ["--to", tmp_path, "--root", tiny_root]
    methods("run", *place, "--cells", "own-gkd-50", "--seeds", 0, "--set", *small)
    (found,) = publishing.read_records(tmp_path)
    for model in ("student", "before", "teacher"):
        for domain in found["written"][model].values():
            assert domain["tokens"] <= 16
            assert all(0 <= domain[name] <= 1 for name in domain.keys() - {"tokens"})
            assert domain["pass_8"] >= domain["pass_1"]


def test_distinct_pairs_of_known_texts():
    assert distinct_2([[1, 2, 1, 2], [5]]) == pytest.approx(2 / 3)
    assert distinct_2([[1], []]) == 0


def test_the_documents_show_the_published_records():
    records = publishing.published()
    document = publishing.DOCUMENT.read_text()
    assert publishing.with_sections(document, records) == document
    assert publishing.PAGE.read_text() == publishing.page(records)
    assert publishing.PLOT.read_text() == publishing.recovered_plot(publishing.apart(records)[1])
