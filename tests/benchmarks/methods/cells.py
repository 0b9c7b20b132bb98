"""The cells of the table: a name, what it stands for, and the options in which it differs.

All cells of a seed start from the same student and draw rows in the same order within a domain.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.config_file import load_config, resolve

BASE = Path(__file__).parent / "base.yaml"
NATURAL = "{policy: fixed, weights: natural}"
KL, CE, ATKD = "{kind: forward_kl}", "{kind: cross_entropy}", "{kind: atkd}"
PAPER = f"[{CE}, {{kind: forward_kl, weight: 0.2}}]"  # DDK, Eq. 3


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    name: str
    title: str
    options: dict[str, str] = field(default_factory=dict)  # `a.b` -> value as in YAML

    def but(self, name: str, title: str, **options: str) -> "Cell":
        """A cell that differs in some options; `__` in a keyword stands for a point."""
        changed = {key.replace("__", "."): value for key, value in options.items()}
        return Cell(name, title, self.options | changed)


def policy(name: str, *, interval: int = 12, **options: float) -> str:
    """A mixture in which a policy decides every 12 steps, ten times in a run."""
    others = "".join(f", {option}: {value}" for option, value in options.items())
    return f"{{policy: {name}, interval: {interval}, lag_steps: 2{others}}}"


KD = Cell("kd", "(b) forward KL, uniform")
CELLS = (
    KD.but("ce", "(a) cross-entropy, uniform", losses=f"[{CE}]"),
    KD,
    KD.but("kd-natural", "(c) forward KL, natural", mixture=NATURAL),
    KD.but("ddk", "(d) DDK", mixture=policy("ddk")),
    KD.but("ddk-unsmoothed", "(e) DDK, alpha 1", mixture=policy("ddk", alpha=1.0)),
    KD.but("doremi", "(f) DoReMi", mixture=policy("doremi")),
    KD.but("sheared", "(f) Sheared", mixture=policy("sheared")),
    KD.but("odm", "(f) ODM", mixture=policy("odm")),
    KD.but("atkd", "(g) ATKD, uniform", losses=f"[{ATKD}]"),
    KD.but("kd-paper", "(c) with DDK's loss", losses=PAPER, mixture=NATURAL),
    KD.but("ddk-paper", "(d) with DDK's loss", losses=PAPER, mixture=policy("ddk")),
)

COMPARISONS = (
    ("kd", "ce"),
    ("kd-natural", "kd"),
    ("ddk", "kd"),
    ("ddk", "kd-natural"),
    ("ddk-unsmoothed", "ddk"),
    ("doremi", "kd"),
    ("sheared", "kd"),
    ("odm", "kd"),
    ("atkd", "kd"),
    ("ddk-paper", "kd-paper"),
)

SWEEPS: dict[str, tuple[Cell, ...]] = {
    "learning rate": tuple(
        cell.but(f"{cell.name}-lr-{lr}", f"{cell.title}, {lr}", optimiser__lr=lr)
        for cell in CELLS[:2]
        for lr in ("1e-3", "2e-3", "4e-3")
    ),
    "DDK, interval": tuple(
        KD.but(f"ddk-{k}", f"K {k}", mixture=policy("ddk", interval=k)) for k in (6, 24, 48)
    ),
    "DDK, alpha": tuple(
        KD.but(f"ddk-alpha-{a}", f"alpha {a}", mixture=policy("ddk", alpha=a)) for a in (0.25, 0.75)
    ),
    "ATKD, lambda": tuple(
        KD.but(f"atkd-{w}", f"lambda {w}", losses=f"[{ATKD[:-1]}, easy_weight: {w}}}]")
        for w in (0.0, 0.5, 0.8)
    ),
    "ATKD beside cross-entropy": (
        KD.but("atkd-ce", "ATKD and cross-entropy", losses=f"[{ATKD}, {CE}]"),
        KD.but("kd-ce", "forward KL and cross-entropy", losses=f"[{KL}, {CE}]"),
    ),
}


def every_cell() -> dict[str, Cell]:
    """All cells by name."""
    return {cell.name: cell for cell in (*CELLS, *(c for cells in SWEEPS.values() for c in cells))}


def config_of(
    cell: Cell, seed: int, *, root: Path | None = None, folder: Path | None = None
) -> Config:
    """The config of a cell; resolved where `root`, the reference folder, and `folder` are given."""
    overrides = [f"seed={seed}", *(f"{name}={value}" for name, value in cell.options.items())]
    if root is None or folder is None:
        return load_config(BASE, overrides)
    paths = [f"paths.root={root}", f"paths.runs={folder}", f"paths.cache={folder / 'cache'}"]
    return resolve(load_config(BASE, [*overrides, *paths]))


def described(config: Config) -> dict[str, Any]:
    """What decides a cell's numbers, with no path of this machine: the config as it was written."""
    return config.model_dump(mode="json", exclude={"paths"})
