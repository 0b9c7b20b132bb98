"""Several teachers in one micro-batch: each row is learnt from the teacher of its domain alone.

They differ in width and, as models of one family do, in how many rows their vocabularies have.

N positions with loss   P those of one teacher
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.config.source import TokenSources
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
    plan_of,
    plan_of_two,
    prepared_domains,
)
from tests.student_trainer.test_objective import unit

CPU = torch.device("cpu")
TEACHERS = {"wide": 48, "narrow": 40}  # by width; each teaches one domain
ROWS = {"student": tiny.VOCAB + 32, "wide": tiny.VOCAB + 64, "narrow": tiny.VOCAB}
VOCABS = {name: min(ROWS[name], ROWS["student"]) for name in TEACHERS}  # ids that are shared
KINDS = {
    "ids and the tail": {"targets": {"top_k": 16}},
    "every id": {"targets": {"top_k": tiny.VOCAB}},  # of the teacher with the fewest
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
    """Both teachers, and a student with rows that one of them lacks."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, (name, width) in enumerate({**TEACHERS, "student": 32}.items()):
        tiny.save_model(folder / name, width=width, layers=2, seed=10 + seed)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        torch.manual_seed(seed)
        model.resize_token_embeddings(ROWS[name])
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ROWS}


@pytest.fixture(scope="module")
def teachers(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: folders[name] for name in TEACHERS}


@pytest.fixture
def plan(request, tmp_path: Path, folders: dict[str, Path], teachers: dict[str, Path]) -> RunPlan:
    """A run of both teachers, one domain each."""
    cache = tmp_path / "cache" if request.param == "last states" else None
    domains, options = prepared_domains(tmp_path), KINDS[request.param]
    pair = tiny.Pair(folders["wide"], folders["student"])
    return plan_of_two(
        tmp_path / "run", pair, domains, teachers, cache=cache, vocabs=VOCABS, **options
    )


def batch_of(plan: RunPlan, rows: Rows, targets, objective: Objective) -> Batch:
    """The tensors of a unit, with the weights of its positions where a loss has some."""
    (batch,) = weighed_batches(
        [(rows, targets)],
        Layouts(DOMAINS, True, CPU, CAUSAL_LM),
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


def answered(plan, readers):
    """Rows of all domains, and what a plan's teachers answer about them."""
    rows, reader = unit(0, count=6), open_routing(0, plan=plan, readers=readers)
    assert plan.training_question is not None
    reader.submit(rows, plan.training_question)
    return rows, reader.next()


@pytest.mark.parametrize("plan", KINDS, indirect=True, ids=str)
def test_a_mixed_micro_batch_is_the_sum_of_one_for_each_teacher(plan, teachers) -> None:
    """The same objective on each teacher's rows alone, in whose batch no other teacher is."""
    readers = {
        name: lambda rank, folder=folder: LocalTeacher(HFEngine.load(str(folder)))
        for name, folder in teachers.items()
    }
    rows, answer = answered(plan, readers)
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
        head = load_teacher_heads(plan.parts[part.teacher], CPU)
        alone = Objective(student, config, teacher_width=None, teacher_heads=head)
        batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(own, part.targets)
        split = {n: mixed[n][part.index_P] for n in OF_THE_STEP if n in mixed}
        expected.append(learnt(alone, batch | split))
    for value, ones in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(value, sum(ones[1:], ones[0]), rtol=1e-4, atol=1e-5)
    assert not np.allclose(*(ones[2] for ones in expected), atol=1e-3)


@pytest.mark.parametrize("plan", ["every id"], indirect=True)
def test_validation_compares_each_domain_with_its_teacher(plan, teachers) -> None:
    """KL to the other teacher is another number."""
    engines = {name: HFEngine.load(str(folder)) for name, folder in teachers.items()}
    readers = {name: lambda rank, e=engine: LocalTeacher(e) for name, engine in engines.items()}
    rows, reader = unit(0, count=6), open_routing(0, plan=plan, readers=readers)
    assert plan.validation_question is not None
    reader.submit(rows, plan.validation_question)
    answer = reader.next()
    student = CAUSAL_LM.load(plan.config, device=CPU)
    objective = Objective(student, plan.config, teacher_width=None)
    layouts = Layouts(DOMAINS, True, CPU, CAUSAL_LM)
    (mixed_2G,) = objective(layouts.batch(rows, answer), mode="evaluate")
    own = [plan.parts[name].validation_question for name in engines]
    assert [question.ask.shared_vocab for question in filter(None, own)] == [*VOCABS.values()]
    whole = [e.score(rows, q) for e, q in zip(engines.values(), own, strict=True) if q]
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


def averaging(plan: RunPlan) -> RunPlan:
    """The same with one domain learnt from the average of both teachers."""
    domains = dict(plan.config.domains)
    averaged = {"wide": 3.5, "narrow": 1.5}
    domains["code"] = domains["code"].model_copy(update={"teacher": averaged})
    return replace(plan, config=plan.config.model_copy(update={"domains": domains}))


@pytest.mark.parametrize("plan", ["last states"], indirect=True)
def test_teachers_are_averaged_per_position_with_weights(plan, folders, teachers) -> None:
    """One domain learns .7 of one teacher and .3 of the other, the other domain one alone."""
    plan = averaging(plan)
    assert plan.config.teachers_of("code") == {"wide": 0.7, "narrow": 0.3}
    engines = {name: HFEngine.load(str(folder)) for name, folder in teachers.items()}
    readers = {name: lambda rank, e=engine: LocalTeacher(e) for name, engine in engines.items()}
    rows, answer = answered(plan, readers)
    heads = load_teacher_heads(plan, CPU)
    student = CAUSAL_LM.load(plan.config, device=CPU)
    objective = Objective(student, plan.config, teacher_width=None, teacher_heads=heads)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(rows, answer)
    (found_2G,) = objective(batch, mode="evaluate")
    p_NV = {name: bucketed(dense_logprobs(folder, batch)) for name, folder in folders.items()}
    mixed_NV = 0.7 * p_NV["wide"] + 0.3 * p_NV["narrow"]
    of_code_N1 = (batch["domain_N"] == DOMAINS.index("code"))[:, None]
    taught_NV = torch.where(of_code_N1, mixed_NV, p_NV["narrow"])
    kl_N = (torch.xlogy(taught_NV, taught_NV) - torch.xlogy(taught_NV, p_NV["student"])).sum(-1)
    expected_G = torch.zeros(2, dtype=torch.float64).index_add_(0, batch["domain_N"], kl_N)
    torch.testing.assert_close(found_2G[1], expected_G, rtol=1e-5, atol=1e-4)
    label_N = taught_NV.gather(1, batch["label_N"][:, None])[:, 0].log().numpy()
    np.testing.assert_allclose(label_logprobs(answer), label_N, atol=1e-4)


def bucketed(log_NV: torch.Tensor) -> torch.Tensor:
    """Probabilities of the ids that all share and, last, of all others together."""
    shared = min(VOCABS.values())
    return torch.cat([log_NV[:, :shared].exp(), log_NV[:, shared:].exp().sum(-1, True)], dim=-1)


def dense_logprobs(folder: Path | str, batch: Batch) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids_BT, positions_BT = batch["input_ids_BT"], batch["position_ids_BT"]
    with torch.no_grad():
        output = model(ids_BT, position_ids=positions_BT, use_cache=False)
    return output.logits.flatten(0, 1)[batch["loss_index_N"]].log_softmax(-1)


@pytest.mark.parametrize("plan", ["last states"], indirect=True)
def test_averaged_teachers_and_several_by_domain_teach_what_the_student_writes(
    plan, tmp_path: Path
) -> None:
    source = TokenSources.model_validate({"student": 0.5, "dataset": 0.5, "max_new_tokens": 6})
    plans = []
    for name, base in {"by-domain": plan, "averaged": averaging(plan)}.items():
        config = base.config.model_copy(update={"source": source, "name": name, "steps": 2})
        (tmp_path / name).mkdir()
        ends = tuple(range(3, 80))
        plans.append(replace(base, config=config, run_dir=str(tmp_path / name), ends=ends))
        mark_exported(plans[-1])
    results = run_jobs([as_job("train", one) for one in plans], tmp_path / "torchrun")
    assert [result["error"] for result in results] == [None, None]
    last = [read_metrics(Path(one.run_dir) / "metrics.jsonl")[-1] for one in plans]
    for line in last:
        assert line.rollouts is not None
        assert line.rollouts.tokens > 0
        assert set(line.teachers) == set(TEACHERS)
        assert all(one.kl is not None for one in line.teachers.values())
    averaged, by_domain = last[1], last[0]
    assert averaged.teachers["narrow"].tokens == averaged.tokens
    assert by_domain.teachers["narrow"].tokens < by_domain.tokens
    assert averaged.domains["code"].kl != pytest.approx(by_domain.domains["code"].kl, abs=1e-3)


def test_a_student_whose_teacher_is_its_own_model_begins_at_it_whatever_its_adapters_are(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    """With its adapters off it is that teacher still, once they have moved."""
    itself = tiny.Pair(tiny_pair.teacher, tiny_pair.teacher)
    lora = {"train": {"kind": "lora", "r": 4, "alpha": 8}}
    plan = plan_of(tmp_path / "run", itself, prepared_domains(tmp_path), student=lora)
    assert plan.validation_question is not None
    student = CAUSAL_LM.load(plan.config, device=CPU)
    objective = Objective(student, plan.config, teacher_width=None)
    rows = unit(0, count=4)
    answer = HFEngine.load(str(itself.teacher)).score(rows, plan.validation_question)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(rows, answer)
    assert objective(batch, mode="evaluate")[0][1].abs().max() < 1e-4
    with torch.no_grad():
        for name, weight in student.saved.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3)
    assert objective(batch, mode="evaluate")[0][1].min() > 1
    with student.saved.disable_adapter():
        assert objective(batch, mode="evaluate")[0][1].abs().max() < 1e-4


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
