"""Why a model cannot be loaded, told in words of ours."""

from pathlib import Path

import pytest

from shared.loading import read_config, why_unloadable
from tests import tiny


def test_advice_of_another_library_is_left_out() -> None:
    advice = ValueError(
        "XForCausalLM does not support an attention implementation through sdpa yet. Load your "
        'model with the argument `attn_implementation="eager"` meanwhile.'
    )
    said = why_unloadable(advice, section="student", attention="sdpa")
    assert "attn_implementation" not in said
    assert said.endswith("through sdpa yet; set student.attention=auto")
    assert (
        why_unloadable(OSError("no file\nmore"), section="student", attention="sdpa") == "no file"
    )


def test_code_of_a_models_own_names_the_option() -> None:
    error = ValueError("Please pass the argument `trust_remote_code=True` to allow custom code")
    said = why_unloadable(error, section="student", attention="auto")
    assert said.endswith("then set student.trust_remote_code=true")


@pytest.mark.parametrize(
    ("written", "read"), [(-1, None), ([2, -1], [2]), ([-1], None), (2, 2), ([2, 7], [2, 7])]
)
def test_a_negative_id_is_no_token(tmp_path: Path, written: object, read: object) -> None:
    tiny.save_model(tmp_path, width=32, layers=1)
    tiny.edit_config(tmp_path, eos_token_id=written)
    asked = {"revision": None, "trust_remote_code": False, "attention": "auto"}
    assert read_config(str(tmp_path), **asked).eos_token_id == read
