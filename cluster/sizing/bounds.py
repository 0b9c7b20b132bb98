"""The limits that the code of losses, scoring and DeepSpeed keeps, read from where they stand."""

from cluster.sizing.memory import Bounds, ModelSizes
from shared.config.run import Config
from shared.targets.asks.ask import Ask
from shared.targets.asks.kept_ids import KeptIds
from shared.targets.asks.last_states import LastStates
from student_trainer.engine import SMALLEST_SHARDED, deepspeed_config
from student_trainer.losses.kernel.fused import ACCELERATOR_PART_BYTES, PART_BYTES
from student_trainer.losses.kernel.primitive import default_chunk_rows
from student_trainer.losses.kernel.whole import whole_chunk_rows
from teacher_service.scoring.scoring import chunk_size

WHOLE_PART_TENSORS = 5  # of a part's logits that are computed over a whole vocabulary


def bounds_of(
    config: Config, ask: Ask | None, student: ModelSizes, *, teacher_rows: int, on_gpu: bool
) -> Bounds:
    """Those of a run whose teacher is asked `ask` in training and has a head of so many rows."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**deepspeed_config(config)["zero_optimization"])
    whole, device = isinstance(ask, LastStates), "cuda" if on_gpu else "cpu"
    ids = 1 + (ask.num_ids if isinstance(ask, KeptIds) and not whole else 0)
    vocabulary = student.vocabulary
    rows = whole_chunk_rows(vocabulary) if whole else default_chunk_rows(vocabulary, num_ids=ids)
    part = ACCELERATOR_PART_BYTES if on_gpu else PART_BYTES
    buffers = len(config.temperatures) + student.soft_capped + whole
    return Bounds(
        chunk_rows=rows,
        chunk_buffers=buffers,
        ids=0 if whole else ids,
        part_bytes=WHOLE_PART_TENSORS * part if whole else 0,
        scoring_rows=chunk_size(teacher_rows, device),
        bucket_elements=int(zero.reduce_bucket_size),
        gathered_elements=int(zero.max_live_parameters),
        whole_elements=SMALLEST_SHARDED,
    )
