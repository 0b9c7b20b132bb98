"""The results of `tutelage eval` as a table of at most 100 columns."""

from collections.abc import Iterable, Iterator, Mapping

from cluster.evaluation.results import DomainResults, Results
from cluster.evaluation.statistics import Estimate, Measures
from cluster.report.text import shortened

NAME_WIDTH, MODEL_WIDTH, CELL_WIDTH = 16, 16, 17
HEADS = {"nll": "NLL", "bits_per_byte": "bits/byte", "kl": "KL", "ece": "ECE"}
OF_CLASSES = {"nll": "NLL", "kl": "KL", "ece": "ECE"}
CLASSES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
WRITTEN = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "Rouge-L",
    "cut": "cut",
}

WRITTEN_LEGEND = (
    "Exact match, token F1, Rouge-L: of {} answers, written greedily; ± over prompts, paired in\n"
    "differences. Cut: answers that came to the limit of tokens, counted as they are."
)


def table(results: Results) -> str:
    """A line for each model of each domain, its differences below; how it tells classes apart, and
    the scores of what models wrote in domains with prompts, under heads of their own."""
    has_classes = results.per == "row"
    lines = list(_part(results.domains, OF_CLASSES if has_classes else HEADS))
    if has_classes:
        lines += ["", *_part(results.domains, CLASSES)]
    if prompted := {name: domain for name, domain in results.domains.items() if domain.prompts}:
        lines += ["", *_part(prompted, WRITTEN)]
    return "\n".join([*lines, "", *_legend(results)])


def _part(domains: Mapping[str, DomainResults], heads: Mapping[str, str]) -> Iterator[str]:
    cells = "".join(f"{head:>{CELL_WIDTH}}" for head in heads.values())
    yield f"{'domain':<{NAME_WIDTH}}{'model':<{MODEL_WIDTH}}{cells}"
    for name, domain in domains.items():
        yield from _domain(name, domain, heads)


def _domain(name: str, domain: DomainResults, heads: Iterable[str]) -> Iterator[str]:
    shown = shortened(name, NAME_WIDTH - 2)
    for model, measured in domain.models.items():
        yield f"{shown:<{NAME_WIDTH}}{model:<{MODEL_WIDTH}}{_cells(measured, heads)}"
        shown = ""
    for pair, measured in domain.differences.items():
        label = f"{shortened(pair, MODEL_WIDTH - 1):<{MODEL_WIDTH}}"
        yield f"{'':<{NAME_WIDTH}}{label}{_cells(measured, heads, sign='+')}"


def _cells(measured: Measures, heads: Iterable[str], *, sign: str = "") -> str:
    return "".join(f"{_cell(getattr(measured, name), sign):>{CELL_WIDTH}}" for name in heads)


def _cell(estimate: Estimate | int | None, sign: str) -> str:
    if estimate is None:
        return "-"
    if isinstance(estimate, int):
        return str(estimate)
    error = "-" if estimate.error is None else f"{estimate.error:.3f}"
    return f"{estimate.value:{sign}.3f} ± {error}"


def _legend(results: Results) -> list[str]:
    prompts = sum(domain.prompts for domain in results.domains.values())
    likeliest, over = ("class", "row") if results.per == "row" else ("token", "document")
    kinds = sorted({domain.kl_kind for domain in results.domains.values()} - {"none"})
    return [
        f"Student before and after training. NLL and KL to the teacher in nats per {results.per}, "
        f"KL {', '.join(kinds)}."
        if kinds
        else f"Student before and after training. NLL in nats per {results.per}.",
        f"ECE: expected calibration error of the likeliest {likeliest}, 15 bins.",
        f"± standard errors over {over}s; those of differences are paired by {over}.",
        *([WRITTEN_LEGEND.format(prompts)] if prompts else ()),
    ]
