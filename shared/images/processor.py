"""What a model makes of an image: the tokens that stand in its place, and its pixels.

The processor is the model's own, of transformers, and images are read as transformers reads them,
so that what is computed of a row is what `AutoProcessor` and the model give their users. Models
that are told which tokens are images, and have positions or masks by that, are refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shared.errors import ConfigError, DataError
from shared.loading import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others may run programs, as EPS does
MOST_PIXELS = 50_000_000  # of an image; a small file may hold far more
SIZES = ((64, 64), (640, 480), (300, 1000))  # of images by which two processors are compared


@dataclass(frozen=True)
class ImageProcessor:
    """A model's processor of transformers."""

    model: str  # as the config has it
    processor: Any

    @property
    def token(self) -> str:
        """The token that holds the place of one image in a text."""
        return self.processor.image_token

    @property
    def token_id(self) -> int:
        """Its id."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.token))

    @property
    def digest(self) -> str:
        """A hash of all that decides tokens and pixels, beside the tokenizer."""
        told = self.processor.to_dict() | {"pillow": version("pillow")}
        told |= {name: version(name) for name in ("transformers", "numpy")}
        return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())

    def save(self, folder: Path) -> None:
        """Write its files."""
        self.processor.save_pretrained(folder)

    def ids(self, image: "Image") -> np.ndarray:
        """The token ids that stand in the place of an image, int32."""
        answer = self.processor(
            text=[self.token], images=[[image]], add_special_tokens=False, return_tensors="np"
        )
        return answer["input_ids"][0].astype(np.int32)

    def blank_ids(self) -> np.ndarray:
        """The token ids that stand in the place of the blank image, int32."""
        return self.ids(open_image(blank_image(), where="the blank image"))

    def pixels(self, images: Sequence[Sequence[bytes]]) -> dict[str, np.ndarray]:
        """What the model reads beside token ids, of the images of each line that has some, by the
        names that transformers has for it."""
        opened = [[open_image(one, where="a row") for one in own] for own in images if own]
        found = self.processor.image_processor(images=opened, return_tensors="np")
        return {name: np.asarray(value) for name, value in found.items()}


def open_image(encoded: bytes, *, where: str) -> "Image":
    """An image in RGB, turned as its file says. Raises DataError for bytes that are none of
    `FORMATS`, or of more than `MOST_PIXELS`."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # each format has errors of its own
        raise DataError(
            f"{where}: its image cannot be read ({first_line(error)}); correct it, or leave the "
            "row out"
        ) from None


@lru_cache(maxsize=1)
def blank_image() -> bytes:
    """A small grey image, encoded."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", SIZES[0], (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


@lru_cache(maxsize=4)
def image_processor(model: str, revision: str | None, *, trusted: bool = False) -> ImageProcessor:
    """The processor of a model. Raises ConfigError for a model that has none for images, or whose
    tokenizer has no token for their place."""
    from transformers import AutoProcessor  # slow

    try:
        found = AutoProcessor.from_pretrained(
            model, revision=revision or "main", trust_remote_code=trusted
        )
    except Exception as error:  # of every library that reads one of its files
        raise ConfigError(
            f"{model} has no processor for images that can be loaded ({first_line(error)}); name a "
            "model of image and text, with its processor_config.json or preprocessor_config.json"
        ) from None
    token = getattr(found, "image_token", None)
    if not hasattr(found, "image_processor") or not isinstance(token, str):
        raise ConfigError(
            f"{model} has no processor that puts images in the place of a token; name a model of "
            "image and text"
        )
    processor = ImageProcessor(model, found)
    if processor.token_id == 0:
        raise ConfigError(
            f"{model} has the id 0 for the place of an image, with which lines are padded; name "
            "another model"
        )
    return processor


def differing_places(
    one: ImageProcessor, other: ImageProcessor
) -> tuple[tuple[int, int], np.ndarray, np.ndarray] | None:
    """A size of an image, wide and high, in whose place two models have other tokens, with the ids
    of each; None where they agree on all that are tried."""
    from PIL import Image

    for size in SIZES:
        image = Image.new("RGB", size)
        own, others = one.ids(image), other.ids(image)
        if not np.array_equal(own, others):
            return size, own, others
    return None
