"""What a generation request and its answer say about themselves."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from shared.errors import TeacherError
from shared.targets.generation import Continuations, GenerationSpec, Openings

SPEC = GenerationSpec(4, stop_ids=(2, 7), temperature=0.5, seed=3)
TEACHER = {"model": "one"}


def openings(*ids: list[int]) -> Openings:
    return Openings.build(names=[f"opening {n}" for n in range(len(ids))], input_ids=ids)


def answer(asked: Openings, spec: GenerationSpec = SPEC) -> Continuations:
    written = [[5] * (n + 1) for n in range(len(asked))]
    return Continuations.build(
        asked, spec, teacher=TEACHER, output_ids=written, stopped=[True] * len(asked)
    )


def test_a_spec_survives_json():
    assert GenerationSpec.from_dict(json.loads(json.dumps(asdict(SPEC)))) == SPEC


def test_what_goes_in_comes_out():
    asked = openings([1, 2, 3], [4])
    found = answer(asked)
    assert [ids.tolist() for ids in asked.ids()] == [[1, 2, 3], [4]]
    assert [ids.tolist() for ids in found.ids()] == [[5], [5, 5]]
    assert found.ids()[0].dtype == np.int32
    assert found.stopped() == [True, True]
    found.check(asked, SPEC, TEACHER)


def test_equal_openings_are_one_and_the_same_whatever_they_are_called():
    first, second = openings([1, 2], [1, 2]).hashes()
    assert first == second
    assert openings([1, 2]).hashes() != openings([1, 3]).hashes()


def test_an_answer_to_something_else_is_refused():
    asked = openings([1, 2, 3], [4])
    found = answer(asked)
    with pytest.raises(TeacherError, match="does not continue opening 0"):
        found.check(openings([1, 2, 3]), SPEC)
    with pytest.raises(TeacherError, match=r"seed 3.*seed 4"):
        found.check(asked, replace(SPEC, seed=4))
    with pytest.raises(TeacherError, match="another teacher"):
        found.check(asked, SPEC, {"model": "two"})
