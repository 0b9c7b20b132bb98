"""Laws of soft labels from class similarities: what they are made of, and the loss they are for.

N rows   E width of a code   C classes
"""

from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config.losses import CrossEntropy, SoftCrossEntropy
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets.asks.classes import HeadLogProbs, SoftLabels
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from student_trainer.answers import Reading, answer_arrays, view_of
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses
from teacher_service.engine.classes.similarity import codes_of, similarities, soft_labels
from teacher_service.engine.classes.soft_labels import SoftLabelEngine

CLASSES = ("ask", "sing", "tell")
LABEL_N = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 2])
UNIFORM_CC = np.full((3, 3), 1 / 3)


@pytest.fixture
def codes_NE() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(len(LABEL_N), 4)))


def found(codes_NE: Tensor, samples: int, seed: int = 0) -> np.ndarray:
    options = {"num_classes": len(CLASSES), "samples": samples, "seed": seed}
    return similarities(codes_NE, LABEL_N, **options)


def by_hand(codes_NE: Tensor, chosen: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Mean cosines over pairs of rows, of which no row is paired with itself."""
    cosine_NN = F.cosine_similarity(codes_NE[:, None], codes_NE[None], dim=-1).numpy()
    pairs = [
        [cosine_NN[i, j] for i, j in product(a, b) if i != j] for a, b in product(chosen, repeat=2)
    ]
    return np.array([np.mean(values) for values in pairs]).reshape(len(chosen), -1)


def rows_of(number: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(c == LABEL_N)) for c in range(number))


def test_classes_are_as_alike_as_their_rows_are_in_the_mean(codes_NE):
    every_CC = found(codes_NE, samples=40)
    np.testing.assert_allclose(every_CC, by_hand(codes_NE, rows_of(3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(every_CC, every_CC.T, rtol=0, atol=1e-15)


def test_of_more_rows_so_many_are_drawn_as_are_asked_for(codes_NE):
    possible = [
        by_hand(codes_NE, chosen)
        for chosen in product(*(combinations(rows, 2) for rows in rows_of(3)))
    ]
    drawn = [found(codes_NE, samples=2, seed=seed) for seed in range(6)]
    for own_CC in drawn:
        assert min(np.abs(own_CC - one_CC).max() for one_CC in possible) < 1e-12
    assert len({own_CC.tobytes() for own_CC in drawn}) > 1, "the seed decides which"
    assert np.array_equal(drawn[0], found(codes_NE, samples=2))


def test_each_class_is_likeliest_in_its_own_row_or_it_is_refused():
    alike_CC = np.array([[0.5, 0.2, -0.1], [0.2, 0.15, 0.0], [-0.1, 0.0, 0.3]])
    named = {"classes": CLASSES, "option": "teachers.t.similarity"}
    said = r"similarity.diagonal is 0.0225, with which rows of sing are as near to those of ask as"
    with pytest.raises(ConfigError, match=rf"{said} to their own; set it above 0\.0500, or raise"):
        soft_labels(alike_CC, diagonal=0.0225, **named)
    label_CC = soft_labels(alike_CC, diagonal=0.0501, **named)
    np.testing.assert_allclose(label_CC.sum(1), 1, rtol=0, atol=1e-15)
    assert label_CC.argmax(1).tolist() == [0, 1, 2]
    power = np.exp([0.5501, 0.2, -0.1])
    np.testing.assert_allclose(label_CC[0], power / power.sum(), rtol=0, atol=1e-15)
    with pytest.raises(ConfigError, match="is 800, with which other classes have no probability"):
        soft_labels(alike_CC, diagonal=800, **named)
    with pytest.raises(ConfigError, match="the autoencoder ended without numbers"):
        soft_labels(alike_CC * np.nan, diagonal=0.1, **named)


def test_codes_keep_what_tells_groups_of_texts_apart_and_repeat_with_their_seed():
    draw = np.random.default_rng(1)
    middle_CD = draw.normal(size=(3, 16))
    means_ND = torch.from_numpy(middle_CD[LABEL_N] + 0.1 * draw.normal(size=(len(LABEL_N), 16)))
    codes_NE = codes_of(means_ND, epochs=200, seed=3)
    assert codes_NE.shape == (len(LABEL_N), 4)
    alike_CC = found(codes_NE.double(), samples=40)
    assert (alike_CC.diagonal() > 0.9).all()
    assert (alike_CC - np.eye(3) < 0.7).all()
    assert torch.equal(codes_NE, codes_of(means_ND, epochs=200, seed=3))
    for other in ({"epochs": 200, "seed": 4}, {"epochs": 1, "seed": 3}):
        assert not torch.equal(codes_NE, codes_of(means_ND, **other))


def unit(label_N: np.ndarray) -> Rows:
    return Rows.build(
        domains=["kinds"] * len(label_N),
        indices=range(len(label_N)),
        input_ids=[[7, 9, label] for label in label_N],
        doc_starts=[np.zeros(1)] * len(label_N),
        loss_masks=[[0, 1, 0]] * len(label_N),
    )


def learnt(label_CC: np.ndarray, logits_NC: Tensor, losses: list) -> tuple[Tensor, Tensor]:
    """The mean loss of rows by what the engine answers about them, and its gradient."""
    engine, question = (
        SoftLabelEngine(CLASSES, label_CC, {"model": "m"}),
        Question(SoftLabels(CLASSES)),
    )
    answer = engine.score(unit(LABEL_N), question)
    answer.check(unit(LABEL_N), question, engine.fingerprint)
    batch = {name: torch.from_numpy(v) for name, v in answer_arrays(answer).items()}
    temperatures = (1.0, *(t for loss in losses for t in loss.temperatures if t != 1))
    logits_NC = logits_NC.clone().requires_grad_()
    value = token_losses(
        logits_NC,
        Head(torch.eye(len(CLASSES)), None, 1.0, None),
        label_N=torch.from_numpy(LABEL_N),
        terms=terms_of(losses),
        multiplier=1 / len(LABEL_N),
        targets=view_of(batch, Reading(temperatures)),
    ).loss
    value.backward()
    assert logits_NC.grad is not None
    return value.detach(), logits_NC.grad


def plain(value: Tensor, logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, logits_NC)[0]


@pytest.fixture
def logits_NC() -> Tensor:
    return torch.randn(len(LABEL_N), 3, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 20.0), (0.5, 5.0), (0.9, 1.0)])
def test_the_loss_tempers_the_student_alone(logits_NC, alpha, temperature):
    alike_CC = np.array([[0.9, 0.2, -0.5], [0.2, 0.8, 0.0], [-0.5, 0.0, 0.7]]) * 4
    label_CC = soft_labels(alike_CC, diagonal=0.0, classes=CLASSES, option="o")
    soft = SoftCrossEntropy(weight=alpha, temperature=temperature)
    found = learnt(label_CC, logits_NC, [soft, CrossEntropy(weight=1 - alpha)])
    own = logits_NC.double().requires_grad_()
    target_NC, label_N = torch.from_numpy(label_CC)[LABEL_N], torch.from_numpy(LABEL_N)
    softened = F.cross_entropy(own / temperature, target_NC)
    hard = F.cross_entropy(own, label_N)
    expected = plain(alpha * temperature**2 * softened + (1 - alpha) * hard, own)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6)


def test_without_soft_labels_it_is_cross_entropy_and_uniform_ones_smooth_labels(logits_NC):
    own = logits_NC.double().requires_grad_()
    label_N = torch.from_numpy(LABEL_N)
    cases = (
        ([CrossEntropy()], F.cross_entropy(own, label_N)),
        (
            [SoftCrossEntropy(weight=0.3, temperature=1.0), CrossEntropy(weight=0.7)],
            F.cross_entropy(own, label_N, label_smoothing=0.3),
        ),
    )
    for losses, expected in cases:
        found = learnt(UNIFORM_CC, logits_NC, losses)
        for value, other in zip(found, plain(expected, own), strict=True):
            torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6)


def test_what_has_no_model_is_asked_for_nothing_else():
    engine = SoftLabelEngine(CLASSES, UNIFORM_CC, {"model": "m"})
    assert not engine.describe().watched
    with pytest.raises(ConfigError, match="soft labels of ask, sing, tell, and is asked about 2"):
        engine.score(unit(LABEL_N), Question(HeadLogProbs(("a", "b"))))
    with pytest.raises(ConfigError, match="no model, which could write"):
        engine.generate(Openings.build(names=["d"], input_ids=[[5]]), GenerationSpec(4))
    with pytest.raises(ConfigError, match="no model, whose head could be shipped"):
        engine.ship_head()
