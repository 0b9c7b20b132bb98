"""A student of image and text whose language model is a mixture of experts.

N tokens   E experts
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeTopKRouter,
    load_balancing_loss_func,
)

from cluster.planning.bases import student_upcycled
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.metrics import read_metrics
from student_trainer.models.upcycling import EXPERTS, ROUTER
from student_trainer.tasks.registry import task_of
from tests import pictured
from tests.student_trainer.comparing import comparable_lines, same_weights, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import rates_of
from tests.student_trainer.processes import as_job
from tests.student_trainer.tasks.test_image_text import (
    OPTIMISER,
    adamw_of,
    bucketed,
    inputs_of,
    load,
    logits_of,
    trained,
)
from tests.telling import telling
from tests.tiny import Pair

STEPS, TOP_K, WEIGHT = 3, 2, 0.3
BALANCE = {"kind": "router_balance", "weight": WEIGHT, "experts_per_token": TOP_K}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pictured.save_pair(tmp_path_factory.mktemp("models"))


def config_of(folder: Path, name: str, *, pair: Pair, student: Any = (), **options: Any) -> Config:
    """The config of a short run of a mixture of experts."""
    upcycle = {"every": 2, "experts": 4, "top_k": TOP_K, "train": "experts"}
    asked = {"upcycle": upcycle, **dict(student)}
    return student_upcycled(pictured.config_of(folder, name, pair=pair, student=asked, **options))


@pytest.mark.parametrize(("every", "kind"), [(1, "mixtral"), (2, "qwen2_moe")])
def test_a_mixture_computes_what_the_dense_model_does(tmp_path, pair, every, kind):
    config = config_of(tmp_path, "run", pair=pair, student={"upcycle": {"every": every}})
    folder, asked = config.student.model, {"output_loading_info": True}
    sparse, found = AutoModelForImageTextToText.from_pretrained(folder, **asked)  # type: ignore[misc]
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert sparse.config.text_config.model_type == kind
    dense = AutoModelForImageTextToText.from_pretrained(pair.student)
    processor = AutoProcessor.from_pretrained(folder)
    for row in rows_of(config):
        made, _ = inputs_of(processor, row)
        with torch.no_grad():
            expected, logits = (one.eval()(**made).logits for one in (dense, sparse))
        assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def rows_of(config: Config) -> list[dict[str, Any]]:
    return pictured.rows_in(config, "validation")


def test_experts_and_routers_of_the_language_model_train_alone(tmp_path, pair):
    config = config_of(tmp_path, "run", pair=pair)
    model = task_of(config).load(config, device=torch.device("cpu")).saved
    for name, weight in model.named_parameters():
        routed = EXPERTS.fullmatch(name) or ROUTER.fullmatch(name)
        assert weight.requires_grad == (routed is not None), name


def plain_steps(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step on all rows, with that of the routers over all of their tokens once,
    and the weights that train after them."""
    rows, model = pictured.rows_in(config, "train"), load(config.student.model)
    model.set_experts_implementation("eager")  # the only one that computes in float64
    for name, weight in model.named_parameters():
        weight.requires_grad_(bool(EXPERTS.fullmatch(name) or ROUTER.fullmatch(name)))
    teacher = load(config.teachers["t"].model)
    processor = AutoProcessor.from_pretrained(config.student.model)
    said: list[torch.Tensor] = []
    (router,) = (m for m in model.modules() if isinstance(m, Qwen2MoeTopKRouter))
    router.register_forward_hook(lambda module, given, output: said.append(output[0]))
    optimiser, rates, losses = adamw_of(model, config), rates_of(config), []
    with torch.no_grad():
        p_NV = torch.cat([logits_of(teacher, processor, row)[0] for row in rows]).log_softmax(-1)
    ids_NK = p_NV.topk(config.targets.top_k).indices
    for rate in rates[: config.steps]:
        said.clear()
        found = [logits_of(model, processor, row) for row in rows]
        q_NV = torch.cat([logits for logits, _ in found]).log_softmax(-1)
        label_N = torch.cat([label for _, label in found])
        p, q = bucketed(p_NV, ids_NK), bucketed(q_NV, ids_NK)
        loss = (p.exp() * (p - q)).sum(-1).mean() + 0.5 * F.nll_loss(q_NV, label_N)
        logits_NE = torch.cat([part.flatten(0, -2) for part in said])
        loss = loss + WEIGHT * load_balancing_loss_func((logits_NE,), logits_NE.shape[1], TOP_K)
        optimiser.zero_grad()
        loss.backward()
        learning = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(learning, config.optimiser.clip_norm or 0)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses, {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_steps_are_those_of_a_plain_loop_with_the_loss_of_the_routers_once(tmp_path, pair):
    options = {
        "steps": STEPS,
        "optimiser": OPTIMISER,
        "batch": {"rows_per_step": 12, "micro_batch": 12},  # all rows at once
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}, BALANCE],
    }
    config = config_of(tmp_path, "run", pair=pair, student={"workers": 1}, **options)
    trained([pictured.plan_of(config)], tmp_path / "jobs", ranks=1)
    expected, weights = plain_steps(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line.loss for line in lines] == pytest.approx(expected, rel=1e-6)
    found = dict(load(tmp_path / "run" / "export").named_parameters())
    for name, weight in weights.items():
        assert (found[name] - weight).abs().max() <= 1e-6, name


@pytest.fixture(scope="module")
def run_under(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Callable[[int], Path]:
    """Gives the folder of a run of two ranks under a stage of ZeRO; beside it lies one that goes on
    from the checkpoint at its middle."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def run(zero: int) -> Path:
        options = {"optimiser": OPTIMISER, "student": {"zero": zero}, "log_every": 3}
        plan = pictured.plan_of(config_of(folder, f"zero{zero}", pair=pair, **options))
        assert [loss.kind for loss in plan.config.losses][-1] == "router_balance"
        run_jobs([as_job("resumed", plan, at=2)], folder / f"jobs{zero}", ranks=2)
        return folder / f"zero{zero}"

    return run


@pytest.mark.parametrize("zero", telling(range(4), 3))
def test_a_killed_run_ends_with_the_same_bits_under_every_stage_of_zero(run_under, zero):
    straight = run_under(zero)
    resumed = straight.with_name(f"{straight.name}-resumed")
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)
    expected, found = (weights_after(run, 4) for run in (run_under(0), straight))
    assert all((found[name] - expected[name]).abs().max() <= 1e-6 for name in expected)
    line = read_metrics(straight / "metrics.jsonl")[0]
    assert line.terms["router_balance"] > 0
    assert line.experts is not None
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in line.experts.shares)


def test_the_routers_loss_of_another_number_of_experts_is_refused(tmp_path, pair):
    losses = [{"kind": "forward_kl"}, BALANCE | {"experts_per_token": 1}]
    config = config_of(tmp_path, "run", pair=pair, losses=losses)
    with pytest.raises(ConfigError, match=r"another loss of its routers than .* over 1 expert"):
        task_of(config).trust(config)


def test_a_dense_student_has_no_routers_to_balance(tmp_path, pair):
    config = pictured.config_of(tmp_path, "run", pair=pair, losses=[BALANCE])
    with pytest.raises(ConfigError, match=r"no loss of the routers of .*; take router_balance"):
        task_of(config).trust(config)


def test_a_language_part_that_no_mixture_holds_is_refused(tmp_path, pair):
    model = tmp_path / "biased"
    pictured.save_llava(model, width=32, layers=2, seed=2, mlp_bias=True)
    student = Pair(pair.teacher, model)
    with pytest.raises(ConfigError, match=r"has no place for 6 of its weights, as model\.language"):
        config_of(tmp_path, "run", pair=student)
