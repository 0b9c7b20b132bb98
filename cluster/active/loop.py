"""The rounds: train, evaluate, choose, ask, filter, and train on what was kept.

Who trains, answers and writes is passed in. Every stage is a function of the files of those before
it, and a stage whose file is there is not done again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash

from cluster.active import elad, pgkd
from cluster.active.asking import Log, Writer
from cluster.active.classes import accuracy
from cluster.active.filtering import Row
from cluster.active.folder import ActiveDir, read_json, read_lines, write_json, write_lines
from cluster.active.material import Material
from cluster.active.records import Answers, Harvest
from cluster.active.standing import Standing, standing_of
from cluster.evaluation.items import Item
from shared.config.run import Config
from shared.errors import ConfigError, UserError
from shared.in_words import counted
from shared.text.sources import sources_of

HARVESTS = {"pgkd": pgkd.harvest, "elad": elad.harvest}
SURE = "The student is sure of every explanation that it was asked for."
PROVENANCE = "provenance"  # a field of synthetic rows that training does not read


@dataclass(frozen=True, slots=True)
class Parts:
    """Who trains a round, answers as its student, and writes."""

    train: Callable[[Config], None]
    answer: Callable[[Config, Sequence[Item], Sequence[Item]], Answers]  # training, validation
    writer: Writer
    say: Callable[[str], None]


def teach(material: Material, folder: ActiveDir, parts: Parts) -> Standing:
    """All rounds to their end; the best one's student is the export then. Raises what the
    parts raise; the same call goes on."""
    log, results = Log(folder.asked), list[Answers]()
    while True:
        number = len(results)
        results.append(_answers(material, folder, results, parts))
        standing = standing_of(results, material.settings)
        parts.say(_said(number, results[-1], standing))
        if not standing.stopped and not folder.round(number).rows.exists():
            try:
                standing = _grown(material, folder, results[-1], standing, number, log, parts)
            except UserError as error:  # what there is by then is reported and exported first
                standing = replace(standing, stopped=str(error), refused=True)
        if standing.stopped:
            folder.put_export(standing.best)
            return standing


def config_of(material: Material, folder: ActiveDir, number: int, best: int) -> Config:
    """The run of a round: on the user's text and all that was kept before, from the best student so
    far, or from the student of the config."""
    config, run = material.config, folder.round(number).run.path
    domain, student = config.domains[material.domain], config.student
    written = [str(folder.round(earlier).rows) for earlier in range(number)]
    grown = domain.model_copy(update={"train": [*sources_of(domain, "train"), *written]})
    if number and material.settings.start == "best":
        export = {"model": str(folder.round(best).run.export), "revision": None}
        student = student.model_copy(update=export)
    return config.model_copy(
        update={
            "name": run.name,
            "paths": config.paths.model_copy(update={"runs": str(run.parent)}),
            "seed": config.seed if not number else _seed(config.seed, number),
            "domains": config.domains | {material.domain: grown},
            "student": student,
            "active": None,
        }
    )


def rows_of(material: Material, folder: ActiveDir, number: int) -> list[Row]:
    """What a round has kept."""
    names = _names(material)
    path = folder.round(number).rows
    return [Row(*(line[name] for name in names)) for line in read_lines(path)]


def _answers(
    material: Material, folder: ActiveDir, results: Sequence[Answers], parts: Parts
) -> Answers:
    number = len(results)
    path = folder.round(number).answers
    if path.exists():
        return Answers.from_dict(read_json(path))
    best = standing_of(results, material.settings).best if results else 0
    config = config_of(material, folder, number, best)
    parts.train(config)
    asked = (material.train_items(number), material.validation_items())
    found = parts.answer(config, *asked)
    write_json(path, found.as_dict())
    return found


def _grown(
    material: Material,
    folder: ActiveDir,
    answers: Answers,
    standing: Standing,
    number: int,
    log: Log,
    parts: Parts,
) -> Standing:
    """The standing once the teacher has written, or could not."""
    earlier = [row for one in range(number) for row in rows_of(material, folder, one)]
    budget = material.settings.budget_tokens
    harvest = HARVESTS[material.settings.method]
    found = harvest(material, answers, number, log, parts.writer, earlier)
    if not found.asked:
        return replace(standing, stopped=SURE)
    if not found.answered and not log.spent():
        raise ConfigError(
            f"active.budget_tokens is {budget}, but the first prompt and its answer may take "
            f"{found.smallest}; raise it, or lower active.max_new_tokens or what a prompt holds"
        )
    if not found.answered or found.is_cut_off:
        return replace(
            standing,
            stopped=f"The budget of {budget:,} tokens (active.budget_tokens) is used up but for "
            f"{budget - log.spent():,}, in which no prompt of round {number} fits.",
        )
    round_dir = folder.round(number)
    write_lines(round_dir.left_out, ({"reason": o.reason, "text": o.text} for o in found.left_out))
    parts.say(_harvest_said(number, found))
    if not found.kept:
        return replace(standing, stopped=_nothing(found, number, folder), refused=True)
    write_lines(round_dir.rows, _lines(material, found, number, parts.writer))
    return standing


def _lines(material: Material, found: Harvest, number: int, writer: Writer) -> list[dict]:
    prompt, response = _names(material)
    teacher = dict(writer.fingerprint)
    return [
        {
            prompt: kept.row.prompt,
            response: kept.row.response,
            PROVENANCE: {
                "round": number,
                "asked": kept.asked,
                "parents": list(kept.parents),
                "teacher": teacher,
            },
        }
        for kept in found.kept
    ]


def _names(material: Material) -> tuple[str, str]:
    """What the domain's rows call prompt and response."""
    columns = material.config.domains[material.domain].columns
    return columns.get("prompt", "prompt"), columns.get("response", "response")


def _seed(seed: int, number: int) -> int:
    """Another order of rows in every round, which may start from the student of the one before."""
    return xxhash.xxh32_intdigest(f"{seed}/round {number}".encode())


def _said(number: int, found: Answers, standing: Standing) -> str:
    best = "the best so far" if standing.best == number else f"round {standing.best} is better"
    return (
        f"round {number}: accuracy {accuracy(found.validation):.3f} on "
        f"{counted(len(found.validation), 'validation prompt')}, loss {found.loss:.3f}; {best}"
    )


def _harvest_said(number: int, found: Harvest) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in found.reasons.items())
    left_out = f"; {len(found.left_out)} left out: {reasons}" if reasons else ""
    return (
        f"round {number}: the teacher answered {found.answered} of {counted(found.asked, 'prompt')}"
        f", {len(found.kept)} rows kept{left_out}"
    )


def _nothing(found: Harvest, number: int, folder: ActiveDir) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in found.reasons.items())
    return (
        f"nothing that the teacher wrote in round {number} is learnt ({reasons}); see "
        f"{folder.round(number).left_out}, change active.instruction or "
        "active.temperature, and the same command goes on"
    )
