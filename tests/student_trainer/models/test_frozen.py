"""Adapters and projections train, the base does not, and a hash of every bit proves it."""

import pytest
from transformers import AutoModelForCausalLM

from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains
from tests.telling import asked, telling

KINDS = ("lora", "qlora")
STAGES = (0, 2, 3)
HIDDEN = {"kind": "hidden_states", "weight": 0.5, "layers": {1: 1}}
# Under ZeRO-3 the embedding is cut into shards, the norm stays whole.
UNFROZEN = ("embed_tokens.weight", "model.norm.weight")
TOUCHED = {"lora": "embed_tokens.weight", "qlora": "down_proj.base_layer.weight"}
each = pytest.mark.parametrize("zero", telling(STAGES, 3))
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, tiny_pair) -> dict[str, dict]:
    """What every job found, by its name."""
    folder, jobs = tmp_path_factory.mktemp("frozen"), {}
    domains = prepared_domains(folder)

    def add(job_name: str, kind: str, zero: int, job: str, **arguments: str) -> None:
        plan = plan_of(
            folder / job_name,
            tiny_pair,
            domains,
            steps=2,
            student={"train": {"kind": kind, "r": 4}, "zero": zero},
            losses=[{"kind": "forward_kl"}, HIDDEN],
        )
        mark_exported(plan)
        jobs[job_name] = as_job(job, plan, **arguments)

    for kind in KINDS:
        for zero in asked(request, "zero"):
            add(f"{kind}-{zero}", kind, zero, "frozen")
            add(f"{kind}-{zero}-touched", kind, zero, "touched", name=TOUCHED[kind])
    for zero in asked(request, "zero"):
        for number, name in enumerate(UNFROZEN):
            add(f"unfrozen-{zero}-{number}", KINDS[number], zero, "unfrozen", name=name)
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder / "jobs"), strict=True))


@every_kind
@each
def test_adapters_and_projections_train_and_no_bit_of_the_base(results, kind, zero) -> None:
    found = results[f"{kind}-{zero}"]
    assert found["same"] == {"base": True, "adapters": False, "projections": False}
    assert found["facts"][0] == found["facts"][1] == found["again"]


@every_kind
@each
def test_weights_are_counted_whole(results, kind, zero, tiny_pair) -> None:
    facts = results[f"{kind}-{zero}"]["facts"][0]
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    assert facts["num_frozen"] == base.num_parameters()
    adapted = [m for n, m in base.named_modules() if n.endswith("_proj")]
    in_and_out = sum(m.in_features + m.out_features for m in adapted)
    assert facts["num_trained"] == 4 * in_and_out + 32 * 48  # r = 4, and one projection


@every_kind
@each
def test_a_bit_that_flips_on_one_rank_stops_the_export_on_all(results, kind, zero) -> None:
    said = results[f"{kind}-{zero}-touched"]
    assert said.keys() == {"weight", "scale"} if kind == "qlora" else {"weight"}
    for error, sentence in said.values():
        assert error == "FrozenWeightsError"
        assert TOUCHED[kind] in sentence


@each
@pytest.mark.parametrize("number", range(len(UNFROZEN)))
def test_a_base_weight_that_trains_by_mistake_is_caught(results, zero, number) -> None:
    found = results[f"unfrozen-{zero}-{number}"]
    assert found["error"] == "FrozenWeightsError"
    assert UNFROZEN[number] in found["message"]
    assert "1 frozen weights" in found["message"]
