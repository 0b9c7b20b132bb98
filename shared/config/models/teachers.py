"""Teachers as a config has them, and which of them a domain may name."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config.base import Dtype, LocalPath, Name, Section
from shared.config.models.attention import Attention
from shared.config.models.engines import check_environment
from shared.config.models.following import FollowedStudent, why_unfollowing
from shared.config.models.modules import TrainedModules, why_untrainable
from shared.config.models.similarity import Similarity, why_unlike

LEAST_SHARE = 1e-7  # of an average of teachers


class Autoscaling(Section):
    """Bounds of a number of copies that follows how long steps wait for them."""

    min: int = Field(default=1, ge=1, description="copies that serve, at least")
    max: int = Field(ge=1, description="copies that serve or come, at most")
    wait: float = Field(
        default=0.03,
        gt=0,
        lt=1,
        description="share of their time that steps may wait; above it copies are added",
    )

    @model_validator(mode="after")
    def _in_order(self) -> "Autoscaling":
        if self.min > self.max:
            raise ValueError(
                f"replicas.min is {self.min}, more than replicas.max, which is {self.max}; raise "
                "max, or lower min"
            )
        return self


class Teacher(Section):
    """A causal language model, the PEFT adapter on it, and how many copies serve it."""

    model: Name
    revision: Name | None = None
    adapter: Name | None = None
    adapter_revision: Name | None = None
    dtype: Dtype = "float32"
    attention: Attention = Field(
        default="auto", description="auto (the library's choice), sdpa, eager or flash_attention_2"
    )
    quantisation: Literal["none", "int8", "nf4"] = "none"
    trust_remote_code: bool = False
    engine: Literal["transformers", "vllm", "similarity"] = Field(
        default="transformers",
        description="what computes: transformers, vllm in an environment of its own, or no model: "
        "similarity, of a task's classes (ReffAKD), with model's token embeddings",
    )
    python: LocalPath | None = Field(
        default=None,
        description="Python of that environment, a path on its replicas' nodes, from / or ~",
    )
    replicas: Annotated[int, Field(ge=1)] | Autoscaling = Field(
        default=1, description="copies that serve; with min, max and wait as many as steps need"
    )
    gpus: float = Field(default=0, ge=0, description="GPUs of one replica")
    cpus: float = Field(default=1, ge=0, description="CPUs of one replica")
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="processes that share every layer of one replica, and its gpus and cpus",
    )
    online_modules: TrainedModules | None = Field(
        default=None, description="LoRA modules on it that learn beside the student (OKD)"
    )
    follow_student: FollowedStudent | None = Field(
        default=None, description="it is the student itself, some steps ago (self-distillation)"
    )
    similarity: Similarity = Field(
        default=Similarity(), description="of engine similarity: how alike classes are"
    )

    @model_validator(mode="after")
    def _spread(self) -> "Teacher":
        if self.tensor_parallel == 1:
            return self
        asked = f"tensor_parallel is {self.tensor_parallel}"
        if self.gpus not in (0, self.tensor_parallel):
            raise ValueError(
                f"{asked} and gpus {self.gpus:g}, but each of its processes has one GPU; set "
                f"gpus={self.tensor_parallel}, or 0 for CPUs"
            )
        if self.quantisation != "none":
            raise ValueError(
                f"{asked} and quantisation {self.quantisation}, whose matrices are not split; set "
                "one of them, or load the layers one after the other on several gpus"
            )
        if self.adapter is not None:
            raise ValueError(
                f"{asked} and adapter {self.adapter}, which is not split; merge it into the model, "
                "or leave tensor_parallel at 1"
            )
        return self

    @model_validator(mode="after")
    def _alike(self) -> "Teacher":
        is_asked = self.engine == "similarity"
        if is_asked and (why := why_unlike(self)) is not None:
            raise ValueError(f"engine is similarity, which has no model, but {why}; leave it out")
        if not is_asked and self.similarity != Similarity():
            raise ValueError(
                f"similarity is set, but engine is {self.engine}; set engine=similarity, or leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _elsewhere(self) -> "Teacher":
        check_environment(self.engine, self.python)
        if self.engine != "vllm":
            return self
        plain = {"adapter": None, "quantisation": "none", "attention": "auto", "tensor_parallel": 1}
        for option, value in plain.items():
            if getattr(self, option) != value:
                raise ValueError(
                    f"engine is vllm and {option} {getattr(self, option)}, which it is not asked "
                    f"for; leave {option} out, or set engine=transformers"
                )
        return self

    @model_validator(mode="after")
    def _weights_move(self) -> "Teacher":
        if self.online_modules is not None and (why := why_untrainable(self)) is not None:
            raise ValueError(f"online_modules is set, and {why}, or leave them out")
        if self.follow_student is not None and (why := why_unfollowing(self)) is not None:
            raise ValueError(f"follow_student is set, but {why}; leave one of them out")
        return self

    @property
    def loading(self) -> dict[str, Any]:
        """What decides which weights are loaded, and how, beside the model's name."""
        return {
            "revision": self.revision,
            "adapter": self.adapter,
            "adapter_revision": self.adapter_revision,
            "dtype": self.dtype,
            "attention": self.attention,
            "quantisation": self.quantisation,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def rank_cpus(self) -> float:
        """CPUs of each process of a replica."""
        return self.cpus / self.tensor_parallel

    @property
    def rank_gpus(self) -> float:
        """GPUs of each process of a replica."""
        return self.gpus / self.tensor_parallel

    @property
    def apart(self) -> bool:
        """Whether a replica's engine is a process of its own, which has the replica's place."""
        return self.engine == "vllm"

    @property
    def draws(self) -> bool:
        """Whether it ships ids that are drawn by its probabilities."""
        return self.engine == "transformers"

    @property
    def fewest(self) -> int:
        """Replicas that it has at least, and starts with."""
        return self.replicas.min if isinstance(self.replicas, Autoscaling) else self.replicas

    @property
    def most(self) -> int:
        """Replicas that it has at most."""
        return self.replicas.max if isinstance(self.replicas, Autoscaling) else self.replicas


def shares_of(named: str | Mapping[str, float]) -> dict[str, float]:
    """The teachers that a domain names, with shares that sum to 1."""
    weights = {named: 1.0} if isinstance(named, str) else named
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def check_teachers(
    teachers: Collection[str],
    asked: Mapping[str, str | Mapping[str, float] | None],
    *,
    exact: bool,
    scored: str | None,
) -> None:
    """Raise ValueError unless every domain has a teacher, or several where the average of their
    distributions is `exact` and nothing is `scored` by one, told as a sentence tells it, and every
    teacher a domain; `asked` is what domains name."""
    for name, shares in asked.items():
        if isinstance(shares, Mapping):
            _check_shares(name, shares, exact=exact, scored=scored)
    named = {
        (name, teacher): teacher
        for name, shares in asked.items()
        for teacher in (shares if isinstance(shares, Mapping) else (shares,))
    }
    known = ", ".join(teachers)
    for (name, _), teacher in named.items():
        if teacher is None and len(teachers) > 1:
            raise ValueError(
                f"domains.{name} names no teacher, and there are {len(teachers)}; set "
                f"domains.{name}.teacher to one of {known}"
            )
        if teacher is not None and teacher not in teachers:
            raise ValueError(
                f"domains.{name}.teacher is {teacher!r}, but teachers has {known}; name one of them"
            )
    for name in teachers:
        if len(teachers) > 1 and name not in named.values():
            raise ValueError(
                f"teachers.{name} teaches no domain; set domains.NAME.teacher={name} for one, or "
                "remove it"
            )


def _check_shares(
    domain: str, shares: Mapping[str, float], *, exact: bool, scored: str | None
) -> None:
    option = f"domains.{domain}.teacher"
    if not shares:
        raise ValueError(f"{option} names no teacher; name one, or several with their weights")
    for teacher, share in shares_of(shares).items():
        if share < LEAST_SHARE:
            raise ValueError(
                f"{option} gives {teacher} a share of {share:g}, less than {LEAST_SHARE:g}, which "
                f"float32 does not keep; leave {teacher} out, or take weights nearer to each other"
            )
    if len(shares) > 1 and not exact:
        raise ValueError(
            f"{option} averages {' and '.join(shares)}, who ship other ids of a position each; set "
            "targets.exact=last_hidden, with which their average is over the whole vocabulary, or "
            "name one teacher"
        )
    if len(shares) > 1 and scored:
        raise ValueError(
            f"{option} averages {' and '.join(shares)}, but {scored}, or name one teacher"
        )
