"""What a token costs, as printed: the bytes of real answers."""

import pytest

from shared.targets.payload import Pair, bytes_per_token, payload_note
from tests.answers import question_of
from tests.shared.data.test_rows import rows
from tests.shared.targets.made_up import answer

WIDTH = 6  # of the states that `answer` makes up
QWEN = Pair(teacher_width=3584, teacher_rows=152_064, dtype="bfloat16")


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("hidden", ["int8", "fp32"])
@pytest.mark.parametrize("vocab", [512, 100_000])
def test_it_is_what_a_large_answer_takes(encoding, hidden, vocab):
    spec = question_of(
        16,
        vocab,
        temperatures=(1.0, 2.0),
        encoding=encoding,
        hidden_layers=(1, 3),
        hidden_encoding=hidden,
        entropy=True,
    )
    unit = rows([512] * 4)
    built, sent = answer(spec, unit=unit)
    found = sum(bytes_per_token(spec, hidden_width=WIDTH).values())
    assert found == pytest.approx(built.num_bytes / len(sent.label_logprob_N), abs=0.2)


@pytest.mark.parametrize(
    ("hidden", "per_layer"), [("bf16", 2 * 512), ("int8", 512 + 4), ("fp32", 4 * 512)]
)
def test_a_layer_of_states_costs_its_width_and_a_step(hidden, per_layer):
    spec = question_of(64, 4096, hidden_layers=(2, 4), hidden_encoding=hidden)
    found = bytes_per_token(spec, hidden_width=512)
    assert found["hidden states"] == pytest.approx(2 * per_layer, abs=0.1)


def test_the_sentence_names_every_part_and_their_sum():
    spec = question_of(64, 4096, encoding="fp32")
    said = payload_note(spec, hidden_width=0, pair=QWEN, top_k=64)
    assert "log-probabilities 256, masses and label 8" in said
    assert "hidden states" not in said
    total = round(sum(bytes_per_token(spec, hidden_width=0).values()))
    assert said.startswith(f"a token costs {total} bytes from the teacher: ids ")


def test_the_sentence_says_what_the_other_kind_of_answer_costs():
    """3,584 numbers of two bytes and the label, before a head of 152,064 rows."""
    ids = question_of(64, 151_936)
    states = question_of(0, 151_936, head="x", states="bf16", states_width=3584)
    said = [payload_note(spec, hidden_width=0, pair=QWEN, top_k=64) for spec in (ids, states)]
    cheap = round(sum(bytes_per_token(ids, hidden_width=0).values()))
    assert f"{cheap} bytes" in said[0]
    assert said[0].endswith("with targets.exact=last_hidden 7,172, and the head once 1,090.0 MB")
    drawn = question_of(64, 151_936, selector="threshold", entropy=True)
    threshold = payload_note(drawn, hidden_width=0, pair=QWEN, top_k=64)
    assert threshold.startswith("a token costs about 158 bytes from the teacher: ")
    assert "with targets.exact=last_hidden 7,172, and" in threshold
    assert said[1].startswith("a token costs 7,172 bytes from the teacher: ")
    assert "last hidden state 7,168" in said[1]
    assert said[1].endswith(f"the 64 likeliest ids would cost {cheap}")


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_head_weighs_its_numbers_in_the_teachers_type(dtype, size):
    pair = Pair(teacher_width=48, teacher_rows=512, dtype=dtype)
    assert pair.head_bytes == 48 * 512 * size
