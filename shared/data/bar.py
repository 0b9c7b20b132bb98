"""How far the reading of text has come: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from shared.in_words import in_bytes
from shared.text.framing import Encoded

SAID_EVERY_S = 30.0  # where there is no terminal


def with_bar(
    documents: Iterator[Encoded], *, name: str, size: int | None, shown: bool
) -> Iterator[Encoded]:
    """Pass documents through, and say how many characters of text were read."""
    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=size,
        desc=f"tokenising {name}",
        unit="B",
        unit_scale=True,
        disable=not (shown and on_terminal),
    )
    done, said = 0, time.monotonic()
    whole = "" if size is None else f" of files of {in_bytes(size)}"
    with bar:
        for document in documents:
            bar.update(document.num_chars)
            done += document.num_chars
            if shown and not on_terminal and time.monotonic() - said > SAID_EVERY_S:
                said = time.monotonic()
                told = f"tokenising {name}: {done:,} characters{whole}"
                print(told, file=sys.stderr, flush=True)  # where the bar would be
            yield document
        bar.total = bar.n  # a file is a little larger than the text in it
        bar.refresh()
