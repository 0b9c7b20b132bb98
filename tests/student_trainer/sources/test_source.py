"""A source of tokens is plugged in beside the data set and trains through the same loop."""

import json
from pathlib import Path

import pytest

from shared.data.row_store import RowStore
from shared.run.metrics import read_metrics
from student_trainer.state.checkpoint import latest_checkpoint, read_state
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, plan_of, prepared_domains

RANKS, STEPS, ROWS = 2, 4, 8
SOURCES = ("DataSet", "Uncounted", "Alternating")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on each source, under weights that move."""
    folder = tmp_path_factory.mktemp("sources")
    domains, pair, jobs = prepared_domains(folder), tiny.save_pair(folder / "pair"), []
    for source in SOURCES:
        plan = plan_of(
            folder / source,
            pair,
            domains,
            steps=STEPS,
            log_every=1,
            mixture={"policy": "odm", "interval": 2, "lag_steps": 1},
        )
        mark_exported(plan)
        jobs.append(as_job("sourced", plan, source=source))
    run_jobs(jobs, folder / "jobs", ranks=RANKS)
    return folder


def test_rows_counted_by_all_ranks_together_train_the_same_bits(runs: Path) -> None:
    known, added_up = runs / "DataSet", runs / "Uncounted"
    assert same_weights(known, added_up)
    assert comparable_lines(known) == comparable_lines(added_up)
    assert (known / "weight_log.jsonl").read_text() == (added_up / "weight_log.jsonl").read_text()


def test_every_tokens_of_every_rank_is_counted_once(runs: Path) -> None:
    stores = [RowStore.open(runs / f"{name}.train.arrow") for name in DOMAINS]
    per_rank = ROWS // RANKS
    for step, line in enumerate(read_metrics(runs / "Alternating" / "metrics.jsonl")):
        for rank in range(RANKS):
            domain = (step + rank) % len(DOMAINS)
            rows = stores[domain].take(range(step * per_rank, (step + 1) * per_rank))
            counted = line.domains[DOMAINS[domain]]
            assert counted.tokens == rows.num_loss_tokens().sum()
            assert (counted.sequences, counted.epochs) == (per_rank, step + 1)
        assert line.tokens == sum(domain.tokens for domain in line.domains.values())
        assert line.units == ROWS // 2


def test_another_source_teaches_and_names_what_a_resume_needs(runs: Path) -> None:
    found = json.loads((runs / "Alternating" / "evaluations.json").read_text())
    for domain in DOMAINS:
        assert found["after"][domain]["kl"] < found["before"][domain]["kl"]
    checkpoint = latest_checkpoint(runs / "Alternating" / "checkpoints")
    assert checkpoint is not None
    facts = read_state(checkpoint)["facts"]
    assert facts["the source"] == "alternating"
    assert not any(name.startswith("the text of") for name in facts)
