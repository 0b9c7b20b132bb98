"""A bar on the terminal while text is tokenised."""

import sys
from collections.abc import Iterator

from tqdm import tqdm

from shared.text.framing import Encoded


def with_bar(
    documents: Iterator[Encoded], *, name: str, size: int | None, shown: bool
) -> Iterator[Encoded]:
    """Pass documents through under a bar on the terminal, in characters of text read."""
    bar = tqdm(
        total=size,
        desc=f"tokenising {name}",
        unit="B",
        unit_scale=True,
        disable=not (shown and sys.stderr.isatty()),
    )
    with bar:
        for document in documents:
            bar.update(document.num_chars)
            yield document
        bar.total = bar.n  # a file is a little larger than the text in it
        bar.refresh()
