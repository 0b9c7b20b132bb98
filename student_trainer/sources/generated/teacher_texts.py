"""What teachers write to learn from: sequence-level KD (Kim and Rush, arXiv 1606.07947).

A text is a function of the teacher, the spec and the opening, which holds the row and the draw. It
is written once and lies on disk before it is learnt:

    teacher_texts/
      step-000012.rank-0.IDENTITY.arrow    what a rank had written first for the step with index 12

A rank reads what any wrote for an earlier step, of several texts the one of the lowest rank, and
what it wrote for this one itself. So a run that is killed and gone on with learns the same texts,
however they were batched.

P prompts of a rank for a step
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from shared.data.rollouts import Rollout, RowPrompt
from shared.errors import StorageError, not_kept, reason_of
from shared.prompts.prefix import shown_prompts
from shared.run.plan import RunPlan
from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Openings,
    RemoteGenerator,
)
from student_trainer.sources.generated.arrow_files import write_table

_Key = tuple[str, bytes]  # identity, and hash of the opening
_Text = tuple[Continuations, int]  # an answer, and a line of it
_NAME = re.compile(r"step-(\d{6,})\.rank-(\d+)\.([0-9a-f]+)\.arrow")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The texts of a run; a rank writes its own and reads those of all."""

    folder: Path

    def kept(self, step: int, rank: int, identity: str, answer: Continuations) -> Continuations:
        """An answer that is written beside what is there of its name, whole or not at all, as it
        lies on disk. Raises StorageError."""
        path = self.folder / f"step-{step:06d}.rank-{rank}.{identity}.arrow"
        if path.exists():  # of a teacher that is alike, or a rank that had other rows of the step
            answer = Continuations.joined([_read(path), answer])
        try:
            write_table(path, answer.table)
        except OSError as error:
            wrote = f"what the teacher wrote for step {step + 1}"
            raise not_kept(wrote, self.folder, error) from None
        return _read(path)

    def of(self, steps: range, rank: int | None = None) -> list[tuple[str, Continuations]]:
        """Identities and answers of some steps, in the order of steps and ranks, of one rank or of
        all. Raises StorageError for a file that cannot be read."""
        named = []
        for path in self.folder.glob("*.arrow"):
            match = _NAME.fullmatch(path.name)
            if match is None or int(match[1]) not in steps:
                continue
            if rank is None or int(match[2]) == rank:
                named.append((int(match[1]), int(match[2]), match[3], path))
        return [(identity, _read(path)) for *_, identity, path in sorted(named)]


def _read(path: Path) -> Continuations:
    try:
        with pa.memory_map(str(path)) as source:
            return Continuations(pa.ipc.open_file(source).read_all())
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{path} holds texts of the teacher and cannot be read ({reason_of(error)}); put it "
            "back, or start over with --fresh"
        ) from None


def identity_of(teacher: Mapping[str, str], spec: GenerationSpec) -> str:
    """Names who writes, by its fingerprint, and what is asked."""
    asked = {"teacher": dict(teacher), "spec": spec.as_dict()}
    return xxhash.xxh3_64_hexdigest(json.dumps(asked, sort_keys=True).encode())


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """What a teacher goes on from."""

    prompt: RowPrompt  # as the student has it
    name: str  # of the row, for messages
    domain: str
    draw: str  # of one opening and spec, every draw gives another text
    spec: GenerationSpec


@dataclass(slots=True)
class TeacherTexts:
    """Writes a rank's prompts on with their domains' teachers, or finds what they wrote before."""

    plan: RunPlan
    rank: int
    files: TextFiles
    generators: Mapping[str, RemoteGenerator]  # by teacher
    _tokens: int = 0  # that teachers wrote since they were last taken
    _read_until: int = 0  # files of the steps before are in `_known`
    _known: dict[_Key, _Text] = field(default_factory=dict)
    _own: dict[_Key, _Text] = field(default_factory=dict)  # that this rank wrote for the step

    def written(self, step: int, asked: Sequence[TeacherPrompt]) -> list[Rollout]:
        """What is learnt after prompts, in their order [P]. Raises TutelageErrors of the service,
        and StorageError."""
        self._own.clear()
        _learn(self._known, self.files.of(range(self._read_until, step)))
        self._read_until = max(self._read_until, step)
        teacher_P = [self.plan.config.teacher_of(one.domain) for one in asked]
        groups: dict[tuple[str, GenerationSpec], list[int]] = {}
        for line, (teacher, one) in enumerate(zip(teacher_P, asked, strict=True)):
            groups.setdefault((teacher, one.spec), []).append(line)
        found: dict[int, Rollout] = {}
        for (teacher, spec), lines in groups.items():
            openings = self._openings([asked[line] for line in lines])
            texts = self._texts(step, teacher, openings, spec)
            for line, text in zip(lines, texts, strict=True):
                found[line] = Rollout(asked[line].prompt, *text)
        return [found[line] for line in range(len(asked))]

    def take_tokens(self) -> int:
        """Tokens that teachers wrote since the last call."""
        found, self._tokens = self._tokens, 0
        return found

    def _openings(self, asked: Sequence[TeacherPrompt]) -> Openings:
        """As the teacher is shown them."""
        prompts = [one.prompt.input_ids for one in asked]
        domains = [one.domain for one in asked]
        openings = Openings.build(
            names=[one.name for one in asked],
            input_ids=shown_prompts(prompts, domains, self.plan.openings),
        )
        return openings.with_draws([one.draw for one in asked])

    def _texts(
        self, step: int, teacher: str, openings: Openings, spec: GenerationSpec
    ) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Token ids, log-probabilities and whether it ended, of what one teacher writes."""
        identity = identity_of(self.plan.by_teacher[teacher].teacher or {}, spec)
        if self._missing(identity, openings):
            _learn(self._own, self.files.of(range(step, step + 1), self.rank))
        if missing := self._missing(identity, openings):
            answer = self._asked(teacher, openings.at(missing), spec)
            _learn(self._own, [(identity, self.files.kept(step, self.rank, identity, answer))])
        keys = [(identity, key) for key in openings.hashes()]
        places = [self._known.get(key) or self._own[key] for key in keys]
        return [_text(answer, line) for answer, line in places]

    def _missing(self, identity: str, openings: Openings) -> list[int]:
        """The first line of every opening that no text is known to."""
        first = {key: line for line, key in reversed([*enumerate(openings.hashes())])}
        return sorted(
            line
            for key, line in first.items()
            if (identity, key) not in self._known and (identity, key) not in self._own
        )

    def _asked(self, teacher: str, openings: Openings, spec: GenerationSpec) -> Continuations:
        """What a teacher writes at this moment."""
        answer = self.generators[teacher].generate(openings, spec)
        answer.check(openings, spec, self.plan.by_teacher[teacher].teacher)
        self._tokens += sum(map(len, answer.written()))
        return answer


def _learn(texts: dict[_Key, _Text], answers: Sequence[tuple[str, Continuations]]) -> None:
    """Add the texts that are new; of two of one opening the first stays."""
    for identity, answer in answers:
        for line, key in enumerate(answer.table.column("opening_hash").to_pylist()):
            texts.setdefault((identity, key), (answer, line))


def _text(answer: Continuations, line: int) -> tuple[np.ndarray, np.ndarray, bool]:
    one = Continuations(answer.table.slice(line, 1))
    (ids,), (logprobs,), (stopped,) = one.written(), one.logprobs(), one.stopped()
    return ids, logprobs, stopped
