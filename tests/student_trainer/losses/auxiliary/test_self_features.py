"""Deep layers teach shallow ones: values, whom the gradient reaches, and that weight 0 is none."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cluster.planning.handshake import shake_hands
from cluster.planning.loading import load
from shared.config.losses import SelfFeatures as Section
from shared.errors import HandshakeError
from student_trainer.losses.auxiliary.self_features import SelfFeatures, own_projections
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.cluster.jobs import write_job
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.teacher_service.scripted import make_rows

CPU = torch.device("cpu")
CE = {"kind": "cross_entropy"}


def states(width: int = 6) -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    return {layer: torch.randn(1, 5, width, requires_grad=True) for layer in range(4)}


def values(section: Section, states_1ND: dict[int, torch.Tensor], modules: nn.ModuleDict):
    loss = SelfFeatures(section, modules)
    output = SimpleNamespace(hidden_states=[states_1ND[layer] for layer in range(4)])
    return loss.values(loss.pick(output, {"loss_index_N": torch.tensor([0, 2, 3])}))


@pytest.mark.parametrize("group", [1, 3])
def test_channels_are_averaged_in_groups_and_pairs_of_layers_too(group: int) -> None:
    found = states()
    value_N = values(Section(layers={0: 3, 1: 2}, group=group), found, nn.ModuleDict())
    picked = {n: x[0, [0, 2, 3]].unflatten(-1, (-1, group)).mean(-1) for n, x in found.items()}
    parts = [((picked[s] - picked[d]) ** 2).mean(-1) for s, d in ((0, 3), (1, 2))]
    torch.testing.assert_close(value_N, (parts[0] + parts[1]) / 2)


def test_a_learned_projection_stands_before_the_shallow_state() -> None:
    found, section = states(), Section(layers={1: 3})
    modules = nn.ModuleDict(own_projections([section], 6))
    value_N = values(section, found, modules)
    (weight,) = modules.parameters()
    expected_N = ((found[1][0] @ weight.T - found[3][0]) ** 2).mean(-1)[[0, 2, 3]]
    torch.testing.assert_close(value_N, expected_N)
    value_N.sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()


@pytest.mark.parametrize("group", [None, 2])
def test_deep_states_get_no_gradient(group: int | None) -> None:
    found, section = states(), Section(layers={0: 2, 1: 3}, group=group)
    modules = nn.ModuleDict(own_projections([section], 6))
    values(section, found, modules).sum().backward()
    reached = {n: x.grad is not None and bool(x.grad.any()) for n, x in found.items()}
    assert reached == {0: True, 1: True, 2: False, 3: False}


def objective_of(folder: Path, pair: tiny.Pair, losses: list[dict]) -> Objective:
    config = plan_of(folder / "run", pair, prepared_domains(folder), losses=losses).config
    return Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)


def gradients(objective: Objective) -> dict[str, torch.Tensor | None]:
    rows = make_rows([[9], [30], [23]], vocab=tiny.VOCAB)
    loss, *_ = objective(Layouts(("text", "prose"), True, CPU, CAUSAL_LM).batch(rows))
    loss.backward()
    return {name: weight.grad for name, weight in objective.named_parameters()}


def test_no_layer_above_the_shallow_one_learns_from_it(tmp_path: Path, tiny_pair) -> None:
    """In a whole student, whose head and last layer the loss alone leaves as they are."""
    asked = [{"kind": "self_features", "layers": {1: 2}, "weight": 0.5}]
    found = gradients(objective_of(tmp_path, tiny_pair, asked))
    for name, gradient in found.items():
        deep = ".layers.1." in name or name.endswith("model.norm.weight")
        reached = gradient is not None and bool(gradient.any())
        assert reached == (not deep), name


def test_weight_0_has_the_bits_of_none(tmp_path: Path, tiny_pair) -> None:
    plain = gradients(objective_of(tmp_path, tiny_pair, [CE]))
    asked = [CE, {"kind": "self_features", "layers": {1: 2}, "weight": 0}]
    without = gradients(objective_of(tmp_path, tiny_pair, asked))
    assert plain.keys() == without.keys()
    for name, gradient in plain.items():
        other = without[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"layers": {1: 2}, "group": 5},
            "group of self_features is 5, which does not divide .* 32",
        ),
        ({"layers": {1: 3}}, "a self_features loss asks for student layer 3, but .* 0 to 2"),
    ],
)
def test_what_the_student_has_not_is_refused(tmp_path: Path, tiny_pair, asked, said) -> None:
    losses = [CE, {"kind": "self_features", **asked}]
    config = load(write_job(tmp_path, tiny_pair, losses=losses, mixture={"policy": "fixed"}), [])
    with pytest.raises(HandshakeError, match=said):
        shake_hands(config)


def test_a_layer_is_supervised_by_a_deeper_one() -> None:
    with pytest.raises(ValueError, match="has layer 1 supervise layer 2, which is no shallower"):
        Section(layers={2: 1})
