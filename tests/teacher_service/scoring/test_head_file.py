"""The teacher's head as a file, and answers that stand before it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.errors import ConfigError
from shared.targets.asks.head_location import find_head
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.head_file import save_head
from teacher_service.scoring.scoring import ScoringHead
from tests.answers import decoded, question_of
from tests.teacher_service.engine.test_hf import FULL, by_id
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import save_family

FAMILIES = ["llama", "qwen2", "gemma2", "granite", "cohere"]  # plain, tied, capped, scaled twice


def loaded(folder: Path, cache: Path, dtype: str) -> HFEngine:
    engine = HFEngine.load(str(folder), dtype=dtype)
    engine.cache = str(cache)
    return engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_times_the_file_are_the_teachers_distribution(family, dtype, tmp_path):
    engine = loaded(save_family(family, tmp_path / "model"), tmp_path / "cache", dtype)
    shipped, rows = engine.ship_head(), make_rows([[20, 9, 5], [31], [3]])
    assert engine.ship_head() == shipped
    spec = question_of(
        0, VOCAB, head=shipped.digest, states=shipped.states, states_width=shipped.states_width
    )
    answer = engine.score(rows, spec)
    answer.check(rows, spec)
    found = load_file(find_head(tmp_path / "cache", shipped.digest))
    states_ND = torch.from_numpy(decoded(answer).last_ND.copy())
    if dtype == "bfloat16":
        states_ND = states_ND.view(torch.bfloat16)
    assert torch.equal(states_ND, engine.last_hidden(rows))
    logits_NV = states_ND.double() @ found["weight"].double().T * found["logit_scale"]
    if "soft_cap" in found:
        logits_NV = found["soft_cap"] * (logits_NV / found["soft_cap"]).tanh()
    expected = decoded(engine.score(rows, FULL))
    # The teacher's own bfloat16 logits are rounded, those of the file are not.
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(logits_NV.log_softmax(1), by_id(expected), atol=tolerance)
    np.testing.assert_array_equal(answer.arrays().label_logprob_N, expected.label_logprob_N)


def test_the_same_head_has_the_same_digest_and_a_bias_another(tmp_path):
    weight_VD = torch.randn(8, 4)
    one, again = (save_head(ScoringHead(weight_VD), tmp_path) for _ in range(2))
    other = save_head(ScoringHead(weight_VD, torch.zeros(8)), tmp_path)
    capped = save_head(ScoringHead(weight_VD, soft_cap=30.0), tmp_path)
    assert one == again
    assert len({head.digest for head in (one, other, capped)}) == 3
    assert (one.states, one.states_width) == ("fp32", 4)
    assert one.num_bytes == find_head(tmp_path, one.digest).stat().st_size
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "weight_VD",
    [torch.empty(8, 4, device="meta"), torch.zeros(8, 4, dtype=torch.float64)],
    ids=["offloaded", "wide"],
)
def test_a_head_that_cannot_be_shipped_is_refused(weight_VD, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be shipped whole; remove targets.exact"):
        save_head(ScoringHead(weight_VD), tmp_path)
