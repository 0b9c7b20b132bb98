"""What a payload of hidden states keeps of a real teacher's, and at what price."""

from pathlib import Path

import pytest

from tests.benchmarks.targets.hidden_payload import measure


@pytest.mark.benchmark
def test_a_pca_keeps_more_than_random_directions_and_int8_costs_half(
    reference: Path, tmp_path: Path
) -> None:
    found = {
        (r.width, r.projection, r.encoding): r
        for r in measure(reference, tmp_path, widths=[32, 128], layers=(2, 6), rows=2)
    }
    for width in (32, 128):
        for layer in (2, 6):
            error = {key[1:]: r.errors[layer] for key, r in found.items() if key[0] == width}
            assert error["pca", "bf16"] < 0.8 * error["random", "bf16"]
            assert error["pca", "int8"] < error["pca", "bf16"] + 0.02
        cost = {r.encoding: r.bytes_per_token for key, r in found.items() if key[0] == width}
        assert cost["int8"] == pytest.approx(cost["bf16"] / 2 + 4, abs=0.1)
    for layer in (2, 6):
        assert found[128, "pca", "int8"].errors[layer] < found[32, "pca", "int8"].errors[layer]
