"""The routers' loss: that of transformers, its gradient, on in training where a config asks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.config.losses import RouterBalance
from shared.config.run import Config
from shared.data.layout import lay_out
from shared.errors import ConfigError
from shared.run.metrics import read_metrics
from student_trainer.losses.auxiliary.router_balance import RouterBalance as Balance
from student_trainer.metrics.sums import EXPERT_TOKENS
from student_trainer.models.probing import take_apart
from student_trainer.models.routers import router_balance_of, routers_of
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.families.making import make_model
from tests.student_trainer.comparing import weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.teacher_service.scripted import make_rows

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe")


def mixture(family: str, **settings: object):
    """A random mixture of experts whose config asks for its routers' loss."""
    torch.manual_seed(0)
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    config = AutoConfig.for_model(family, **(SIZES | asked | settings))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for gate in gates(model):
            gate.mul_(20)
    return model


def config_of(folder: Path, model: Path, **options: object) -> Config:
    pair = tiny.Pair(model, model)
    options = {"targets": {"selector": "top_k"}} | options
    return plan_of(folder / "run", pair, prepared_domains(folder), **options).config


def balanced(weight: float = 0.5, **options: object) -> list[dict]:
    section = {"kind": "router_balance", "weight": weight, "experts_per_token": 3}
    return [{"kind": "cross_entropy"}, section | options]


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_are_those_of_transformers(family: str) -> None:
    """On rows of several lengths, with padding, which a mask tells transformers."""
    model = mixture(family)
    rows = make_rows([[9], [40], [23]], vocab=tiny.VOCAB)
    layout = lay_out(rows, packed=True)
    batch = {name: torch.from_numpy(getattr(layout, name)) for name in layout.__slots__}
    real_BT = torch.arange(batch["input_ids_BT"].shape[1]) < batch["length_B"][:, None]
    plain = model(input_ids=batch["input_ids_BT"], attention_mask=real_BT.long()).aux_loss
    expected = torch.autograd.grad(plain, gates(model))
    auxiliary = Balance(RouterBalance(experts_per_token=3), torch.nn.ModuleDict())
    options = dict.fromkeys(auxiliary.needs.options, True)
    output = model.get_decoder()(input_ids=batch["input_ids_BT"], use_cache=False, **options)
    values_N = auxiliary.values(auxiliary.pick(output, batch))
    assert len(values_N) == len(layout.label_N)
    torch.testing.assert_close(values_N, plain.detach().expand(len(values_N)))
    found = torch.autograd.grad(values_N.mean(), gates(model))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert min(float(gradient.abs().max()) for gradient in expected) > 1e-4


def gates(model) -> list[torch.nn.Parameter]:
    named = model.named_parameters()
    found = [p for name, p in named if "router" in name or name.endswith("gate.weight")]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_step_is_that_of_a_plain_step(tmp_path: Path, checkpointing: bool) -> None:
    """Cross-entropy of the tokens with loss and the coefficient's share of the routers' loss."""
    model = mixture("qwen3_moe")
    tiny.save_tokenizer(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    student = {"activation_checkpointing": checkpointing}
    config = config_of(tmp_path, tmp_path / "model", losses=balanced(), student=student)
    loaded = CAUSAL_LM.load(config, device=CPU)
    loaded.saved.train()
    objective = Objective(loaded, config, teacher_width=None)
    rows = make_rows([[9], [40], [23]], vocab=tiny.VOCAB)
    batch = Layouts(("text", "prose"), True, CPU, CAUSAL_LM).batch(rows)
    count = len(batch["label_N"])
    loss, *_ = objective(batch, multiplier=1 / count)
    loss.backward()
    real_BT = torch.arange(batch["input_ids_BT"].shape[1]) < batch["length_B"][:, None]
    plain = model.train()(input_ids=batch["input_ids_BT"], attention_mask=real_BT.long())
    logits_NV = plain.logits.flatten(0, 1)[batch["loss_index_N"]]
    expected = torch.nn.functional.cross_entropy(logits_NV, batch["label_N"])
    expected = expected + 0.5 * plain.aux_loss
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    own = dict(loaded.saved.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(own[name].grad, weight.grad, atol=2e-6, rtol=1e-4)


def test_the_load_of_experts_is_counted_by_layer_however_a_step_is_cut(tmp_path: Path) -> None:
    """Every token but padding counts, whether it has loss or not."""
    model = mixture("qwen3_moe")
    tiny.save_tokenizer(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path, tmp_path / "model", losses=balanced())
    objective = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)
    layout = objective.loss_head.layout
    assert layout.routers == (2, 4)
    rows = make_rows([[9], [40], [23]], vocab=tiny.VOCAB)
    layouts = Layouts(("text", "prose"), True, CPU, CAUSAL_LM)

    def load(part) -> torch.Tensor:
        _, sums, _ = objective(layouts.batch(part))
        return sums[layout.place(EXPERT_TOKENS)].reshape(layout.routers)

    together = load(rows)
    assert torch.equal(together, sum(load(rows.part(slice(n, n + 1))) for n in range(3)))
    assert together.sum(1).tolist() == [3.0 * (9 + 40 + 23)] * 2
    batch = layouts.batch(rows)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids_BT"], output_router_logits=True)
    real_N = (torch.arange(batch["input_ids_BT"].shape[1]) < batch["length_B"][:, None]).flatten()
    for layer, counted_E in zip(logits.router_logits, together, strict=True):
        sent_NK = layer[real_N].topk(3, dim=-1).indices
        assert [(sent_NK == e).sum().item() for e in range(4)] == counted_E.tolist()


def test_what_a_config_asks_for_is_found() -> None:
    assert router_balance_of(mixture("mixtral").config) == {"weight": 0.5, "experts_per_token": 3}
    assert router_balance_of(mixture("mixtral", output_router_logits=False).config) is None
    assert router_balance_of(mixture("mixtral", router_aux_loss_coef=0.0).config) is None


WRONG = {
    "number of experts": r"another loss .* over 2 experts a token; set its experts_per_token to",
    "no routers": "transformers has no loss of the routers of .*; take router_balance out",
    "routers that say nothing": "transformers has no loss of the routers of .*; take router_balan",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_loss_that_is_not_the_models_is_refused(tmp_path: Path, tiny_pair, wrong: str) -> None:
    losses = balanced()
    if wrong == "no routers":
        model = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    elif wrong == "number of experts":
        model, losses = mixture("mixtral"), balanced(experts_per_token=2)
    else:
        model = make_model("flint", seed=1)
        model.config.output_router_logits = True
        with pytest.raises(ConfigError, match=r"set output_router_logits in its config\.json to"):
            take_apart(model, name="flint")
    config = config_of(tmp_path, tiny_pair.student, losses=losses)
    with pytest.raises(ConfigError, match=WRONG[wrong]):
        routers_of(model, config)
    left_out = [loss | {"weight": 0} for loss in losses if loss["kind"] == "router_balance"]
    config = config_of(tmp_path, tiny_pair.student, losses=[{"kind": "cross_entropy"}, *left_out])
    routers_of(model, config)


def test_a_fault_of_the_models_own_code_is_no_missing_loss(tmp_path: Path, tiny_pair) -> None:
    model = mixture("mixtral")
    model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
    config = config_of(tmp_path, tiny_pair.student, losses=balanced())
    with pytest.raises(ConfigError, match=r"cannot be computed: .*division by zero; set") as error:
        routers_of(model, config)
    assert type(error.value) is ConfigError


def test_the_routers_of_a_batch_are_asked_for_where_the_loss_is() -> None:
    section = SimpleNamespace(weight=2.0, experts_per_token=1)
    auxiliary = Balance(section, torch.nn.ModuleDict())
    assert (auxiliary.weight, auxiliary.needs.options) == (2.0, ("output_router_logits",))


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.drill), 3])
def test_a_mixture_trains_with_it_and_resumes_bit_for_bit(tmp_path: Path, zero: int) -> None:
    model = tmp_path / "model"
    tiny.save_tokenizer(model)
    mixture("mixtral").save_pretrained(model)
    plan = plan_of(
        tmp_path / "run",
        tiny.Pair(model, model),
        prepared_domains(tmp_path),
        student={"zero": zero},
        losses=balanced(),
    )
    run_jobs([as_job("resumed", plan, at=2)], tmp_path / "jobs")
    runs = [tmp_path / "run", tmp_path / "run-resumed"]
    first, again = (weights_after(run, 4) for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    lines = [read_metrics(run / "metrics.jsonl") for run in runs]
    assert [line.terms["router_balance"] for line in lines[0]][-1] > 2.9
    assert lines[0][-1].terms == lines[1][-1].terms
    experts = lines[0][-1].experts
    assert experts is not None
    assert experts == lines[1][-1].experts
    assert [sum(shares) for shares in experts.shares] == pytest.approx([1, 1], abs=1e-3)
    assert experts.max_load == pytest.approx(4 * max(map(max, experts.shares)), abs=1e-3)
    assert 0.5 < experts.entropy < 1
    assert "x even" in (runs[0] / "logs" / "progress.log").read_text()
