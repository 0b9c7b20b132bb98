"""Validation on any number of ranks: sums over all rows, divided once, as transformers has them."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore, write_rows
from shared.mixture.weight_log import read_log
from tests import tiny
from tests.cluster.planning.test_difficulty import dense
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import (
    DOMAINS,
    mark_exported,
    plan_of,
    prepared_domains,
    ragged_rows,
)

RANKS = (1, 2)
MODELS = ("student", "teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of DDK on one rank and on two, of which one has an empty unit of validation."""
    folder = tmp_path_factory.mktemp("evaluate")
    pair = tiny.save_pair(folder / "pair")
    domains = validated(folder)
    for ranks in RANKS:
        plan = plan_of(
            folder / f"ranks-{ranks}",
            pair,
            domains,
            steps=1,
            student={"workers": ranks},
            mixture={"policy": "ddk", "interval": 1, "lag_steps": 0, "start": "ddk"},
        )
        mark_exported(plan)
        run_jobs([as_job("controlled", plan)], folder / f"jobs-{ranks}", ranks=ranks)
    return folder


def validated(folder: Path) -> tuple[PreparedDomain, ...]:
    """Five validation rows in one domain and three in the other: five units of at most two."""
    domains = prepared_domains(folder)
    few = ragged_rows(101, count=3)
    write_rows(Path(domains[1].validation_path), domain=DOMAINS[1], rows=few)
    return domains


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    """Nats per token of each domain's validation text under each model, float64."""
    paths = [str(folder / f"{name}.validation.arrow") for name in DOMAINS]
    counts = [RowStore.open(path).loss_tokens() for path in paths]
    assert len({int(tokens_R.sum()) for tokens_R in counts}) == len(DOMAINS)
    return {
        model: np.array(
            [
                dense(folder / "pair" / model, path)["nll"] @ tokens_R / tokens_R.sum()
                for path, tokens_R in zip(paths, counts, strict=True)
            ]
        )
        for model in MODELS
    }


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_means_over_all_tokens_of_all_ranks(folder, expected, ranks, model) -> None:
    before = json.loads((folder / f"ranks-{ranks}" / "evaluations.json").read_text())["before"]
    found = [before[name][f"{model}_nll"] for name in DOMAINS]
    np.testing.assert_allclose(found, expected[model], atol=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
def test_ddk_compares_the_perplexities_of_all_ranks_tokens(folder, expected, ranks) -> None:
    (entry,) = read_log(folder / f"ranks-{ranks}" / "weight_log.jsonl", DOMAINS).entries
    ratio_D = np.exp(expected["student"] - expected["teacher"])
    np.testing.assert_allclose(entry.factors, np.exp(ratio_D) / np.exp(ratio_D).sum(), rtol=1e-4)
    assert np.ptp(entry.factors) > 1e-3
