"""What active teaching leaves behind, `runs/NAME`: a file for each stage of each round.

A file is whole or absent, and one that is there is done, so that a command that was killed at any
point goes on with the stage under way. A round's training is an ordinary run, which goes on by
itself.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DamagedError
from shared.run.run_dir import RunDir, write_atomically


@dataclass(frozen=True, slots=True)
class RoundDir:
    """Paths inside `rounds/N`."""

    path: Path
    run: RunDir  # of its training

    @property
    def answers(self) -> Path:
        """How its student answered, on training and validation text."""
        return self.path / "answers.json"

    @property
    def left_out(self) -> Path:
        """What the teacher wrote and nobody learns, each with the reason."""
        return self.path / "left_out.jsonl"

    @property
    def rows(self) -> Path:
        """What the teacher wrote and is learnt from the next round on; training text."""
        return self.path / "synthetic.jsonl"


@dataclass(frozen=True, slots=True)
class ActiveDir:
    """Paths inside `runs/NAME`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config; not `config.yaml`, by which runs are known."""
        return RunDir(self.path).rounds

    @property
    def text(self) -> Path:
        """What the domain's text is known by."""
        return self.path / "text.json"

    @property
    def asked(self) -> Path:
        """Every prompt to the teacher and its answer, a line each, in the order they were asked."""
        return self.path / "asked.jsonl"

    @property
    def rounds(self) -> Path:
        """What became of every round, for programs."""
        return self.path / "rounds.json"

    @property
    def report(self) -> Path:
        """The same as a page."""
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        """The student of the best round."""
        return self.path / "export"

    def round(self, number: int) -> RoundDir:
        """The folder of a round; its run has a name that no other has."""
        folder = self.path / "rounds" / str(number)
        return RoundDir(folder, RunDir(folder / f"{self.path.name}-round-{number}"))

    def put_export(self, number: int) -> None:
        """Make the export that of a round, as a copy; a folder that is there stays until it is
        whole."""
        mark = self.export / "round.json"
        if mark.exists() and read_json(mark) == {"round": number}:
            return
        draft, old = (self.path / f".export.{part}" for part in ("draft", "old"))
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.round(number).run.export, draft)
        write_json(draft / mark.name, {"round": number})
        if self.export.exists():
            self.export.rename(old)
        draft.rename(self.export)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a whole file or nothing, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises DamagedError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DamagedError(
            f"{path} cannot be read; remove it, and the same command makes it again"
        ) from None


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of JSON lines or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote. Raises DamagedError."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError:
        raise DamagedError(
            f"{path} cannot be read; remove it, and the same command makes it again"
        ) from None
