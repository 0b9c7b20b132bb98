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
VLLM = ("python3.11", "~/vllm/bin/pip")  # what makes the environment of a teacher in vLLM
PROGRAMS = ("make", "tutelage", "ray", "export", *VLLM)


@dataclass(frozen=True)
class CommandBlock:
    """A fenced block whose lines are commands."""

    document: Path
    text: str
    commands: tuple[tuple[str, ...], ...]  # words, without comments; continued lines joined

    @property
    def programs(self) -> set[str]:
        """What the block calls."""
        return {words[0] for words in self.commands}


def fences(document: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a document: what follows ``` and the text, without its indentation."""
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.S | re.M)
    found = fenced.findall(document.read_text())
    return [(kind, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, kind, text in found]


def blocks(document: Path, kind: str = "") -> list[str]:
    """The fenced blocks of a document that begin with ```kind."""
    return [text for one, text in fences(document) if one == kind]


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
            found.append(CommandBlock(document, text, tuple(filter(None, commands))))
    return found
