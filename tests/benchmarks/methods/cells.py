"""The cells of the table: a name, what it stands for, and the options in which it differs.

All cells of a seed start from the same student and draw rows in the same order within a domain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.config.file import load_config, resolve
from shared.config.run import Config

MINUS = "\u2212"
CONTROL = f"OPD, sampled, every advantage {MINUS}1"
HERE = Path(__file__).parent
NATURAL = "{policy: fixed, weights: natural}"
KL, CE, ATKD = "{kind: forward_kl}", "{kind: cross_entropy}", "{kind: atkd}"
JSD, REVERSE, SAMPLED = "{kind: jsd}", "{kind: reverse_kl}", "{kind: policy_gradient}"
WHITENED = "{kind: policy_gradient, whiten: true}"
LONG_TERM = "{kind: policy_gradient, credit: later_mean, clip: 0.2}"  # MiniLLM, Eq. 9
MADE = "made/"  # of paths in the folder of records
PROMPTS, EVEN, RANDOM = "made/prompts.json", "made/even", "made/random"
TASKS, ADEPT, NOVICE = "made/tasks", "made/adept", "made/novice"
LORA = "{kind: lora, r: 32, alpha: 32}"
SOFT = "{kind: soft_cross_entropy, temperature: 1}"
SOFT_AT_2 = "{kind: soft_cross_entropy, temperature: 2}"
HIDDEN = (
    "{kind: hidden_states, layers: {3: 2, 6: 4}, distance: cosine, weight: 1.0, final_weight: 0.1}"
)
STEADY_HIDDEN = (
    "{kind: hidden_states, layers: {3: 2, 6: 4}, distance: cosine, weight: 0.5}"  # without phases
)
PHASES = "{difficulty: teacher_nll, phases: 3, replay: 0.2, max_steps: 40, plateau: null}"
PAPER = f"[{CE}, {{kind: forward_kl, weight: 0.2}}]"  # DDK, Eq. 3


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    name: str
    title: str
    options: dict[str, str] = field(default_factory=dict)  # `a.b` -> value as in YAML
    base: str = "base.yaml"  # what the options are on top of
    control: bool = False  # whether every advantage is -1, whatever the teacher says

    def but(self, name: str, title: str, **options: str) -> "Cell":
        """A cell that differs in some options; `__` in a keyword stands for a point."""
        changed = {key.replace("__", "."): value for key, value in options.items()}
        return replace(self, name=name, title=title, options=self.options | changed)


def policy(name: str, *, interval: int = 12, **options: float) -> str:
    """A mixture in which a policy decides every 12 steps, ten times in a run."""
    others = "".join(f", {option}: {value}" for option, value in options.items())
    return f"{{policy: {name}, interval: {interval}, lag_steps: 2{others}}}"


KD = Cell("kd", "(b) forward KL, uniform")
AKD = KD.but(
    "akd",
    "(h) AKD",
    student__train=LORA,
    losses=f"[{SOFT}, {HIDDEN}]",
    targets__hidden="{width: 64}",
    prompts=PROMPTS,
    progressive=PHASES,
    optimiser__lr="8e-3",
)
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
    AKD,
    AKD.but(
        "akd-full",
        "(h) AKD, all weights train",
        student__train="{kind: full}",
        optimiser__lr="4e-3",
    ),
    AKD.but("akd-soft", "(h) AKD, no hidden states", losses=f"[{SOFT}]"),
    AKD.but(
        "akd-hard",
        "(h) AKD, hard labels alone",
        losses=f"[{CE}]",
        prompts="null",
        progressive=PHASES.replace("teacher_nll", "length"),
    ),
    AKD.but("akd-plain", "(h) AKD, no prompt", prompts="null"),
    AKD.but(
        "akd-flat", "(h) AKD, no phases", losses=f"[{SOFT}, {STEADY_HIDDEN}]", progressive="null"
    ),
    AKD.but("all", "(i) DDK + ATKD + AKD", losses=f"[{ATKD}, {HIDDEN}]", mixture=policy("ddk")),
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
    *((part, "akd") for part in ("akd-full", "akd-soft", "akd-hard", "akd-plain", "akd-flat")),
    ("akd", "kd"),
    ("all", "akd"),
)

BY_NAME = {cell.name: cell for cell in CELLS}
MAIN = tuple(BY_NAME[name] for name in ("ce", "kd", "ddk", "atkd"))


def over(option: str, values: Sequence[str], cells: Sequence[Cell], *, name: str) -> list[Cell]:
    """Cells with each value of an option; `name` is how cell names and titles call the option."""
    return [
        cell.but(
            f"{cell.name}-{name}-{value.removeprefix(MADE)}",
            f"{cell.title}, {name} {value.removeprefix(MADE)}",
            **{option: value},
        )
        for value in values
        for cell in cells
    ]


KD_CE = KD.but("kd-ce", "forward KL and cross-entropy", losses=f"[{KL}, {CE}]")
WEIGHTED = (
    KD.but("llkd", "LLKD, tokens", weighting="{policy: llkd}"),
    KD.but("llkd-documents", "LLKD, documents", weighting="{policy: llkd, unit: document}"),
    KD.but(
        "llkd-open",
        "LLKD, tokens, weights without thresholds",
        weighting="{policy: llkd, confidence: 0, uncertainty: 0}",
    ),
    KD_CE.but(
        "instance",
        "instance weights, k from 3 to 0",
        weighting="{policy: instance_weights, steepness: 3}",
    ),
    KD_CE.but(
        "instance-flat",
        "instance weights, k 0",
        weighting="{policy: instance_weights, steepness: 0}",
    ),
    KD.but("augment", "half of the documents changed", augmentation="{share: 0.5}"),
    KD.but(
        "augment-selected",
        "half of the documents changed, a policy keeps some",
        augmentation="{share: 0.5}",
        weighting="{policy: reinforced}",
    ),
)
UNWEIGHTED = (KD, KD_CE)
WEIGHTED_COMPARISONS = (
    *((cell, "kd") for cell in ("llkd", "llkd-documents", "llkd-open", "augment")),
    ("augment-selected", "kd"),
    ("augment-selected", "augment"),
    ("instance", "instance-flat"),
    ("instance", "kd-ce"),
)


def sparse(top_k: int, train: str) -> str:
    """Four experts in every other layer."""
    return f"{{every: 2, experts: 4, top_k: {top_k}, train: {train}}}"


SPARSE = (
    KD.but("sparse-1", "one expert of four, all train", student__upcycle=sparse(1, "all")),
    KD.but("sparse-2", "two experts of four, all train", student__upcycle=sparse(2, "all")),
    KD.but("sparse-alone", "two of four, alone trained", student__upcycle=sparse(2, "experts")),
)
SPARSE_COMPARISONS = (
    ("sparse-1", "kd"),
    ("sparse-2", "kd"),
    ("sparse-2", "sparse-1"),
    ("sparse-alone", "sparse-2"),
)

LORA_KD = KD.but("lora", "forward KL, LoRA", student__train=LORA)
KD_AT_2 = KD.but("kd-t2", "soft targets at T 2", losses=f"[{SOFT_AT_2}]")


def own(share: float) -> str:
    """A source in which the student writes a share of the tokens."""
    return f"{{student: {share}, dataset: {1 - share}, max_new_tokens: 8, lag: 0}}"


# Two tasks with right answers, a teacher that was trained to do them, and a student that saw little
# of them, as papers start from one that was fine-tuned.
MADE_TASKS = {
    f"domains.{task}.{part}": f"{TASKS}/{task}.{part}.jsonl"
    for task in ("reverse", "add")
    for part in ("train", "validation")
}
OWN = Cell(
    "own-kl",
    "forward KL, text of the data set",
    {"teachers.adept.model": ADEPT, "student.model": NOVICE, **MADE_TASKS},
    base="on_policy.yaml",
)
TRAINED = OWN.but(
    "adept",
    "the teacher",
    teachers__adept__model="models/teacher-6m",
    student__model="models/teacher-6m",
    losses=f"[{CE}]",
    steps="500",
)
MAKERS = {
    ADEPT: TRAINED,
    NOVICE: TRAINED.but(
        "novice", "the student", student__model="models/student-base-1m", steps="150"
    ),
}

ON_POLICY = (
    OWN.but("own-ce", "cross-entropy, text of the data set", losses=f"[{CE}]"),
    OWN,
    OWN.but(
        "own-seqkd",
        "sequence-level KD",
        losses=f"[{CE}]",
        source="{teacher: 1.0, max_new_tokens: 8}",
    ),
    OWN.but("own-reverse", "reverse KL, text of the data set", losses=f"[{REVERSE}]"),
    OWN.but("own-gkd-0", "GKD (JSD .5), own share 0", losses=f"[{JSD}]"),
    OWN.but("own-gkd-50", "GKD (JSD .5), own share .5", losses=f"[{JSD}]", source=own(0.5)),
    OWN.but("own-gkd-100", "GKD (JSD .5), own share 1", losses=f"[{JSD}]", source=own(1.0)),
    OWN.but("own-opd", "OPD, sampled", losses=f"[{SAMPLED}]", source=own(1.0)),
    OWN.but("own-opd-white", "OPD, sampled, whitened", losses=f"[{WHITENED}]", source=own(1.0)),
    replace(
        OWN.but(
            "own-opd-constant",
            f"control: every advantage {MINUS}1",
            losses=f"[{SAMPLED}]",
            source=own(1.0),
        ),
        control=True,
    ),
    OWN.but("own-opd-dense", "OPD, dense (reverse KL)", losses=f"[{REVERSE}]", source=own(1.0)),
    OWN.but(
        "own-minillm",
        "MiniLLM, own share .75",
        losses=f"[{REVERSE}, {LONG_TERM}, {CE}]",
        source="{student: 0.75, dataset: 0.25, max_new_tokens: 8, lag: 0, updates: 4}",
    ),
    OWN.but(
        "own-distillm",
        "DistiLLM (skew .1), own share adaptive",
        losses="[{kind: skew_forward_kl, alpha: 0.1}, {kind: skew_reverse_kl, alpha: 0.1}]",
        source="{adaptive: {every: 10, tolerance: 0.02, replay_rows: 480}, max_new_tokens: 8}",
    ),
    OWN.but(
        "own-okd",
        "OKD (forward KL, eta .5), text of the data set",
        teachers__adept__online_modules="{lr: 3e-4, eta: 0.5}",
    ),
)

# Steps that take as much processor time as GKD's 300 on own text alone, the teacher's with it.
AS_LONG = {"own-ce": 900, "own-kl": 380, "own-seqkd": 480}
ON_POLICY = (
    *ON_POLICY,
    *(
        cell.but(f"{cell.name}-long", f"{cell.title}, {AS_LONG[cell.name]} steps", steps=steps)
        for cell in ON_POLICY
        if (steps := str(AS_LONG.get(cell.name, "")))
    ),
)

ON_POLICY_COMPARISONS = (
    *(
        (cell, "own-kl")
        for cell in (
            *("own-ce", "own-seqkd", "own-gkd-50", "own-gkd-100", "own-opd-dense"),
            *("own-minillm", "own-distillm", "own-okd"),
        )
    ),
    ("own-opd-dense", "own-reverse"),
    ("own-minillm", "own-opd-dense"),
    ("own-gkd-50", "own-gkd-0"),
    ("own-gkd-100", "own-gkd-0"),
    ("own-opd", "own-opd-dense"),
    ("own-opd-white", "own-opd"),
    ("own-opd", "own-opd-constant"),
    *(("own-gkd-100", f"{cell}-long") for cell in AS_LONG),
)

SWEEPS: dict[str, Sequence[Cell]] = {
    "learning rate": over(
        "optimiser.lr",
        ("2e-3", "4e-3", "8e-3"),
        [*MAIN[:2], BY_NAME["atkd"]],
        name="lr",
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
    "ATKD, share of hard tokens": tuple(
        KD.but(f"atkd-hard-{k}", f"k {k}", losses=f"[{ATKD[:-1]}, hard_fraction: {k}}}]")
        for k in (0.25, 0.75, 1.0)
    ),
    "ATKD beside cross-entropy": (
        KD.but("atkd-ce", "ATKD and cross-entropy", losses=f"[{ATKD}, {CE}]"),
        KD_CE,
    ),
    "adapters and temperature": (
        LORA_KD,
        *over("optimiser.lr", ("8e-3", "1.6e-2", "3.2e-2"), [LORA_KD], name="lr"),
        KD_AT_2,
        KD_AT_2.but("kd-t2-k512", "soft targets at T 2, 512 ids", targets__top_k="512"),
        KD.but(
            "kd-hidden",
            "forward KL and hidden states",
            losses=f"[{KL}, {STEADY_HIDDEN}]",
            targets__hidden="{width: 64}",
        ),
    ),
    "selector": (
        *over("targets.selector", ("renormalised", "sampled", "threshold"), [KD], name="selector"),
        *over("targets.selector", ("threshold",), [KD_AT_2], name="selector"),
    ),
    "learning rate, own text": over(
        "optimiser.lr",
        ("1e-4", "3e-4"),
        [cell for cell in ON_POLICY if cell.name in ("own-kl", "own-opd", "own-opd-dense")],
        name="lr",
    ),
    "base student": over("student.model", (EVEN, RANDOM), MAIN, name="student"),
    "steps": over("steps", ("240",), MAIN, name="steps"),
}
CIRCUMSTANCES = tuple(
    (f"{cell}-{circumstance}", f"{against}-{circumstance}")
    for circumstance in ("student-even", "student-random", "steps-240")
    for cell, against in (("kd", "ce"), ("ddk", "kd"), ("atkd", "kd"))
)
SELECTED = {  # by the title of a table of selectors
    "`top_k`": "kd",
    "`renormalised`": "kd-selector-renormalised",
    "`sampled`": "kd-selector-sampled",
    "`threshold`": "kd-selector-threshold",
    "`top_k`, T 2": "kd-t2",
    "`threshold`, T 2": "kd-t2-selector-threshold",
}
SWEPT_COMPARISONS = (
    *((f"kd-selector-{s}", "kd") for s in ("renormalised", "sampled", "threshold")),
    ("kd-t2-selector-threshold", "kd-t2"),
    ("atkd-ce", "kd-ce"),
    *CIRCUMSTANCES,
)


def every_cell() -> dict[str, Cell]:
    """All cells by name."""
    swept = (cell for cells in SWEEPS.values() for cell in cells)
    return {cell.name: cell for cell in (*CELLS, *swept, *WEIGHTED, *SPARSE, *ON_POLICY)}


def config_of(
    cell: Cell, seed: int, *, root: Path | None = None, folder: Path | None = None
) -> Config:
    """The config of a cell; resolved where `root`, the reference folder, and `folder` are given."""
    overrides = [f"seed={seed}", *(f"{name}={value}" for name, value in cell.options.items())]
    if root is None or folder is None:
        return load_config(HERE / cell.base, overrides)
    paths = [f"paths.root={root}", f"paths.runs={folder}", f"paths.cache={folder / 'cache'}"]
    made = {name: value for name, value in cell.options.items() if value.startswith(MADE)}
    paths += [f"{name}={folder / value}" for name, value in made.items()]
    return resolve(load_config(HERE / cell.base, [*overrides, *paths]))


def described(config: Config) -> dict[str, Any]:
    """What decides a cell's numbers, with no path of this machine: the config as it was written."""
    return config.model_dump(mode="json", exclude={"paths"})
