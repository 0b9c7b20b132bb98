"""What a file's bytes are known by."""

from pathlib import Path

import xxhash

from shared.errors import DataError

READ_BYTES = 1 << 20


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal. Raises DataError where it cannot be read."""
    state = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                state.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check it") from None
    return state.hexdigest()
