"""The teacher as the search asks it: how well it does under a prompt, and other words for one.

Both go through the teacher service, in units of rows or openings whose make-up is fixed, so that
the same question has the same answer.

E examples of a split
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from cluster.prompt_search.splits import Split, Task
from shared.data.rows import Rows
from shared.errors import HandshakeError
from shared.prompts.prefix import Opening, opening, shown
from shared.prompts.prompts import Example, Prompt
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from shared.text.documents import Document
from shared.text.framing import encode
from teacher_service.engine.description import TeacherDescription
from teacher_service.service.pool import GenerationPool, TeacherPool

UNIT = 16  # rows or openings of one request
ROOM = 4  # tokens an answer may have beyond the longest right one, before it is wrong anyway
REWRITE_TEMPERATURE = 0.9
REWRITE = Prompt(
    "Say the same instruction in other words.",
    (
        Example("Name the capital of the country.", "Which city is the country's capital?"),
        Example("Sum up the text in a sentence.", "In one sentence, tell what the text says."),
        Example("Is the review good or bad?", "Decide whether the review praises or complains."),
    ),
)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A serving teacher and the two ways to ask it."""

    description: TeacherDescription
    score: TeacherPool
    generate: GenerationPool


class ScoreStore:
    """Values per example that are known already, in a file that only grows."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._known = path, dict[str, np.ndarray]()
        lines = path.read_text().split("\n") if path.exists() else []
        for line in lines[:-1]:  # the last is empty, or torn by a kill
            found = json.loads(line)
            self._known[found["prompt"]] = np.array(found["values"])
        if lines and lines[-1]:
            path.write_text("".join(f"{line}\n" for line in lines[:-1]))

    def get(self, prompt: Prompt) -> np.ndarray | None:
        """The values of a prompt, None where it was never scored."""
        return self._known.get(prompt.id)

    def add(self, prompt: Prompt, values_E: np.ndarray) -> None:
        """Write the values of a prompt down."""
        self._known[prompt.id] = values_E
        with self._path.open("a") as file:
            file.write(json.dumps({"prompt": prompt.id, "values": values_E.tolist()}) + "\n")


@dataclass(frozen=True, slots=True)
class Scorer:
    """A `Score` that asks the teacher about a split, each prompt once."""

    task: Task
    split: Split
    teacher: Teacher
    store: ScoreStore
    max_new_tokens: int
    done: Callable[[], None] = lambda: None  # called after each prompt

    def __call__(self, prompts: Sequence[Prompt]) -> list[np.ndarray | None]:
        """Values per example [E] of each prompt, None for one that does not fit."""
        fitting = {p.id: p for p in prompts if self._fits(p)}
        asked = {id: p for id, p in fitting.items() if self.store.get(p) is None}
        for prompt in asked.values():
            self._submit(prompt)
        for prompt in {p.id: p for p in prompts}.values():
            if prompt.id in asked:
                self.store.add(prompt, self._collect())
            self.done()
        return [self.store.get(p) if p.id in fitting else None for p in prompts]

    def _fits(self, prompt: Prompt) -> bool:
        """Whether the domain's longest document, or the longest answer, fits after the prompt."""
        limit = self.teacher.description.max_context
        longest = longest_asked(self.task, prompt, max_new_tokens=self.max_new_tokens)
        return limit is None or longest <= limit

    def _opening(self, prompt: Prompt) -> Opening:
        return opening(prompt, self.task.tokenizer, self.task.kind)

    def _submit(self, prompt: Prompt) -> None:
        rows = shown(self.split.rows, {self.task.domain: self._opening(prompt)})
        for first in range(0, len(rows), UNIT):
            unit = rows.part(slice(first, first + UNIT))
            if self.task.metric == "accuracy":
                self.teacher.generate.submit(asked_of(unit), self._generation)
            else:
                self.teacher.score.submit(unit, self._scoring)

    def _collect(self) -> np.ndarray:
        values: list[float] = []
        documents = self.split.documents
        for first in range(0, len(documents), UNIT):
            part = documents[first : first + UNIT]
            if self.task.metric == "accuracy":
                written = self.teacher.generate.next().ids()
                texts = self.task.tokenizer.batch_decode(written, skip_special_tokens=True)
                values += [
                    float(same_answer(text, document.response, chat=self._chat))
                    for text, document in zip(texts, part, strict=True)
                ]
            else:
                rows = self.split.rows.part(slice(first, first + UNIT))
                logprob_N = self.teacher.score.next().arrays().label_logprob_N
                cuts = np.cumsum(rows.num_loss_tokens())[:-1]
                values += [float(row_N.mean()) for row_N in np.split(logprob_N, cuts)]
        return np.array(values)

    @property
    def _chat(self) -> bool:
        return bool(self.task.tokenizer.chat_template)

    @property
    def _generation(self) -> GenerationSpec:
        return GenerationSpec(self.max_new_tokens, stop_ids=self.task.stop_ids)

    @property
    def _scoring(self) -> Question:
        return Question(LikeliestIds(1, self.teacher.description.vocab_rows))


def answer_room(task: Task) -> int:
    """New tokens that the longest right answer needs."""
    return task.longest_answer + ROOM


def longest_asked(task: Task, prompt: Prompt, *, max_new_tokens: int) -> int:
    """Tokens that the teacher must have room for: the prompt, the domain's longest document and,
    where it writes answers, one of those."""
    instead = opening(prompt, task.tokenizer, task.kind)
    before = len(instead.shown_ids) if prompt else 0
    return before + task.longest + (max_new_tokens if task.metric == "accuracy" else 0)


def refuse_unfit(
    task: Task, instruction: str | None, *, max_new_tokens: int | None, limit: int | None
) -> None:
    """Refuse a domain whose longest document leaves no room, and an instruction that does not fit
    before it. Raises HandshakeError."""
    room = answer_room(task) if max_new_tokens is None else max_new_tokens
    for prompt in (Prompt(), Prompt(instruction or "")):
        size = longest_asked(task, prompt, max_new_tokens=room)
        if limit is None or size <= limit:
            continue
        parts = [f"its longest document of {task.longest} tokens"]
        parts += [f"an answer of up to {room}"] if task.metric == "accuracy" else []
        way_out = "lower data.context by as many"
        if prompt:
            parts.insert(0, "the instruction in prompt_search.instructions")
            way_out = f"shorten it, or {way_out}"
        raise HandshakeError(
            f"domain {task.domain} needs {size} tokens for {' and '.join(parts)}, {size - limit} "
            f"more than the {limit} that the teacher reads; {way_out}"
        )


def same_answer(written: str, right: str, *, chat: bool) -> bool:
    """Whether an answer is the right one but for whitespace."""
    return answer_in(written, right, chat=chat).split() == right.split()


def answer_in(written: str, right: str, *, chat: bool) -> str:
    """What of a written text is the answer. Without a chat template an empty line ends it, as it
    does in worked examples, unless the right answer has one."""
    if not chat and "\n\n" not in right.strip():
        return written.strip().partition("\n\n")[0]
    return written.strip()


def scorer_for(task: Task, split: Split, teacher: Teacher, *, cache: Path, **options) -> Scorer:
    """A scorer whose store is that of this teacher, split and metric.

    `options` are `max_new_tokens`, None for as many as the longest right answer needs, and `done`.
    """
    max_new_tokens = options.pop("max_new_tokens") or answer_room(task)
    decides = [
        teacher.description.fingerprint,
        split.digest,
        task.metric,
        max_new_tokens if task.metric == "accuracy" else 0,
        task.stop_ids,
        [document.response for document in split.documents],
    ]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())
    store = ScoreStore(cache / "prompt_scores" / f"{digest}.jsonl")
    return Scorer(task, split, teacher, store, max_new_tokens, **options)


def rewrite(task: Task, teacher: Teacher, instruction: str, count: int, seed: int) -> list[str]:
    """The teacher's own rewrites of an instruction, drawn with seeds from `seed` on.

    None where what it would be shown does not fit its context.
    """
    plain = asked_of(_row(task, Document("pair", "a rewrite", prompt=instruction, response=".")))
    before = opening(REWRITE, task.tokenizer, "pair")
    (ids,) = plain.ids()
    asked = np.concatenate([before.shown_ids, ids[len(before.plain_ids) :]])
    room = 2 * len(task.tokenizer(instruction, add_special_tokens=False)["input_ids"]) + 8
    limit = teacher.description.max_context
    if limit is not None and len(asked) + room > limit:
        return []
    openings = Openings.build(names=[f"{task.domain}, an instruction"], input_ids=[asked])
    for turn in range(count):
        spec = GenerationSpec(room, task.stop_ids, REWRITE_TEMPERATURE, seed=seed + turn)
        teacher.generate.submit(openings, spec)
    written = [teacher.generate.next().ids()[0] for _ in range(count)]
    texts = task.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in texts]


def _row(task: Task, document: Document) -> Rows:
    (one,) = encode(iter([document]), tokenizer=task.tokenizer, loss_on="responses")
    return Rows.build(
        domains=[task.domain],
        indices=[0],
        input_ids=[one.input_ids],
        doc_starts=[np.zeros(1, np.int32)],
        loss_masks=[one.loss_mask],
    )


def asked_of(rows: Rows) -> Openings:
    """What stands before the first token with loss in each row."""
    pairs = zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True)
    ids = [ids[: int(np.flatnonzero(mask)[0]) + 1] for ids, mask in pairs]
    return Openings.build(names=rows.names(), input_ids=ids)
