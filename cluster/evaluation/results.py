"""The results of `tutelage eval`: teacher and students on validation text, domain by domain."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from cluster.evaluation.classes import scores_of, with_difference, with_labels
from cluster.evaluation.generations import (
    Generation,
    read_generations,
    with_differences,
    with_scores,
)
from cluster.evaluation.statistics import Measures, difference, measures
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.text_bytes import Decoder, text_bytes
from shared.errors import ConfigError
from shared.run.document_sums import DocumentSums
from shared.run.run_dir import RunDir, read_written, write_atomically

EVAL = "eval.json"
ROWS_AT_A_TIME = 256
MODELS = ("teacher", "before", "after")
OVER = "documents"  # what standard errors are over


@dataclass(frozen=True, slots=True)
class DomainResults:
    """One domain. `models` are `teacher`, `before`, `after` and the name of a run that is
    compared, those that were measured; `differences` are paired by document."""

    documents: int
    tokens: int  # with loss
    bytes: int | None  # that they stand for; None of classes and tags
    kl_kind: str  # "full", "bucketed-K", "aligned", "grouped" or "none"
    prompts: int  # that were answered
    models: dict[str, Measures]
    differences: dict[str, Measures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Results:
    """eval.json; domains in config order."""

    run: str
    domains: dict[str, DomainResults]
    standard_errors_over: str = OVER
    per: str = "token"  # what NLL and KL are per: a row with a class is one, a word with a tag too

    def write(self, run_dir: Path) -> Path:
        """Write `eval.json` into a run's folder; returns its path."""
        path = run_dir / EVAL
        write_atomically(path, self.text())
        return path

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Compared:
    """The student of another run, as it was evaluated last."""

    run: Path
    documents: DocumentSums
    generations: tuple[Generation, ...] = ()

    def refuse_other_text(self, documents: DocumentSums, domains: Iterable[str]) -> None:
        """Raise ConfigError for a student that was evaluated on other validation text."""
        for name in domains:
            if self.documents.of(name).places() != documents.of(name).places():
                raise ConfigError(
                    f"--compare is {self.run}, which has other validation text of domain {name}, "
                    "so that the students cannot be compared; name a run with the same data and "
                    f"tokenizer, or run `tutelage eval {self.run}` if that has changed since"
                )


def compared(run: Path, to: RunDir, domains: Iterable[str]) -> Compared:
    """Another run's student to stand beside that of a run. Raises ConfigError where none was
    evaluated, or on other text."""
    run_dir = RunDir(run.absolute())
    run_dir.recorded_config()
    documents = _newest(run_dir)
    if documents is None:
        raise ConfigError(
            f"--compare is {run}, whose student was not evaluated document by document; run "
            f"`tutelage eval {run}` first"
        )
    found = Compared(run, documents, tuple(read_generations(run_dir.generations)))
    if (own := _newest(to)) is not None:
        found.refuse_other_text(own, domains)
    return found


def _newest(run_dir: RunDir) -> DocumentSums | None:
    paths = (run_dir.documents(when) for when in ("latest", "after"))
    return next((DocumentSums.read(path) for path in paths if path.exists()), None)


def results_of(
    run_dir: RunDir,
    domains: Sequence[PreparedDomain],
    tokenizer: Decoder | None,
    other: Compared | None = None,
    *,
    per: str = "token",
) -> Results:
    """From what the evaluations of a run have left in its folder; without a tokenizer its rows have
    classes or tags. Raises ConfigError for another student on other text."""
    written = read_generations(run_dir.generations)
    after = DocumentSums.read(run_dir.documents("latest"))
    if other is not None:
        other.refuse_other_text(after, [domain.name for domain in domains])
    students = {"before": _before(run_dir, after), "after": after}
    texts = {name: _Texts(written, name) for name in MODELS}
    scores = scores_of(run_dir.path)
    if other is not None:
        label = _label(other, run_dir)
        students[label] = other.documents
        texts[label] = _Texts(other.generations, "after")
        scores[label] = scores_of(other.run)["after"]
    known = {name: documents for name, documents in students.items() if documents is not None}
    kinds = read_written(run_dir.path / "evaluation.json")
    return Results(
        run_dir.path.name,
        {
            domain.name: _domain_results(
                {name: documents.of(domain.name) for name, documents in known.items()},
                None if tokenizer is None else bytes_of(after.of(domain.name), domain, tokenizer),
                {name: text.of(domain.name) for name, text in texts.items()},
                {name: found.get(domain.name) for name, found in scores.items()},
                kl_kind=kinds[domain.name]["kl_kind"],
                one_each=per == "row",
            )
            for domain in domains
        },
        per=per,
    )


def _label(other: Compared, run_dir: RunDir) -> str:
    """What the other run is called in the table."""
    name = other.run.absolute().name
    return name if name not in (run_dir.path.name, *MODELS) else str(other.run)


@dataclass(frozen=True, slots=True)
class _Texts:
    """What one model wrote, and what it is called there."""

    generations: Sequence[Generation]
    model: str

    def of(self, domain: str) -> "_Texts":
        return _Texts([g for g in self.generations if g.domain == domain], self.model)

    def joined(self, measured: Measures) -> Measures:
        return with_scores(measured, self.generations, self.model)

    def less(self, other: "_Texts", measured: Measures) -> Measures:
        return with_differences(
            measured, self.generations, other.generations, model=self.model, other=other.model
        )


def _domain_results(
    students: Mapping[str, DocumentSums],
    bytes_D: np.ndarray | None,
    texts: Mapping[str, _Texts],
    scores: Mapping[str, Mapping[str, float] | None],
    *,
    kl_kind: str,
    one_each: bool,
) -> DomainResults:
    """`bytes_D` is None of rows with classes or tags; `scores` has, by model, those of all rows
    together, and `one_each` says whether a row has one class."""
    after = students["after"]

    def measured(documents: DocumentSums, name: str, *, of: str) -> Measures:
        found = texts[name].joined(measures(documents, bytes_D, of=of))
        gaps = documents.column(f"{of}_gap")
        return with_labels(found, gaps, scores.get(name), one_each=one_each)

    def less(name: str, other: DocumentSums) -> Measures:
        found = texts["after"].less(texts[name], difference(after, other, bytes_D))
        gaps = after.column("student_gap"), other.column("student_gap")
        return with_difference(found, gaps) if one_each else found

    models = {name: measured(own, name, of="student") for name, own in students.items()}
    teacher = measured(after, "teacher", of="teacher")
    return DomainResults(
        documents=len(after),
        tokens=int(after.column("tokens").sum()),
        bytes=None if bytes_D is None else int(bytes_D.sum()),
        kl_kind=kl_kind,
        prompts=sum(one.is_scored for one in texts["after"].generations),
        models=models if teacher.nll is None else {"teacher": teacher, **models},
        differences={
            f"after - {name}": less(name, own) for name, own in students.items() if name != "after"
        },
    )


def bytes_of(documents: DocumentSums, domain: PreparedDomain, tokenizer: Decoder) -> np.ndarray:
    """Bytes of text of the documents of a domain's validation rows, int64 [D]."""
    found: Mapping[tuple[int, int], int] = _bytes_by_document(domain, tokenizer)
    places = zip(
        documents.column("row").tolist(), documents.column("document").tolist(), strict=True
    )
    return np.array([found[place] for place in places], np.int64)


def _bytes_by_document(domain: PreparedDomain, tokenizer: Decoder) -> dict[tuple[int, int], int]:
    found = {}
    for rows in RowStore.open(domain.validation_path).units(ROWS_AT_A_TIME):
        indices = rows.table.column("index").to_pylist()
        counts = [len(starts) for starts in rows.column("doc_starts")]
        places = [
            (index, number)
            for index, count in zip(indices, counts, strict=True)
            for number in range(count)
        ]
        found |= zip(places, text_bytes(rows, tokenizer).tolist(), strict=True)
    return found


def _before(run_dir: RunDir, latest: DocumentSums) -> DocumentSums | None:
    """The student before training, where it was measured on the same text."""
    path = run_dir.documents("before")
    if not path.exists():
        return None
    before = DocumentSums.read(path)
    return before if before.places() == latest.places() else None
