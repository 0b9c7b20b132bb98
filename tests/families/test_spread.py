"""Every family for which transformers has a tensor-parallel plan answers on two processes as on
one, or is refused in a sentence."""

from collections.abc import Iterator

import numpy as np
import pytest

from shared.errors import ConfigError
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.tensor_parallel import has_plan, refuse_unsplittable
from tests import tiny
from tests.answers import decoded, question_of
from tests.families.known import APART, REFUSED
from tests.families.making import FAMILIES, make_model, tiny_config
from tests.teacher_service.ranks import Ranks
from tests.teacher_service.scripted import make_rows

UNSOUND = ("hrm_text", "doge", "gemma4", "inkling_text", "sarvam_moe")
# In one process, transformers makes the padding token's row of its head zeros after it has read it.
OTHER_HEAD = ("youtu",)
OTHERS = [family for family in FAMILIES if family not in {*APART, *REFUSED}]
QUESTION = question_of(9, tiny.VOCAB, encoding="fp32")
pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def answered(folder: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden states and the labels' log-probabilities."""
    engine = HFEngine.load(folder, tensor_parallel=size)
    rows = make_rows([[20, 9, 5], [31], [2, 30], [3]], vocab=tiny.VOCAB - 2)
    labels_N = decoded(engine.score(rows, QUESTION)).label_logprob_N
    return engine.last_hidden(rows).numpy(), labels_N


@pytest.mark.parametrize("family", UNSOUND)
def test_a_plan_that_is_unsound_is_refused_from_the_config_alone(family: str) -> None:
    with pytest.raises(ConfigError, match=r"teachers.one.tensor_parallel is 2, .* no sound plan"):
        refuse_unsplittable(tiny_config(family), 2, section="teachers.one")


@pytest.mark.parametrize("family", OTHERS)
def test_two_processes_answer_as_one(family: str, ranks: Ranks, tmp_path) -> None:
    if has_plan(tiny_config(family)) is None:
        pytest.skip("transformers has no sound plan for it")
    folder = str(tmp_path)
    make_model(family, seed=1).save_pretrained(folder)
    states_ND, labels_N = answered(folder, 1)
    spread_ND, spread_N = ranks.call(answered, folder, 2)[0]
    np.testing.assert_allclose(spread_ND, states_ND, rtol=0, atol=1e-5 * abs(states_ND).max())
    if family not in OTHER_HEAD:
        np.testing.assert_allclose(spread_N, labels_N, rtol=1e-5, atol=1e-5)
