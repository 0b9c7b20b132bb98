"""The search with constructed scorers, whose best prompt is known."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cluster.prompt_search.search import Material, best_of, is_gain, search
from cluster.prompt_search.trial import Candidate, Estimate, Trial
from shared.config.verbs.prompt_search import PromptSearch
from shared.prompts.prompts import Example, Prompt

SETTINGS = PromptSearch()
POOL = tuple(Example(f"question {n} of {n % 7}", f"answer {n}") for n in range(30))
MATERIAL = Material("Write the first word.", POOL, tuple(f"question {n}" for n in range(40, 60)))


def refuse(instruction: str, count: int, seed: int) -> list[str]:
    """A teacher too weak to paraphrase."""
    return ["", instruction, "word word word word word word"][:count]


class Scripted:
    """Scores that a function of the prompt gives, with counts of what was asked."""

    def __init__(self, chance, *, examples: int = 40, seed: int = 0) -> None:
        self.chance, self.asked = chance, Counter()
        self.luck_E = np.random.default_rng(seed).random(examples)

    def __call__(self, prompts):
        self.asked.update(prompt.id for prompt in prompts)
        chances = [self.chance(prompt) for prompt in prompts]
        return [None if c is None else (self.luck_E < c).astype(float) for c in chances]


def last_word_is_best(prompt: Prompt) -> float:
    """Each part of the best prompt helps: the right word, and examples."""
    says_last = "last" in prompt.instruction.lower()
    return 0.05 + 0.5 * says_last + 0.1 * len(prompt.examples)


def found(chance, *, settings=SETTINGS, material=MATERIAL, paraphrase=refuse, seed=0, confirm=None):
    scorer = Scripted(chance)
    outcome = search(
        material,
        settings,
        score=scorer,
        confirm=Scripted(confirm or chance, examples=60, seed=1),
        paraphrase=paraphrase,
        seed=seed,
    )
    return outcome, scorer


def trial(*values: float, text: str = "x") -> Trial:
    return Trial(Candidate(Prompt(text), "test"), 0, np.array(values))


def test_the_best_prompt_is_found_through_several_operators():
    """The word by a near one and the examples by choice, for most seeds of a random search."""
    outcomes = [found(last_word_is_best, seed=seed)[0] for seed in range(10)]
    assert all(outcome.kept for outcome in outcomes)
    best = [
        "last" in outcome.prompt.instruction.lower() and len(outcome.prompt.examples) >= 3
        for outcome in outcomes
    ]
    assert sum(best) >= 7


def test_paraphrases_of_the_teacher_are_tried_before_rules():
    def paraphrase(instruction: str, count: int, seed: int) -> list[str]:
        return ["Tell me which word opens the line", "no", "Begin: say what stands in front"]

    outcome, _ = found(lambda p: 0.9 if "opens" in p.instruction else 0.1, paraphrase=paraphrase)
    assert "opens the line" in outcome.prompt.instruction
    origins = Counter(t.candidate.origin for t in outcome.history)
    assert origins["paraphrase by the teacher"] >= 2
    assert any(origin.startswith("rewrite: ") for origin in origins), "one of three did not pass"


def test_a_weak_teachers_paraphrases_are_replaced_by_rules():
    outcome, _ = found(last_word_is_best)
    origins = [t.candidate.origin for t in outcome.history]
    assert "paraphrase by the teacher" not in origins
    assert any(origin.startswith("rewrite: ") for origin in origins)


@pytest.mark.parametrize("chance", [last_word_is_best, lambda prompt: 0.5])
def test_no_prompt_is_ever_scored_twice(chance):
    outcome, scorer = found(chance)
    assert set(scorer.asked.values()) == {1}
    assert len(outcome.history) == len(scorer.asked)


def test_the_same_seed_finds_the_same_and_another_looks_elsewhere():
    one, again, other = (found(last_word_is_best, seed=seed)[0] for seed in (3, 3, 4))
    assert [t.line() for t in one.history] == [t.line() for t in again.history]
    assert [t.line() for t in one.history] != [t.line() for t in other.history]


def test_where_nothing_helps_the_search_stops_after_a_round_and_keeps_no_prompt():
    outcome, _ = found(lambda prompt: 0.5)
    assert outcome.stopped == "round 1 gained less than one standard error"
    assert not outcome.kept
    assert outcome.prompt == Prompt()
    assert outcome.gain.mean == 0


def test_a_winner_that_does_not_win_on_the_untouched_split_is_not_kept():
    outcome, _ = found(last_word_is_best, confirm=lambda prompt: 0.5)
    assert "last" in outcome.winner.candidate.prompt.instruction.lower()
    assert not outcome.kept
    assert outcome.prompt == Prompt()


def test_a_winner_that_may_have_been_lucky_on_the_untouched_split_is_not_kept():
    """One of 60 answers more is one standard error above none."""
    lucky = np.sort(Scripted(None, examples=60, seed=1).luck_E)[30:32]

    def one_more(prompt: Prompt) -> float:
        return float(lucky.mean() if "last" in prompt.instruction.lower() else lucky[0])

    outcome, _ = found(last_word_is_best, confirm=one_more)
    assert outcome.gain.mean == pytest.approx(1 / 60)
    assert outcome.gain.above(0.99) > 0
    assert not outcome.kept


def test_rounds_are_bounded():
    outcome, _ = found(last_word_is_best, settings=PromptSearch(rounds=1))
    assert max(t.round for t in outcome.history) == 1
    assert outcome.stopped in ("1 rounds are done", "round 1 gained less than one standard error")


def test_what_does_not_fit_is_on_record_and_never_in_the_beam():
    outcome, _ = found(lambda p: None if len(p.examples) > 1 else last_word_is_best(p))
    beyond = [t.line() for t in outcome.history if not t.line()["fits"]]
    assert beyond
    assert {line["dev_mean"] for line in beyond} == {None}
    unfit = {line["id"] for line in beyond}
    assert not unfit & {t.candidate.parent for t in outcome.history}
    assert len(outcome.prompt.examples) <= 1


def test_keywords_that_the_score_hangs_on_are_named_in_the_history():
    outcome, _ = found(last_word_is_best)
    origins = {t.candidate.origin for t in outcome.history}
    assert any(origin.startswith("without ") for origin in origins)
    assert any(" for " in origin for origin in origins)


def test_examples_come_from_the_pool_alone():
    outcome, _ = found(last_word_is_best)
    shown = {example for t in outcome.history for example in t.candidate.prompt.examples}
    assert shown
    assert shown <= set(POOL)


def test_without_a_pool_no_examples_are_shown():
    outcome, _ = found(last_word_is_best, material=replace(MATERIAL, pool=()))
    assert not any(t.candidate.prompt.examples for t in outcome.history)


def test_the_beam_prefers_the_certain_to_the_lucky():
    sure, lucky = trial(*[0.5] * 20), trial(*[1, 0] * 9, 1, 1)
    assert lucky.estimate.mean > sure.estimate.mean
    assert best_of([lucky, sure], 2) == [sure, lucky]


def test_an_estimate_is_mean_and_standard_error():
    estimate = Estimate.of(np.array([0.0, 1.0, 1.0, 1.0]))
    assert estimate.mean == 0.75
    assert estimate.se == pytest.approx(0.25)
    assert estimate.above(2) == pytest.approx(0.25)
    assert Estimate.of(np.array([1.0])).above() == -np.inf


def test_a_gain_is_measured_example_by_example():
    """Noise that both share does not hide what the better one adds."""
    noise_E = np.random.default_rng(0).normal(size=30)
    before, best = trial(*noise_E), trial(*(noise_E + 0.01))
    assert is_gain(best, before)
    assert not is_gain(before, best)
    assert not is_gain(before, before)
    assert not is_gain(trial(*np.roll(noise_E, 1)), before)


def replace_of(settings: PromptSearch, **changes) -> PromptSearch:
    return settings.model_copy(update=changes)
