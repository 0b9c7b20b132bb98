"""An estimate in words: what `tutelage plan` prints."""

from collections.abc import Iterator, Sequence

from cluster.sizing.estimate import Estimate, Side, seconds_of
from cluster.sizing.fitting import Room, has_in_words
from cluster.sizing.probe_words import bounded, side_by_side, speeds
from cluster.sizing.rates import cost, gpus_of
from cluster.sizing.writers import COPIES
from shared.in_words import duration, in_bytes

WIDTH = 22


def lines(found: Estimate, rooms: Sequence[Room], *, price: float | None) -> Iterator[str]:
    """All of it, line by line."""
    config = found.config
    yield (
        f"{config.name}: {config.steps:,} steps of {config.batch.rows_per_step} rows of up to "
        f"{found.tokens:,} tokens, {config.batch.micro_batch} to a forward pass"
    )
    for room in rooms:
        yield ""
        yield from _memory(found, room)
    yield ""
    yield from _wire(found)
    yield from _time(found, price)
    yield from (f"{'Note':<{WIDTH}}{note}" for note in found.notes)


def _memory(found: Estimate, room: Room) -> Iterator[str]:
    side = room.side
    kind = _how(found, side)
    copies = f"{side.processes} x " if side.processes > 1 else ""
    weights = f"{side.sizes.num_weights / 1e6:,.1f} M weights"
    yield f"{copies}{side.name}, {side.model}: {weights}, {kind}"
    if found.probe is not None:
        yield from side_by_side(found, side)
    else:
        for name, size in side.memory.parts.items():
            if size:
                yield f"  {name:<{WIDTH - 2}}{in_bytes(size):>12}"
    verdict = {True: "fits", False: "does not fit", None: "name it with --gpu"}[room.fits]
    has = "memory not known" if room.has is None else has_in_words(room.has)
    if found.probe is not None:
        yield f"  {room.where} ({has}): {verdict}"
        return
    said = f"with its libraries; {room.where} ({has}): {verdict}"
    yield f"  {'in all':<{WIDTH - 2}}{in_bytes(room.taken):>12}  {said}"


def _how(found: Estimate, side: Side) -> str:
    if side.name == COPIES:
        return f"{found.config.student.dtype}, copies of the student that write"
    return _how_student(found) if side.name == "student" else _how_teacher(found, side)


def _how_student(found: Estimate) -> str:
    student = found.config.student
    trained = found.student.sizes.trained / found.student.sizes.num_weights
    said = [
        student.train.kind,
        student.dtype,
        f"ZeRO {student.zero}",
        f"{trained:.1%} of it learns",
    ]
    return ", ".join(said + ["activation checkpointing"] * student.activation_checkpointing)


def _how_teacher(found: Estimate, side: Side) -> str:
    teacher = found.config.teachers[side.name]
    few_bits = f", {teacher.quantisation}" if teacher.quantisation != "none" else ""
    return teacher.dtype + few_bits


def _wire(found: Estimate) -> Iterator[str]:
    wire = found.wire
    if wire is None:
        yield f"{'Wire':<{WIDTH}}nothing: no loss asks a teacher"
    else:
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in wire.bytes_per_token.items())
        unit = found.config.task.unit
        yield f"{'Wire':<{WIDTH}}{wire.total_per_token:,.0f} bytes a {unit}: {parts}"
        rate = ""
        if found.pace is not None:
            per_s = wire.total_per_token * wire.tokens_per_step / found.pace.step_s
            rate = f", {in_bytes(per_s)} a second"
        step = in_bytes(wire.total_per_token * wire.tokens_per_step)
        yield f"{'':<{WIDTH}}{step} a step at most{rate}"
        yield f"{'Object store':<{WIDTH}}{in_bytes(wire.object_store_bytes)} under way at one time"
        stored = in_bytes(wire.store_bytes)
        yield f"{'targets.store':<{WIDTH}}{stored} at most, if no row comes twice"
        ids = f"{wire.shared_vocab:,} shared ids"
        if not wire.vocab_is_known:
            yield f"{'':<{WIDTH}}for {ids}, as many as the smaller head has; no tokenizer is there"
    kept = found.config.checkpoints.keep + 1
    size = in_bytes(found.checkpoint_bytes)
    yield f"{'Checkpoints':<{WIDTH}}{in_bytes(kept * found.checkpoint_bytes)}: {kept} of {size}"
    if found.payloads:
        yield f"{'A token costs':<{WIDTH}}by what is asked:"
    for one in found.payloads:
        mark = "  <- configured" if one.chosen else ""
        head = f" and the head once, {in_bytes(one.head_bytes)}" if one.head_bytes else ""
        yield f"  {one.name:<30}{one.bytes_per_token:>9,.0f} bytes{head}{mark}"


def _time(found: Estimate, price: float | None) -> Iterator[str]:
    pace, config = found.pace, found.config
    gpus = gpus_of(config)
    if pace is None:
        way = "name GPUs (--gpu)" if gpus else "the config gives no process a GPU (gpus)"
        yield f"{'Time':<{WIDTH}}not known: {way}, or measure: --probe"
        return
    how = "by operations" if pace.waited_s is None else "measured"
    yield f"{'Step':<{WIDTH}}{pace.step_s:.3g} s ({how}): student {pace.student_s:.3g} s"
    if found.probe is not None:
        yield from (f"{'':<{WIDTH}}{said}" for said in speeds(found))
        yield from (f"{'Bounded':<{WIDTH}}{said}" for said in bounded(found))
    if pace.teacher_s:
        yield (
            f"{'Replicas':<{WIDTH}}{pace.replicas_per_worker:.2g} keep one worker busy, "
            f"{pace.busy_replicas} all of them; there are {pace.replicas}"
        )
    total = seconds_of(found) or 0.0
    rate = config.batch.rows_per_step * found.tokens / pace.step_s
    apart = f"{rate:,.0f} tokens/s, evaluation apart"
    if found.probe is not None:
        beside = duration(found.probe.whole_run_s(config))
        apart = (
            f"of which evaluations and checkpoints {beside}" + ", baseline apart" * config.baseline
        )
    yield f"{'Time':<{WIDTH}}{duration(total)} for {config.steps:,} steps, {apart}"
    if price is not None:
        money = cost(seconds=total, gpus=gpus, price=price)
        yield f"{'Cost':<{WIDTH}}{money:,.2f} for {gpus:g} GPUs at {price:g} an hour"
