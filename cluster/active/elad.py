"""Explanation-guided distillation (ELAD, arXiv 2402.13098): the teacher reads the explanations that
the student is least sure of, step by step, and rewrites them from the first wrong step on.

Steps before it are kept as the student wrote them. A step is judged by the question and the steps
before it alone. What the teacher writes is learnt where it comes to the right answer, which is
known of training rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import xxhash

from cluster.active.asking import Ask, Log, Told, Writer
from cluster.active.chains import Chain, final_answer, steps_of
from cluster.active.filtering import UNDECODED, LeftOut, Reason, Row, plain, same
from cluster.active.material import Material
from cluster.active.records import Answers, Harvest, Kept
from shared.config.verbs.active import ELAD
from shared.text.formats import INVALID

INSTRUCTION = "Check how a question is answered, step by step."
VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
VERDICT_TOKENS = 8
NO_STEP = "(none)"


@dataclass(frozen=True, slots=True)
class Reading:
    """How far the teacher has read an explanation."""

    chain: Chain
    right: int = 0  # steps that it holds for right
    is_wrong: bool = False  # the next one is not
    reason: Reason | None = None  # why nothing of it is learnt

    @property
    def is_open(self) -> bool:
        """Whether there is a step to judge."""
        left = self.right < len(self.chain.steps)
        return left and not self.is_wrong and self.reason is None


def harvest(
    material: Material,
    answers: Answers,
    number: int,
    log: Log,
    writer: Writer,
    earlier: Sequence[Row],
) -> Harvest:
    """What a round's explanations give."""
    settings = material.settings
    assert isinstance(settings, ELAD)
    unsure = [chain for chain in answers.chains if chain.uncertainty > 0 and chain.steps]
    chosen = sorted(unsure, key=lambda chain: (-chain.uncertainty, chain.key))
    readings = [Reading(chain) for chain in chosen[: settings.questions]]
    first = [_verify(material, settings, one, number) for one in readings[:1]]
    while any(one.is_open for one in readings):
        readings = _judged(material, settings, readings, number, log, writer)
    answered = sum(1 for one in readings if one.right or one.is_wrong or one.reason == "malformed")
    found: list[Kept | LeftOut] = []
    known = {(same(row.prompt), plain(row.response)) for row in earlier}
    wrong = [one for one in readings if one.is_wrong]
    fitting, long = _with_room(
        [(one, _correct(material, settings, one, number)) for one in wrong], writer
    )
    found += [LeftOut(_text(one), "too long") for one in long]
    wrong, asks = [one for one, _ in fitting], [ask for _, ask in fitting]
    told = log.ask(asks, writer, budget=settings.budget_tokens)
    for one, correction in zip(wrong, told, strict=False):
        found.append(_revised(material, settings, one, correction, known))
    found += [LeftOut(_text(one), "budget used up") for one in wrong[len(told) :]]
    found += [
        LeftOut(_text(one), one.reason or "nothing to correct")
        for one in readings
        if not one.is_wrong
    ]
    return Harvest(
        asked=len(readings),
        answered=answered,
        smallest=sum(writer.size(ask.text) + ask.max_new_tokens for ask in first),
        kept=tuple(one for one in found if isinstance(one, Kept)),
        left_out=tuple(one for one in found if isinstance(one, LeftOut)),
    )


def _judged(
    material: Material,
    settings: ELAD,
    readings: Sequence[Reading],
    number: int,
    log: Log,
    writer: Writer,
) -> list[Reading]:
    """All readings a step further, as far as the budget goes."""
    waiting = [one for one in readings if one.is_open]
    fitting, long = _with_room(
        [(one, _verify(material, settings, one, number)) for one in waiting], writer
    )
    waiting, asks = [one for one, _ in fitting], [ask for _, ask in fitting]
    told = log.ask(asks, writer, budget=settings.budget_tokens)
    after = [_after(one, answer) for one, answer in zip(waiting, told, strict=False)]
    after += [replace(one, reason="budget used up") for one in waiting[len(told) :]]
    after += [replace(one, reason="too long") for one in long]
    by_key = {one.chain.key: one for one in after}
    return [by_key.get(one.chain.key, one) for one in readings]


def _with_room(
    asked: Sequence[tuple[Reading, Ask]], writer: Writer
) -> tuple[list[tuple[Reading, Ask]], list[Reading]]:
    """Those whose prompt leaves the teacher room, and the readings of the others."""
    fitting = [(one, ask) for one, ask in asked if writer.has_room(ask)]
    return fitting, [one for one, ask in asked if not writer.has_room(ask)]


def _after(reading: Reading, told: Told) -> Reading:
    verdict = VERDICT.match(told.answer.text)
    if verdict is None:
        return replace(reading, reason="malformed")
    if verdict[1].lower() == "yes":
        return replace(reading, right=reading.right + 1)
    return replace(reading, is_wrong=True)


def _revised(
    material: Material,
    settings: ELAD,
    reading: Reading,
    told: Told,
    known: set[tuple[str, str]],
) -> Kept | LeftOut:
    """The explanation with the teacher's steps in place of the wrong one and all after it."""
    document, text = material.train[reading.chain.key], told.answer.text
    steps = [*reading.chain.steps[: reading.right], *steps_of(text)]
    row = Row(document.prompt, "\n".join(steps))
    pair = (same(row.prompt), plain(row.response))
    right = final_answer(document.response, settings.answer_marker)
    reason: Reason | None = None
    if not text.strip() or UNDECODED in text or INVALID.search(text):
        reason = "malformed"
    elif final_answer(row.response, settings.answer_marker) != right:
        reason = "wrong answer"
    elif pair[1] == plain(document.response):
        reason = "in training"
    elif pair in known:
        reason = "written before"
    elif not material.fits(row):
        reason = "too long"
    if reason is not None:
        return LeftOut(row.response, reason)
    known.add(pair)
    return Kept(row, told.digest, told.ask.parents)


def _verify(material: Material, settings: ELAD, reading: Reading, number: int) -> Ask:
    parts = [
        *_read(material, settings, reading),
        f"Next step:\n{reading.chain.steps[reading.right]}",
        "Is the next step right? Answer with yes or no.",
    ]
    keys = (reading.chain.key,)
    ask = _ask(material, settings, parts, number, f"verify/{reading.right}", keys)
    return replace(ask, max_new_tokens=min(VERDICT_TOKENS, ask.max_new_tokens))


def _correct(material: Material, settings: ELAD, reading: Reading, number: int) -> Ask:
    shots = material.shots(1)
    marker = settings.answer_marker
    has_marker = any(marker in material.train[key].response for key in shots)
    last = f"{marker} and the answer" if has_marker else "the answer"
    parts = [
        *(f"A question and its right steps:\n{_shot(material, key)}" for key in shots),
        *_read(material, settings, reading),
        f"Next step, which is wrong:\n{reading.chain.steps[reading.right]}",
        "Write the right next step and all steps that follow, one a line and nothing else. The "
        f"last line is {last}.",
    ]
    keys = tuple(dict.fromkeys([*shots, reading.chain.key]))
    return _ask(material, settings, parts, number, "correct", keys)


def _read(material: Material, settings: ELAD, reading: Reading) -> list[str]:
    steps = "\n".join(reading.chain.steps[: reading.right]) or NO_STEP
    return [
        settings.instruction or INSTRUCTION,
        f"Question:\n{material.row(reading.chain.key).prompt}",
        f"Steps so far, which are right:\n{steps}",
    ]


def _ask(
    material: Material,
    settings: ELAD,
    parts: Sequence[str],
    number: int,
    use: str,
    keys: tuple[str, ...],
) -> Ask:
    seed = f"{material.config.seed}/{number}/{use}/{keys[-1]}"
    return Ask(
        text="\n\n".join(parts),
        round=number,
        purpose=use.partition("/")[0],
        parents=keys,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=xxhash.xxh32_intdigest(seed.encode()) >> 1,
    )


def _shot(material: Material, key: str) -> str:
    row = material.row(key)
    return f"{row.prompt}\n{row.response}"


def _text(reading: Reading) -> str:
    return "\n".join(reading.chain.steps)
