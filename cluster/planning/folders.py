"""What a model's folder holds instead of plain weights, and the way out."""

from collections.abc import Mapping

from cluster.planning.description import ModelDescription
from shared.config.run import Config
from shared.errors import ConfigError


def refuse_quantised(
    config: Config, teachers: Mapping[str, ModelDescription], student: ModelDescription
) -> None:
    """Raise ConfigError for a student whose weights lie there in few bits, which do not train, and
    for a teacher that is to be quantised a second time."""
    if student.stored_as is not None:
        raise ConfigError(
            f"student.model {config.student.model} is stored {student.stored_as}, and such weights "
            "do not train; name its unquantised base, and student.train.kind=qlora to train "
            "adapters on a base in nf4"
        )
    for name, described in teachers.items():
        asked = config.teachers[name].quantisation
        if described.stored_as is not None and asked != "none":
            raise ConfigError(
                f"teachers.{name}.quantisation is {asked}, but {described.name} is already stored "
                f"{described.stored_as}; set teachers.{name}.quantisation=none"
            )
