"""Language modelling of text with images as a task: what follows the images in a text is learnt.

B lines   T tokens
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from shared.config.run import Config
from shared.data.layout import Layout, lay_out
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import SCHEMA, Rows
from shared.data.trust import Trust
from shared.images.processor import ImageProcessor, blank_image, image_processor
from student_trainer.tasks.causal_lm import CausalLM
from student_trainer.tasks.task import PIXELS, ModelKind

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student


@dataclass(frozen=True, slots=True)
class ImageText(CausalLM):
    """Learns the teacher's distribution of the next token of a text with images; a `Task`."""

    student: str
    revision: str | None
    trusted: bool

    @property
    def model(self) -> ModelKind:
        """See `Task`."""
        return ModelKind("AutoModelForImageTextToText", "CAUSAL_LM", sees=True)

    @property
    def processor(self) -> ImageProcessor:
        """The student's."""
        return image_processor(self.student, self.revision, trusted=self.trusted)

    def trust(self, config: Config) -> Trust:
        """As a language model's, every document on a line of its own."""
        from student_trainer.models.image_text import image_text_trust  # slow, as torch is

        return image_text_trust(config, self.model)

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """A language model beside what sees, and the linear output head over both."""
        from student_trainer.models.image_text import load_image_text  # slow, as torch is

        return load_image_text(config, self.model, self.processor, device=device, export=export)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A line for each document, and one more with the blank image, which learns nothing, where
        no row has an image: every pass then uses every weight."""
        return lay_out(self._seen(rows), packed=False)

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """The pixels of the images, in the order of their lines."""
        pixels = self.processor.pixels(self._seen(rows).documents().images())
        return {PIXELS + name: array for name, array in pixels.items()}

    def _seen(self, rows: Rows) -> Rows:
        """The rows, and where none has an image one that is a blank image."""
        images = rows.images()
        if any(images):
            return rows
        ids = self.processor.blank_ids()
        blank = Rows.build(
            domains=["blank"],
            indices=[0],
            input_ids=[ids],
            doc_starts=[np.zeros(1)],
            loss_masks=[np.zeros(len(ids))],
        )
        tables = [own.table.select(SCHEMA.names) for own in (rows, blank)]
        return Rows(pa.concat_tables(tables).combine_chunks()).with_images(
            [*images, [blank_image()]]
        )
