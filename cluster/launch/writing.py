"""What a student's workers write with: the generator of the teacher service, around their own
model."""

from typing import Any

from shared.targets.generation import Generator


def open_generator(model: Any, *, device: Any, dtype: str, batch_rows: int) -> Generator:
    """A generator in a worker's process; satisfies `OpenGenerator`."""
    from teacher_service.engine import generating  # slow, and the driver writes nothing

    return generating.open_generator(model, device=device, dtype=dtype, batch_rows=batch_rows)
