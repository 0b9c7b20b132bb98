"""The results of `tutelage eval` as a table of at most 100 columns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cluster.evaluation.results import DomainResults, Results
from cluster.evaluation.statistics import Estimate, Measures
from shared.in_words import shortened

NAME_WIDTH, MODEL_WIDTH, CELL_WIDTH = 16, 16, 17
HEADS = {"nll": "NLL", "bits_per_byte": "bits/byte", "kl": "KL", "ece": "ECE"}
OF_LABELS = {"nll": "NLL", "kl": "KL", "ece": "ECE"}
CLASSES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
SPANS = {"span_f1": "span F1", "precision": "precision", "recall": "recall"}
LIKELIEST = {"token": "token", "row": "class", "word": "tag"}  # by what NLL is per
WRITTEN = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "Rouge-L",
    "cut": "cut",
}

SPANS_LEGEND = (
    "Span F1: of whole entities with their types, all rows together, as seqeval counts them."
)
WRITTEN_LEGEND = (
    "Exact match, token F1, Rouge-L: of {} answers, written greedily; ± over prompts, paired in\n"
    "differences. Cut: answers that came to the limit of tokens, counted as they are."
)


def table(results: Results) -> str:
    """A line for each model of each domain, its differences below; how it tells classes apart or
    finds entities, and the scores of what models wrote in domains with prompts, under heads of
    their own."""
    heads = HEADS if results.per == "token" else OF_LABELS
    lines = list(_part(results.domains, heads))
    for heads in (CLASSES, SPANS):
        if scored := dict(_scored(results.domains, heads)):
            lines += ["", *_part(scored, heads)]
    if prompted := {name: domain for name, domain in results.domains.items() if domain.prompts}:
        lines += ["", *_part(prompted, WRITTEN)]
    return "\n".join([*lines, "", *_legend(results)])


def _scored(
    domains: Mapping[str, DomainResults], heads: Mapping[str, str]
) -> Iterator[tuple[str, DomainResults]]:
    """The domains of which some of the models have the scores of `heads`, and those models."""
    for name, domain in domains.items():
        if models := _with_any(domain.models, heads):
            differences = _with_any(domain.differences, heads)
            yield name, replace(domain, models=models, differences=differences)


def _with_any(measured: Mapping[str, Measures], heads: Iterable[str]) -> dict[str, Measures]:
    return {
        name: one
        for name, one in measured.items()
        if any(getattr(one, head) is not None for head in heads)
    }


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
    likeliest, over = LIKELIEST[results.per], "document" if results.per == "token" else "row"
    kinds = sorted({domain.kl_kind for domain in results.domains.values()} - {"none"})
    return [
        f"Student before and after training. NLL and KL to the teacher in nats per {results.per}, "
        f"KL {', '.join(kinds)}."
        if kinds
        else f"Student before and after training. NLL in nats per {results.per}.",
        f"ECE: expected calibration error of the likeliest {likeliest}, 15 bins.",
        f"± standard errors over {over}s; those of differences are paired by {over}.",
        *([SPANS_LEGEND] if any(_scored(results.domains, SPANS)) else ()),
        *([WRITTEN_LEGEND.format(prompts)] if prompts else ()),
    ]
