"""The trials: recipes with options on top, and the tables that show them."""

from dataclasses import dataclass, field

from tests.benchmarks.outcomes import rounds

MADE = "made/"  # of paths in the folder of records
MADE_SEED = 100
ROWS_PER_CLASS = 10
CLASSIFIER, FEW = "made/classifier", "made/few.train.jsonl"
TAGGERS = {"wnut17": "made/wnut17-tagger", "ncbi_disease": "made/ncbi_disease-tagger"}
CLASSIFIED = {"teachers": f"{{head: {{model: {CLASSIFIER}, cpus: 0.5}}}}", "student.cpus": "0.5"}
BASE = CLASSIFIED | {
    "student.model": "models/student-base-1m",
    "optimiser.lr": "2e-3",
    "batch": "{rows_per_step: 32, micro_batch: 32}",
    "steps": "400",
}
FEW_ROWS = {"domains.intent.train": FEW}
STORIES = {
    "student.workers": "1",
    "student.zero": "0",
    "steps": "300",
    "data.validation_rows": "64",
}
SIMILAR = {"steps": "400", "student.cpus": "0.5"}
BACK = {
    "teachers": "{student-base-1m: {model: models/student-base-1m, cpus: 0.6}}",
    "student.model": "models/stories260k",
}
FORTH = "stories260k to student-base-1m"
ALIGNED = {"cross_tokenizer": "aligned"}
ULD = {
    "cross_tokenizer": "uld",
    "losses": "[{kind: total_variation, weight: 2}, {kind: cross_entropy}]",
}


def of_corpus(corpus: str, *, taught: bool = True) -> dict[str, str]:
    """Options of a run on one corpus of entities, whose teacher, where it is `taught`, has learnt
    all of its rows."""
    splits = {"train": "train", "validation": "valid"}
    paths = (f"{split}: data/ner/{corpus}.{part}.jsonl" for split, part in splits.items())
    found = {"domains": f"{{{corpus}: {{{', '.join(paths)}}}}}", "student.cpus": "0.5"}
    if taught:
        found["teachers"] = f"{{tagger: {{model: {TAGGERS[corpus]}, cpus: 0.5}}}}"
    return found


@dataclass(frozen=True)
class Trial:
    """A recipe with options on top, in which both students of a run are compared."""

    name: str
    title: str
    recipe: str
    options: dict[str, str] = field(default_factory=dict)  # `a.b` -> value as in YAML
    verb: str = "run"
    seeded: tuple[str, ...] = ("seed",)  # options that are the seed


@dataclass(frozen=True)
class Table:
    """Trials that are measured alike."""

    mark: str  # in RESULTS.md
    measures: dict[str, str]  # title -> key of a record's measures
    trials: tuple[Trial, ...]
    against: tuple[tuple[str, str], ...] = ()  # pairs of trials, compared by their students
    baseline: str = "hard labels"  # what a student is compared with in its own run
    student: str = "distilled"


CLASSES = Table(
    "classes",
    {"accuracy": "accuracy", "macro F1": "macro_f1", "ECE": "calibration_error"},
    (
        Trial("tiny", "0.03 M weights", "classification", CLASSIFIED),
        Trial("tiny-few", "0.03 M weights, few rows", "classification", CLASSIFIED | FEW_ROWS),
        Trial("base", "1 M student", "classification", BASE),
        Trial("base-few", "1 M student, few rows", "classification", BASE | FEW_ROWS),
        Trial(
            "base-llkd",
            "1 M student, LLKD",
            "classification",
            BASE | {"weighting": "{policy: llkd}"},
        ),
        Trial(
            "reffakd", "ReffAKD, 1 M student", "reffakd", {"steps": "400", "student.cpus": "0.5"}
        ),
        Trial(
            "reffakd-few",
            "ReffAKD, 1 M student, few rows",
            "reffakd",
            SIMILAR | FEW_ROWS | {"teachers.similar.similarity.diagonal": "0.1"},
        ),
    ),
    (("base-llkd", "base"),),
)
ACROSS = Table(
    "across",
    {"NLL": "nll"},
    (
        Trial("grouped", f"{FORTH}, grouped", "cross_tokenizer", STORIES),
        Trial("aligned", f"{FORTH}, aligned", "cross_tokenizer", STORIES | ALIGNED),
        Trial("uld", f"{FORTH}, ULD", "cross_tokenizer", STORIES | ULD),
        Trial("back-grouped", "and back, grouped", "cross_tokenizer", STORIES | BACK),
        Trial("back-aligned", "and back, aligned", "cross_tokenizer", STORIES | BACK | ALIGNED),
        Trial("back-uld", "and back, ULD", "cross_tokenizer", STORIES | BACK | ULD),
    ),
    (
        ("grouped", "aligned"),
        ("uld", "aligned"),
        ("back-grouped", "back-aligned"),
        ("back-uld", "back-aligned"),
    ),
)
ROUNDS = Table(
    "rounds",
    {"accuracy": "accuracy"},
    (Trial("pgkd", "PGKD, 3 rounds", "pgkd", rounds.OPTIONS, verb="active"),),
    baseline="few labels",
    student="best round",
)
TAGS = Table(
    "tags",
    {"span F1": "span_f1"},
    tuple(
        Trial(
            f"{corpus}-{shots}",
            f"{corpus}, {shots} of each type",
            "tagging",
            of_corpus(corpus) | {"task.shots": str(shots)},
            seeded=("seed", "task.episode"),
        )
        for corpus in TAGGERS
        for shots in (1, 5, 20)
    ),
)
MARKS = Table(
    "marks",
    {"span F1": "span_f1"},
    tuple(
        Trial(
            f"cllmfs-{corpus}-{shots}",
            f"{corpus}, {shots} of each type",
            "cllmfs",
            of_corpus(corpus, taught=False) | {"task.shots": str(shots)},
            seeded=("seed", "task.episode"),
        )
        for corpus in TAGGERS
        for shots in (1, 5, 20)
    ),
    baseline="without contrast",
    student="CLLMFS",
)
TABLES = (CLASSES, ACROSS, ROUNDS, TAGS, MARKS)
TRIALS = {trial.name: trial for table in TABLES for trial in table.trials}
