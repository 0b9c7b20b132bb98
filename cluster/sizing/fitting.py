"""Whether every process of an estimate has room, and what to change where one has none."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.sizing.estimate import Estimate, Side
from cluster.sizing.hardware import GIB, Device
from cluster.sizing.writers import COPIES
from shared.errors import ConfigError
from shared.in_words import in_bytes

# Of a process on a CPU: Python and the libraries that it imports, resident; on a GPU: CUDA's
# context and NCCL's buffers.
CPU_LIBRARIES = {"student": 600 * 10**6, "teacher": 550 * 10**6}
GPU_LIBRARIES = 10**9
LASTING = ("weights", "optimiser", "gradients", "update", "teacher's head", "modules")
WRITTEN = ("keys and values", "kept batches", "reading", "drawing")  # of models that write
RAY_BYTES = 10**9  # Ray's own processes of a node and the command
USABLE = 0.95  # Ray ends processes beyond this share of a node; a GPU's allocator needs the rest


@dataclass(frozen=True, slots=True)
class Room:
    """What a process has, and what it takes with its libraries."""

    side: Side
    taken: int
    has: float | None  # None: not known
    where: str

    @property
    def fits(self) -> bool | None:
        """None: not known."""
        return None if self.has is None else self.taken <= self.has * USABLE


def rooms(found: Estimate, *, gpu: Device | None, machine_bytes: int) -> list[Room]:
    """Each side's room: on GPUs of its own, or of a machine that all processes on CPUs share."""
    return [_room(found, side, gpu, machine_bytes) for side in found.sides]


def machine_total(found: Estimate) -> int:
    """Bytes that all processes on CPUs take together, if one machine has them all."""
    own = [side for side in found.sides if side.gpus == 0]
    stored = round(found.wire.object_store_bytes) if found.wire else 0
    return sum(side.processes * _taken(found, side) for side in own) + stored + RAY_BYTES


def refuse_unfit(found: Estimate, *, gpu: Device | None, machine_bytes: int) -> None:
    """Raise ConfigError naming the part that is too large and the way out."""
    for room in rooms(found, gpu=gpu, machine_bytes=machine_bytes):
        if room.fits is False:
            raise ConfigError(_sentence(found, room))
    total = machine_total(found)
    if any(side.gpus == 0 for side in found.sides) and total > machine_bytes * USABLE:
        largest = max(found.sides, key=lambda side: side.processes * _taken(found, side))
        raise ConfigError(
            f"all processes together take {in_bytes(total)} and the machine has "
            f"{in_bytes(machine_bytes)}; most is {_whose(largest)}, "
            f"{in_bytes(largest.processes * _taken(found, largest))}, of which "
            f"{largest.memory.largest}: "
            f"{_way_out(found, largest)}"
        )


def _room(found: Estimate, side: Side, gpu: Device | None, machine_bytes: int) -> Room:
    taken = _taken(found, side)
    if side.gpus == 0:
        return Room(side, taken, machine_bytes, "the machine")
    # A worker uses one GPU, and so does a copy; a replica lays its layers out over all it has.
    one_gpu = side.name in ("student", COPIES)
    share = min(1.0, side.gpus) if one_gpu else side.gpus
    has = None if gpu is None else gpu.memory_bytes * share
    name = "GPU" if gpu is None else gpu.name
    where = f"{name} x {share:g}" if share != 1 else name
    return Room(side, taken, has, where)


def _taken(found: Estimate, side: Side) -> int:
    """As measured, else by the formula."""
    if found.probe is not None:
        return found.probe.memory(side.name).total
    return side.memory.total + libraries(side)


def libraries(side: Side) -> int:
    """What a process takes beside its tensors, by the formula."""
    if side.gpus:
        return GPU_LIBRARIES
    return CPU_LIBRARIES["student" if side.name == "student" else "teacher"]


def _sentence(found: Estimate, room: Room) -> str:
    side, has = room.side, room.has or 0
    part = side.memory.largest
    return (
        f"{_whose(side)} takes {in_bytes(room.taken)} of {room.where}'s {has_in_words(has)}, most "
        f"of it for {part} ({in_bytes(side.memory.parts[part])}): {_way_out(found, side)}"
    )


def has_in_words(size_bytes: float) -> str:
    """The memory of a GPU or a machine, which are sold in GiB."""
    return f"{size_bytes / GIB:,.0f} GiB" if size_bytes >= GIB else in_bytes(size_bytes)


def _whose(side: Side) -> str:
    others = {"student": "a student worker", COPIES: "a copy of the student that writes"}
    return others.get(side.name, f"a replica of {side.name}")


def _way_out(found: Estimate, side: Side) -> str:
    ways = list(_ways(found, side))
    return f"{', '.join(ways[:-1])}{', or ' if len(ways) > 1 else ''}{ways[-1]}"


def _ways(found: Estimate, side: Side) -> Iterator[str]:
    """What would make the largest part smaller, the mildest first."""
    config, part = found.config, side.memory.largest
    student = config.student
    if part in WRITTEN:
        if config.source.batch_rows > 1:
            yield f"set source.batch_rows={config.source.batch_rows // 2}"
        yield f"lower source.max_new_tokens, {config.source.max_new_tokens}"
        return
    if part == "modules":
        yield f"lower teachers.{side.name}.online_modules.r"
    per_token = part not in LASTING
    if per_token and config.batch.micro_batch > 1:
        yield f"set batch.micro_batch={config.batch.micro_batch // 2}"
    if side.name == COPIES:
        yield "give copies a GPU of their own (rollouts.gpus), or take fewer (rollouts.replicas)"
    elif side.name != "student":
        if not per_token and config.teachers[side.name].quantisation != "nf4":
            yield f"set teachers.{side.name}.quantisation=nf4"
        if side.gpus:
            yield f"give it more GPUs (teachers.{side.name}.gpus)"
    elif per_token and not student.activation_checkpointing and part != "loss":
        yield "set student.activation_checkpointing=true"
    elif not per_token:
        if student.zero < (3 if part == "weights" else 2):
            yield f"set student.zero={3 if part == 'weights' else 2}"
        if student.train.kind == "full":
            yield "set student.train.kind=lora"
        elif student.train.kind == "lora":
            yield "set student.train.kind=qlora"
        yield "give it more student.workers" if student.zero else "take a smaller student"
    if per_token:
        yield f"lower data.context, {config.data.context}"
    yield "take a smaller model" if side.name != "student" else "take more memory"
