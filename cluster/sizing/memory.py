"""How much memory each process of a run takes, part by part, from sizes alone.

Sizes come from `tracing`, and the limits of what is bounded from the code that bounds it
(`bounds`); nothing here needs torch. All numbers are bytes unless their names say otherwise.

N positions with loss of a micro-batch   V head rows   D hidden width   W workers
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

FLOAT32, BFLOAT16 = 4, 2
NF4_BLOCK = 64  # weights that share a scale
NF4_CODE = 16  # numbers that 4 bits stand for, once a layer


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model before any of its weights is read."""

    num_weights: int
    weight_bytes: int  # as held: in few bits where it is quantised, tied ones once
    trained: int  # weights that learn
    trained_bytes: int
    trains_head: bool
    vocabulary: int  # V
    width: int  # D
    itemsize: int  # of a number of the head
    tied: bool  # whether the head is the embedding
    soft_capped: bool
    layers: int
    most_quantised: int  # of the largest weight in few bits, once it is widened for a product


@dataclass(frozen=True, slots=True)
class Activations:
    """What the decoder's passes over one micro-batch, or scoring unit, keep alive and compute."""

    kept_bytes: int  # between forward and backward pass
    most_bytes: int  # at any moment, gradients of weights apart
    flops: float  # of the decoder, backward pass and recomputation included
    head_flops: float  # of one product with the head
    tokens: int  # padding included
    traced: bool  # else estimated from sizes


MOVED_HEAD_PRODUCTS = 2  # with the head, for the gradient that a copy is moved along


def with_moved_copy(clean: Activations) -> Activations:
    """The same where each text is read again with moved embeddings: a pass and its backward pass
    for the gradient, and another of each for the copy, whose states are kept beside the first's."""
    return replace(
        clean,
        kept_bytes=2 * clean.kept_bytes,
        most_bytes=clean.kept_bytes + clean.most_bytes,
        flops=3 * clean.flops,
    )


@dataclass(frozen=True, slots=True)
class Writing:
    """What a model keeps that goes on from a batch of openings."""

    lines: int  # of the batch
    tokens: int  # of a line at most, its opening included
    states_bytes: int  # keys and values of the batch, once all of it is written
    reading_bytes: int  # of the pass over the openings
    logits_bytes: int  # of the law that a token is drawn from


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that the code of losses, scoring and DeepSpeed keeps, as it has them."""

    chunk_rows: int  # positions whose logits [n, V] live at one time in the loss
    chunk_buffers: int  # of them
    ids: int  # kept ids of a position of a chunk, in numbers of 4 bytes
    part_bytes: int  # of what is computed of a part of a chunk at a time
    scoring_rows: int  # positions whose logits live at one time in the teacher
    bucket_elements: int  # of DeepSpeed's buffer that gradients are reduced in
    gathered_elements: int  # of weights that are whole at one time under ZeRO-3
    whole_elements: int  # of a tensor below which ZeRO-3 keeps it whole


@dataclass(frozen=True, slots=True)
class StudentSetting:
    """How a student trains."""

    zero: int
    workers: int
    dtype_bytes: int  # of weights that learn
    positions: int  # N, at most
    answer_bytes: float  # of a position's answer, decoded, beside the batch
    answers: int  # micro-batches whose answers are decoded at one time
    on_gpu: bool
    teacher_head_bytes: int = 0  # where the teacher's states are read
    writing: Writing | None = None  # None: its workers write nothing


Parts = dict[str, int]  # what takes memory -> bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """A process's parts at the moment at which it holds most."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


def nf4_bytes(rows: int, columns: int) -> int:
    """Of a linear layer's weight in nf4: half a byte each, and a float32 a block of 64."""
    count = rows * columns
    return -(-count // 2) + FLOAT32 * (-(-count // NF4_BLOCK) + NF4_CODE)


def int8_bytes(rows: int, columns: int) -> int:
    """Of a linear layer's weight in int8, and a float32 a row."""
    return rows * columns + FLOAT32 * rows


def student_memory(
    sizes: ModelSizes, activations: Activations, setting: StudentSetting, bounds: Bounds
) -> Memory:
    """The parts of a student's process, libraries apart.

    They are those of the backward pass of a step's last micro-batch, of the optimiser's update, or
    of the writing between steps, whichever is most.
    """
    lasting = {
        "weights": _weights(sizes, setting),
        "optimiser": optimiser_bytes(sizes, setting),
        "gradients": gradient_bytes(sizes, setting),
    }
    if setting.teacher_head_bytes:
        lasting["teacher's head"] = setting.teacher_head_bytes
    writing: list[Parts] = []
    if setting.writing is not None:
        if setting.zero == 3:  # a worker has a part of the weights, and writes with all
            lasting["copy that writes"] = sizes.weight_bytes
        writing.append(lasting | writing_parts(setting.writing))
    learning = lasting | _learning(sizes, activations, setting, bounds)
    # The update flattens the gradients it applies, and divides by roots of second moments.
    update = 2 * FLOAT32 * -(-sizes.trained // _shares(setting, from_stage=1))
    updating = lasting | {"update": update}
    return _most(learning, updating, *writing)


def optimiser_bytes(sizes: ModelSizes, setting: StudentSetting) -> int:
    """Two moments and, where weights are narrow or sharded, their own copy in float32."""
    share = -(-sizes.trained // _shares(setting, from_stage=1))
    masters = setting.zero > 0 or setting.dtype_bytes < FLOAT32
    return share * FLOAT32 * (3 if masters else 2)


def gradient_bytes(sizes: ModelSizes, setting: StudentSetting) -> int:
    """What lasts until the update: all of them in stage 0, as wide as the weights, and in stage 1
    of narrow weights, with their sums in float32; else a worker's share in float32."""
    narrow = setting.dtype_bytes < FLOAT32
    if setting.zero == 0:
        return sizes.trained * setting.dtype_bytes
    if setting.zero == 1 and narrow:
        return sizes.trained * (FLOAT32 + setting.dtype_bytes)
    return FLOAT32 * -(-sizes.trained // setting.workers)


def loss_bytes(sizes: ModelSizes, setting: StudentSetting, bounds: Bounds) -> int:
    """Of the token loss: chunks of logits in float32, what is computed of them, the gradient of
    all states, and that of the head. No tensor [N, V] is among them."""
    rows = min(setting.positions, bounds.chunk_rows)
    row = sizes.vocabulary * bounds.chunk_buffers + 8 * bounds.ids
    chunk = FLOAT32 * rows * row
    states = 2 * setting.positions * sizes.width * sizes.itemsize  # picked ones, their gradients
    head = sizes.vocabulary * sizes.width * FLOAT32 if sizes.trains_head else 0
    if sizes.trains_head and setting.dtype_bytes < FLOAT32:
        head += sizes.vocabulary * sizes.width * setting.dtype_bytes
    narrowed = rows * sizes.vocabulary * sizes.itemsize if sizes.itemsize < FLOAT32 else 0
    return chunk + min(bounds.part_bytes, chunk) + states + head + narrowed


def teacher_memory(
    sizes: ModelSizes,
    activations: Activations,
    bounds: Bounds,
    *,
    answer_bytes: float,
    writing: Writing | None = None,
    kept_batches: int = 0,
    modules: int = 0,
) -> Memory:
    """The parts of a replica's process, libraries apart; `answer_bytes` of a unit.

    `kept_batches` of what it writes keep their states while others are asked for, as in lock step;
    `modules` weights on it learn in float32, with a gradient and two moments each.
    """
    rows = min(activations.tokens, bounds.scoring_rows)
    lasting = {"weights": sizes.weight_bytes + sizes.most_quantised}
    if modules:
        lasting["modules"] = 4 * FLOAT32 * modules
    if writing is not None and kept_batches:
        lasting["kept batches"] = kept_batches * writing.states_bytes
    scoring = lasting | {
        "activations": activations.most_bytes,
        "logits": 2 * FLOAT32 * rows * sizes.vocabulary,
        "answers": round(2 * answer_bytes),
    }
    return _most(scoring, *([lasting | writing_parts(writing)] if writing is not None else []))


def copy_memory(sizes: ModelSizes, writing: Writing) -> Memory:
    """The parts of a process that hosts a copy of the student and writes with it."""
    weights = {"weights": sizes.weight_bytes + sizes.most_quantised}
    return Memory(weights | writing_parts(writing))


def writing_parts(writing: Writing) -> Parts:
    """What writing adds to weights."""
    return {
        "keys and values": writing.states_bytes,
        "reading": writing.reading_bytes,
        "drawing": writing.logits_bytes,
    }


def _most(*moments: Parts) -> Memory:
    return Memory(max(moments, key=lambda parts: sum(parts.values())))


def _weights(sizes: ModelSizes, setting: StudentSetting) -> int:
    """As a worker holds them: sharded under ZeRO-3, adapters' bases too."""
    if setting.zero < 3:
        return sizes.weight_bytes
    return -(-sizes.weight_bytes // setting.workers)


def _learning(
    sizes: ModelSizes, activations: Activations, setting: StudentSetting, bounds: Bounds
) -> Parts:
    """What a forward and a backward pass add: the loss beside the kept activations, or what the
    backward pass takes beyond them."""
    beyond = activations.most_bytes - activations.kept_bytes + sizes.most_quantised
    loss = loss_bytes(sizes, setting, bounds)
    head = sizes.vocabulary * sizes.width * setting.dtype_bytes if sizes.trains_head else 0
    parts = {
        "activations": activations.kept_bytes,
        "loss": loss,
        "backward pass": max(0, beyond + head - loss),
        "batch and answers": round(setting.answers * setting.positions * setting.answer_bytes),
    }
    if setting.zero > 0:
        parts["reduction bucket"] = _bucket(sizes, setting, bounds)
    if setting.zero == 3 and setting.workers > 1:
        sharded = min(sizes.num_weights, bounds.gathered_elements)
        parts["gathered weights"] = sizes.weight_bytes * sharded // max(1, sizes.num_weights)
    return parts


def _bucket(sizes: ModelSizes, setting: StudentSetting, bounds: Bounds) -> int:
    """A GPU gives the whole of DeepSpeed's buffer; a CPU the part that gradients are written to."""
    elements = bounds.bucket_elements
    if not setting.on_gpu:
        elements = min(elements, sizes.trained)
    return elements * setting.dtype_bytes


def _shares(setting: StudentSetting, *, from_stage: int) -> int:
    """Over how many workers something is divided that is sharded from a stage on."""
    return setting.workers if setting.zero >= from_stage else 1
