"""A canary tells a sound engine from one that answers nothing, or something else than before."""

import numpy as np
import pytest

from shared.data.rows import Rows
from shared.errors import EngineError
from shared.targets.canary import COARSE_LEVEL, FLAT, INTERVAL, TOKENS, Canary, canary_rows
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from tests.teacher_service.scripted import VOCAB, invented

LEVEL = 1e-3


class Engine:
    """Answers with log-probabilities that a test sets."""

    def __init__(self, logprob_N: np.ndarray) -> None:
        self.logprob_N, self.asked = logprob_N, list[Rows]()

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        self.asked.append(rows)
        answer = invented(rows, question)
        columns = {
            "top_ids": np.zeros((TOKENS - 1, 1), np.uint16),
            "top_logprobs": np.zeros((TOKENS - 1, 1), np.float16),
            "log_tail": np.full((TOKENS - 1, 1), -1, np.float32),
            "label_logprob": self.logprob_N.astype(np.float32),
        }
        plain = question.as_dict() | {"ids": "plain"}
        return SoftTargets.build(
            question=Question.from_dict(plain),
            teacher=answer.described["teacher"],
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=columns,
        )


SOUND_N = np.linspace(-9, -1, TOKENS - 1)


def watched(logprob_N: np.ndarray, **settings) -> tuple[Engine, Canary]:
    engine = Engine(logprob_N)
    return engine, Canary(engine.score, "the engine of m", VOCAB, **settings)


def test_its_text_is_known_to_every_model_and_within_its_reach():
    for vocab, limit in ((5, None), (128, 4), (151_936, 32_768)):
        (ids,) = canary_rows(vocab, limit).column("input_ids")
        assert 0 <= ids.min() < ids.max() < vocab
        assert len(ids) == min(TOKENS, limit or TOKENS)


@pytest.mark.parametrize("vocab", [17, 7907, 7919, 3 * 7919, 151_936])
def test_its_tokens_differ_where_the_vocabulary_allows(vocab):
    (ids,) = canary_rows(vocab).column("input_ids")
    assert len(set(ids.tolist())) == TOKENS


@pytest.mark.parametrize(
    ("logprob_N", "said"),
    [
        (np.full(TOKENS - 1, -np.log(VOCAB)), r"the log-probability -4\.8520, as if it had no w"),
        (SOUND_N * FLAT / 16, "every token of a fixed text"),
        (np.where(SOUND_N < -5, np.nan, SOUND_N), "that are not finite"),
    ],
)
def test_an_engine_that_answers_one_number_is_refused(logprob_N, said):
    _, canary = watched(logprob_N)
    with pytest.raises(EngineError, match=said):
        canary.begin()


def test_a_sound_engine_is_asked_again_before_every_interval():
    engine, canary = watched(SOUND_N)
    canary.begin()
    for _ in range(3 * INTERVAL):
        canary.count()
    assert len(engine.asked) == 4
    assert len({tuple(rows.hashes()) for rows in engine.asked}) == 1


@pytest.mark.parametrize(("dtype", "level"), [("float32", LEVEL), ("bfloat16", COARSE_LEVEL)])
def test_an_engine_that_answers_otherwise_than_at_first_is_refused(dtype, level):
    engine, canary = watched(SOUND_N, dtype=dtype, interval=2)
    canary.begin()
    engine.logprob_N = SOUND_N + level / 2
    canary.count()
    canary.count()
    engine.logprob_N = SOUND_N + np.eye(TOKENS - 1)[3] * level * 2
    canary.count()
    with pytest.raises(EngineError, match=r"nats off its own first answer, where .* start it a"):
        canary.count()
    engine.logprob_N = SOUND_N * np.nan
    for _ in range(2):  # no unit passes until it is sound again
        with pytest.raises(EngineError, match="nan nats off"):
            canary.count()
    engine.logprob_N = SOUND_N
    canary.count()
    assert len(engine.asked) == 6


def test_weights_that_are_handed_over_answer_as_where_they_come_from():
    engine, canary = watched(SOUND_N)
    canary.begin(SOUND_N + LEVEL / 2)
    with pytest.raises(EngineError, match=r"0\.002 nats off those of the trainer"):
        canary.begin(SOUND_N + 2 * LEVEL)
    canary.begin(SOUND_N + 2 * LEVEL, level=3 * LEVEL)
    engine.logprob_N = SOUND_N - 1  # of other weights, which become the first
    canary.begin(SOUND_N - 1)
    for _ in range(INTERVAL):
        canary.count()


def test_units_are_counted_from_the_last_weights_that_were_loaded():
    engine, canary = watched(SOUND_N, interval=3)
    for _ in range(2):
        canary.begin()
        canary.count()
        canary.count()
    assert len(engine.asked) == 2
    canary.count()
    assert len(engine.asked) == 3
