"""A teacher attends as its config says."""

import numpy as np
import pytest

from shared.config.models.teachers import Teacher
from shared.errors import ConfigError
from teacher_service.engine.audit import load_engine
from tests.answers import decoded, question_of
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import save_family


def test_the_attention_asked_for_answers_and_is_part_of_the_fingerprint(tmp_path):
    folder = str(save_family("llama", tmp_path))
    auto, eager, sdpa = (
        load_engine(Teacher(model=folder, attention=attention))
        for attention in ("auto", "eager", "sdpa")
    )
    assert auto.fingerprint == sdpa.fingerprint
    assert {**eager.fingerprint, "attention": "sdpa"} == auto.fingerprint
    assert eager.fingerprint["attention"] == "eager"
    rows, spec = make_rows([[20, 9], [31]]), question_of(8, VOCAB, encoding="fp32")
    found, expected = (decoded(e.score(rows, spec)) for e in (eager, auto))
    np.testing.assert_allclose(found.label_logprob_N, expected.label_logprob_N, atol=1e-4)


def test_an_attention_that_a_family_lacks_is_one_sentence(tmp_path):
    folder = str(save_family("bloom", tmp_path))
    with pytest.raises(ConfigError, match=r"set teachers\.NAME\.attention=auto") as refused:
        load_engine(Teacher(model=folder, attention="sdpa"))
    assert "attn_implementation" not in str(refused.value)
    assert "\n" not in str(refused.value)
