"""An image of a row: where its bytes are, until they lie in the row itself."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from shared.errors import DataError


@dataclass(frozen=True)
class RowImage:
    """An encoded image, as a file or by itself."""

    source: Path | bytes
    where: str  # file:line of its row

    def read(self) -> bytes:
        """The bytes. Raises DataError for a file that cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.where}: its image {self.source} cannot be read ({error.strerror}); correct "
            "its path, or leave the row out"
        )

    @cached_property
    def digest(self) -> str:
        """A hash of the bytes."""
        return xxhash.xxh3_128_hexdigest(self.read())

    def stamp(self) -> list[str | int]:
        """What changes where the image does, without reading a file. Raises DataError."""
        if isinstance(self.source, bytes):
            return [self.digest]
        try:
            told = self.source.stat()
        except OSError as error:
            raise self._unreadable(error) from None
        return [str(self.source), told.st_size, told.st_mtime_ns]
