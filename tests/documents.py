"""What the documents tell a reader to type: the command lines of their fenced blocks."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shared", "teacher_service", "student_trainer", "cluster")
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / package / "README.md" for package in PACKAGES),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "README.md",
    ROOT / "tests" / "benchmarks" / "RESULTS.md",
)
PROGRAMS = ("make", "tutelage", "ray", "export")


@dataclass(frozen=True)
class CommandBlock:
    """A fenced block whose lines are commands."""

    document: Path
    commands: tuple[tuple[str, ...], ...]  # words, without comments; continued lines joined

    @property
    def programs(self) -> set[str]:
        """What the block calls."""
        return {words[0] for words in self.commands}


def blocks(document: Path, kind: str = "") -> list[str]:
    """The fenced blocks of a document that begin with ```kind, without their indentation."""
    fences = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.S | re.M)
    found = fences.findall(document.read_text())
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, k, text in found if k == kind]


def command_blocks() -> list[CommandBlock]:
    """Every block of every document that begins with one of `PROGRAMS`, a comment aside."""
    found = []
    for document in DOCUMENTS:
        for text in blocks(document):
            first = re.sub(r"^#.*\n", "", text).split(maxsplit=1)
            if first[0] not in PROGRAMS:
                continue
            lines = text.replace("\\\n", " ").splitlines()
            commands = [tuple(shlex.split(line, comments=True)) for line in lines]
            found.append(CommandBlock(document, tuple(filter(None, commands))))
    return found
