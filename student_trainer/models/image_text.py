"""The student of a task whose rows have images: a language model beside what sees.

B lines   T tokens   N positions with loss   D hidden width
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.config.run import Config
from shared.data.passes import TOGETHER
from shared.data.trust import Trust
from shared.errors import ConfigError
from shared.images.processor import ImageProcessor, blank_image
from shared.model_parts import ROUTED, read_by, speaking_part_of, takes, token_types_of
from student_trainer.models.routers import heard
from student_trainer.models.student import Student, load_student, student_trust
from student_trainer.tasks.task import PIXELS, ModelKind

SIDES = ("vision", "language")


@dataclass(frozen=True, slots=True)
class ImageTextStudent(Student):
    """A loaded student; `decoder` takes pixels beside token ids, and is what the head reads."""

    processor: ImageProcessor | None = None
    language: nn.Module | None = None  # the part of the decoder that sees nothing

    def sides(self, objective: nn.Module) -> dict[str, str]:
        """The side of every weight of it that trains, by its name in an objective around it."""
        assert self.language is not None, "a student that sees says something too"
        own = {id(p) for part in (self.language, self.head) for p in part.parameters()}
        students = {id(p) for p in self.saved.parameters() if p.requires_grad}
        named = ((name, p) for name, p in objective.named_parameters() if id(p) in students)
        return {name: SIDES[id(p) in own] for name, p in named}

    def outputs(
        self, batch: Mapping[str, Tensor], options: Mapping[str, bool]
    ) -> tuple[Any, Tensor]:
        """See `Student`. A line has the positions that the model gives it, as one alone has."""
        assert self.language is not None, "a student that sees says something too"
        beside = pixels_in(batch, self.decoder) | {"use_cache": False}
        asked = {name: value for name, value in options.items() if name != ROUTED}
        with heard(self.language, asked=options.get(ROUTED, False)) as routers:
            output = self.decoder(input_ids=batch["input_ids_BT"], **beside, **asked)
        output.router_logits = next(iter(routers), None)
        return output, output.last_hidden_state.flatten(0, 1)[batch["loss_index_N"]]

    def probe(self, device: torch.device, *, tokens: int) -> dict[str, Tensor]:
        """A batch of the blank image and a few fixed tokens, all of it with loss."""
        assert self.processor is not None, "a student that sees has a processor"
        plain = Student.probe(self, device, tokens=tokens)
        seen_T = torch.from_numpy(self.processor.blank_ids()).long().to(device)
        ids_1T = torch.cat([seen_T[None], _without(plain["input_ids_BT"], seen_T)], dim=1)
        place_T = torch.arange(ids_1T.shape[1], device=device)
        pixels = self.processor.pixels([[blank_image()]])
        read = {name: value for name, value in pixels.items() if takes(self.decoder, name)}
        beside = {PIXELS + name: torch.tensor(v).to(device) for name, v in read.items()}
        return {"input_ids_BT": ids_1T, "loss_index_N": place_T, **beside}


def pixels_in(batch: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """What a module reads of a batch's pixels, in its own dtype."""
    named = {name.removeprefix(PIXELS): t for name, t in batch.items() if name.startswith(PIXELS)}
    return read_by(module, named)


def load_image_text(
    config: Config,
    kind: ModelKind,
    processor: ImageProcessor,
    *,
    device: torch.device,
    export: Path | None = None,
) -> ImageTextStudent:
    """See `load_student`."""
    found = load_student(config, kind, device=device, export=export)
    if (told := token_types_of(found.decoder)) is not None:
        raise ConfigError(
            f"student.model: {config.student.model} is told by {told} which tokens are images, "
            "which nobody here does; choose another student, of LLaVA's kind"
        )
    parts = {field.name: getattr(found, field.name) for field in fields(found)}
    language = speaking_part_of(found.decoder)
    return ImageTextStudent(**parts, processor=processor, language=language)


def image_text_trust(config: Config, kind: ModelKind) -> Trust:
    """See `student_trust`; rows never share a line. Raises ConfigError, also for a model whose
    lines do not share a pass."""
    found = student_trust(config, kind)
    if found.passes != TOGETHER:
        raise ConfigError(
            f"student.model: {config.student.model} reads {found.passes.in_words()}, and images "
            "are read with all lines of a unit; choose another student"
        )
    return replace(found, packed=False)


def _without(ids_1T: Tensor, seen_T: Tensor) -> Tensor:
    """Ids without those that stand for images."""
    return ids_1T[:, ~torch.isin(ids_1T[0], seen_T)]
