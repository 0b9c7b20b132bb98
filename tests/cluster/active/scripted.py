"""Rounds in milliseconds: a student that answers as its nearest training row, and a teacher that
writes from a script. Everything between them is real."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from cluster.active.answers import Answer
from cluster.active.asking import Ask, Written
from cluster.active.folder import ActiveDir
from cluster.active.loop import Parts, teach
from cluster.active.material import Material, material_of
from cluster.active.records import Answers
from cluster.active.standing import Standing
from cluster.evaluation.items import Item
from shared.config.file import load_config, resolve
from shared.config.run import Config
from shared.run.run_dir import RunDir
from shared.text.documents import Document
from shared.text.sources import read_documents, sources_of
from tests.cluster.jobs import write_job
from tests.tiny import Pair

COLOURS = {
    "red": ["rose", "blood", "fire", "ruby", "brick"],
    "green": ["leaf", "moss", "lime", "frog", "pine"],
    "blue": ["sky", "sea", "ink", "jay", "steel"],
}
ACTIVE = {
    "method": "pgkd",
    "instruction": "Write rows.",
    "rounds": 3,
    "patience": 4,
    "budget_tokens": 50_000,
    "train_prompts": 60,
    "validation_prompts": 18,
    "max_new_tokens": 60,
    "temperature": 0.5,
    "max_classes": 5,
    "prompts": 2,
    "rows": 3,
    "shots": 2,
    "correct": 2,
    "incorrect": 1,
    "hard_negatives": 2,
    "report_classes": 2,
}


class Killed(BaseException):
    """What ends a command at once."""


def rows(count: int, *, seed: int, words: int = 5) -> list[dict[str, str]]:
    """Different prompts with their colours, from the first `words` words of each."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        colour = draw.choice([*COLOURS])
        word = draw.choice(COLOURS[colour][:words])
        found[f"the {word} number {draw.randint(1, 999)}"] = colour
    return [{"prompt": prompt, "response": colour} for prompt, colour in found.items()]


def write_rows(path: Path, found: Sequence[dict[str, str]]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def active_job(folder: Path, pair: Pair, **parts: object) -> Path:
    """A config with training rows that know two words of each colour and are at odds about others,
    and validation rows that ask about all five."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = [*COLOURS]
    lone = [{"prompt": f"the oddity{n} number 0", "response": colours[n * n % 3]} for n in range(9)]
    write_rows(folder / "known.jsonl", [*rows(40, seed=1, words=2), *lone])
    write_rows(folder / "held.jsonl", rows(30, seed=2))
    domains = {"colours": {"train": "known.jsonl", "validation": "held.jsonl"}}
    fixed = {"mixture": {"policy": "fixed"}, "active": ACTIVE, "name": "rounds", "steps": 2}
    return write_job(folder, pair, **({"domains": domains} | fixed | parts))


def config_of(job: Path, *overrides: str) -> Config:
    """The config of a job, resolved."""
    return resolve(load_config(job, overrides), base=job.parent)


def material_for(config: Config) -> Material:
    """Its material, in the tokens of its student."""
    return material_of(config, AutoTokenizer.from_pretrained(config.student.model))


def line(prompt: str, response: str) -> str:
    """A row as a teacher writes it."""
    return json.dumps({"prompt": prompt, "response": response})


def new_rows(ask: Ask) -> str:
    """Three rows with words that training rows lack, different for every ask."""
    draw = random.Random(ask.seed)
    colour = draw.choice([*COLOURS])
    return "\n".join(
        line(f"the {word} number {draw.randint(1000, 9999)}", colour)
        for word in COLOURS[colour][2:]
    )


class Script:
    """A teacher that writes what a function says."""

    def __init__(self, say: Callable[[Ask], str] = new_rows, *, tick: Callable[[], None]) -> None:
        self.fingerprint = {"model": "script"}
        self.asked: list[Ask] = []
        self._say, self._tick = say, tick
        self.room = 100_000

    def size(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def has_room(self, ask: Ask) -> bool:
        """Of so many words in all."""
        return self.size(ask.text) + ask.max_new_tokens <= self.room

    def write(self, asks: Sequence[Ask]) -> Iterator[Written]:
        """One after the other."""
        for ask in asks:
            self._tick()
            self.asked.append(ask)
            text = self._say(ask)
            yield Written(text, self.size(ask.text), self.size(text), cut=False)


def nearest(prompt: str, known: Sequence[Document]) -> tuple[str, float]:
    """The response of the training row with the most words in common, and how sure that is."""
    words = set(prompt.split())
    shared = [len(words & set(document.prompt.split())) for document in known]
    best = max(shared)
    return known[shared.index(best)].response, best / len(words)


class Rounds:
    """Rounds of a config in a folder; `kill_at` is the step of a part at which all ends."""

    def __init__(
        self,
        config: Config,
        say: Callable[[Ask], str] = new_rows,
        *,
        kill_at: int | None = None,
        accuracies: Sequence[float] = (),
    ) -> None:
        self.config, self.ticks, self._kill_at = config, 0, kill_at
        self.material = material_for(config)
        self.folder = ActiveDir(Path(config.paths.runs) / config.name)
        self.writer = Script(say, tick=self._tick)
        self.trained: list[Config] = []
        self.said: list[str] = []
        self._accuracies = list(accuracies)

    def teach(self) -> Standing:
        """All rounds."""
        parts = Parts(self._train, self._answer, self.writer, self.said.append)
        return teach(self.material, self.folder, parts)

    def _tick(self) -> None:
        if self.ticks == self._kill_at:
            raise Killed
        self.ticks += 1

    def _train(self, config: Config) -> None:
        self._tick()
        self.trained.append(config)
        export = RunDir(Path(config.paths.runs) / config.name).export
        export.mkdir(parents=True, exist_ok=True)
        (export / "student.txt").write_text(config.name)

    def _answer(self, config: Config, train: Sequence[Item], validation: Sequence[Item]) -> Answers:
        self._tick()
        domain = config.domains[self.material.domain]
        known = list(
            read_documents(sources_of(domain, "train"), root=Path("/"), columns=domain.columns)
        )
        found = [[self._answered(item, known) for item in items] for items in (train, validation)]
        if self._accuracies:
            self._set(found[1], self._accuracies[len(self.trained) - 1])
        return Answers(tuple(found[0]), tuple(found[1]), loss=2.0 - 0.1 * len(known))

    @staticmethod
    def _set(answers: list[Answer], accuracy: float) -> None:
        """Make a share of answers right, and the others wrong."""
        for number, answer in enumerate(answers):
            is_right = number < round(accuracy * len(answers))
            text = answer.right if is_right else "none"
            answers[number] = Answer(answer.key, answer.right, text, answer.probability)

    @staticmethod
    def _answered(item: Item, known: Sequence[Document]) -> Answer:
        assert item.document is not None
        others = [document for document in known if document.prompt != item.document.prompt]
        text, sure = nearest(item.document.prompt, others)
        return Answer(item.key, item.document.response, text, sure)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
