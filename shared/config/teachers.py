"""Teachers as a config has them, and which of them a domain may name."""

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import Field

from shared.config.attention import Attention
from shared.config.base import Dtype, Section


class Teacher(Section):
    """A causal language model, the PEFT adapter on it, and how many copies serve it."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    dtype: Dtype = "float32"
    attention: Attention = Field(
        default="auto", description="auto (the library's choice), sdpa, eager or flash_attention_2"
    )
    quantisation: Literal["none", "int8", "nf4"] = "none"
    trust_remote_code: bool = False
    replicas: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0, description="GPUs of one replica")
    cpus: float = Field(default=1, ge=0, description="CPUs of one replica")


def check_teachers(teachers: Collection[str], named: Mapping[str, str | None]) -> None:
    """Raise ValueError unless every domain has one teacher, and every teacher a domain; `named` are
    the teachers that domains name."""
    known = ", ".join(teachers)
    for name, teacher in named.items():
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
