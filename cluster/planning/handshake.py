"""Before anything starts: whether this student can learn from these teachers on this text.

Reads tokenizers and configs of all models, no weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.planning.across.tokenizers import Tokenizers, tokenizers_of
from cluster.planning.description import ModelDescription, describe
from cluster.planning.folders import (
    refuse_incomplete,
    refuse_incomplete_teacher,
    refuse_quantised,
)
from cluster.planning.notes import pair_notes
from cluster.planning.tasks.images import seen_alike
from shared.config.adaptive_losses import reads_pairs
from shared.config.losses import RouterBalance, SelfFeatures
from shared.config.models.attention import INSTALLED_BY, refusal
from shared.config.models.engines import refuse_beyond_classifier
from shared.config.models.student import Student
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.config.tasks.task import Classification, Tagging
from shared.errors import ConfigError, HandshakeError
from shared.images.processor import ImageProcessor
from shared.loading import OF_TEXTS, OF_WORDS
from shared.prompts.class_reading import ClassReading, OwnClasses, OwnHead
from shared.prompts.verbaliser import Verbaliser
from shared.targets.asks.classes import ClassAsk, SoftLabels
from shared.targets.asks.head_location import ShippedHead
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.asks.last_states import LastStates
from shared.targets.question import ASKED_BY, HiddenAsk, Question
from shared.text.chat import chosen_template
from shared.text.sources import kinds_of
from shared.text.tokenizers import named_templates, same_templates, with_template
from student_trainer.tasks.registry import task_of
from student_trainer.tasks.task import Side

LARGEST_FULL_VOCABULARY = 32_768
IN_WORDS: dict[str | None, str] = {OF_TEXTS: "of whole texts", OF_WORDS: "of their words"}


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What a teacher's files tell."""

    shared_vocab: int  # ids that it and the student both know
    width: int  # of its hidden states
    rows: int  # of its head
    context: int | None  # tokens it reads at most; None: no limit
    differences: tuple[str, ...] = ()  # from the student, that keep nobody from learning: sentences
    reading: ClassReading | None = None  # how it is asked about classes; None: it is not

    def classes(self) -> ClassAsk | None:
        """What it is asked about every row; None where rows have no classes."""
        return None if self.reading is None else self.reading.ask()


@dataclass(frozen=True, slots=True)
class Handshake:
    """What all models of a run agree on, and what each teacher brings."""

    load_tokenizer: Callable[[], Any]  # the student's, of transformers, under the chosen template
    rows_digest: str  # of the student's tokenizer, see `shared.text.tokenizers.rows_digest`
    tokens: tuple[str | None, ...]  # of the student's tokenizer, by id
    teachers: Mapping[str, TeacherFacts]
    router_balance: RouterBalance | None  # that the student's own config asks for
    across: Tokenizers | None = None  # where they may differ; None: all models have one
    processor: ImageProcessor | None = None  # the student's, where rows have images


def shake_hands(config: Config) -> Handshake:
    """Compare the models of a resolved config, every teacher with the student.

    Raises HandshakeError for models that do not fit each other, ConfigError for a model that
    cannot be read, a context longer than a model's, or a `top_k` beyond the vocabulary.
    """
    if not config.targets.teacher_free:
        for name, teacher in config.teachers.items():
            refuse_incomplete_teacher(name, teacher)
    refuse_incomplete("student.model", config.student.model)
    cache = Path(config.paths.cache)
    teachers = {
        name: describe_teacher(name, teacher, cache=cache)
        for name, teacher in config.teachers.items()
    }
    own = config.student
    student = describe(
        "student.model",
        own.model,
        revision=own.revision,
        trusted=own.trust_remote_code,
        cache=cache,
    )
    if not config.targets.teacher_free:
        for name, teacher in config.teachers.items():
            refuse_attention(f"teachers.{name}", teacher, teachers[name])
    refuse_attention("student", own, student)
    refuse_quantised(config, teachers, student)
    template = config.data.chat_template
    identity = with_template(student.identity, template, model=student.name)
    facts = {
        name: _compared(config.taught_by(name), teacher, replace(student, identity=identity))
        for name, teacher in teachers.items()
    }
    if not config.task.classifies:  # else the class of a row is not read, and who loads it looks
        _refuse_short_context(student, config.data.context)

    @once
    def load_tokenizer() -> Any:
        tokenizer = student.load_tokenizer()
        chosen = chosen_template(tokenizer.chat_template, template, model=student.name)
        tokenizer.chat_template = chosen
        return tokenizer

    asked = student.router_balance
    balance = None if asked is None else RouterBalance(**asked)
    across = None
    if config.cross_tokenizer is not None:
        (teacher,) = teachers.values()
        across = tokenizers_of(config, teacher, student)
    told = (load_tokenizer, student.rows_digest, identity.tokens, facts, balance, across)
    return Handshake(*told, processor=seen_alike(config) if config.task.sees else None)


def describe_teacher(name: str, teacher: Teacher, *, cache: Path) -> ModelDescription:
    """See `describe`."""
    return describe(
        f"teachers.{name}.model",
        teacher.model,
        revision=teacher.revision,
        trusted=teacher.trust_remote_code,
        cache=cache,
    )


def _compared(config: Config, teacher: ModelDescription, student: ModelDescription) -> TeacherFacts:
    """What one teacher brings to a student, for the domains of `config`."""
    if isinstance(config.task, Classification | Tagging):
        (asked,) = config.teachers.values()
        return _asked_about_classes(config.task, teacher, asked)
    _refuse_classifier(teacher)
    vocabulary, differences = _agreed(config, teacher, student)
    if config.cross_tokenizer is None:
        _refuse_short_context(teacher, config.data.context)
    _refuse_more_than_all(config, vocabulary)
    refuse_beyond_vllm(config, vocabulary)
    _refuse_missing_layers(config, teacher, student)
    _refuse_uneven_groups(config, student)
    return TeacherFacts(
        shared_vocab=vocabulary,
        width=teacher.hidden_size,
        rows=teacher.vocab_size,
        context=teacher.max_context,
        differences=differences,
    )


def _asked_about_classes(
    task: Classification | Tagging, teacher: ModelDescription, asked: Teacher
) -> TeacherFacts:
    """What a teacher brings that shares nothing with a student but the classes. Raises ConfigError
    for classes that it cannot tell apart."""
    told = {"tokenizer_digest": teacher.rows_digest, "limit": teacher.max_context}
    read: ClassReading = Verbaliser(task, teacher.load_tokenizer, teacher.name, **told)
    if asked.engine == "similarity":
        read = OwnClasses(task, teacher.load_tokenizer, teacher.rows_digest)
    elif teacher.classes is not None:
        wanted = OF_WORDS if isinstance(task, Tagging) else OF_TEXTS
        if teacher.head != wanted:
            raise HandshakeError(
                f"{teacher.option} is {teacher.name}, a classifier {IN_WORDS[teacher.head]}, and "
                f"task is {task.kind}; name one {IN_WORDS[wanted]}, or a causal language model"
            )
        refuse_beyond_classifier(f"{teacher.option} {teacher.name}", asked)
        read = OwnHead(task, teacher.load_tokenizer, teacher.name, teacher.classes, **told)
    return TeacherFacts(
        shared_vocab=read.ask().shared_vocab,
        width=teacher.hidden_size,
        rows=teacher.vocab_size,
        context=teacher.max_context,
        reading=read,
    )


def _refuse_classifier(teacher: ModelDescription) -> None:
    if teacher.classes is not None:
        raise HandshakeError(
            f"{teacher.option} is {teacher.name}, a classifier {IN_WORDS[teacher.head]}, which "
            "knows no next token; set task=classification or task=tagging, or name a causal "
            "language model"
        )


def _agreed(
    config: Config, teacher: ModelDescription, student: ModelDescription
) -> tuple[int, tuple[str, ...]]:
    """The ids that a teacher answers about, and how it differs in ways that matter to nobody. All
    of its own where it reads rows of its own."""
    identity = teacher.identity
    if config.cross_tokenizer is not None:
        return min(identity.num_ids, teacher.vocab_size), ()
    if named_templates(identity):
        identity = with_template(identity, config.data.chat_template, model=teacher.name)
    is_same = same_templates(identity, student.identity)
    vocabulary = task_of(config).agree(
        Side(teacher.name, identity, teacher.vocab_size),
        Side(student.name, student.identity, student.vocab_size),
        chat_rows=not is_same and _uses_chat_template(config),
    )
    return vocabulary, tuple(pair_notes(replace(teacher, identity=identity), student))


def training_question(
    config: Config,
    vocabulary: int,
    *,
    projection: str = "",
    prompts: str = "",
    head: ShippedHead | None = None,
    classes: ClassAsk | None = None,
) -> Question | None:
    """What is asked of the teacher in training; None where no loss asks for anything.

    `projection` is the digest of the matrices that hidden states pass through, `prompts` that of
    what the teacher is shown, `head` the shipped head whose input is asked for in place of ids,
    `classes` what is asked where rows have some.
    """
    if not config.needs_teacher:
        return None
    if classes is not None:
        return Question(classes, prefix=prompts)
    if head is None:
        selector = config.selector_for(vocabulary)
        ask = ASKED_BY[selector].asked(
            config.targets, shared_vocab=vocabulary, temperatures=config.temperatures
        )
    else:
        ask = LastStates(vocabulary, head.digest, head.states, head.states_width)
    hidden = HiddenAsk(config.hidden_layers, config.targets.hidden.encoding, projection)
    return Question(ask, hidden=hidden, prefix=prompts)


def validation_question(
    config: Config,
    vocabulary: int,
    *,
    prompts: str = "",
    head: ShippedHead | None = None,
    classes: ClassAsk | None = None,
) -> tuple[Question | None, str]:
    """What is asked in validation, and how the KL computed from it is called; None where there is
    nothing to compare with, as soft labels say nothing of a row but its class."""
    if isinstance(classes, SoftLabels):
        return None, "none"
    if classes is not None:
        return Question(classes, prefix=prompts), "full"
    if head is not None:
        ask = LastStates(vocabulary, head.digest, head.states, head.states_width)
        return Question(ask, prefix=prompts), "full"
    full = config.evaluation.kl == "full" or (
        config.evaluation.kl == "auto" and vocabulary <= LARGEST_FULL_VOCABULARY
    )
    num_ids = vocabulary if full else config.targets.top_k
    ask = LikeliestIds(num_ids, vocabulary, encoding="fp32", ids=config.targets.ids)
    kind = "full" if full else f"bucketed-{num_ids}"
    if config.cross_tokenizer is not None:
        kind = "grouped" if config.cross_tokenizer == "grouped" else "aligned"
    return Question(ask, prefix=prompts), kind


def refuse_beyond_vllm(config: Config, vocabulary: int) -> None:
    """Refuse more ids of a position than a teacher with engine vllm is asked for, which makes an
    object of each. Raises ConfigError."""
    full = config.evaluation.kl == "full"
    asked = {
        f"evaluation.kl is full, all {vocabulary:,} ids": (full, vocabulary, "evaluation.kl=auto"),
        f"targets.top_k is {config.targets.top_k:,}": (True, config.targets.top_k, "a lower one"),
    }
    name = next((name for name, t in config.teachers.items() if t.engine == "vllm"), None)
    for said, (is_asked, num_ids, other) in asked.items():
        if name is not None and is_asked and num_ids > LARGEST_FULL_VOCABULARY:
            raise ConfigError(
                f"{said}, but teachers.{name}.engine is vllm, which is asked for at most "
                f"{LARGEST_FULL_VOCABULARY:,} ids of a position; set {other}, or "
                f"teachers.{name}.engine=transformers"
            )


def refuse_attention(section: str, asked: Teacher | Student, model: ModelDescription) -> None:
    """Refuse an attention that a model, or this machine, does not have. Raises ConfigError."""
    package = INSTALLED_BY.get(asked.attention)
    installed = package is None or any(map(find_spec, (package, "kernels")))
    reason = refusal(
        f"{section}.attention",
        asked.attention,
        model=model.name,
        offered=model.attentions,
        installed=installed,
        gpus=asked.gpus,
        dtype=asked.dtype,
    )
    if reason:
        raise ConfigError(reason)


def _refuse_short_context(model: ModelDescription, context: int) -> None:
    limit = model.max_context
    if limit is not None and context > limit:
        raise HandshakeError(
            f"data.context is {context}, but {model.option} {model.name} reads at most {limit} "
            "tokens; "
            f"set data.context={limit} or lower"
        )


def _refuse_missing_layers(
    config: Config, teacher: ModelDescription, student: ModelDescription
) -> None:
    """Layer 0 is the embedding's output, layer L the last one."""
    losses = config.losses
    asked = {
        "teacher": (teacher, [(n, loss.kind) for loss in losses for n in loss.teacher_layers]),
        "student": (student, [(n, loss.kind) for loss in losses for n in loss.student_layers]),
    }
    for role, (model, layers) in asked.items():
        last = model.num_layers
        for layer, kind in layers:
            if last is not None and not 0 <= layer <= last:
                raise HandshakeError(
                    f"a {kind} loss asks for {role} layer {layer}, but the {role} has layers 0 to "
                    f"{last}; change losses"
                )


def _refuse_uneven_groups(config: Config, student: ModelDescription) -> None:
    for loss in config.losses:
        if (
            isinstance(loss, SelfFeatures)
            and loss.weight
            and student.hidden_size % (loss.group or 1)
        ):
            raise HandshakeError(
                f"the group of self_features is {loss.group}, which does not divide the "
                f"{student.hidden_size} channels of a state of {student.name}; take a divisor"
            )


def _refuse_more_than_all(config: Config, vocabulary: int) -> None:
    top_k, own = config.targets.top_k, config.targets.student_ids
    if config.targets.exact is None and top_k > vocabulary:
        raise ConfigError(
            f"targets.top_k is {top_k}, but {_whose(config)} {vocabulary:,} tokens; set "
            f"targets.top_k={vocabulary} or lower"
        )
    if top_k + own > vocabulary and own:
        raise ConfigError(
            f"targets.top_k is {top_k} and targets.student_ids {own}, {top_k + own} ids in all, "
            f"but teacher and student share {vocabulary:,}; lower one, or set student_ids=0 and "
            f"top_k={vocabulary}, which ships all"
        )


def _whose(config: Config) -> str:
    across = config.cross_tokenizer is not None
    return "the teacher has" if across else "teacher and student share"


def _uses_chat_template(config: Config) -> bool:
    """Whether any row of any source, of training or validation, is a prompt or a conversation."""
    root = Path(config.paths.root)
    return reads_pairs(config.losses) or any(
        kind != "text" for domain in config.domains.values() for kind in kinds_of(domain, root=root)
    )
