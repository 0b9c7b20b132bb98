"""Texts that two models write token by token: forced tokens, states that are kept, and the mixture
of two laws.

B openings   V vocabulary
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from shared.errors import ConfigError, TeacherError
from shared.targets.generation import Continuations, GenerationSpec, Openings, Partner
from teacher_service.engine.generation import lock_step
from teacher_service.engine.generation.generating import ModelGenerator, open_generator
from teacher_service.engine.hf import HFEngine
from tests.families.making import save_family
from tests.teacher_service.engine.generation.test_generating import RWKV, openings
from tests.teacher_service.engine.generation.test_sampling import CPU, STOPS, after, law
from tests.teacher_service.engine.test_trust import LEAKY, saved
from tests.tiny import VOCAB

SPEC = GenerationSpec(
    7, temperature=0.8, top_p=0.95, stop_ids=STOPS + tuple(range(40, 100)), logprobs=True, seed=4
)
PLAIN = openings((3, 9, 5, 9), vocab=VOCAB)
ASKED = PLAIN.with_draws("abcd")


@pytest.fixture(scope="module")
def models(tiny_pair) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Teacher and student."""
    folders = (tiny_pair.teacher, tiny_pair.student)
    teacher, student = (AutoModelForCausalLM.from_pretrained(f).eval() for f in folders)
    return teacher, student


def way(model: torch.nn.Module, rows: int = 32) -> ModelGenerator:
    return open_generator(model, device=CPU, dtype="float32", batch_rows=rows)


class Counted:
    """A generator that counts how often its model reads, and for how many tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.read, self._way = 0, way(model)
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)  # type: ignore[operator]

    def _count(self, _, inputs) -> None:
        self.read += inputs[0].numel()

    def generate(self, asked: Openings, spec: GenerationSpec) -> Continuations:
        return self._way.generate(asked, spec)

    def close(self) -> None:
        self._hook.remove()


def bits(found: Continuations) -> list[tuple[list[int], list[bytes]]]:
    pairs = zip(found.written(), found.logprobs(), strict=True)
    return [(ids.tolist(), [value.tobytes() for value in logprobs]) for ids, logprobs in pairs]


def step_by_step(generator, asked: Openings, spec: GenerationSpec) -> Continuations:
    """Asked for one token more each time, what was answered before given."""
    answer = generator.generate(
        asked.with_forced([[]] * len(asked)), replace(spec, max_new_tokens=1)
    )
    for count in range(2, spec.max_new_tokens + 1):
        ends = [
            [*ids, *[STOPS[0]] * (count - len(ids))] if over else ids
            for ids, over in zip(answer.written(), answer.stopped(), strict=True)
        ]
        answer = generator.generate(asked.with_forced(ends), replace(spec, max_new_tokens=count))
    return answer


def test_what_is_written_step_by_step_is_what_is_written_at_once(models):
    """To the bit; and each token is read once."""
    whole = way(models[0]).generate(ASKED, SPEC)
    assert 0 < sum(whole.stopped()) < len(ASKED)
    counted = Counted(models[0])
    try:
        assert bits(step_by_step(counted, ASKED, SPEC)) == bits(whole)
        after_probes = counted.read
        step_by_step(counted, PLAIN.with_draws("efgh"), SPEC)
        assert counted.read - after_probes == len(ASKED) * (9 + SPEC.max_new_tokens - 1)
    finally:
        counted.close()


def test_whoever_has_lost_the_states_answers_the_same_bits(models):
    """As a replica that was started again, or another one."""
    whole = bits(way(models[0]).generate(ASKED, SPEC))

    class Forgetful:
        def generate(self, asked: Openings, spec: GenerationSpec) -> Continuations:
            return way(models[0]).generate(asked, spec)

    assert bits(step_by_step(Forgetful(), ASKED, SPEC)) == whole


def test_states_of_batches_that_are_asked_about_no_longer_are_dropped(models, monkeypatch):
    monkeypatch.setattr(lock_step, "MOST_BETWEEN", 2)
    generator = way(models[0])
    batches = [PLAIN.with_draws([f"{n}{d}" for d in "abcd"]) for n in range(4)]
    for number in (0, 1, 2, 0, 3):
        asked = batches[number].with_forced([[]] * 4)
        generator.generate(asked, replace(SPEC, max_new_tokens=1))
    kept = generator._in_steps()._kept
    assert [n for n in range(4) if any(batches[n].hashes()[0] in key for key in kept)] == [0, 2, 3]


def test_many_workers_who_write_side_by_side_read_each_token_once(models):
    spec = replace(SPEC, max_new_tokens=3, stop_ids=())
    batches = [PLAIN.with_draws([f"{n}{d}" for d in "abcd"]) for n in range(24)]
    counted, given = Counted(models[0]), [[[]] * 4 for _ in batches]
    try:
        for count in range(1, spec.max_new_tokens + 1):
            for n, asked in enumerate(batches):
                step = replace(spec, max_new_tokens=count)
                answer = counted.generate(asked.with_forced(given[n]), step)
                given[n] = [ids.tolist() for ids in answer.written()]
            if count == 1:
                after_first = counted.read
        assert counted.read - after_first == len(batches) * 4 * (spec.max_new_tokens - 1)
    finally:
        counted.close()


def test_what_is_given_is_taken_and_told_its_logprob(models):
    """Whatever else would have been drawn; where nothing is given, draws go on."""
    given = [[50, 60, 70], [51], [], [52, 61, 71, 81, 91, 101, 111]]
    spec = replace(SPEC, top_p=1.0, stop_ids=())
    found = way(models[0]).generate(ASKED.with_forced(given), spec)
    for opening, ids, own, logprobs in zip(
        ASKED.ids(), found.written(), given, found.logprobs(), strict=True
    ):
        assert ids[: len(own)].tolist() == own
        assert len(ids) == len(logprobs) == spec.max_new_tokens
        for logits_V, token, logprob in zip(
            after(models[0], opening, ids), ids, logprobs, strict=True
        ):
            assert logprob == pytest.approx(float(law(logits_V, spec)[token].log()), abs=2e-5)
    free = way(models[0]).generate(ASKED, spec)
    assert found.written()[2].tolist() == free.written()[2].tolist()


def test_an_answer_that_begins_otherwise_is_refused(models):
    asked = ASKED.with_forced([[50], [51], [], [52]])
    spec = replace(SPEC, stop_ids=())
    answer = way(models[0]).generate(asked, spec)
    answer.check(asked, spec)
    with pytest.raises(TeacherError, match="does not begin as asked after intent/0"):
        answer.check(ASKED.with_forced([[50], [51], [], [53]]), spec)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"logprobs": False}])
def test_given_tokens_without_a_law_or_its_logprobs_are_refused(models, options):
    with pytest.raises(ConfigError, match="whose log-probabilities are answered; ask for these"):
        way(models[0]).generate(ASKED.with_forced([[5]] * 4), replace(SPEC, **options))


@pytest.mark.parametrize("family", ["recurrent gemma", "rwkv"])
def test_a_model_that_cannot_read_on_is_asked_all_the_same(family, tmp_path):
    folder = saved(tmp_path, LEAKY.get(family, RWKV))
    engine, spec = HFEngine.load(str(folder)), replace(SPEC, stop_ids=(), max_new_tokens=4)
    asked = openings((3, 9, 9), vocab=90)
    whole, steps = engine.generate(asked, spec), step_by_step(engine, asked, spec)
    assert [ids.tolist() for ids in whole.written()] == [ids.tolist() for ids in steps.written()]
    for one, other in zip(whole.logprobs(), steps.logprobs(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("family", ["recurrent_gemma", "openai-gpt"])
def test_a_model_that_keeps_its_states_in_itself_or_takes_none_is_not_believed(family, tmp_path):
    """Whatever it reads between two questions about a text."""
    engine = HFEngine.load(str(save_family(family, tmp_path, seed=3)))
    spec = replace(SPEC, stop_ids=(), max_new_tokens=4)
    asked = openings((3, 9, 5), vocab=VOCAB).with_draws("abc")
    whole, steps = engine.generate(asked, spec), step_by_step(engine, asked, spec)
    for one, other in zip(whole.logprobs(), steps.logprobs(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def mixed(models, asked: Openings, spec: GenerationSpec, share: float) -> Continuations:
    """What the student writes with the teacher."""
    teacher, student = models
    return way(student).generate_mixed(asked, spec, Partner(way(teacher), asked, share))


@pytest.mark.parametrize(
    ("share", "options"),
    [
        pytest.param(0.3, {}, marks=pytest.mark.drill),
        (0.3, {"temperature": 0.7, "top_p": 0.9}),
        pytest.param(0.8, {"temperature": 2.0}, marks=pytest.mark.drill),
    ],
)
def test_tokens_are_drawn_from_the_mixture(models, share, options):
    """Chi-square of all texts of two tokens out of three, over 2,000 of one prompt."""
    times, ids = 2000, openings([7], vocab=VOCAB).ids()[0]
    spec = GenerationSpec(2, temperature=1.0, vocab=3, logprobs=True)
    spec = replace(spec, **{"temperature": 1.0} | options)
    asked = Openings.build(names=["one"] * times, input_ids=[ids] * times)
    found = mixed(models, asked.with_draws([str(n) for n in range(times)]), spec, share)
    counts = Counter(tuple(text.tolist()) for text in found.written())
    expected = {}
    for text in product(range(3), repeat=2):
        laws = [
            [law(logits_V[:3], spec) for logits_V in after(model, ids, np.array(text))]
            for model in models
        ]
        steps = [share * p + (1 - share) * q for p, q in zip(*laws, strict=True)]
        expected[text] = float(steps[0][text[0]] * steps[1][text[1]]) * times
    likely = [text for text in expected if expected[text] > 0]
    assert set(counts) <= set(likely)
    assert len(likely) > 3
    observed = [counts[text] for text in likely]
    pvalue = stats.chisquare(observed, [expected[text] for text in likely], sum_check=False).pvalue
    assert pvalue > 1e-3
    alone = [float(law(after(models[1], ids, np.array([0]))[0][:3], spec)[v]) for v in range(3)]
    first = [sum(counts[text] for text in counts if text[0] == v) for v in range(3)]
    least = np.array([max(1e-9, p * times) for p in alone])
    assert stats.chisquare(first, least, sum_check=False).pvalue < 1e-6  # nor from the student's


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_what_is_kept_are_the_logprobs_of_the_mixture_and_of_the_student(models, share):
    spec = replace(SPEC, top_p=1.0, max_new_tokens=5)
    found = mixed(models, ASKED, spec, share)
    own = found.own_logprobs()
    assert own is not None
    for opening, ids, logprobs, own_logprobs in zip(
        ASKED.ids(), found.written(), found.logprobs(), own, strict=True
    ):
        p_S, q_S = (
            torch.stack(
                [law(l_V, spec)[t] for l_V, t in zip(after(m, opening, ids), ids, strict=True)]
            )
            for m in models
        )
        mixture_S = share * p_S + (1 - share) * q_S
        np.testing.assert_allclose(logprobs, mixture_S.log(), atol=3e-5)
        np.testing.assert_allclose(own_logprobs, q_S.log(), atol=3e-5)


def test_the_weight_of_a_token_is_the_students_law_over_the_mixture():
    """The golden vector of MiniLLM's Eq. 5 at alpha = .2, and 1 at p = q."""
    log_p, log_q = (torch.tensor([value]).log() for value in (0.5, 0.3))
    weight = (log_q - lock_step.mixture(log_q, log_p, 0.2)).exp()
    assert float(weight) == pytest.approx(0.882352941)
    assert float(lock_step.mixture(log_q, log_q, 0.2)) == pytest.approx(float(log_q))


def test_a_share_of_all_is_the_partners_own_text(models):
    found, own = mixed(models, ASKED, SPEC, 1.0), way(models[0]).generate(ASKED, SPEC)
    assert [ids.tolist() for ids in found.written()] == [ids.tolist() for ids in own.written()]
    assert found.logprobs()[0] == pytest.approx(own.logprobs()[0])


def test_a_text_is_the_same_alone_and_in_any_batch(models):
    teacher, student = models
    spec = replace(SPEC, top_p=1.0)
    partner = Partner(way(teacher), ASKED, 0.4)
    alone, *others = [way(student, n).generate_mixed(ASKED, spec, partner) for n in (1, 2, 4)]
    for other in others:
        assert [w.tolist() for w in other.written()] == [w.tolist() for w in alone.written()]
        for a, b in zip(other.logprobs(), alone.logprobs(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert bits(way(student).generate_mixed(ASKED, spec, partner)) == bits(others[-1])
