"""Cases of a law: the most telling ones are shown in `make test`, the others are drills."""

from collections.abc import Iterable, Sequence
from itertools import cycle, product
from typing import Any

import pytest


def telling(cases: Iterable[Any], *shown: Any) -> list[Any]:
    """The cases as parameters; those that are not among `shown` are drills."""
    found = list(cases)
    assert all(case in found for case in shown), "what is shown is a case of the law"
    return [case if case in shown else _drill(case) for case in found]


def _drill(case: Any) -> Any:
    """A value, or the values of several parameters, left out of `make test`."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.drill)


def asked(
    request: pytest.FixtureRequest,
    parameter: str,
    *,
    among: Iterable[Any] | None = None,
    always: Iterable[Any] = (),
) -> list[Any]:
    """The values of a parameter that tests of this file have in this session, each once: what a
    fixture of many runs needs to make, with drills or without. `always` are those that tests name;
    `among` cases alone, in their order, where other tests have a parameter of this name too."""
    own = (item for item in request.session.items if item.path == request.path)
    cases = (getattr(item, "callspec", None) for item in own)
    found = (case.params[parameter] for case in cases if case and parameter in case.params)
    values = list(dict.fromkeys([*always, *found]))
    return values if among is None else [case for case in among if case in values]


def in_turn(cases: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """Every case with one of the others, which take turns; with all of them as drills."""
    cases = list(cases)
    return telling(product(cases, others), *zip(cases, cycle(others), strict=False))
