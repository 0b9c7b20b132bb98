"""Laws of the estimate: what grows, what is divided, what is bounded."""

from dataclasses import replace

import pytest

from cluster.sizing.hardware import GIB, gpu_named, size_of
from cluster.sizing.memory import (
    Activations,
    Bounds,
    ModelSizes,
    StudentSetting,
    Writing,
    copy_memory,
    gradient_bytes,
    loss_bytes,
    optimiser_bytes,
    student_memory,
    teacher_memory,
)
from shared.errors import ConfigError

SIZES = ModelSizes(
    num_weights=10**9,
    weight_bytes=2 * 10**9,
    trained=10**9,
    trained_bytes=2 * 10**9,
    trains_head=True,
    vocabulary=150_000,
    width=2_048,
    itemsize=2,
    tied=True,
    soft_capped=False,
    layers=24,
    most_quantised=0,
)
ACTIVATIONS = Activations(10**9, 2 * 10**9, 1e12, 1e11, 8_192, traced=True)
BOUNDS = Bounds(256, 1, 65, 0, 1_000, 5 * 10**8, 10**9, 10_000)
WRITING = Writing(32, 512, states_bytes=10**12, reading_bytes=10**8, logits_bytes=10**7)
SETTING = StudentSetting(2, 4, 2, 8_192, 900.0, 1, on_gpu=True)


def test_the_loss_has_no_tensor_of_all_positions_and_ids():
    more = replace(SETTING, positions=16 * SETTING.positions)
    added = loss_bytes(SIZES, more, BOUNDS) - loss_bytes(SIZES, SETTING, BOUNDS)
    assert added == 15 * SETTING.positions * 2 * SIZES.width * SIZES.itemsize


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_more_workers_never_take_more_and_halve_what_is_sharded(zero):
    one, two = (replace(SETTING, zero=zero, workers=n, dtype_bytes=4) for n in (1, 2))
    shared = 2 if zero else 1
    assert optimiser_bytes(SIZES, one) == shared * optimiser_bytes(SIZES, two)
    assert gradient_bytes(SIZES, one) == shared * gradient_bytes(SIZES, two)
    weights = [student_memory(SIZES, ACTIVATIONS, s, BOUNDS).parts["weights"] for s in (one, two)]
    assert weights[0] == (2 if zero == 3 else 1) * weights[1]


def test_the_total_is_the_sum_of_its_parts_and_names_the_largest():
    memory = student_memory(SIZES, ACTIVATIONS, SETTING, BOUNDS)
    assert memory.total == sum(memory.parts.values())
    assert memory.parts[memory.largest] == max(memory.parts.values())


def test_a_cpu_touches_of_the_reduction_bucket_what_there_are_gradients():
    small = replace(SIZES, trained=10**6)
    on_cpu = student_memory(small, ACTIVATIONS, replace(SETTING, on_gpu=False), BOUNDS)
    on_gpu = student_memory(small, ACTIVATIONS, SETTING, BOUNDS)
    assert on_cpu.parts["reduction bucket"] == 2 * 10**6
    assert on_gpu.parts["reduction bucket"] == 2 * 5 * 10**8


def test_where_the_update_takes_more_than_the_passes_it_is_what_counts():
    little = replace(ACTIVATIONS, kept_bytes=0, most_bytes=0)
    bounds = replace(BOUNDS, chunk_rows=1, bucket_elements=1)
    frozen = replace(SIZES, trains_head=False)
    memory = student_memory(frozen, little, replace(SETTING, positions=1), bounds)
    assert memory.parts["update"] == 2 * 4 * SIZES.trained // SETTING.workers


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("24 GB", 24 * 10**9), ("1.5g", 1.5e9), ("7", 7)]
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert size_of(text, option="--memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "3PB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"--memory is .* no size"):
        size_of(text, option="--memory")


def test_gpus_are_known_by_name_and_others_are_refused_with_the_nearest():
    assert gpu_named("h100").memory_bytes == 80 * GIB
    with pytest.raises(ConfigError, match="did you mean A100"):
        gpu_named("A1000")


def test_a_worker_that_writes_takes_the_larger_of_writing_and_learning():
    learning = student_memory(SIZES, ACTIVATIONS, SETTING, BOUNDS)
    writing = student_memory(SIZES, ACTIVATIONS, replace(SETTING, writing=WRITING), BOUNDS)
    assert writing.largest == "keys and values"
    assert "activations" not in writing.parts
    little = replace(SETTING, writing=replace(WRITING, states_bytes=1))
    assert student_memory(SIZES, ACTIVATIONS, little, BOUNDS) == learning


def test_a_worker_that_has_a_part_of_the_weights_writes_with_all_of_them():
    sharded = replace(SETTING, zero=3, writing=WRITING)
    parts = student_memory(SIZES, ACTIVATIONS, sharded, BOUNDS).parts
    assert parts["copy that writes"] == SIZES.weight_bytes == SETTING.workers * parts["weights"]
    copy = copy_memory(SIZES, WRITING)
    assert copy.total == SIZES.weight_bytes + 10**12 + 10**8 + 10**7


def test_a_teacher_keeps_batches_in_lock_step_and_what_its_modules_learn_with():
    plain = teacher_memory(SIZES, ACTIVATIONS, BOUNDS, answer_bytes=0)
    kept = teacher_memory(
        SIZES, ACTIVATIONS, BOUNDS, answer_bytes=0, writing=WRITING, kept_batches=8
    )
    assert kept.parts["kept batches"] == 8 * WRITING.states_bytes
    taught = teacher_memory(SIZES, ACTIVATIONS, BOUNDS, answer_bytes=0, modules=10**6)
    assert taught.total - plain.total == 16 * 10**6  # weights, gradient and two moments
