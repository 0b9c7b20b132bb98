"""The policy gradient on a language of three ids and two tokens, where every text is counted.

V ids   T tokens
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shared.config.losses import PolicyGradient as Section
from student_trainer.losses.terms.policy_gradient import PolicyGradient
from student_trainer.losses.terms.term import ChunkView
from student_trainer.weighing.advantages import advantages

V = 3


def model(seed: int) -> Tensor:
    """Logits of the first token, and of the second after each first [1 + V, V], float64."""
    return torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed)).double()


def logprobs(logits: Tensor, text: tuple[int, int]) -> Tensor:
    log = logits.log_softmax(-1)
    return torch.stack([log[0, text[0]], log[1 + text[0], text[1]]])


def sequence_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q(y) || p(y)) over all texts."""
    texts = list(product(range(V), repeat=2))
    q = torch.stack([logprobs(student, text).sum() for text in texts])
    p = torch.stack([logprobs(teacher, text).sum() for text in texts])
    return (q.exp() * (q - p)).sum()


def token_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The token's own KL at every place that the student comes to, as if its ways there stood."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    reached = torch.cat([torch.ones(1, dtype=q.dtype), q[0].exp().detach()])
    return (reached * kl).sum()


def mixture(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Logits of what is drawn where the teacher has a share in every token."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    return (share * p + (1 - share) * q).log()


def expected_gradient(
    student: Tensor,
    teacher: Tensor,
    *,
    behaviour: Tensor | None = None,
    writer: Tensor | None = None,
    constant=None,
    **options,
) -> Tensor:
    """Of the term, over texts drawn from `behaviour`, by default the student itself; rewards are
    against the student that wrote, by default `behaviour`."""
    live = student.clone().requires_grad_(True)
    behaviour = student if behaviour is None else behaviour
    writer = behaviour if writer is None else writer
    section = Section(**options)
    total = torch.zeros((), dtype=torch.float64)
    for text in product(range(V), repeat=2):
        drawn = logprobs(behaviour, text).detach()
        reward = (logprobs(teacher, text) - logprobs(writer, text)).numpy()
        found = advantages(reward, credit=section.credit, discount=section.discount)
        advantage = torch.from_numpy(found) if constant is None else torch.full((2,), constant)
        chunk = SimpleNamespace(
            label_logprob_n=logprobs(live, text),
            columns={"advantage_N": advantage.double(), "behaviour_N": drawn},
        )
        values = PolicyGradient(section).evaluate(as_chunk(chunk)).values_n
        total = total + drawn.sum().exp() * values.sum()
    return torch.autograd.grad(total, live)[0]


def as_chunk(chunk: SimpleNamespace) -> ChunkView:
    return ChunkView(
        label_logprob_n=chunk.label_logprob_n,
        pair=lambda temperature: pytest.fail("it compares no ids"),
        labelled=None,
        columns=chunk.columns,
        moving={},
    )


def gradient(loss, student: Tensor, *others: Tensor) -> Tensor:
    live = student.clone().requires_grad_(True)
    return torch.autograd.grad(loss(live, *others), live)[0]


def finite_difference(loss, student: Tensor, *others: Tensor, step: float = 1e-5) -> Tensor:
    found = torch.zeros_like(student)
    for place in product(range(1 + V), range(V)):
        change = torch.zeros_like(student)
        change[place] = step
        high, low = loss(student + change, *others), loss(student - change, *others)
        found[place] = (high - low) / (2 * step)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_expected_gradient_is_that_of_the_sequence_level_objective(seed):
    student, teacher = model(seed), model(seed + 50)
    found = expected_gradient(student, teacher, credit="return")
    numerical = finite_difference(sequence_kl, student, teacher)
    torch.testing.assert_close(found, numerical, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found, gradient(sequence_kl, student, teacher))


@pytest.mark.parametrize("seed", range(4))
def test_the_rewards_of_tokens_alone_give_the_gradient_of_their_own_divergences(seed):
    student, teacher = model(seed), model(seed + 50)
    found = expected_gradient(student, teacher, credit="token")
    torch.testing.assert_close(found, gradient(token_kl, student, teacher))


def test_a_single_step_and_the_rewards_after_it_make_the_whole():
    """MiniLLM: Eq. 3 is Eq. 2. Over two tokens the mean of later rewards is their sum."""
    student, teacher = model(1), model(2)
    long_term = expected_gradient(student, teacher, credit="later_mean")
    whole = gradient(token_kl, student, teacher) + long_term
    torch.testing.assert_close(whole, gradient(sequence_kl, student, teacher))


@pytest.mark.parametrize("credit", ["token", "return", "later_mean"])
def test_the_gradient_changes_with_the_teacher_and_is_zero_at_it(credit):
    student = model(1)
    first = expected_gradient(student, model(2), credit=credit)
    assert (first - expected_gradient(student, model(3), credit=credit)).abs().max() > 0.01
    assert expected_gradient(student, student, credit=credit).abs().max() < 1e-12


def test_a_constant_negative_advantage_is_told_apart():
    student, teacher = model(1), model(2)
    constant = expected_gradient(student, teacher, constant=-0.7)
    assert constant.abs().max() < 1e-12
    assert expected_gradient(student, teacher).abs().max() > 0.01


def test_importance_ratios_make_up_for_older_weights():
    """The ratio of a token leaves out that of the way to it, as in PPO."""
    student, older, teacher = model(1), model(1) + 0.1 * model(7), model(2)
    found = expected_gradient(student, teacher, behaviour=older, credit="token")
    live = student.clone().requires_grad_(True)
    q, drawn, p = (m.log_softmax(-1) for m in (live, older, teacher))
    reached = torch.cat([torch.ones(1, dtype=q.dtype), drawn[0].exp()])
    surrogate = (reached * (q.exp() * (drawn - p)).sum(-1)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(surrogate, live)[0])


def reached_kl(student: Tensor, drawn: Tensor, teacher: Tensor) -> Tensor:
    """The token's own KL where a text that is drawn comes to."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    return (torch.cat([torch.ones(1, dtype=q.dtype), drawn.softmax(-1)[0]]) * kl).sum()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_share_of_the_teacher_changes_where_texts_come_to_and_no_gradient_there(share):
    """MiniLLM's Eq. 5: the weight of a token makes up for who drew it, that of the way to it is
    left out."""
    student, teacher = model(1), model(2)
    drawn = mixture(student, teacher, share)
    options = {"behaviour": drawn, "writer": student, "credit": "token"}
    found = expected_gradient(student, teacher, **options)
    numerical = finite_difference(reached_kl, student, drawn, teacher)
    torch.testing.assert_close(found, numerical, atol=1e-8, rtol=1e-6)
    alone = expected_gradient(student, teacher, credit="token")
    assert ((found - alone).abs().max() < 1e-12) == (share == 0)
    torch.testing.assert_close(found[0], alone[0])  # nothing leads to the first token


@pytest.mark.parametrize("credit", ["token", "later_mean", "return"])
def test_a_share_leaves_a_teacher_told_apart(credit):
    student, teacher = model(1), model(2)
    drawn = mixture(student, teacher, 0.2)
    options = {"behaviour": drawn, "writer": student, "credit": credit}
    found = expected_gradient(student, teacher, **options)
    assert expected_gradient(student, teacher, constant=-0.7, **options).abs().max() < 1e-12
    assert found.abs().max() > 0.01
    other = expected_gradient(student, model(3), **options)
    assert (found - other).abs().max() > 0.01
    itself = {"behaviour": mixture(student, student, 0.2), "writer": student, "credit": credit}
    assert expected_gradient(student, student, **itself).abs().max() < 1e-12


def test_a_clip_bounds_what_a_ratio_counts():
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 9.0], dtype=torch.float64)
    live = ratio.log().requires_grad_(True)
    columns = {"advantage_N": advantage, "behaviour_N": torch.zeros(5, dtype=torch.float64)}
    chunk = as_chunk(SimpleNamespace(label_logprob_n=live, columns=columns))
    free = PolicyGradient(Section()).evaluate(chunk).values_n
    torch.testing.assert_close(free, torch.tensor([-1.5, -0.5, 1.5, 0.5, 0.0]).double())
    values = PolicyGradient(Section(clip=0.2)).evaluate(chunk).values_n
    torch.testing.assert_close(values, torch.tensor([-1.2, -0.5, 1.5, 0.8, 0.0]).double())
    (found,) = torch.autograd.grad(values.sum(), live)
    assert (found == 0).tolist() == [True, False, False, True, True]
