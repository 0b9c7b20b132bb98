"""What `tutelage eval` lets teacher and students write: the same openings for all, each model on a
service, greedily and in units whose make-up is fixed.

The hand-shake has made sure that teacher and student frame text alike; the export does so with the
tokenizer in its own folder.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.evaluation.generations import Generation, Written, write_generations
from cluster.evaluation.items import FOLLOWING, Item, framed_by, items_of, rows_of
from cluster.evaluation.scores import WITHOUT_ROUGE, has_rouge, scores
from cluster.launch.teachers.serving import (
    own_services,
    pool_settings,
    served_student,
    student_served,
)
from cluster.planning.description import describe
from cluster.planning.preparation import Launch
from cluster.prompt_search.teacher import ROOM, UNIT, answer_in, asked_of
from shared.config.models.student import LoRATraining
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.prompts.prefix import Opening, shown
from shared.run.plan import RunPlan
from shared.targets.generation import GenerationSpec, Openings
from shared.text.chat import chosen_template
from shared.text.framing import ends_of
from student_trainer.state.export import exported_step
from teacher_service.service.pool import GenerationPool


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """How much is written."""

    prompts: int = 32  # of a domain; 0: nothing
    max_new_tokens: int | None = None  # None: as many as the longest right answer needs


@dataclass(frozen=True, slots=True)
class Writer:
    """One model that writes: its tokenizer, what ends its texts, and what it is shown before
    documents, by domain."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    openings: Mapping[str, Opening]

    @staticmethod
    def of(
        tokenizer: Any, model: str, options: dict, openings: Mapping[str, Opening] | None = None
    ) -> "Writer":
        """A model's ends are those of its training text and of its generation config."""
        ends = dict.fromkeys((*ends_of(tokenizer), *_configured_ends(model, options)))
        return Writer(tokenizer, tuple(ends), openings or {})

    def openings_of(self, items: Sequence[Item], config: Config) -> Openings:
        """What the model goes on from."""
        framed = framed_by(self.tokenizer, items, config)
        return asked_of(shown(rows_of(framed), self.openings))


class Generating:
    """The openings of an evaluation, and what models write on them one after the other."""

    def __init__(self, launch: Launch, limits: GenerationLimits, export: Path | None) -> None:
        """`export` holds the student after training; None: it has not begun. Openings that would
        not fit a model are left out, which is said."""
        self._launch, self._export = launch, export
        config = launch.config
        self._texts: dict[str, list[Written]] = {}
        self._items: list[Item] = []
        self._room: dict[str, int] = {}
        for domain in launch.prepared.domains if limits.prompts else ():
            drawn = items_of(
                config, domain, self._student.tokenizer, count=limits.prompts, seed=config.seed
            )
            self._room[domain.name] = limits.max_new_tokens or _room_for(drawn)
            self._items += self._fitting(drawn, domain.name)
        if any(item.is_scored for item in self._items) and not has_rouge():
            print(WITHOUT_ROUGE, flush=True)

    def ask_teachers(self, plan: RunPlan) -> None:
        """Let each teacher write in its domains, on the services that a plan is answered by."""
        launch, config = self._launch, self._launch.config
        if config.targets.teacher_free or not self._items:
            return
        if config.cross_tokenizer is not None:
            print(
                f"cross_tokenizer is {config.cross_tokenizer}: the teacher writes nothing, since "
                "the openings are in the student's tokens",
                flush=True,
            )
            return
        services, texts = launch.services or own_services(launch), {}
        for name, part in plan.by_teacher.items():
            assert part.teacher is not None, "a live teacher has a fingerprint"
            settings = self._settings(services[name], part.teacher, own=launch.services is None)
            led = [domain for domain in part.config.domains if config.teacher_of(domain) == name]
            teacher, items = config.teachers[name], self._of(led)
            writer = Writer.of(
                self._student.tokenizer,
                teacher.model,
                {"revision": teacher.revision or "main"},
                launch.prepared.showing.of_domains,
            )
            texts |= self._written(writer, items, settings)
        self._texts["teacher"] = [texts[item.domain, item.key] for item in self._items]

    def ask_students(self) -> None:
        """Let the student write as it began, then as its export has it."""
        if not self._items:
            return
        models = {"before": served_student(self._launch.config)}
        if self._export is not None:
            models["after"] = exported_student(self._launch.config, self._export)
        for name, model in models.items():
            writer = self._exported if name == "after" else self._student
            with student_served(self._launch, model, purpose=f"to write, {name}") as served:
                settings = self._settings(*served, own=True)
                found = self._written(writer, self._items, settings)
            self._texts[name] = [found[item.domain, item.key] for item in self._items]

    def write(self) -> None:
        """Keep all of it in the run's folder, in place of what was written before."""
        if not self._items:
            self._launch.run_dir.generations.unlink(missing_ok=True)
            return
        step = None if self._export is None else exported_step(self._export)
        write_generations(
            self._launch.run_dir.generations,
            [
                Generation(
                    domain=item.domain,
                    key=item.key,
                    prompt=item.shown(self._student.tokenizer),
                    right=self._right(item),
                    max_new_tokens=self._room[item.domain],
                    step=step,
                    models={name: texts[number] for name, texts in self._texts.items()},
                )
                for number, item in enumerate(self._items)
            ],
        )

    @cached_property
    def _student(self) -> Writer:
        student = self._launch.config.student
        options = {
            "revision": student.revision or "main",
            "trust_remote_code": student.trust_remote_code,
        }
        return Writer.of(student_tokenizer(self._launch.config), student.model, options)

    @cached_property
    def _exported(self) -> Writer:
        from transformers import AutoTokenizer

        options = {"trust_remote_code": self._launch.config.student.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(self._export, **options)
        return Writer.of(tokenizer, str(self._export), options)

    def _fitting(self, items: Sequence[Item], domain: str) -> Iterator[Item]:
        """Items that leave every model the room to answer."""
        showing = self._launch.prepared.showing.of_domains
        before, room = showing[domain].longest if domain in showing else 0, self._room[domain]
        limits = {
            "teacher": self._launch.prepared.teachers[
                self._launch.config.teacher_of(domain)
            ].context,
            "student": self._student_limit,
        }
        shown_before = {"teacher": before, "student": 0}
        fitting = [
            item
            for item in items
            if all(
                limit is None or item.num_opening + shown_before[name] + room <= limit
                for name, limit in limits.items()
            )
        ]
        if left_out := len(items) - len(fitting):
            told = ", ".join(f"the {n} reads {limit}" for n, limit in limits.items() if limit)
            print(
                f"{left_out} of {len(items)} prompts of {domain} are left out: with {room} new "
                f"tokens they are longer than models read ({told}); lower --max-new-tokens",
                flush=True,
            )
        yield from fitting

    @cached_property
    def _student_limit(self) -> int | None:
        config, student = self._launch.config, self._launch.config.student
        return describe(
            "student.model",
            student.model,
            revision=student.revision,
            trusted=student.trust_remote_code,
            cache=Path(config.paths.cache),
        ).max_context

    def _of(self, domains: Collection[str]) -> list[Item]:
        return [item for item in self._items if item.domain in domains]

    def _settings(self, service: str, fingerprint: dict[str, str], *, own: bool) -> dict[str, Any]:
        client = str(self._launch.run_dir.path)
        return pool_settings(
            self._launch.config, service, teacher=fingerprint, client=client, own=own
        )

    def _written(
        self, writer: Writer, items: Sequence[Item], settings: dict[str, Any]
    ) -> dict[tuple[str, str], Written]:
        """What one model writes, by domain and key of the item."""
        units = [unit for domain in self._room for unit in _units(self._of_domain(items, domain))]
        config, found = self._launch.config, {}
        with closing(GenerationPool(0, **settings)) as pool:
            for unit in units:
                spec = GenerationSpec(self._room[unit[0].domain], writer.stop_ids, seed=config.seed)
                pool.submit(writer.openings_of(unit, config), spec)
            for unit in units:
                answer = pool.next()
                texts = writer.tokenizer.batch_decode(answer.ids(), skip_special_tokens=True)
                for item, text, stopped in zip(unit, texts, answer.stopped(), strict=True):
                    found[item.domain, item.key] = self._scored(item, text, cut=not stopped)
        return found

    @staticmethod
    def _of_domain(items: Sequence[Item], domain: str) -> list[Item]:
        return [item for item in items if item.domain == domain]

    def _scored(self, item: Item, text: str, *, cut: bool) -> Written:
        if not item.is_scored:
            return Written(text, cut)
        right = self._right(item)
        chat = bool(self._student.tokenizer.chat_template)
        return Written(text, cut, scores(answer_in(text, right, chat=chat), right))

    def _right(self, item: Item) -> str:
        text = self._student.tokenizer.decode(item.right_ids, skip_special_tokens=True)
        return text.strip() if item.is_scored else text


def student_tokenizer(config: Config) -> Any:
    """The tokenizer that text is framed with. Raises ConfigError where it cannot be loaded."""
    from transformers import AutoTokenizer

    student = config.student
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            student.model,
            revision=student.revision or "main",
            trust_remote_code=student.trust_remote_code,
        )
    except Exception as error:  # of every tokenizer's own code
        raise ConfigError(
            f"student.model: the tokenizer of {student.model} cannot be loaded; get its files again"
        ) from error
    tokenizer.chat_template = chosen_template(
        tokenizer.chat_template, config.data.chat_template, model=student.model
    )
    return tokenizer


def exported_student(config: Config, export: Path) -> Teacher:
    """What a service serves of an export: a whole model, or adapters on the student's."""
    student = served_student(config)
    if isinstance(config.student.train, LoRATraining):
        return student.model_copy(update={"adapter": str(export)})
    return student.model_copy(update={"model": str(export), "revision": None})


def _configured_ends(model: str, options: dict) -> list[int]:
    from transformers import GenerationConfig

    try:
        ends: Any = GenerationConfig.from_pretrained(model, **options).eos_token_id
    except Exception:  # a model needs none, and transformers' own errors are many
        return []
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _room_for(items: Sequence[Item]) -> int:
    """New tokens that the longest right answer needs, and a few to be wrong in."""
    answers = [item.num_right for item in items if item.is_scored]
    return max(answers) + ROOM if answers else FOLLOWING


def _units(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[first : first + UNIT] for first in range(0, len(items), UNIT)]
