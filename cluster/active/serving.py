"""The models of active teaching on their services: teachers that write for the length of a command,
and each round's student, which answers after it was trained.

Students answer in units whose make-up is fixed, and the teacher one prompt at a time, so that the
same question has the same answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cluster.active.answers import Answer
from cluster.active.asking import Ask, Written
from cluster.active.chains import Chain, chain_of, final_answer, prefixes
from cluster.active.filtering import plain
from cluster.active.records import Answers
from cluster.evaluation.items import Item, rows_of
from cluster.launch.generating import Writer as Framing
from cluster.launch.generating import exported_student, student_tokenizer
from cluster.launch.teachers.serving import pool_settings, refuse_other_teacher, student_service
from cluster.prompt_search.teacher import ROOM, UNIT, answer_in, asked_of
from shared.config.models.teachers import Teacher
from shared.config.paths import without_job_folder
from shared.config.run import Config
from shared.config.verbs.active import ELAD, Active
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.run.run_dir import RunDir, read_written
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from shared.text.documents import Document
from shared.text.framing import encode
from teacher_service.engine.description import TeacherDescription
from teacher_service.service import service
from teacher_service.service.pool import GenerationPool, TeacherPool


@contextmanager
def teachers_up(
    config: Config, folder: Path, services: Mapping[str, str] | None
) -> Iterator[dict[str, tuple[str, TeacherDescription]]]:
    """Name and description of each teacher's service, by teacher: those named, or ones of the
    command's own."""
    if services is not None:
        for key, name in services.items():
            refuse_other_teacher(name, config.teachers[key])
        yield {key: (name, service.running(name).described()) for key, name in services.items()}
        return
    from cluster.session.placement import declared, refuse_unplaceable, teachers_demands

    names = {key: f"{_namespace(folder)}-teacher-{key}" for key in config.teachers}
    refuse_unplaceable(teachers_demands(config.teachers, declared()))
    for teacher in config.teachers.values():
        print(f"loading the teacher, {without_job_folder(teacher.model)}", flush=True)
    asked = {names[key]: teacher for key, teacher in config.teachers.items()}
    try:
        found = dict(service.start_all(asked, detached=False, cache=config.paths.cache))
        yield {key: (name, found[name]) for key, name in names.items()}
    finally:
        for name in names.values():
            service.stop(name)


class ServiceWriter:
    """A teacher on a service, as a `Writer`."""

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        folder: Path,
        served: tuple[str, TeacherDescription],
        *,
        own: bool,
    ) -> None:
        name, self._description = served
        self.fingerprint = self._description.fingerprint
        options = {
            "revision": teacher.revision or "main",
            "trust_remote_code": teacher.trust_remote_code,
        }
        framing = Framing.of(_tokenizer_of(teacher, options), teacher.model, options)
        self._tokenizer, self._stop_ids = framing.tokenizer, framing.stop_ids
        self._settings = pool_settings(
            config, name, teacher=self.fingerprint, client=str(folder), own=own
        )

    def size(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self._ids(text))

    def has_room(self, ask: Ask) -> bool:
        """Whether the prompt leaves the teacher room for the longest answer."""
        limit = self._description.max_context
        return limit is None or self.size(ask.text) + ask.max_new_tokens <= limit

    def write(self, asks: Sequence[Ask]) -> Iterator[Written]:
        """Answers in order. Raises ConfigError, before any, for a prompt that leaves no room."""
        openings = [self._ids(ask.text) for ask in asks]
        for ask in asks:
            self._refuse_long(ask)
        with closing(GenerationPool(0, **self._settings)) as pool:
            for number, (ask, ids) in enumerate(zip(asks, openings, strict=True), start=1):
                spec = GenerationSpec(
                    ask.max_new_tokens, self._stop_ids, ask.temperature, seed=ask.seed
                )
                name = f"prompt {number} of round {ask.round}"
                pool.submit(Openings.build(names=[name], input_ids=[ids]), spec)
            for ids in openings:
                answer = pool.next()
                (written,), (stopped,) = answer.ids(), answer.stopped()
                text = self._tokenizer.decode(written, skip_special_tokens=True)
                yield Written(text, len(ids), len(written) + stopped, cut=not stopped)

    def _ids(self, text: str) -> np.ndarray:
        """What the teacher reads: the text as a prompt is framed, up to where its answer begins."""
        document = Document("pair", "a prompt", prompt=text, response=".")
        (one,) = encode(
            iter([document]), tokenizer=self._tokenizer, loss_on="responses", special_tokens="text"
        )
        return one.input_ids[: int(np.flatnonzero(one.loss_mask)[0]) + 1]

    def _refuse_long(self, ask: Ask) -> None:
        if not self.has_room(ask):
            raise ConfigError(
                f"a prompt of round {ask.round} has {self.size(ask.text)} tokens and its answer up "
                f"to active.max_new_tokens {ask.max_new_tokens}, more than the "
                f"{self._description.max_context} that the teacher reads; lower "
                "active.max_new_tokens, or how many rows and classes a prompt holds"
            )


def _tokenizer_of(teacher: Teacher, options: dict[str, Any]) -> Any:
    """The teacher's own, whose chat template frames its prompts. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(teacher.model, **options)
    except Exception as error:  # of every tokenizer's own code
        raise ConfigError(
            f"the tokenizer of the teacher {teacher.model} cannot be loaded; get its files again"
        ) from error


def answers_of(
    config: Config,
    train: Sequence[Item],
    validation: Sequence[Item],
    *,
    domain: str,
    settings: Active,
) -> Answers:
    """What the student of a finished run, whose config this is, answers."""
    run_dir = RunDir(Path(config.paths.runs) / config.name)
    told = read_written(run_dir.summary)["domains"][domain]
    name = f"{_namespace(run_dir.path)}-student"
    model = exported_student(config, run_dir.export)
    with student_service(config, name, model, purpose="to answer") as description:
        asking = pool_settings(
            config, name, teacher=description.fingerprint, client=str(run_dir.path), own=True
        )
        student = _Student(config, run_dir.export, description, asking)
        return student.examined(train, validation, settings, loss=told["student_nll_after"])


class _Student:
    """A student on a service."""

    def __init__(
        self,
        config: Config,
        export: Path,
        description: TeacherDescription,
        settings: dict[str, Any],
    ) -> None:
        tokenizer = student_tokenizer(config)
        options = {"trust_remote_code": config.student.trust_remote_code}
        self._framing = Framing.of(tokenizer, str(export), options)
        self._config, self._settings = config, settings
        self._question = Question(LikeliestIds(1, description.vocab_rows))
        self._limit = description.max_context

    def examined(
        self, train: Sequence[Item], validation: Sequence[Item], settings: Active, *, loss: float
    ) -> Answers:
        """Its answers and, where a method reads explanations, those of the training prompts."""
        learnt, held = self._answered(train), self._answered(validation)
        if not isinstance(settings, ELAD):
            return Answers(_classed(learnt), _classed(held), loss)
        chains = self._chains(learnt, settings)
        return Answers(_final(learnt, settings), _final(held, settings), loss, chains)

    def _answered(self, items: Sequence[Item]) -> list["_Answered"]:
        """Answers to the prompts that leave room for one. Raises ConfigError where none does."""
        room = max(item.num_right for item in items) + ROOM
        fitting = [i for i in items if not self._limit or i.num_opening + room <= self._limit]
        if not fitting:
            raise ConfigError(
                f"no prompt of domain {items[0].domain} leaves the student, which reads "
                f"{self._limit} tokens, the {room} that an answer may take; give shorter rows"
            )
        units = [fitting[first : first + UNIT] for first in range(0, len(fitting), UNIT)]
        written = self._written(units, room)
        sure = self._probabilities(units, written)
        return [
            _Answered(item, ids, room, self._answer(item, ids, probability))
            for item, ids, probability in zip(fitting, written, sure, strict=True)
        ]

    def _answer(self, item: Item, ids: np.ndarray, probability: float) -> Answer:
        assert item.document is not None, "items are prompts"
        right, tokenizer = item.document.response.strip(), self._framing.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True)
        text = answer_in(text, right, chat=bool(tokenizer.chat_template))
        return Answer(item.key, right, text, probability)

    def _chains(self, answered: Sequence["_Answered"], settings: ELAD) -> tuple[Chain, ...]:
        """How unsure it is after each step of what it wrote."""
        tokenizer = self._framing.tokenizer
        sizes = [prefixes(one.ids, tokenizer) for one in answered]
        draws = [str(number) for number in range(settings.samples)]
        with closing(GenerationPool(0, **self._settings)) as pool:
            for one, cuts in zip(answered, sizes, strict=True):
                for size in cuts:
                    pool.submit(*self._drawn(one, size, draws, settings.sample_temperature))
            return tuple(
                chain_of(
                    one.item.key,
                    one.ids,
                    one.answer.text,
                    [pool.next().ids() for _ in cuts],
                    tokenizer=tokenizer,
                    marker=settings.answer_marker,
                )
                for one, cuts in zip(answered, sizes, strict=True)
            )

    def _drawn(
        self, one: "_Answered", size: int, draws: Sequence[str], temperature: float
    ) -> tuple[Openings, GenerationSpec]:
        """Draws from the prompt and the first tokens of an answer to it."""
        opening = np.concatenate([one.item.ids[: one.item.num_opening], one.ids[:size]])
        openings = Openings.build(
            names=[one.item.key] * len(draws), input_ids=[opening] * len(draws)
        )
        room, stops = max(1, one.room - size), self._framing.stop_ids
        return openings.with_draws(draws), GenerationSpec(
            room, stops, temperature, seed=self._config.seed
        )

    def _written(self, units: Sequence[Sequence[Item]], room: int) -> list[np.ndarray]:
        """Ids of each answer, with the one that ends it."""
        spec = GenerationSpec(room, self._framing.stop_ids, seed=self._config.seed, logprobs=True)
        with closing(GenerationPool(0, **self._settings)) as pool:
            for unit in units:
                pool.submit(asked_of(rows_of(list(unit))), spec)
            return [ids for _ in units for ids in pool.next().written()]

    def _probabilities(
        self, units: Sequence[Sequence[Item]], written: Sequence[np.ndarray]
    ) -> list[float]:
        """Of each answer as a whole, under the student's own law."""
        left, found = iter(written), list[float]()
        rows = [_with_answers(unit, [next(left) for _ in unit]) for unit in units]
        with closing(TeacherPool(0, **self._settings)) as pool:
            for unit in rows:
                pool.submit(unit, self._question)
            for unit in rows:
                logprob_N = pool.next().arrays().label_logprob_N
                cuts = np.cumsum(unit.num_loss_tokens())[:-1]
                found += [float(np.exp(row_N.sum())) for row_N in np.split(logprob_N, cuts)]
        return found


@dataclass(frozen=True, slots=True)
class _Answered:
    """An answer with the ids that were written for it, at most `room`."""

    item: Item
    ids: np.ndarray
    room: int
    answer: Answer


def _classed(answered: Sequence[_Answered]) -> tuple[Answer, ...]:
    """Responses and answers as classes are spelt."""
    found = (one.answer for one in answered)
    return tuple(replace(one, right=plain(one.right), text=plain(one.text)) for one in found)


def _final(answered: Sequence[_Answered], settings: ELAD) -> tuple[Answer, ...]:
    """What explanations come to, against what the right ones do."""
    marker, found = settings.answer_marker, (one.answer for one in answered)
    return tuple(
        replace(one, right=final_answer(one.right, marker), text=final_answer(one.text, marker))
        for one in found
    )


def _with_answers(items: Sequence[Item], written: Sequence[np.ndarray]) -> Rows:
    """Openings with what a student wrote, whose every token counts."""
    ids, masks = [], []
    for item, answer in zip(items, written, strict=True):
        ids.append(np.concatenate([item.ids[: item.num_opening], answer]).astype(np.int32))
        mask = np.zeros(len(ids[-1]), np.uint8)
        mask[item.num_opening - 1 : -1] = 1
        masks.append(mask)
    return Rows.build(
        domains=[item.domain for item in items],
        indices=range(len(items)),
        input_ids=ids,
        doc_starts=[np.zeros(1, np.int32)] * len(ids),
        loss_masks=masks,
    )


def _namespace(folder: Path) -> str:
    """One per folder, so that runs of one name in different places do not meet."""
    return f"{folder.name}-{xxhash.xxh32_hexdigest(str(folder).encode())}"
