"""Everything a run needs before any process starts: checked, tokenised, locked, written down."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from cluster.planning.across.rows import ReadAcross, read_across
from cluster.planning.description import refuse_unloadable, student_trust
from cluster.planning.handshake import (
    Handshake,
    TeacherFacts,
    shake_hands,
    training_question,
    validation_question,
)
from cluster.planning.prompting import Showing, refuse_overlong, showing_of
from cluster.planning.tasks.words import with_words
from shared.config.adaptive_losses import writes_pairs
from shared.config.losses import RouterBalance
from shared.config.mixture import AdaptiveMixture
from shared.config.models.teachers import Teacher
from shared.config.paths import refuse_unwritable
from shared.config.run import Config
from shared.config.tasks.task import Tagging
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare
from shared.data.trust import Trust
from shared.data.written_pairs import RESPONSES
from shared.errors import ConfigError, HandshakeError
from shared.images.reading import ImageRows
from shared.locations import Location
from shared.run.plan import RunPlan, Work
from shared.run.run_dir import RunDir
from shared.run.start import StartClock
from shared.targets.asks.head_location import ShippedHead
from shared.text.framing import ends_of
from shared.text.special_tokens import special_ids
from student_trainer.models.routers import OtherRouterLoss
from teacher_service.engine.description import LoadEngine, TeacherDescription
from teacher_service.engine.vllm.environment import refuse_environment


@dataclass(frozen=True, slots=True)
class Prepared:
    """A resolved config, known to be possible, and its rows on disk."""

    config: Config
    teachers: Mapping[str, TeacherFacts]
    domains: tuple[PreparedDomain, ...]
    trust: Trust  # in units of the student
    showing: Showing  # to the teachers alone
    special_ids: tuple[int, ...] = ()  # of the tokenizer, where documents are changed
    ends: tuple[int, ...] = ()  # ids that end what the student writes, where it writes any
    across: ReadAcross | None = None  # of a run across tokenizers
    left_out: str | None = None  # of what the student's own config asks, in a sentence

    def taught_by(self, teacher: str) -> "Prepared":
        """The part of the run that one teacher teaches."""
        config = self.config.taught_by(teacher)
        return replace(
            self,
            config=config,
            teachers={teacher: self.teachers[teacher]},
            domains=tuple(domain for domain in self.domains if domain.name in config.domains),
        )

    @property
    def teacher(self) -> Teacher:
        """The teacher of a part, or of a run that has one."""
        (teacher,) = self.config.teachers.values()
        return teacher

    @property
    def facts(self) -> TeacherFacts:
        """What is known of it."""
        (facts,) = self.teachers.values()
        return facts


@dataclass(frozen=True, slots=True)
class Launch:
    """A command at work on a run directory, which it has locked."""

    prepared: Prepared
    run_dir: RunDir
    attempt: Path  # logs/attempt-N
    # Teacher services that are running, by teacher; None: the run starts its own.
    services: Mapping[str, str] | None
    clock: StartClock = field(default_factory=StartClock)
    # In place of those of its own services' replicas, by teacher, and of its workers' training.
    engines: Mapping[str, LoadEngine] = field(default_factory=dict)
    work: Work | None = None
    trains: bool = True  # or evaluates, and needs nothing that models write before training

    def taught_by(self, teacher: str) -> "Launch":
        """The part of the command that one teacher teaches."""
        services = self.services and {teacher: self.services[teacher]}
        return replace(self, prepared=self.prepared.taught_by(teacher), services=services)

    @property
    def config(self) -> Config:
        """The run's resolved config."""
        return self.prepared.config

    @property
    def serves_student(self) -> bool:
        """Whether a service of the student may have to score its rows, or write, before training,
        in its workers' places."""
        progressive = self.config.progressive
        scores = progressive is not None and progressive.difficulty == "gap"
        return scores or writes_pairs(self.config.losses)

    @property
    def namespace(self) -> str:
        """One per run directory, so that runs of one name in different places do not meet."""
        place = xxhash.xxh32_hexdigest(str(self.run_dir.path).encode())
        return f"{self.run_dir.path.name}-{place}"


def check(config: Config) -> Handshake:
    """Refuse what cannot work, reading no weights. Raises UserErrors."""
    _refuse_environments(config)
    return shake_hands(config)


def _refuse_environments(config: Config) -> None:
    """Look at the environments of engines, those that are on this machine."""
    named = {f"teachers.{name}": teacher.python for name, teacher in config.teachers.items()}
    for section, python in {**named, "rollouts": config.rollouts.python}.items():
        if python is not None and Path(python).expanduser().exists():
            refuse_environment(python, section=section)


def prepare_run(config: Config) -> Prepared:
    """Check a resolved config and tokenise its domains, with bars on the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hands = check(config)
    if not config.targets.teacher_free:
        refuse_unloadable(config)
    if config.targets.store is not None:
        store = Location.of(config.targets.store)
        if store.local and not config.targets.teacher_free:
            refuse_unwritable("targets.store", str(store.local))
        store.list()  # it can be reached
    showing = showing_of(config, hands)
    domains = prepare(
        config,
        tokenizer=hands.load_tokenizer,
        tokenizer_digest=hands.rows_digest,
        cache=Path(config.paths.cache),
        left_out=showing.left_out,
        images=hands.processor and ImageRows(hands.processor, Path(config.paths.root)),
    )
    across = None
    if hands.across is not None:
        (known,) = hands.teachers.values()
        bounds = {"context": config.data.context, "teacher_context": known.context}
        domains, across = read_across(
            domains, hands.across, cache=Path(config.paths.cache), **bounds
        )
    if isinstance(config.task, Tagging):
        domains = with_words(domains, config, hands)
    writes_texts = not config.source.is_dataset or writes_pairs(config.losses)
    if across is None and not config.task.classifies:
        refuse_unreadable(config, hands, showing, domains)
    config, trust, left_out = trusted(config, hands.router_balance)
    return Prepared(
        config=config,
        teachers=hands.teachers,
        domains=domains,
        trust=trust,
        showing=showing,
        special_ids=special_ids(hands.load_tokenizer()) if config.augmentation.applies else (),
        ends=ends_of(hands.load_tokenizer()) if writes_texts else (),
        across=across,
        left_out=left_out,
    )


def refuse_unreadable(
    config: Config, hands: Handshake, showing: Showing, domains: Sequence[PreparedDomain]
) -> None:
    """Raise UserErrors where a teacher cannot read rows as it is shown them, or their ids."""
    writes_pairs_first = writes_pairs(config.losses)
    writes_texts = not config.source.is_dataset or writes_pairs_first
    for domain in domains:
        for name in config.teachers_of(domain.name):
            known = hands.teachers[name]
            refuse_overlong(
                showing,
                domain,
                teacher_context=known.context,
                context=config.data.context // (RESPONSES if writes_pairs_first else 1),
                source=config.source if writes_texts else None,
            )
            refuse_unknown_ids(hands, domain, known=known)


def trusted(config: Config, asked: RouterBalance | None) -> tuple[Config, Trust, str | None]:
    """A config with what `with_router_balance` adds, what units of its student are trusted for, and
    a sentence where the student's routers have no such loss, which is left out then."""
    routed = with_router_balance(config, asked)
    try:
        return routed, student_trust(routed), None
    except OtherRouterLoss as error:
        if routed is config:
            raise
        why = str(error).partition("; ")[0]
    said = f"The loss of its routers that the student's config.json asks for is left out: {why}."
    return config, student_trust(config), said


def refuse_unknown_ids(hands: Handshake, domain: PreparedDomain, *, known: TeacherFacts) -> None:
    """Raise HandshakeError where a domain's text has ids that the tokenizer names and a model's
    embeddings do not hold."""
    if known.shared_vocab >= len(hands.tokens):
        return
    paths = (domain.train_path, domain.validation_path)
    largest = max(RowStore.open(path).largest_id() for path in paths)
    if largest >= known.shared_vocab:
        raise HandshakeError(
            f"domain {domain.name} has token {hands.tokens[largest]!r} ({largest}), but "
            f"teacher and student both hold {known.shared_vocab:,} of the tokenizer's "
            f"{len(hands.tokens):,} ids; take models with a row for each id, or leave such "
            "text out"
        )


def with_router_balance(config: Config, asked: RouterBalance | None) -> Config:
    """A config with the loss of the routers that its student's own config asks for, unless it has
    one; one that sees cannot ask, and has it where it is upcycled."""
    if config.task.sees:
        upcycle = config.student.upcycle
        asked = upcycle and RouterBalance(weight=upcycle.balance, experts_per_token=upcycle.top_k)
    if (
        asked is None
        or config.task.classifies
        or any(isinstance(loss, RouterBalance) for loss in config.losses)
    ):
        return config
    return config.model_copy(update={"losses": [*config.losses, asked]})


def refuse_unasked(config: Config) -> None:
    """Refuse what needs a teacher's answers where no loss asks for any; a baseline, which asks
    none either, takes its weights from its run's log. Raises ConfigError."""
    if config.needs_teacher:
        return
    if config.prompts is not None and not config.source.teacher:
        raise ConfigError(
            f"prompts is {config.prompts}, but no loss asks a teacher, who would be shown them; "
            "leave prompts out, add a loss that learns from the teacher, or let it write (source)"
        )
    for name, domain in config.domains.items():
        if "teacher_prompt" in domain.columns and not config.source.teacher:
            raise ConfigError(
                f"domains.{name}.columns has a teacher_prompt, but no loss asks a teacher, who "
                "would be shown it; leave the column out, add a loss that learns from the teacher, "
                "or let it write (source)"
            )
    for name, teacher in config.teachers.items():
        if teacher.online_modules is not None:
            raise ConfigError(
                f"teachers.{name}.online_modules is set, but no loss asks a teacher, so that "
                "nobody learns from them; leave them out, or add a loss that learns from it"
            )
        if teacher.follow_student is not None:
            raise ConfigError(
                f"teachers.{name}.follow_student is set, but no loss asks a teacher, so that "
                "nobody learns from it; leave it out, or add a loss that learns from it"
            )
    if isinstance(config.mixture, AdaptiveMixture) and not config.mixture.needs_validation:
        raise ConfigError(
            f"mixture.policy is {config.mixture.policy}, which compares with the teacher on "
            "training text, but no loss asks a teacher; add one that does, or take ddk, sheared "
            "or fixed"
        )


def refuse_unreached(config: Config) -> None:
    """Refuse a warm-up that the run ends in, so that no update has the rate asked for. Raises
    ConfigError."""
    asked = config.optimiser
    if asked.warmup_steps > config.steps:
        reached = asked.lr * config.steps / asked.warmup_steps
        raise ConfigError(
            f"optimiser.warmup_steps is {asked.warmup_steps}, but the run has {config.steps} "
            f"steps, and its rate would reach {reached:.3g} of optimiser.lr {asked.lr:g}; set "
            f"optimiser.warmup_steps={config.steps // 10} or more steps"
        )


def run_plan(
    prepared: Prepared,
    *,
    run_dir: Path,
    teacher: dict[str, str] | None,
    projection: str = "",
    head: ShippedHead | None = None,
) -> RunPlan:
    """What the workers are told of one teacher's part, once its fingerprint, the projection of its
    hidden states and, where it ships the last ones whole, its head are known."""
    config, prompts = prepared.config, prepared.showing.prompts
    vocabulary, classes = prepared.facts.shared_vocab, prepared.facts.classes()
    evaluation, kl_kind = validation_question(
        config, vocabulary, prompts=prompts, head=head, classes=classes
    )
    return RunPlan(
        config=config,
        run_dir=str(run_dir),
        domains=prepared.domains,
        training_question=training_question(
            config, vocabulary, projection=projection, prompts=prompts, head=head, classes=classes
        ),
        validation_question=evaluation if teacher else None,
        kl_kind=kl_kind if teacher else "none",
        teacher=teacher,
        packed=prepared.trust.packed,
        passes=prepared.trust.passes,
        teacher_width=shipped_width(prepared) if config.hidden_layers else None,
        openings=prepared.showing.openings,
        special_ids=prepared.special_ids,
        ends=prepared.ends,
        token_pair=_token_pair(prepared, RunDir(run_dir)),
    )


def _token_pair(prepared: Prepared, run_dir: RunDir) -> str | None:
    """Where what pairs the tokens of a run across tokenizers lies, in its folder."""
    if prepared.across is None:
        return None
    run_dir.path.mkdir(parents=True, exist_ok=True)
    prepared.across.pair.write(run_dir.token_pair)
    return str(run_dir.token_pair)


def shipped_width(prepared: Prepared) -> int:
    """Width of the hidden states that travel."""
    payload, width = prepared.config.targets.hidden, prepared.facts.width
    return width if payload.raw else min(width, payload.width)


def refuse_unfit(config: Config, teacher: TeacherDescription, *, width: int) -> None:
    """What only a loaded teacher tells: its context and its layers, whose states are as wide as
    `width` says. Raises HandshakeError."""
    apart = config.task.classifies or config.cross_tokenizer is not None  # rows of its own
    limit = None if apart else teacher.max_context
    if limit is not None and config.data.context > limit:
        raise HandshakeError(
            f"data.context is {config.data.context}, but the teacher reads at most {limit} tokens; "
            f"set data.context={limit} or lower"
        )
    beyond = [layer for layer in config.hidden_layers if not 0 <= layer <= teacher.num_layers]
    if beyond:
        raise HandshakeError(
            f"a hidden_states loss asks for teacher layer {beyond[0]}, but the teacher has layers "
            f"0 to {teacher.num_layers}; change losses"
        )
    if config.hidden_layers and not teacher.state_widths:
        raise HandshakeError(
            "a hidden_states loss asks for the teacher's states, but its layers do not give one "
            "state per token; take hidden_states out of losses"
        )
    for layer in config.hidden_layers:
        if teacher.state_widths[layer] != width:
            raise HandshakeError(
                f"a hidden_states loss asks for teacher layer {layer}, whose states have "
                f"{teacher.state_widths[layer]} numbers and not the {width} of its config; "
                "ask for other layers"
            )
