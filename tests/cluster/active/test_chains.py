"""Steps, final answers, and how unsure a student is of an explanation."""

import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from cluster.active.chains import (
    Chain,
    chain_of,
    entropy,
    final_answer,
    prefixes,
    steps_of,
    uncertainty,
)
from shared.targets.generation import GenerationSpec, Openings
from teacher_service.engine.hf import HFEngine
from tests.tiny import Pair

SAMPLES, ROOM = 6, 24


def test_steps_are_lines_and_the_answer_follows_the_last_marker():
    text = "first  step\n\n  then #### 3\n#### 4 \nmore"
    assert steps_of(text) == ("first  step", "  then #### 3", "#### 4 ", "more")
    assert final_answer(text, "####") == "4"
    assert final_answer("x is 2\nso  4 \n", "####") == "so 4"
    assert final_answer("", "####") == ""


def test_uncertainty_is_what_the_most_frequent_answer_lacks():
    assert uncertainty(["a", "a", "b", "a"]) == 1 / 4
    assert entropy(["a", "a", "b", "b"]) == pytest.approx(math.log(2) / math.log(4))
    assert entropy(["a", "b", "c", "d"]) == pytest.approx(1)
    assert uncertainty(["a"] * 5) == entropy(["a"] * 5) == 0


def drawn_chain(pair: Pair, temperature: float) -> Chain:
    """What a random student wrote in lines, and how sure it is."""
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    engine = HFEngine.load(str(pair.student))
    opening = np.array([1, *tokenizer("def f(x):\n", add_special_tokens=False)["input_ids"]])
    written = np.array(tokenizer("one\ntwo\nthree", add_special_tokens=False)["input_ids"])
    cuts = prefixes(written, tokenizer)
    assert [tokenizer.decode(written[:cut]).count("\n") for cut in cuts] == [0, 1, 2]
    draws = [str(number) for number in range(SAMPLES)]
    drawn = []
    for cut in cuts:
        start = np.concatenate([opening, written[:cut]])
        openings = Openings.build(names=["q"] * SAMPLES, input_ids=[start] * SAMPLES)
        spec = GenerationSpec(ROOM - cut, (2,), temperature)
        drawn.append(engine.generate(openings.with_draws(draws), spec).ids())
    text = "one\ntwo\nthree"
    return chain_of("q", written, text, drawn, tokenizer=tokenizer, marker="####")


def test_a_student_without_chance_is_sure_of_every_prefix(tiny_pair):
    chain = drawn_chain(tiny_pair, 0.0)
    assert (chain.within, chain.between, chain.uncertainty) == (0, 0, 0)
    assert chain.steps == ("one", "two", "three")


def test_a_student_that_draws_is_not(tiny_pair):
    chain = drawn_chain(tiny_pair, 2.0)
    assert 0 < chain.within <= 1
    assert 0 < chain.between <= 1
