"""What an engine other than transformers is not asked for: a config that needs it is refused before
anything starts."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from shared.config.selectors import DRAWN
from shared.errors import ConfigError

if TYPE_CHECKING:
    from shared.config.models.teachers import Teacher
    from shared.config.targets import Targets

ANSWERS_WITHIN_S = 3600.0  # an engine's own process, or it is ended; loading is its first answer
VLLM_DRAWS_AT = (0.01, 2.0)  # least and most temperature; a lower one it would raise to the least

VLLM_SHARE = 0.9  # of the memory of a GPU, or of the part that is asked for

# Ranks of adapters that vLLM makes room for; one between them takes the room of the next.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def draws_in_vllm(temperature: float) -> bool:
    """Whether vLLM draws at a temperature as it is asked; 0 is the likeliest token."""
    least, most = VLLM_DRAWS_AT
    return temperature == 0 or least <= temperature <= most


def check_environment(engine: str, python: str | None) -> None:
    """Raise ValueError where an engine and the Python of an environment of its own do not fit."""
    if engine != "vllm":
        if python is not None:
            raise ValueError(
                f"python is {python}, but engine is {engine}, which computes in the replica's own; "
                "set engine=vllm, or leave python out"
            )
        return
    if python is None:
        raise ValueError(
            "engine is vllm, which needs an environment of its own; set python=PATH to its Python"
        )
    if not python.startswith(("/", "~")):
        raise ValueError(
            f"python is {python}, which each replica would look for in a folder of its own; name "
            "it from / or ~"
        )


def check_engines(
    teachers: "Mapping[str, Teacher]",
    targets: "Targets",
    *,
    temperatures: Collection[float],
    hidden_layers: Collection[int],
    difficulty: str | None,
    writes_at: float | None,
    mixes: bool,
    waited_s: float,
) -> None:
    """Raise ValueError where a teacher with engine vllm is asked for more than its likeliest ids at
    temperature 1, to write at a temperature where it does not draw, or waited for longer than its
    process is. `difficulty` is what orders rows, `writes_at` the temperature at which teachers
    write, if anything or any does; `mixes` says that they have a share in every token of the
    student's; a unit is waited for `waited_s`."""
    name = next((name for name, teacher in teachers.items() if teacher.engine == "vllm"), None)
    if name is None:
        return
    others = " and ".join(f"{t:g}" for t in temperatures if t != 1)
    asked = {
        f"losses have temperature {others}": bool(others),
        f"targets.selector is {targets.selector}, which draws ids": targets.selector in DRAWN,
        f"targets.exact is {targets.exact}": targets.exact is not None,
        f"targets.student_ids is {targets.student_ids}": targets.student_ids > 0,
        "losses has a hidden_states": bool(hidden_layers),
        f"progressive.difficulty is {difficulty}": difficulty == "teacher_entropy",
        "source.teacher_mix has it write token by token": mixes,
    }
    for said, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"teachers.{name}.engine is vllm, which gives the likeliest ids and the label at "
                f"temperature 1 and nothing else, but {said}; change that, or set "
                f"teachers.{name}.engine=transformers"
            )
    if writes_at is not None and not draws_in_vllm(writes_at):
        least, most = VLLM_DRAWS_AT
        raise ValueError(
            f"teachers.{name}.engine is vllm, which draws at temperatures from {least:g} to "
            f"{most:g}, or 0 for the likeliest, but source.temperature is {writes_at:g}; change "
            f"that, or set teachers.{name}.engine=transformers"
        )
    if waited_s > ANSWERS_WITHIN_S:
        raise ValueError(
            f"service.unit_deadline_s is {waited_s:g}, but teachers.{name}.engine is vllm, whose "
            f"process is started again when it has not answered for {ANSWERS_WITHIN_S:g} s; set "
            f"at most {ANSWERS_WITHIN_S:g}, or teachers.{name}.engine=transformers"
        )


def refuse_beyond_classifier(named: str, teacher: "Teacher") -> None:
    """Raise ConfigError where a teacher that is a classifier is to be loaded with more
    than its weights; `named` is what the sentence calls it."""
    plain = {"adapter": None, "quantisation": "none", "tensor_parallel": 1}
    for option, value in plain.items():
        if (asked := getattr(teacher, option)) != value:
            merged = ", or merge it (`tutelage export --merge`)" if option == "adapter" else ""
            raise ConfigError(
                f"{named} is a classifier, and {option} is {asked}, which is of language "
                f"models; leave it out{merged}"
            )
