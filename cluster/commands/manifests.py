"""`tutelage manifests`: files that Ray's cluster launcher and KubeRay start a cluster from."""

import re
from pathlib import Path

from cluster.manifests.facts import FILES, FOLDER, IMAGE
from shared.errors import ConfigError, reason_of


def write(to: Path, *, image: str = IMAGE) -> None:
    """Write every manifest into a folder, nodes running `image`; existing files stay. Raises
    ConfigError."""
    if not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", image):
        raise ConfigError(f"--image is {image!r}, which names no image; write it as NAME:TAG")
    there = [name for name in FILES if (to / name).exists()]
    if there:
        raise ConfigError(f"{to / there[0]} exists already; name another folder")
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (to / name).write_text((FOLDER / name).read_text().replace(IMAGE, image))
    except OSError as error:
        raise ConfigError(
            f"{to} cannot be written to: {reason_of(error)}; name another folder"
        ) from None
    for name in FILES:
        print(f"{to / name}: {_first_sentence(to / name)}")


def _first_sentence(file: Path) -> str:
    """Of the comment that opens a file, its first line at most."""
    line = file.read_text().partition("\n")[0].removeprefix("# ")
    return line.partition(". ")[0].rstrip(".:")
