"""Stores that lie on disk: `written/store` holds an answer to a question of every kind, `found.npz`
what the teacher had found, `decoded.npz` what the answers say, and `names.json` the questions'
names by their folders. Their bytes are what users have; they are never written anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.store.answer_files import question_key
from shared.store.target_store import StoredAnswers, TargetStore, stored_answers
from shared.targets.asks.classes import ClassAsk
from shared.targets.question import ASKS, Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.scoring.answering import encode
from teacher_service.scoring.scoring import Selection
from tests.answers import decoded
from tests.shared.data.test_rows import rows

WRITTEN = Path(__file__).parent / "written"
TEACHER = {"model": "a teacher", "dtype": "float32"}
UNIT = rows([8, 1, 5])
FOUND = dict(np.load(WRITTEN / "found.npz"))
NAMES: dict[str, str] = json.loads((WRITTEN / "names.json").read_text())
STORED = {NAMES[answers.key]: answers for answers in stored_answers(WRITTEN / "store")}

every_question = pytest.mark.parametrize("stored", STORED.values(), ids=STORED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since readers leave their marks in a store."""
    return shutil.copytree(WRITTEN / "store", tmp_path_factory.mktemp("written") / "store")


def read(store: Path, stored: StoredAnswers) -> SoftTargets:
    return TargetStore(store, teacher=stored.teacher, question=stored.question).read(UNIT)


def found_for(question: Question) -> Selection:
    """What the teacher had found for a question; no id is kept exactly but those of `exact_NK`
    where ids are drawn by a threshold."""
    stored = question.as_dict()
    size, selector = stored["top_k"], stored.get("selector", "top_k")
    logp_NV, order_NV = FOUND["logp_NV"], FOUND["order_NV"].astype(np.int64)
    ids_NK = np.sort(order_NV, axis=1) if size == logp_NV.shape[1] else order_NV[:, :size]
    logp_NK = np.take_along_axis(logp_NV, ids_NK, axis=1)
    if selector == "sampled":
        logp_NK = np.full_like(logp_NK, -np.inf)
    if selector == "threshold":
        logp_NK = np.where(FOUND["exact_NK"], logp_NK, np.float32(-np.inf))
    return Selection(
        torch.tensor(ids_NK),
        torch.tensor(logp_NK),
        torch.tensor(FOUND["log_tail_N"])[:, None].repeat(1, len(stored["temperatures"])),
        torch.tensor(FOUND["label_logprob_N"]),
        torch.tensor(FOUND["entropy_N"]) if "entropy" in stored else None,
    )


def test_every_kind_of_ask_is_among_them():
    assert len(STORED) == len(NAMES)
    """But for those of classes, which a text has as a whole."""
    kinds = {type(stored.question.ask) for stored in STORED.values()}
    assert kinds == {ask for ask in ASKS.values() if not issubclass(ask, ClassAsk)}


@every_question
def test_a_question_is_called_what_it_is_called_on_disk(store: Path, stored: StoredAnswers):
    table = read(store, stored).table
    described = SoftTargets(table).described
    question = Question.from_dict(described["spec"])
    assert question == stored.question
    assert json.dumps(question.as_dict()) == json.dumps(described["spec"])
    assert question_key(stored.teacher, question) == stored.key


@every_question
def test_what_was_found_is_encoded_to_the_bytes_on_disk(store: Path, stored: StoredAnswers):
    question = SoftTargets(read(store, stored).table).question
    states_ND = torch.tensor(FOUND["states_ND"])
    hidden = {layer: states_ND * layer for layer in question.hidden.layers}
    columns = encode(found_for(question), question, hidden=hidden, last_ND=states_ND)
    answer = SoftTargets.build(
        question=question,
        teacher=TEACHER,
        row_hashes=UNIT.hashes(),
        num_targets_R=UNIT.num_loss_tokens(),
        columns=columns,
    )
    answer.check(UNIT, stored.question, TEACHER)
    assert answer.table.equals(read(store, stored).table, check_metadata=True)


@every_question
def test_the_bytes_on_disk_say_what_they_said(store: Path, stored: StoredAnswers):
    answer, name = decoded(read(store, stored)), NAMES[stored.key]
    expected = {
        key.partition("/")[2]: value
        for key, value in np.load(WRITTEN / "decoded.npz").items()
        if key.startswith(f"{name}/")
    }
    kept = {field: getattr(answer, field) for field in vars(answer) if field[-2:] in ("NK", "NS")}
    kept |= {"last_ND": answer.last_ND}
    kept |= {f"hidden_{layer}": states_ND for layer, states_ND in answer.hidden_ND.items()}
    kept = {field: value for field, value in kept.items() if value is not None and value.size}
    if name == "whole":  # as found
        expected = {"ids_NK": np.broadcast_to(np.arange(300), (11, 300))}
        expected |= {"logprobs_NK": FOUND["logp_NV"], "log_tail_NS": FOUND["log_tail_N"][:, None]}
    assert kept.keys() == expected.keys()
    for field, value in expected.items():
        assert kept[field].dtype == value.dtype
        np.testing.assert_allclose(kept[field], value, rtol=1e-6)
    np.testing.assert_array_equal(answer.label_logprob_N, FOUND["label_logprob_N"])
