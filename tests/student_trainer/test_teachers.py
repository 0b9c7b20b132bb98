"""Several teachers in one micro-batch: each row is learnt from the teacher of its domain alone.

N positions with loss   P those of one teacher
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.data.rows import Rows
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan, open_routing
from shared.targets.routing import MixedTargets, label_logprobs
from student_trainer.models.teacher_head import load_teacher_heads
from student_trainer.objective import Objective
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.weighing.weighed import weighed_batches, weighers_of
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import LocalTeacher, as_job
from tests.student_trainer.runs import (
    DOMAINS,
    mark_exported,
    plan_of_two,
    prepared_domains,
)
from tests.student_trainer.test_objective import unit

CPU = torch.device("cpu")
TEACHERS = {"wide": 48, "narrow": 40}  # by width; each teaches one domain
KINDS = {
    "ids and the tail": {"targets": {"top_k": 16}},
    "every id": {"targets": {"top_k": tiny.VOCAB}},
    "drawn ids": {"targets": {"selector": "threshold", "top_k": 16}},
    "renormalised": {"targets": {"selector": "renormalised"}},
    "token-adaptive": {"losses": [{"kind": "atkd"}, {"kind": "cross_entropy"}]},
    "token-adaptive in reverse": {"losses": [{"kind": "atkd", "direction": "reverse"}]},
    "token temperatures": {"losses": [{"kind": "token_temperature"}]},
    "last states": {"losses": [{"kind": "forward_kl"}, {"kind": "reverse_kl", "temperature": 2}]},
}
OF_THE_STEP = ("hard_N", "class_weight_N", "level_N", "level_weight_N")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both teachers, of different widths."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, (name, width) in enumerate(TEACHERS.items()):
        tiny.save_model(folder / name, width=width, layers=2, seed=10 + seed)
    return {name: folder / name for name in TEACHERS}


@pytest.fixture
def plan(request, tmp_path: Path, tiny_pair: tiny.Pair, folders: dict[str, Path]) -> RunPlan:
    """A run of both teachers, one domain each."""
    cache = tmp_path / "cache" if request.param == "last states" else None
    domains, options = prepared_domains(tmp_path), KINDS[request.param]
    return plan_of_two(tmp_path / "run", tiny_pair, domains, folders, cache=cache, **options)


def batch_of(plan: RunPlan, rows: Rows, targets, objective: Objective) -> Batch:
    """The tensors of a unit, with the weights of its positions where a loss has some."""
    (batch,) = weighed_batches(
        [(rows, targets)],
        Layouts(DOMAINS, True, CPU),
        weighers_of(plan.config.losses),
        engine=objective,
        gather=lambda own: [own],
    )
    return batch


def learnt(objective: Objective, batch: Batch) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, sums and gradient of a batch."""
    objective.zero_grad(set_to_none=True)
    loss, sums, _ = objective(batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return loss.item(), sums, torch.cat(gradients)


@pytest.mark.parametrize("plan", KINDS, indirect=True, ids=str)
def test_a_mixed_micro_batch_is_the_sum_of_one_for_each_teacher(plan, folders) -> None:
    """The same objective on each teacher's rows alone, in whose batch no other teacher is."""
    readers = {
        name: lambda rank, folder=folder: LocalTeacher(HFEngine.load(str(folder)))
        for name, folder in folders.items()
    }
    rows, reader = unit(0, count=6), open_routing(0, plan=plan, readers=readers)
    assert plan.training_question is not None
    reader.submit(rows, plan.training_question)
    answer = reader.next()
    heads = load_teacher_heads(plan, CPU)
    student = CAUSAL_LM.load(plan.config, device=CPU)
    both = Objective(student, plan.config, teacher_width=None, teacher_heads=heads)
    mixed = batch_of(plan, rows, answer, both)
    found = learnt(both, mixed)

    assert isinstance(answer, MixedTargets)
    assert [part.teacher for part in answer.parts] == list(TEACHERS)
    expected = []
    for part in answer.parts:
        config = plan.config
        own = rows.where([config.teacher_of(domain) == part.teacher for domain in rows.domains()])
        part.targets.check(own, plan.parts[part.teacher].training_question)
        head = {n: h for n, h in heads.items() if n == part.teacher}
        alone = Objective(student, config, teacher_width=None, teacher_heads=head)
        batch = Layouts(DOMAINS, True, CPU).batch(own, part.targets)
        split = {n: mixed[n][part.index_P] for n in OF_THE_STEP if n in mixed}
        expected.append(learnt(alone, batch | split))
    for value, ones in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(value, sum(ones[1:], ones[0]), rtol=1e-4, atol=1e-5)
    assert not np.allclose(*(ones[2] for ones in expected), atol=1e-3)


@pytest.mark.parametrize("plan", ["every id"], indirect=True)
def test_validation_compares_each_domain_with_its_teacher(plan, folders) -> None:
    """KL to the other teacher is another number."""
    engines = {name: HFEngine.load(str(folder)) for name, folder in folders.items()}
    readers = {name: lambda rank, e=engine: LocalTeacher(e) for name, engine in engines.items()}
    rows, reader = unit(0, count=6), open_routing(0, plan=plan, readers=readers)
    assert plan.validation_question is not None
    reader.submit(rows, plan.validation_question)
    answer = reader.next()
    student = CAUSAL_LM.load(plan.config, device=CPU)
    objective = Objective(student, plan.config, teacher_width=None)
    layouts = Layouts(DOMAINS, True, CPU)
    (mixed_2G,) = objective(layouts.batch(rows, answer), mode="evaluate")
    whole = [engine.score(rows, plan.validation_question) for engine in engines.values()]
    first_2G, second_2G = (objective(layouts.batch(rows, w), mode="evaluate")[0] for w in whole)
    expected_2G = torch.stack([first_2G[:, 0], second_2G[:, 1]], dim=1)
    torch.testing.assert_close(mixed_2G, expected_2G, rtol=1e-5, atol=1e-4)
    assert abs(first_2G[1, 1] - second_2G[1, 1]) > 1
    of_rows_N = np.repeat([d == DOMAINS[0] for d in rows.domains()], rows.num_loss_tokens())
    pairs = [w.arrays().label_logprob_N for w in whole]
    np.testing.assert_allclose(label_logprobs(answer), np.where(of_rows_N, *pairs), atol=1e-5)


@pytest.mark.parametrize("plan", ["ids and the tail"], indirect=True)
def test_ranks_with_other_teachers_in_their_micro_batches_learn_the_same_under_zero(
    plan, tmp_path: Path
) -> None:
    """Micro-batches of two rows, so that some have one teacher and some have both."""
    plans = []
    for zero in (0, 3):
        student = plan.config.student.model_copy(update={"zero": zero})
        config = plan.config.model_copy(update={"student": student, "name": f"zero-{zero}"})
        folder = tmp_path / config.name
        folder.mkdir()
        plans.append(replace(plan, config=config, run_dir=str(folder)))
        mark_exported(plans[-1])
    results = run_jobs([as_job("train", one) for one in plans], tmp_path / "torchrun")
    assert [result["error"] for result in results] == [None, None]
    lines = [read_metrics(Path(one.run_dir) / "metrics.jsonl") for one in plans]
    for plain, sharded in zip(*lines, strict=True):
        assert sharded.loss == pytest.approx(plain.loss, rel=1e-5)
        assert sharded.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
        assert set(plain.teachers) == set(TEACHERS)
        assert min(one.units for one in plain.teachers.values()) > 0
        for domain, measured in plain.domains.items():
            assert sharded.domains[domain].kl == pytest.approx(measured.kl, rel=1e-5)


def test_rows_keep_their_draw_and_their_own_ids_on_the_way_to_their_teacher() -> None:
    rows = unit(0, count=4)
    ids_NM = np.arange(2 * rows.num_loss_tokens().sum()).reshape(-1, 2)
    asked = rows.with_draws(np.arange(4)).with_student_ids(ids_NM)
    part = asked.where([False, True, False, True])
    assert part.names() == [rows.names()[1], rows.names()[3]]
    assert part.draws().tolist() == [1, 3]
    is_own_N = np.repeat([False, True, False, True], rows.num_loss_tokens())
    np.testing.assert_array_equal(part.student_ids(), ids_NM[is_own_N])
    assert part.hashes() == [asked.hashes()[1], asked.hashes()[3]]
