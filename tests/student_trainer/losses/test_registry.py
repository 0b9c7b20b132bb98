"""Every loss of the config is a term or an auxiliary, and both say the same of it."""

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from shared.config.losses import KINDS, Divergence
from shared.run.metrics import DomainMetrics
from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.registry import AUXILIARIES, TERMS, loss_names, terms_of
from student_trainer.losses.terms import divergences
from student_trainer.losses.terms.divergences import DIVERGENCES, DivergenceTerm
from student_trainer.losses.terms.term import ChunkView, Needs, TermValues
from tests.student_trainer.losses.dense import Case, cross_entropy_term, gradients, relative_error

OPTIONS = {
    "hidden_states": {"layers": {2: 1}},
    "self_features": {"layers": {1: 2}},
    "entity_contrast": {"layer": 3},
}
LAYERS = {  # of the teacher, of the student
    "hidden_states": ((2,), (1,)),
    "self_features": ((), (1, 2)),
    "entity_contrast": ((), (3,)),
}


def test_every_kind_of_the_config_is_a_term_or_an_auxiliary() -> None:
    assert set(TERMS) | set(AUXILIARIES) == set(KINDS)
    assert not set(TERMS) & set(AUXILIARIES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_and_its_term_need_the_same(kind: str) -> None:
    section = KINDS[kind](**OPTIONS.get(kind, {}))
    if kind in AUXILIARIES:
        assert not section.reads_ids
        layers = (section.teacher_layers, section.student_layers)
        assert layers == LAYERS.get(kind, ((), ()))
        return
    term = TERMS[kind](section)
    assert term.needs.teacher == section.reads_ids
    reads_labels = section.of_rollouts or section.of_pairs  # of the teacher, their probability
    assert section.asks_teacher == (section.reads_ids or reads_labels)
    assert ("behaviour_N" in term.needs.columns) == section.of_rollouts
    assert term.needs.temperatures == section.temperatures
    assert term.weight == 1
    if section.takes_drawn_ids:
        assert not term.needs.label_apart, "drawn ids do not tell the label"


def test_what_terms_report_are_fields_of_a_domains_metrics() -> None:
    known = {field.name for field in fields(DomainMetrics)}
    reported = [name for term in TERMS.values() for name in getattr(term, "reported", ())]
    assert {"hard_share", "tkd"} <= set(reported) <= known


def test_names_are_kinds_numbered_from_the_second_on() -> None:
    sections = [SimpleNamespace(kind=kind) for kind in ("jsd", "akl", "jsd", "jsd")]
    assert loss_names(sections) == ["jsd", "akl", "jsd_2", "jsd_3"]


class SquaredDistance(Divergence):
    """sum (p - q)^2 over the kept ids."""

    student_weighted: ClassVar[str | None] = ""

    kind: Literal["squared"] = "squared"


def squared(teacher: Buckets, student: Buckets) -> Tensor:
    return (teacher.kept_NK.exp() - student.kept_NK.exp()).square().sum(-1)


def test_a_further_divergence_is_one_function_and_one_entry(monkeypatch) -> None:
    entry = divergences.Divergence(squared, "sum (p - q)^2", "here")
    monkeypatch.setitem(DIVERGENCES, "squared", entry)
    monkeypatch.setitem(TERMS, "squared", DivergenceTerm)
    case = Case.random()
    targets = case.targets(8, temperatures=(1.0, 2.0))
    section = SquaredDistance(temperature=2.0, weight=0.5)
    found = case.losses(terms=[section], targets=targets, multiplier=0.1, chunk_rows=10)
    p_NV = (case.teacher_NV / 2).softmax(-1)
    q_NV = (case.head.logits(case.hidden_ND) / 2).softmax(-1)
    value_N = 4 * (p_NV - q_NV).square().gather(1, targets.ids_NK).sum(-1)
    torch.testing.assert_close(found.terms["squared"], value_N.detach())
    pairs = zip(gradients(found.loss, case), gradients(0.05 * value_N.sum(), case), strict=True)
    assert all(relative_error(*pair) < 1e-9 for pair in pairs)


class Confidence:
    """-log of the label's probability where a column says so, and what it was for all."""

    reported = ("uncertainty",)
    weight, is_kl_at, needs = 2.0, None, Needs(columns=("chosen_N",))

    def evaluate(self, chunk: ChunkView) -> TermValues:
        values_n = torch.where(chunk.columns["chosen_N"], -chunk.label_logprob_n, 0)
        return TermValues(values_n, {"uncertainty": -torch.expm1(chunk.label_logprob_n)})


def test_a_term_reads_its_columns_chunk_by_chunk_and_reports_by_name(monkeypatch) -> None:
    monkeypatch.setitem(TERMS, "confidence", lambda section: Confidence())
    case = Case.random()
    chosen_N = torch.arange(37) % 3 == 0
    sections = [SimpleNamespace(kind="confidence"), cross_entropy_term()]
    columns: Mapping[str, Tensor] = {"chosen_N": chosen_N}
    found = case.losses(terms=sections, columns=columns, chunk_rows=7)
    nll_N = -case.head.logits(case.hidden_ND).log_softmax(-1).gather(1, case.label_N[:, None])[:, 0]
    torch.testing.assert_close(found.terms["confidence"], nll_N.detach() * chosen_N)
    torch.testing.assert_close(found.reports, {"uncertainty": 1 - (-nll_N.detach()).exp()})
    expected = gradients((nll_N * (1 + 2 * chosen_N)).sum(), case)
    pairs = zip(gradients(found.loss, case), expected, strict=True)
    assert all(relative_error(*pair) < 1e-12 for pair in pairs)
    with pytest.raises(AssertionError, match="chosen_N"):
        case.losses(terms=sections)
    assert list(terms_of(sections)) == ["confidence", "cross_entropy"]
