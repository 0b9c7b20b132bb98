"""Where a step's tokens come from: the data set, and what student and teacher write."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from shared.config.base import Fraction, Section
from shared.config.losses import Loss

SHARES = ("dataset", "student", "teacher")
ADAPTIVE = "adaptive"


class AdaptiveShare(Section):
    """A share of the student's own text that grows where validation loss does (DistiLLM, arXiv
    2402.03898); defaults are the published code's, which looks once an epoch."""

    every: int = Field(default=100, ge=1, description="steps between looks at the validation loss")
    start: Fraction = Field(default=0.0, description="share of loss tokens at first")
    growth: Fraction = Field(default=0.1, description="what a worse loss adds to the share")
    tolerance: float = Field(
        default=0.1, ge=0, description="nats per token by which a loss must be worse"
    )
    replay_rows: int = Field(
        default=1000, ge=1, description="written rows of a domain that are kept to be learnt again"
    )


class TokenSources(Section):
    """Shares of a step's loss tokens by who wrote them, and how student and teacher write."""

    dataset: Fraction = Field(default=1.0, description="share of loss tokens from the data set")
    student: Fraction = Field(
        default=0.0, description="share that the student writes from the prompts of rows (GKD)"
    )
    teacher: Fraction = Field(
        default=0.0,
        description="share that the teacher writes from the prompts of rows (sequence-level KD)",
    )
    adaptive: AdaptiveShare | None = Field(
        default=None,
        description="a share of the student that grows with validation loss, in place of shares",
    )
    prompt_tokens: int = Field(
        default=32, ge=1, description="of a text without a prompt, what is gone on from"
    )
    max_new_tokens: int = Field(default=128, ge=1, description="tokens written to a prompt at most")
    min_new_tokens: int = Field(default=0, ge=0, description="tokens before a text may end")
    temperature: float = Field(
        default=1.0, ge=0, description="that both write at; 0: always the likeliest token"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="mass of the likeliest tokens that they draw from"
    )
    teacher_mix: Fraction = Field(
        default=0.0,
        description="the teacher's share in the law that each token of the student's own text is "
        "drawn from (MiniLLM's alpha)",
    )
    draws: int = Field(
        default=1,
        ge=1,
        description="texts of the teacher to a prompt, which take turns from epoch to epoch",
    )
    lag: int | None = Field(
        default=None,
        ge=0,
        le=2,
        description="steps between the weights that write and the step that learns; 0: none, and "
        "the teacher is waited for; null: 1 where steps are asked ahead",
    )
    updates: int = Field(
        default=1,
        ge=1,
        description="steps that learn each block of rows, written once for all of them, as the "
        "epochs of PPO do",
    )
    batch_rows: int = Field(default=32, ge=1, description="prompts that are gone on from at once")

    @property
    def writes(self) -> bool:
        """Whether the student writes any of it."""
        return self.student > 0 or self.adaptive is not None

    @property
    def teachers_write(self) -> bool:
        """Whether teachers write any of it, or have a share in what the student writes."""
        return bool(self.teacher or self.teacher_mix)

    @property
    def is_dataset(self) -> bool:
        """Whether all of it is the data set's."""
        return not (self.student or self.teacher or self.adaptive)

    @property
    def first_share(self) -> float:
        """The share of loss tokens that models write, at the first step."""
        if self.adaptive is not None:
            return self.adaptive.start
        return self.student + self.teacher if self.dataset else 1.0

    @property
    def written_in_words(self) -> str:
        """The shares that are not the data set's, as a message names them."""
        if self.adaptive is not None:
            return "adaptive"
        shares = {name: getattr(self, name) for name in ("student", "teacher")}
        return " and ".join(f"{name} {share:g}" for name, share in shares.items() if share)

    @property
    def unwritten(self) -> str:
        """The sentence for a command without anything that writes these shares."""
        return (
            f"source has {self.written_in_words}, but nothing here can write; use "
            "`tutelage run`, or source=dataset"
        )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """One source by its name is all of it; of shares, those left out are 0."""
        if isinstance(value, str):
            if value not in (*SHARES, ADAPTIVE):
                listed = ", ".join((*SHARES, ADAPTIVE))
                raise ValueError(f"is {value!r}; take {listed}, or shares of the first three")
            value = {value: {} if value == ADAPTIVE else 1.0}
        if isinstance(value, dict) and not value.keys().isdisjoint(SHARES):
            return dict.fromkeys(SHARES, 0.0) | value
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> "TokenSources":
        if self.adaptive is not None and self.dataset != 1:
            raise ValueError(
                "source has adaptive, which decides how much the student writes, and shares beside "
                "it; remove one of the two"
            )
        total = self.dataset + self.student + self.teacher
        if abs(total - 1) > 1e-9:
            teacher = f" and teacher {self.teacher:g}" if self.teacher else ""
            raise ValueError(
                f"source has dataset {self.dataset:g} and student {self.student:g}{teacher}, which "
                f"sum to {total:g}; shares sum to 1"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"source.min_new_tokens is {self.min_new_tokens}, more than source.max_new_tokens "
                f"{self.max_new_tokens}; lower one or raise the other"
            )
        return self


def check_source(
    source: TokenSources,
    losses: Sequence[Loss],
    *,
    context: int,
    most_ahead: int,
    policy: str,
    fixed_weights: bool,
    baseline: bool,
    teacher_free: bool,
) -> None:
    """Raise ValueError where the student cannot write as asked, or nothing would learn from it.
    `most_ahead` is how many steps are drawn before the one under way."""
    _refuse_unfit_rollouts(source, losses)
    _refuse_idle_options(source)
    if source.is_dataset:
        return
    share = f"source has {source.written_in_words}"
    if source.max_new_tokens >= context:
        raise ValueError(
            f"source.max_new_tokens is {source.max_new_tokens}, which leaves no room for a prompt "
            f"in data.context {context}; lower one or raise the other"
        )
    if source.updates > 1 and not fixed_weights:
        raise ValueError(
            f"source.updates is {source.updates}, with which a block of rows is learnt in so many "
            "steps, but mixture or progressive decide its weights from step to step; leave one out"
        )
    if source.writes:
        _refuse_unlearnt(source, losses, most_ahead=most_ahead)
    if not source.dataset and policy == "doremi":
        raise ValueError(
            "mixture.policy is doremi, which compares losses on the data set, but source has "
            "dataset 0; give the data set a share, or take another policy"
        )
    if baseline:
        raise ValueError(
            f"{share}, but baseline trains a copy on identical rows, which it would not have; "
            "remove one of the two"
        )
    if teacher_free:
        raise ValueError(
            f"{share}, but targets.teacher_free leaves no teacher to write, or to ask about what "
            "is written; remove one of the two"
        )


def _refuse_idle_options(source: TokenSources) -> None:
    """What is said of how models write needs a share that they write."""
    if source.updates > 1 and not source.writes:
        raise ValueError(
            f"source.updates is {source.updates}, but the student writes nothing that could be "
            "learnt more than once; give it a share, or leave it out"
        )
    if source.draws > 1 and not source.teacher:
        raise ValueError(
            f"source.draws is {source.draws}, but source has teacher 0, so that no teacher writes "
            "texts that could take turns; give it a share, or leave it out"
        )
    if source.lag is not None and not source.writes:
        raise ValueError(
            f"source.lag is {source.lag}, but the student writes nothing whose weights could be "
            "old; give it a share, or leave it out"
        )


def check_mix(source: TokenSources, teachers_of: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError where the teacher cannot have a share in the student's text: it needs some
    of it, a law to have a share in, and one teacher; `teachers_of` is by domain."""
    if not source.teacher_mix:
        return
    mix = f"source.teacher_mix is {source.teacher_mix:g}"
    if not source.writes:
        raise ValueError(
            f"{mix}, the teacher's share in what the student writes, but source has student 0; "
            "give the student a share, or leave it out"
        )
    if not source.temperature:
        raise ValueError(
            f"{mix}, but source.temperature is 0, at which each model has one token and no law to "
            "mix; raise it, or leave teacher_mix out"
        )
    for name, teachers in teachers_of.items():
        if len(teachers) > 1:
            raise ValueError(
                f"{mix}, but domains.{name}.teacher averages {' and '.join(teachers)}, and a token "
                "is drawn with one of them; name one teacher, or leave teacher_mix out"
            )


def _refuse_unlearnt(source: TokenSources, losses: Sequence[Loss], *, most_ahead: int) -> None:
    """What the student writes needs a teacher's answers, on time."""
    if source.lag is not None and source.lag > most_ahead:
        raise ValueError(
            f"source.lag is {source.lag}, but steps are asked about at most {most_ahead} ahead "
            "(mixture.lag_steps, at most 2; none with targets.student_ids); lower source.lag to "
            f"{most_ahead}"
        )
    if not any(loss.asks_teacher for loss in losses):
        raise ValueError(
            f"source has {source.written_in_words}, but no loss asks a teacher, and hard labels "
            "are not learnt from what the student wrote; add a divergence to losses"
        )
    all_of_it = "student 1" if source.student == 1 else ""
    if source.adaptive is not None and source.adaptive.start == 1:
        all_of_it = "adaptive.start 1, which never falls"
    if all_of_it and any(loss.kind == "cross_entropy" for loss in losses):
        raise ValueError(
            "losses has a cross_entropy, which learns from nothing that the student wrote, but "
            f"source has {all_of_it}; give dataset or teacher a share, or leave cross_entropy out"
        )


def _refuse_unfit_rollouts(source: TokenSources, losses: Sequence[Loss]) -> None:
    """A loss of what the student wrote needs some of it, and its own law."""
    for loss in losses:
        if not loss.of_rollouts:
            continue
        if not source.writes:
            raise ValueError(
                f"losses has a {loss.kind}, which learns from what the student writes, but source "
                "has student 0; set source=student, or shares as {student: 0.5, dataset: 0.5}"
            )
        if source.temperature != 1 or source.top_p != 1 or source.min_new_tokens:
            raise ValueError(
                f"losses has a {loss.kind}, whose rewards compare the teacher with the student as "
                f"it is, but source has temperature {source.temperature:g}, top_p "
                f"{source.top_p:g} and min_new_tokens {source.min_new_tokens}; leave them out"
            )
