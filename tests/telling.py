"""Which cases of a law `make test` has."""

from collections.abc import Iterable
from typing import Any

import pytest


def telling(cases: Iterable[Any], *few: Any) -> list[Any]:
    """All cases for `parametrize`, of which all but the `few` most telling ones are drills."""
    cases = list(cases)
    if missing := [case for case in few if case not in cases]:
        raise ValueError(f"no such cases: {missing}")
    return [case if case in few else _drill(case) for case in cases]


def _drill(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.drill)
