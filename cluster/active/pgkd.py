"""Performance-guided distillation (PGKD, arXiv 2411.05045): the teacher writes rows for the classes
that the student is weak in or mixes up.

A prompt has, in the order of the public implementation: the classes, training rows that are always
the same, the student's report on validation text (numbers alone), rows that it answers rightly,
rows that it answers wrongly, and hard negatives: wrong with the most confidence, with the class
that each is taken for. All rows are training text. Several prompts of a round share the first
three, and divide the rows by turns.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import xxhash

from cluster.active.answers import Answer, mistakes
from cluster.active.asking import Ask, Log, Told, Writer
from cluster.active.classes import ClassScore, by_class, weakest
from cluster.active.filtering import LeftOut, Row, Sieve, rows_in
from cluster.active.material import Material
from cluster.active.records import Answers, Harvest, Kept
from shared.config.verbs.active import PGKD

INSTRUCTION = "Write training rows for a text classifier."
FORM = '{"prompt": "...", "response": "CLASS"}'
REPAIR = (
    f"These rows shall be JSON, one object a line, as {FORM}, with a class of the list. Write them "
    "again so, and nothing else."
)


def asks(material: Material, answers: Answers, number: int) -> list[Ask]:
    """The prompts of a round."""
    settings = _settings(material)
    hard = mistakes(answers.train, material.classes)[: settings.prompts * settings.hard_negatives]
    taken = {answer.key for answer in hard}
    right = [answer for answer in answers.train if answer.is_right]
    wrong = [a for a in answers.train if not a.is_right and a.key not in taken]
    scores = by_class(answers.validation, material.classes)
    shots = material.shots(settings.shots)
    found = []
    for turn in range(settings.prompts):
        parts = [
            _turn(rows, turn, settings.prompts, count)
            for rows, count in (
                (right, settings.correct),
                (wrong, settings.incorrect),
                (hard, settings.hard_negatives),
            )
        ]
        keys = dict.fromkeys([*shots, *(answer.key for part in parts for answer in part)])
        text = prompt(material, shots, scores, *parts)
        found.append(_ask(settings, material, text, number, f"rows/{turn}", tuple(keys)))
    return found


def prompt(
    material: Material,
    shots: Sequence[str],
    scores: dict[str, ClassScore],
    right: Sequence[Answer],
    wrong: Sequence[Answer],
    hard: Sequence[Answer],
) -> str:
    """One prompt. Its rows are those of the training text with the keys of the answers."""
    settings = _settings(material)
    report = [
        f"{name}: precision {s.precision:.2f}, recall {s.recall:.2f}, F1 {s.f1:.2f}, rows {s.rows}"
        for name in weakest(scores, settings.report_classes)
        for s in [scores[name]]
    ]
    blocks: list[tuple[str, list[str]]] = [
        ("", [settings.instruction or INSTRUCTION]),
        ("Classes:", [", ".join(material.classes)]),
        ("Rows:", [_line(material.row(key)) for key in shots]),
        ("How a student does on its weakest classes:", report),
        ("It answers rightly:", [_line(material.row(a.key)) for a in right]),
        ("It answers wrongly:", [_line(material.row(a.key), answered=a.text) for a in wrong]),
        ("It is sure of a wrong class:", [_mistake(material, a) for a in hard]),
        ("", [_wanted(settings.rows)]),
    ]
    said = ["\n".join([head, *lines] if head else lines) for head, lines in blocks if lines]
    return "\n\n".join(said)


def harvest(
    material: Material,
    answers: Answers,
    number: int,
    log: Log,
    writer: Writer,
    earlier: Sequence[Row],
) -> Harvest:
    """What a round's prompts give. An answer without a row is sent back once; what fails again is
    left out."""
    settings, sieve = _settings(material), material.sieve(earlier)
    wave = asks(material, answers, number)
    told = log.ask(wave, writer, budget=settings.budget_tokens)
    broken = [one for one in told if one.answer.text.strip() and not rows_in(one.answer.text)]
    pairs = [(one, _repair(settings, material, one, number)) for one in broken]
    pairs = [(one, repair) for one, repair in pairs if writer.has_room(repair)]
    broken, repairs = [one for one, _ in pairs], [repair for _, repair in pairs]
    mended = log.ask(repairs, writer, budget=settings.budget_tokens)
    answered = {one.digest: one for one in told}
    answered |= {one.digest: again for one, again in zip(broken, mended, strict=False)}
    found: list[Kept | LeftOut] = []
    for one in answered.values():
        found += _sifted(one, material, sieve)
    return Harvest(
        asked=len(wave),
        answered=len(told),
        smallest=writer.size(wave[0].text) + settings.max_new_tokens,
        kept=tuple(one for one in found if isinstance(one, Kept)),
        left_out=tuple(one for one in found if isinstance(one, LeftOut)),
    )


def _sifted(told: Told, material: Material, sieve: Sieve) -> Iterator[Kept | LeftOut]:
    """Rows of one answer, kept or left out."""
    rows = rows_in(told.answer.text)
    if not rows:
        yield LeftOut(told.answer.text, "malformed")
    for row in rows:
        reason = sieve.reason(row, fits=material.fits(row))
        if reason is None:
            yield Kept(row, told.digest, told.ask.parents)
        else:
            yield LeftOut(_line(row), reason)


def _settings(material: Material) -> PGKD:
    assert isinstance(material.settings, PGKD), "the loop takes the method of the config"
    return material.settings


def _repair(settings: PGKD, material: Material, told: Told, number: int) -> Ask:
    classes = f"Classes:\n{', '.join(material.classes)}"
    text = "\n\n".join([classes, told.answer.text.strip(), REPAIR])
    use = f"repair/{told.digest}"
    return _ask(settings, material, text, number, use, told.ask.parents)


def _ask(
    settings: PGKD, material: Material, text: str, number: int, use: str, keys: tuple[str, ...]
) -> Ask:
    return Ask(
        text=text,
        round=number,
        purpose=use.partition("/")[0],
        parents=keys,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=xxhash.xxh32_intdigest(f"{material.config.seed}/{number}/{use}".encode()) >> 1,
    )


def _turn(answers: Iterable[Answer], turn: int, turns: int, count: int) -> list[Answer]:
    """Those of one prompt of several, who take them by turns."""
    return list(answers)[turn::turns][:count]


def _wanted(rows: int) -> str:
    return (
        f"Write {rows} new rows, most of them for the classes above that are weak or mixed up, and "
        f"no copy of any. Write one JSON object a line, as {FORM}, and nothing else."
    )


def _mistake(material: Material, answer: Answer) -> str:
    sure = round(answer.probability, 3)
    return _line(material.row(answer.key), answered=answer.text, probability=sure)


def _line(row: Row, **more: Any) -> str:
    return json.dumps({"prompt": row.prompt, "response": row.response, **more}, ensure_ascii=False)
