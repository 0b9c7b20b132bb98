"""Validation on any number of ranks: sums over all rows, divided once, as transformers has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore, write_rows
from shared.mixture.weight_log import read_log
from shared.run.document_sums import NUM_BINS, DocumentSums
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


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple, dict[str, np.ndarray]]:
    """By domain, row and document what a plain loop over documents finds in float64."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / "pair" / name, dtype=torch.float64)
        for name in MODELS
    }
    found: dict[tuple, dict[str, np.ndarray]] = {}
    for domain in DOMAINS:
        store = RowStore.open(folder / f"{domain}.validation.arrow")
        rows = store.take(range(len(store)))
        columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        for row, (ids, starts, mask) in enumerate(zip(*columns, strict=True)):
            parts = zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True)
            for number, (own, own_mask) in enumerate(parts):
                if own_mask.any():
                    found[domain, row, number] = measured(models, own, own_mask)
    return found


def measured(models: dict, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over one document, and gaps of its bins, from whole logits."""
    index, values = torch.from_numpy(np.flatnonzero(mask)), {}
    label_N = torch.from_numpy(ids.astype(np.int64))[index + 1]
    log_p = {}
    for name, model in models.items():
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        log_p[name] = logits[index].log_softmax(-1)
        values[f"{name}_nll"] = -log_p[name].gather(1, label_N[:, None]).sum().numpy()
        highest_N, id_N = log_p[name].exp().max(-1)
        gap_B = np.zeros(NUM_BINS)
        for confidence, right in zip(highest_N.tolist(), (id_N == label_N).tolist(), strict=True):
            gap_B[int(np.ceil(confidence * NUM_BINS)) - 1] += right - confidence
        values[f"{name}_gap"] = gap_B
    teacher, student = log_p["teacher"], log_p["student"]
    values["kl"] = (teacher.exp() * (teacher - student)).sum().numpy()
    return values | {"tokens": np.array(len(index))}


@pytest.mark.parametrize("ranks", RANKS)
def test_documents_sum_to_what_a_plain_loop_finds(folder, plain, ranks) -> None:
    found = DocumentSums.read(folder / f"ranks-{ranks}" / "documents" / "before.arrow")
    assert [place[:3] for place in found.places()] == list(plain)
    assert len(plain) > 8  # more than there are rows
    for name in next(iter(plain.values())):
        expected = np.stack([values[name] for values in plain.values()])
        np.testing.assert_allclose(found.column(name), expected, atol=2e-5)
    assert np.abs(found.column("student_gap")).sum() > 1


def test_documents_are_those_of_any_number_of_ranks(folder) -> None:
    one, two = (
        DocumentSums.read(folder / f"ranks-{ranks}" / "documents" / "before.arrow")
        for ranks in RANKS
    )
    assert one.places() == two.places()
    for name in ("student_nll", "teacher_nll", "kl", "student_gap", "teacher_gap"):
        np.testing.assert_allclose(one.column(name), two.column(name), atol=1e-5)


def test_documents_sum_to_the_evaluation(folder) -> None:
    evaluated = json.loads((folder / "ranks-1" / "evaluations.json").read_text())["before"]
    found = DocumentSums.read(folder / "ranks-1" / "documents" / "before.arrow")
    for name in DOMAINS:
        own = found.of(name)
        assert own.column("tokens").sum() == evaluated[name]["tokens"]
        for value in ("student_nll", "teacher_nll", "kl"):
            mean = own.column(value).sum() / own.column("tokens").sum()
            assert mean == pytest.approx(evaluated[name][value], rel=1e-12)
