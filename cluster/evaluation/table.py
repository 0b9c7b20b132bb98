"""The results of `tutelage eval` as a table of at most 100 columns."""

from collections.abc import Iterator

from cluster.evaluation.results import DomainResults, Results
from cluster.evaluation.statistics import Estimate, Measures
from cluster.report.text import shortened

NAME_WIDTH, MODEL_WIDTH, CELL_WIDTH = 16, 16, 17
HEADS = {"nll": "NLL", "bits_per_byte": "bits/byte", "kl": "KL", "ece": "ECE"}


def table(results: Results) -> str:
    """A line for each model of each domain, its differences below."""
    heads = "".join(f"{head:>{CELL_WIDTH}}" for head in HEADS.values())
    lines = [f"{'domain':<{NAME_WIDTH}}{'model':<{MODEL_WIDTH}}{heads}"]
    for name, domain in results.domains.items():
        lines += _domain(name, domain)
    return "\n".join([*lines, "", *_legend(results)])


def _domain(name: str, domain: DomainResults) -> Iterator[str]:
    shown = shortened(name, NAME_WIDTH - 2)
    for model, measured in domain.models.items():
        yield f"{shown:<{NAME_WIDTH}}{model:<{MODEL_WIDTH}}{_cells(measured)}"
        shown = ""
    for pair, measured in domain.differences.items():
        yield f"{'':<{NAME_WIDTH}}{shortened(pair, MODEL_WIDTH - 1):<{MODEL_WIDTH}}" + _cells(
            measured, sign="+"
        )


def _cells(measured: Measures, *, sign: str = "") -> str:
    return "".join(f"{_cell(getattr(measured, name), sign):>{CELL_WIDTH}}" for name in HEADS)


def _cell(estimate: Estimate | None, sign: str) -> str:
    if estimate is None:
        return "-"
    error = "-" if estimate.error is None else f"{estimate.error:.3f}"
    return f"{estimate.value:{sign}.3f} ± {error}"


def _legend(results: Results) -> list[str]:
    kinds = sorted({domain.kl_kind for domain in results.domains.values()} - {"none"})
    return [
        "Student before and after training. NLL and KL to the teacher in nats per token, "
        f"KL {', '.join(kinds)}."
        if kinds
        else "Student before and after training. NLL in nats per token.",
        "ECE: expected calibration error of the likeliest token, 15 bins.",
        "± standard errors over documents; those of differences are paired by document.",
    ]
