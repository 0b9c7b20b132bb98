"""What `metrics.jsonl` says of ATKD by domain, against transformers in float64.

N positions with loss   V vocabulary
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.data.layout import lay_out
from shared.data.row_store import RowStore
from shared.run.metrics import StepMetrics, read_metrics
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, plan_of, prepared_domains

ROWS = 24  # of each domain
EASY_WEIGHT = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of two ranks over every row of both domains once."""
    folder = tmp_path_factory.mktemp("diagnostics")
    domains = prepared_domains(folder)
    plan = plan_of(
        folder / "run",
        tiny.save_pair(folder / "pair"),
        domains,
        steps=1,
        log_every=1,
        batch={"rows_per_step": 2 * ROWS, "micro_batch": 4},
        losses=[{"kind": "atkd", "easy_weight": EASY_WEIGHT}],
        targets={"top_k": tiny.VOCAB},
        mixture={
            "policy": "fixed",
            "weights": {domain.name: domain.num_loss_tokens for domain in domains},
        },
    )
    mark_exported(plan)
    run_jobs([as_job("train", plan)], folder / "jobs")
    return folder


@pytest.fixture(scope="module")
def line(folder: Path) -> StepMetrics:
    (line,) = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line.domains[name].sequences for name in DOMAINS] == [ROWS, ROWS]
    return line


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """UNC, TKD and DKD of every token [N] by domain, over the whole vocabulary."""
    return {name: _tokens(folder, name) for name in DOMAINS}


def _tokens(folder: Path, domain: str) -> dict[str, np.ndarray]:
    store = RowStore.open(folder / f"{domain}.train.arrow")
    layout = lay_out(store.take(range(len(store))), packed=False)
    log_p_NV, log_q_NV = (
        _log_probabilities(folder / "pair" / model, layout) for model in ("teacher", "student")
    )
    place_N = (np.arange(len(layout.label_N)), layout.label_N)
    p_N, q_N = np.exp(log_p_NV[place_N]), np.exp(log_q_NV[place_N])
    tkd_N = p_N * np.log(p_N / q_N) + (1 - p_N) * np.log((1 - p_N) / (1 - q_N))
    kl_N = (np.exp(log_p_NV) * (log_p_NV - log_q_NV)).sum(1)
    return {"uncertainty": 1 - p_N, "tkd": tkd_N, "dkd": (kl_N - tkd_N) / (1 - p_N)}


def _log_probabilities(model: Path, layout: Any) -> np.ndarray:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = loaded(torch.from_numpy(layout.input_ids_BT), use_cache=False).logits
    logits_NV = logits.flatten(0, 1)[torch.from_numpy(layout.loss_index_N)]
    return logits_NV.log_softmax(1).numpy()


@pytest.mark.parametrize("quantity", ["uncertainty", "tkd", "dkd"])
def test_means_by_domain_are_those_of_transformers(line, tokens, quantity) -> None:
    for name in DOMAINS:
        expected = tokens[name][quantity].mean()
        assert getattr(line.domains[name], quantity) == pytest.approx(expected, rel=1e-3)


def test_hard_are_the_tokens_of_both_domains_and_ranks_with_the_larger_uncertainty(
    line, tokens
) -> None:
    """A token beside the median may change sides by rounding."""
    median = np.median(np.concatenate([tokens[name]["uncertainty"] for name in DOMAINS]))
    shares = [float((tokens[name]["uncertainty"] >= median).mean()) for name in DOMAINS]
    for name, share in zip(DOMAINS, shares, strict=True):
        count = line.domains[name].tokens
        assert line.domains[name].hard_share == pytest.approx(share, abs=2 / count)


def test_the_loss_is_that_of_the_paper(line, tokens) -> None:
    every = {q: np.concatenate([tokens[n][q] for n in DOMAINS]) for q in tokens[DOMAINS[0]]}
    hard_N = every["uncertainty"] >= np.median(every["uncertainty"])
    hard = (every["tkd"] + every["dkd"])[hard_N].mean()
    expected = EASY_WEIGHT * every["dkd"][~hard_N].mean() + (1 - EASY_WEIGHT) * hard
    assert line.loss == pytest.approx(expected, rel=1e-2)
