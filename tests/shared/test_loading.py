"""Why a model cannot be loaded, told in words of ours."""

from shared.loading import why_unloadable


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
