"""What the estimate says that lasts of a student, beside what a real engine holds."""

import json
import os
import socket
import subprocess
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from transformers import LlamaConfig

from cluster.sizing.memory import ModelSizes, StudentSetting, gradient_bytes, optimiser_bytes
from cluster.sizing.tracing import student_sizes
from shared.config.models.student import Student
from tests.cluster.sizing.held import DTYPES, STAGES
from tests.cluster.sizing.small import SMALL
from tests.forking import python
from tests.telling import telling

ROOT = Path(__file__).parents[3]
ROUNDING = 0.01  # of shards, which are padded, and of tensors that are too small for one


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The stages and dtypes that tests of this session ask about, with drills or without."""
    own = (item for item in request.session.items if item.path == request.path)
    cases = (item.callspec.params for item in own)  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(f"{case['zero']} {case['dtype']}" for case in cases))


@cache
def held(workers: int, wanted: tuple[str, ...]) -> dict[str, dict[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [*python("ranks"), "-m", "tests.cluster.sizing.held", *wanted],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    told = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return json.loads(told[0].splitlines()[-1])


@cache
def estimated(dtype: str) -> ModelSizes:
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SMALL).save_pretrained(folder)
        return student_sizes(Student(model=folder, dtype=dtype), lines=1, tokens=32, seed=0)[0]


@pytest.mark.parametrize(
    ("zero", "dtype", "workers"),
    telling(
        product(STAGES, DTYPES, (1, 2)), (0, "float32", 1), (2, "bfloat16", 1), (3, "float32", 1)
    ),
)
def test_weights_optimiser_and_gradients_are_those_of_a_real_engine(zero, dtype, workers, wanted):
    sizes, width = estimated(dtype), {"float32": 4, "bfloat16": 2}[dtype]
    setting = StudentSetting(zero, workers, width, 1, 0, 1, on_gpu=False)
    found = held(workers, wanted)[f"{zero} {dtype}"]
    weights = sizes.weight_bytes / (workers if zero == 3 else 1)
    moments = 2 * 4 * sizes.trained / (workers if zero else 1)
    lasting = weights + optimiser_bytes(sizes, setting) + gradient_bytes(sizes, setting)
    assert weights == pytest.approx(found["weights"], rel=ROUNDING)
    assert moments == pytest.approx(found["moments"], rel=ROUNDING)
    # The last gradient that was reduced lies there until the next one is.
    last = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert lasting * (1 - ROUNDING) <= found["all"] <= lasting * (1 + ROUNDING) + last / workers
