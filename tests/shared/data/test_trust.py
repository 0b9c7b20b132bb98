"""What is trusted of models written in numpy, each with one weakness.

T tokens   N positions with loss
"""

from types import SimpleNamespace

import numpy as np
import pytest

from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes, switches_of
from shared.data.trust import Trust, probe, reach_of
from shared.errors import ConfigError

VOCAB = 200
VECTORS = np.random.default_rng(1).normal(size=(VOCAB, 16))
EQUAL = Passes(padded=False)
ALONE = Passes(padded=False, shared=False)


def averages(layout: Layout, *, leak: float = 0.0) -> np.ndarray:
    """The mean of a document's vectors up to each token [B, T, D]; a share of all before leaks."""
    states = np.empty((*layout.input_ids_BT.shape, VECTORS.shape[1]))
    for line, (ids, positions) in enumerate(
        zip(layout.input_ids_BT, layout.position_ids_BT, strict=True)
    ):
        for start, stop in spans(positions):
            count = np.arange(1, stop - start + 1)[:, None]
            states[line, start:stop] = VECTORS[ids[start:stop]].cumsum(0) / count
            states[line, start:stop] += leak * VECTORS[ids[:start]].sum(0)
    return states


def spans(positions) -> list[tuple[int, int]]:
    starts = np.flatnonzero(positions == 0)
    return list(zip(starts, [*starts[1:], len(positions)], strict=True))


def asked(layout: Layout, states: np.ndarray) -> np.ndarray:
    return states.reshape(-1, states.shape[-1])[layout.loss_index_N]


def sound(layout):
    return asked(layout, averages(layout))


def leaking(layout):
    return asked(layout, averages(layout, leak=1e-2))


def looking_ahead(layout):
    """At what stands behind a document, padding or another."""
    last_B = layout.width_P[layout.pass_B] - 1
    seen_BD = VECTORS[layout.input_ids_BT[np.arange(len(last_B)), last_B]]
    return asked(layout, averages(layout) + 1e-1 * seen_BD[:, None])


def minding_neighbours(layout):
    """What stands on other lines of the pass."""
    states = averages(layout)
    for number in range(len(layout.width_P)):
        states[layout.pass_B == number] += 1e-1 * (layout.pass_B == number).sum()
    return asked(layout, states)


def choosing_by_the_longest(layout):
    """By the largest position of a pass, as longrope does."""
    states = averages(layout)
    for number, width in enumerate(layout.width_P):
        lines = layout.pass_B == number
        states[lines] *= 2.0 if layout.position_ids_BT[lines, :width].max() >= 100 else 1.0
    return asked(layout, states)


def found(run, **facts) -> Trust:
    asked_for = {"context": 256, "dtype": "float32", "takes_positions": True} | facts
    return probe(run, name="the model", vocab=VOCAB, **asked_for)


@pytest.mark.parametrize(
    ("fields", "reach"),
    [
        ({"index_topk": 64}, 64),
        ({"indexer_budget": 32}, 32),
        ({"index_topk_blocks": 2, "index_block_size": 16}, 32),
        ({"index_topk": None}, None),
        ({}, None),
    ],
)
def test_keys_picked_in_sixteen_bits_are_those_of_one_document(fields, reach) -> None:
    """In which a sound probe is no proof: picks are changed by rounding too."""
    assert reach_of(SimpleNamespace(**fields)) == reach
    for dtype in ("float32", "bfloat16"):
        packed = reach is None or dtype == "float32"
        assert found(sound, dtype=dtype, reach=reach) == Trust(packed)
    assert found(sound, dtype="bfloat16", reach=256).packed


@pytest.mark.parametrize("context", [8, 40, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_is_trusted_with_everything(context, dtype) -> None:
    assert found(sound, context=context, dtype=dtype) == Trust(packed=True)
    assert found(sound, context=context, limit=context) == Trust(packed=True)
    assert found(sound, takes_positions=False) == Trust(packed=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_fails_is_not_done(dtype) -> None:
    assert found(leaking, dtype=dtype) == Trust(packed=False)
    assert found(looking_ahead, dtype=dtype) == Trust(False, EQUAL)
    assert found(minding_neighbours, dtype=dtype) == Trust(False, ALONE)


def test_what_padding_breaks_runs_unpadded() -> None:
    def refusing_padding(layout):
        if layout.input_ids_BT.shape[1] % 32 == 0:
            raise IndexError("index out of range in self")
        return sound(layout)

    assert found(refusing_padding, context=250) == Trust(False, EQUAL)


def test_a_leak_beside_rounding_is_found() -> None:
    """Rounding of 16 bits everywhere, and a leak of 2 % after the first document."""
    noise = np.random.default_rng(2)

    def rounding(layout, leak):
        states = averages(layout)
        size = np.linalg.norm(states, axis=-1, keepdims=True) / 4
        states += 6e-3 * size * noise.normal(size=states.shape)
        for line, positions in enumerate(layout.position_ids_BT):
            for start, stop in spans(positions)[1:]:
                states[line, start:stop] += leak * size[line, start:stop]
        return asked(layout, states)

    assert found(lambda layout: rounding(layout, 0.0), dtype="bfloat16") == Trust(packed=True)
    assert found(lambda layout: rounding(layout, 0.04), dtype="bfloat16") == Trust(packed=False)


def test_a_known_switch_is_kept_and_an_unknown_one_found() -> None:
    apart = found(choosing_by_the_longest, context=200, switches=(100,))
    assert apart == Trust(packed=True, passes=Passes(switches=(100,)))
    assert found(choosing_by_the_longest, context=90, switches=(100,)) == Trust(packed=True)
    assert found(choosing_by_the_longest, context=200) != Trust(packed=True)


def test_a_model_with_two_answers_is_refused() -> None:
    draws = np.random.default_rng(3)

    def restless(layout):
        states = sound(layout)
        return states + draws.normal(size=states.shape)

    with pytest.raises(ConfigError, match="the model gives the same row another answer"):
        found(restless)


class WithRope:
    def __init__(self, **fields) -> None:
        self.__dict__ |= fields


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


def test_switches_are_those_of_every_layer() -> None:
    assert switches_of(WithRope()) == ()
    assert switches_of(WithRope(rope_parameters={"rope_type": "yarn", "factor": 4.0})) == ()
    assert switches_of(WithRope(rope_parameters=LONG)) == (4096,)
    layers = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
    assert switches_of(WithRope(rope_parameters=layers)) == (4096,)
    old = WithRope(rope_scaling={"type": "su"}, original_max_position_embeddings=2048)
    assert switches_of(old) == (2048,)


def test_words_say_what_is_kept_apart() -> None:
    assert Trust(packed=True, passes=TOGETHER).in_words() == ""
    assert Trust(False, ALONE).in_words().endswith("every document in a pass of its own")
    assert "up to 7 tokens" in Passes(switches=(7,)).in_words()
    assert "unpadded" in EQUAL.in_words()
