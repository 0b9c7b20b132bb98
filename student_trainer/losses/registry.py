"""Every loss that a config can name, by its kind: the one link between a section and what it does.

A kind of `shared.config.losses` is either a term, on log-probabilities, or an auxiliary, on other
outputs of the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from student_trainer.losses.auxiliary.auxiliary import Auxiliary
from student_trainer.losses.auxiliary.contrast import EntityContrast
from student_trainer.losses.auxiliary.hidden_states import HiddenStateMatching
from student_trainer.losses.auxiliary.router_balance import RouterBalance
from student_trainer.losses.auxiliary.self_features import SelfFeatures
from student_trainer.losses.terms.cross_entropy import CrossEntropy
from student_trainer.losses.terms.divergences import DIVERGENCES, DivergenceTerm
from student_trainer.losses.terms.policy_gradient import PolicyGradient
from student_trainer.losses.terms.preference import Preference
from student_trainer.losses.terms.term import Term
from student_trainer.losses.terms.token_adaptive import TokenAdaptive
from student_trainer.losses.terms.token_temperature import TokenTemperature

TERMS: dict[str, Callable[[Any], Term]] = {
    **dict.fromkeys(DIVERGENCES, DivergenceTerm),
    "atkd": TokenAdaptive,
    "cross_entropy": CrossEntropy,
    "policy_gradient": PolicyGradient,
    "preference": Preference,
    "token_temperature": TokenTemperature,
}
AUXILIARIES: dict[str, Callable[[Any, nn.ModuleDict], Auxiliary]] = {
    "entity_contrast": EntityContrast,
    "hidden_states": HiddenStateMatching,
    "router_balance": RouterBalance,
    "self_features": SelfFeatures,
}


def loss_names(sections: Sequence[Any]) -> list[str]:
    """One name per loss section: its kind, numbered from the second of a kind on."""
    kinds = [section.kind for section in sections]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return [k if count == 1 else f"{k}_{count}" for k, count in zip(kinds, counts, strict=True)]


def terms_of(sections: Sequence[Any]) -> dict[str, Term]:
    """The terms among the sections, by name."""
    return {name: TERMS[s.kind](s) for name, s in _named(sections) if s.kind in TERMS}


def auxiliaries_of(sections: Sequence[Any], modules: nn.ModuleDict) -> dict[str, Auxiliary]:
    """The auxiliaries among the sections, by name."""
    return {
        name: AUXILIARIES[s.kind](s, modules)
        for name, s in _named(sections)
        if s.kind in AUXILIARIES
    }


def reports_of(terms: Mapping[str, Term]) -> tuple[str, ...]:
    """Names of all that terms report beside their values."""
    return tuple(name for term in terms.values() for name in term.reported)


def _named(sections: Sequence[Any]) -> list[tuple[str, Any]]:
    return list(zip(loss_names(sections), sections, strict=True))
