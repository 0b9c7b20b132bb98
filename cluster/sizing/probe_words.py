"""A probe in words: the formula and what was measured side by side, the steps' time by part."""

from collections.abc import Iterator

from cluster.sizing.estimate import Estimate, Side
from cluster.sizing.fitting import libraries
from cluster.sizing.measured import STEP_PART, Logits, ProcessMemory, TeacherProbe
from shared.in_words import in_bytes

WIDTH = 20
LASTING = ("weights", "optimiser", "teacher's head")


def side_by_side(found: Estimate, side: Side) -> Iterator[str]:
    """A side's parts by the formula, measured, and the second as a share of the first."""
    assert found.probe is not None, "something is measured"
    measured = found.probe.memory(side.name)
    yield f"  {'':<{WIDTH}}{'formula':>12}{'measured':>12}{'ratio':>8}"
    for name, formula, size in parts(side, measured):
        if formula or size:
            said = "-" if formula is None else in_bytes(formula)
            ratio = f"{size / formula:>8.2f}" if formula and size else ""
            yield f"  {name:<{WIDTH}}{said:>12}{in_bytes(size):>12}{ratio}"


def parts(side: Side, measured: ProcessMemory) -> Iterator[tuple[str, int | None, int]]:
    """Each part's name, bytes by the formula, None where it has none, and measured bytes."""
    formula = dict(side.memory.parts)
    grouped = {name: formula.pop(name, 0) for name in LASTING}
    grouped["gradients"] = formula.pop("gradients", 0) + formula.pop("reduction bucket", 0)
    grouped[STEP_PART] = sum(formula.values())
    yield from ((name, size, measured.parts.get(name, 0)) for name, size in grouped.items())
    yield "kept by allocators", None, measured.kept
    yield "libraries", libraries(side), measured.libraries
    yield "in all", side.memory.total + libraries(side), measured.total


def bounded(found: Estimate) -> Iterator[str]:
    """That no tensor of all positions and ids was there, and whether later steps took more."""
    assert found.probe is not None, "something is measured"
    student = max(found.probe.student, key=lambda one: one.memory.total)
    yield _bounded("the student", student.logits)
    for name, replicas in found.probe.teachers.items():
        yield _bounded(name, max(replicas, key=_widest).logits)
    more = student.later_bytes - student.longest_bytes
    own = len(student.steps)
    if more > 0:
        yield f"the steps after those of the longest rows took {in_bytes(more)} more"
    else:
        yield f"no step after those of the longest rows took more, of {own} that are timed"


def speeds(found: Estimate) -> Iterator[str]:
    """Where a step's time goes, and the speed of each side."""
    assert found.probe is not None, "something is measured"
    student, workers = found.probe.student[0], len(found.probe.student)
    step = student.step
    rest = step["seconds"] - step["wait"] - step["compute"] - step["optimiser"]
    yield (
        f"waits for the teacher {step['wait']:.3g} s, forward and backward {step['compute']:.3g}, "
        f"optimiser {step['optimiser']:.3g}, rest {rest:.3g}; {len(student.steps)} steps"
    )
    busy = step["seconds"] - step["wait"]
    yield f"student {step['tokens'] / workers / busy:,.0f} loss tokens/s a worker"
    for name in found.probe.teachers:
        replicas = found.probe.replicas(name)
        rate = sum(one.tokens_per_s for one in replicas) / len(replicas)
        yield f"{name} {rate:,.0f} tokens/s a replica"


def _widest(one: TeacherProbe) -> int:
    return 0 if one.logits is None else one.logits.widest


def _bounded(side: str, logits: Logits | None) -> str:
    if logits is None:
        return f"{side} was not followed"
    if logits.chunk is None:
        return f"{side}: answers name all {logits.vocabulary:,} ids of every position, as asked"
    if logits.positions <= logits.chunk:
        return (
            f"{side}: all {logits.positions:,} positions with loss are one chunk, which has "
            f"{logits.chunk:,} at most"
        )
    return (
        f"{side}: no tensor of {logits.positions:,} positions x {logits.vocabulary:,} ids; the "
        f"widest has {logits.widest:,} positions"
    )
