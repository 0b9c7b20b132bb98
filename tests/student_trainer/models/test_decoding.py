"""A student whose units take several forward passes learns as from every document alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DeepseekV32Config, Phi3Config

from shared.data.layout import lay_out
from shared.data.passes import Passes
from shared.data.trust import Trust
from shared.errors import ConfigError
from student_trainer.models.decoding import decode
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.models.test_student import CPU, config_of
from tests.student_trainer.runs import DOMAINS
from tests.teacher_service.engine.test_trust import LEAKY, LONGROPE, SIZES, SWITCH, saved
from tests.teacher_service.scripted import make_rows
from tests.teacher_service.teachers import documents

LENGTHS = [[20], [90], [10, 100, 12], [64], [65]]
APART = Trust(packed=True, passes=Passes(switches=(SWITCH,)))


@pytest.fixture
def longrope(tmp_path: Path) -> Path:
    sizes = SIZES | {"vocab_size": tiny.VOCAB}
    config = Phi3Config(**sizes, rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    return Path(saved(tmp_path / "model", config, scale=4.0))


def test_loss_and_gradients_are_those_of_every_document_alone(
    tmp_path: Path, longrope: Path
) -> None:
    config = config_of(tmp_path, longrope, losses=[{"kind": "cross_entropy"}])
    config = config.model_copy(update={"data": config.data.model_copy(update={"context": 200})})
    assert CAUSAL_LM.trust(config) == APART
    student = CAUSAL_LM.load(config, device=CPU)
    objective = Objective(student, config, teacher_width=None)
    rows = make_rows(LENGTHS, vocab=tiny.VOCAB)
    rows = rows.build(
        domains=[DOMAINS[0]] * len(rows),
        indices=range(len(rows)),
        input_ids=rows.column("input_ids"),
        doc_starts=rows.column("doc_starts"),
        loss_masks=rows.column("loss_mask"),
    )
    batch = Layouts(DOMAINS, APART.packed, CPU, CAUSAL_LM, passes=APART.passes).batch(rows)
    assert len(batch["width_P"]) == 2
    loss, _, weighted_N = objective(batch)
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(longrope).train()
    parts = []
    for ids in documents(rows):
        ids_T = torch.from_numpy(ids.astype(np.int64))
        logits_TV = plain(ids_T[None], use_cache=False).logits[0]
        parts.append(cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none"))
    expected_N = torch.cat(parts)
    expected_N.sum().backward()
    torch.testing.assert_close(weighted_N, expected_N.detach(), rtol=1e-4, atol=1e-4)
    own = dict(student.saved.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert own[name].grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale)


class Decoder(nn.Module):
    """States, inner states and router logits that tell line and token."""

    def forward(self, input_ids, position_ids, use_cache, **options):
        states = input_ids[..., None].float().expand(-1, -1, 3)
        flat = states.flatten(0, 1)[:, :2]
        hidden = (states, 2 * states)
        return {
            "last_hidden_state": states,
            "hidden_states": hidden,
            "router_logits": (flat,),
        }


def test_what_options_ask_for_comes_from_every_pass() -> None:
    rows = make_rows([[20], [90], [30]], vocab=tiny.VOCAB)
    layout = lay_out(rows, packed=True, passes=Passes(switches=(SWITCH,)))
    names = ("input_ids_BT", "position_ids_BT", "pass_B", "width_P")
    batch = {name: torch.from_numpy(getattr(layout, name)) for name in names}
    options = {"output_hidden_states": True, "output_router_logits": True}
    found, ids_BT = decode(Decoder(), batch, options=options), batch["input_ids_BT"]
    assert torch.equal(found.last_hidden_state[..., 0], ids_BT.float())
    assert torch.equal(found.hidden_states[1][..., 2], 2 * ids_BT.float())
    assert torch.equal(found.router_logits[0][:, 1], ids_BT.flatten().float())


def test_ranks_that_go_together_are_refused_passes_of_their_own(
    tmp_path: Path, longrope: Path
) -> None:
    options = {"data": {"context": 200}, "student": {"zero": 3}}
    with pytest.raises(ConfigError, match=r"student\.zero is 3, .* set student\.zero=2"):
        CAUSAL_LM.trust(config_of(tmp_path, longrope, **options))
    within = {"data": {"context": SWITCH}, "student": {"zero": 3}}
    other = tmp_path / "within"
    other.mkdir()
    assert CAUSAL_LM.trust(config_of(other, longrope, **within)) == Trust(packed=True)


def test_a_sparse_student_packs_within_its_index_alone(tmp_path: Path) -> None:
    fields = LEAKY["sparse"].to_dict()
    for reach, packs in ((16, False), (512, True)):
        folder = tmp_path / str(reach)
        model = saved(folder / "model", DeepseekV32Config(**(fields | {"index_topk": reach})))
        config = config_of(folder, Path(model), data={"context": 128})
        assert CAUSAL_LM.trust(config).packed == packs


def test_a_recurrent_student_in_bfloat16_does_not_pack(tmp_path: Path) -> None:
    model = Path(saved(tmp_path / "model", LEAKY["recurrent gemma"], scale=2.0))
    config = config_of(tmp_path, model, student={"dtype": "bfloat16"})
    assert CAUSAL_LM.trust(config) == Trust(packed=False)
