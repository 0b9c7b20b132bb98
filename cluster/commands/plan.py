"""`tutelage plan`: what a run takes of memory, wire, disk, time and money, before it starts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.builtin.models import stages_to_build
from cluster.planning.loading import made, read
from cluster.planning.tasks.classes import refuse_classifier, refuse_without_run
from cluster.probing.probe import probe as probing
from cluster.sizing.estimate import Estimate, estimate, seconds_of, with_probe, with_speed
from cluster.sizing.fitting import refuse_unfit, rooms
from cluster.sizing.hardware import Device, gpu_named, machine_memory, size_of
from cluster.sizing.rates import UTILISATION, Speed, cost, gpus_of
from cluster.sizing.words import lines
from shared.errors import ConfigError


def plan(
    path: Path,
    overrides: Sequence[str],
    *,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    memory: str | None = None,
    price: float | None = None,
    probe: bool = False,
    address: str | None = None,
    as_json: bool = False,
) -> Estimate:
    """Print the estimate of a config and return it; with `as_json` one JSON object instead. With
    `probe` the config's first steps are taken, on the cluster at `address`, and measured.

    Raises ConfigError where a process has no room, once the estimate is printed.
    """
    config = read(path, overrides)
    if stages := stages_to_build(config):
        raise ConfigError(
            f"{path} names built-in {' and '.join(stages)}, which the first `tutelage run` makes; "
            "plan it after that, or name models"
        )
    config = made(config)
    refuse_without_run(config, "`tutelage plan`")
    if probe:
        refuse_classifier(config, "--probe", "plan without it, or run with steps=10")
    device = _gpu(gpu, gpu_memory)
    machine = size_of(memory, option="--memory") if memory else machine_memory()
    found = _timed(estimate(config), device)
    if probe:
        refuse_unfit(found, gpu=device, machine_bytes=machine)
        found = with_probe(found, probing(found, address=address))
    places = rooms(found, gpu=device, machine_bytes=machine)
    if as_json:
        print(json.dumps(_fields(found, price=price)))
    else:
        print("\n".join(lines(found, places, price=price)), flush=True)
    refuse_unfit(found, gpu=device, machine_bytes=machine)
    return found


def _gpu(name: str | None, memory: str | None) -> Device | None:
    """The GPUs that are named; None where none is."""
    size = None if memory is None else size_of(memory, option="--gpu-memory")
    if name is not None:
        known = gpu_named(name)
        return known if size is None else replace(known, memory_bytes=size)
    return None if size is None else Device("GPU", size, None, None)


def _timed(found: Estimate, device: Device | None) -> Estimate:
    """With the time of a step where every process is on GPUs whose speed is known."""
    config = found.config
    on_gpus = all(side.gpus for side in found.sides)
    if device is None or not on_gpus:
        return found
    student = device.peak(config.student.dtype)
    dtypes = {teacher.dtype for teacher in config.teachers.values()}
    teacher = min((device.peak(dtype) or 0.0 for dtype in dtypes), default=0.0)
    if not student or not teacher:
        return found
    return with_speed(found, Speed(UTILISATION * student, UTILISATION * teacher))


def _fields(found: Estimate, *, price: float | None) -> dict[str, Any]:
    """For programs: bytes, seconds and operations under the names of the estimate's fields."""
    fields: dict[str, Any] = asdict(found) | {"config": found.config.model_dump(mode="json")}
    if found.pace is not None:
        fields["pace"]["step_s"] = found.pace.step_s
    if (seconds := seconds_of(found)) is not None:
        fields["seconds"] = seconds
    if seconds is not None and price is not None:
        fields["cost"] = cost(seconds=seconds, gpus=gpus_of(found.config), price=price)
    return fields
