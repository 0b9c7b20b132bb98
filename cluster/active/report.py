"""What the rounds came to: `rounds.json` for programs, a table for people, and a page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.active.answers import mistakes
from cluster.active.asking import Log, Told
from cluster.active.classes import ClassScore, accuracy, by_class, macro_f1, weakest
from cluster.active.folder import ActiveDir, read_json, read_lines, write_json
from cluster.active.records import Answers
from cluster.active.standing import Standing
from cluster.report.page import template
from shared.config.verbs.active import Active
from shared.run.run_dir import write_atomically

SHOWN_CLASSES, SHOWN_ROWS = 20, 20  # of a round, on the page


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round; a share is over the validation prompts that were answered."""

    round: int
    accuracy: float
    macro_f1: float | None  # None where responses are no classes
    loss: float  # nats per token of validation text
    hard_negatives: int  # among the training prompts that were answered
    uncertainty: float | None  # mean over the explanations of training prompts, where any is read
    prompts: int  # that the teacher answered, repairs among them
    repairs: int
    read_tokens: int
    written_tokens: int
    kept: int
    left_out: dict[str, int]  # by reason
    classes: dict[str, ClassScore]
    rows: list[dict[str, Any]] = field(default_factory=list)  # kept


@dataclass(frozen=True, slots=True)
class Report:
    """All of them."""

    name: str
    domain: str
    best: int
    stopped: str
    method: str
    metric: str
    tokens: int
    budget: int
    rounds: list[RoundReport]

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes; rows are in files of their own."""
        told = asdict(self)
        for one in told["rounds"]:
            del one["rows"]
        return told


def report_of(folder: ActiveDir, standing: Standing, *, domain: str, settings: Active) -> Report:
    """From what the stages left."""
    told, rounds = Log(folder.asked).told(), []
    while (number := len(rounds)) == 0 or folder.round(number).answers.exists():
        rounds.append(_round(folder, number, [one for one in told if one.ask.round == number]))
    return Report(
        name=folder.path.name,
        domain=domain,
        best=standing.best,
        stopped=standing.stopped,
        method=settings.method,
        metric=settings.metric,
        tokens=sum(one.tokens for one in told),
        budget=settings.budget_tokens,
        rounds=rounds,
    )


def write_report(folder: ActiveDir, report: Report) -> None:
    """Write `rounds.json` and `report.html`."""
    write_json(folder.rounds, report.as_dict())
    page = template("active.html.j2").render(
        report=report, weakest=weakest, most_classes=SHOWN_CLASSES, most_rows=SHOWN_ROWS
    )
    write_atomically(folder.report, page)


def table(report: Report) -> str:
    """A line a round."""
    unsure = report.method == "elad"
    lines = [
        "Greedy answers on validation prompts; loss in nats per token of validation text.",
        f"{'round':<7}{'accuracy':>9}{'unsure' if unsure else 'macro F1':>10}{'loss':>8}   "
        f"{'prompts':>7}{'repairs':>9}{'tokens':>10}{'kept':>6}  left out",
    ]
    for one in report.rounds:
        best = "*" if one.round == report.best else ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in one.left_out.items()) or "-"
        tokens = one.read_tokens + one.written_tokens
        second = one.uncertainty if unsure else one.macro_f1
        lines.append(
            f"{one.round!s:<2}{best:<5}{one.accuracy:>9.3f}{second or 0:>10.3f}{one.loss:>8.3f}   "
            f"{one.prompts:>7}{one.repairs:>9}{tokens:>10,}{one.kept:>6}  {reasons}"
        )
    unsaid = ["unsure: mean uncertainty of explanations, 0 to 2"] if unsure else []
    spent = f"{report.tokens:,} of {report.budget:,}"
    return "\n".join(
        [
            *lines,
            "* the best, which is exported",
            *unsaid,
            "",
            report.stopped,
            f"The teacher has read and written {spent} tokens.",
        ]
    )


def _round(folder: ActiveDir, number: int, told: Sequence[Told]) -> RoundReport:
    paths = folder.round(number)
    answers = Answers.from_dict(read_json(paths.answers))
    chains = answers.chains
    named = () if chains else (*answers.train, *answers.validation)
    names = sorted({answer.right for answer in named})
    classes = by_class(answers.validation, names)
    rows = read_lines(paths.rows) if paths.rows.exists() else []
    left_out = read_lines(paths.left_out) if paths.left_out.exists() else []
    return RoundReport(
        round=number,
        accuracy=accuracy(answers.validation),
        macro_f1=macro_f1(classes.values()) if classes else None,
        loss=answers.loss,
        hard_negatives=len(mistakes(answers.train, names)),
        uncertainty=sum(c.uncertainty for c in chains) / len(chains) if chains else None,
        prompts=len(told),
        repairs=sum(one.ask.purpose == "repair" for one in told),
        read_tokens=sum(one.answer.read for one in told),
        written_tokens=sum(one.answer.written for one in told),
        kept=len(rows),
        left_out=dict(Counter(line["reason"] for line in left_out).most_common()),
        classes=classes,
        rows=rows,
    )
