"""What a task owns is what the loop uses: labels, the model's kind, agreement, evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import HandshakeError
from shared.run.metrics import read_metrics
from shared.text.tokenizers import SPECIALS, TokenizerIdentity
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.task import Side, Task
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, plan_of, prepared_domains
from tests.student_trainer.tasks.own import Echo
from tests.student_trainer.test_objective import unit

CPU = torch.device("cpu")


def identity(*tokens: str) -> TokenizerIdentity:
    """A tokenizer of these tokens, without special ones or a chat template."""
    return TokenizerIdentity(tokens, "same", dict.fromkeys(SPECIALS), None)


def test_a_label_is_the_next_token_or_what_another_task_says() -> None:
    rows = unit(0, count=4)
    ids, masks = rows.column("input_ids"), rows.column("loss_mask")
    for task, later in ((CAUSAL_LM, 1), (Echo(), 0)):
        batch = Layouts(DOMAINS, True, CPU, task).batch(rows)
        pairs = zip(ids, masks, strict=True)
        expected = [row[np.flatnonzero(mask) + later] for row, mask in pairs]
        assert batch["label_N"].tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize(
    ("task", "peft_task"), [(CAUSAL_LM, "CAUSAL_LM"), (Echo(), "FEATURE_EXTRACTION")]
)
def test_an_adapter_names_its_task(
    tiny_pair: tiny.Pair, tmp_path: Path, task: Task, peft_task: str
) -> None:
    student = {"train": {"kind": "lora", "r": 2}, "workers": 1}
    plan = plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path), student=student)
    saved: Any = task.load(plan.config, device=CPU).saved
    assert saved.peft_config["default"].task_type == peft_task


def test_models_agree_on_the_ids_that_both_hold_and_on_no_other_tokens() -> None:
    tokens = identity("a", "b", "c")
    teacher, student = Side("t", tokens, 64), Side("s", tokens, 2)
    assert CAUSAL_LM.agree(teacher, student, chat_rows=False) == 2
    assert CAUSAL_LM.agree(teacher, Side("s", tokens, 64), chat_rows=False) == 3
    with pytest.raises(HandshakeError, match=r"t \(teacher\) and s \(student\)"):
        CAUSAL_LM.agree(teacher, Side("s", identity("a", "x", "c"), 64), chat_rows=False)


def test_another_task_trains_and_measures_through_the_same_loop(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    domains, jobs = prepared_domains(tmp_path), []
    for task in ("CausalLM", "Echo"):
        plan = plan_of(
            tmp_path / task,
            tiny_pair,
            domains,
            steps=12,
            log_every=1,
            student={"workers": 1, "zero": 0},
            losses=[{"kind": "cross_entropy"}],
        )
        mark_exported(plan)
        jobs.append(as_job("tasked", plan, task=task))
    run_jobs(jobs, tmp_path / "jobs", ranks=1)
    losses = {}
    for task in ("CausalLM", "Echo"):
        losses[task] = [line.loss for line in read_metrics(tmp_path / task / "metrics.jsonl")]
        found = json.loads((tmp_path / task / "evaluations.json").read_text())["after"]["code"]
        assert (found["student_nll"] == found["tokens"] == 5) == (task == "Echo")
    assert losses["Echo"][-1] < losses["CausalLM"][-1] - 0.1  # random text, said again or foretold
