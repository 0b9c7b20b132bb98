"""What is said of an attention that cannot be had, and what a library is told."""

import re

import pytest

from shared.config.models.attention import offered_by, refusal

FITS = {"model": "m", "offered": ("eager", "sdpa", "flash_attention_2"), "installed": True}
ON_GPU = {"gpus": 1, "dtype": "bfloat16"}


class Both:
    _supports_sdpa = True
    _supports_flash_attn = True


def test_what_a_class_offers_is_read_off_it() -> None:
    assert offered_by(object) == ("eager",)
    assert offered_by(Both) == ("eager", "sdpa", "flash_attention_2")


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", "flash_attention_2"])
def test_what_there_is_is_not_refused(attention) -> None:
    assert refusal("student.attention", attention, **FITS, **ON_GPU) is None


@pytest.mark.parametrize(
    ("attention", "facts", "said"),
    [
        ("sdpa", {"offered": ("eager",)}, "which the architecture of m does not have"),
        ("flash_attention_2", {"offered": None, "installed": False}, "flash_attn is not installed"),
        ("flash_attention_2", {"gpus": 0}, r"needs a GPU; set student\.gpus"),
        ("flash_attention_2", {"dtype": "float32"}, r"set student\.dtype=bfloat16"),
    ],
)
def test_what_there_is_not_is_one_sentence_with_the_way_out(attention, facts, said) -> None:

    found = refusal("student.attention", attention, **(FITS | ON_GPU | facts))
    assert found is not None
    assert re.search(said, found)
    assert found.startswith(f"student.attention is {attention}")
    assert "set student.attention=auto" in found
