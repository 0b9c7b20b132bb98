"""A kind of answer that the product lacks goes the whole way from a teacher to the loss: a class of
its own and an entry in each of the three tables of kinds are all it takes.

N positions with loss   C classes   V vocabulary
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.errors import TeacherError
from shared.store.readers import RecordingReader, StoreReader
from shared.store.target_store import stored_answers
from shared.targets.asks.ask import MASSES, Arrays, Ask
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.codec.columns import Column, Columns
from shared.targets.payload import bytes_per_token
from shared.targets.question import ASKS, Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.answers import VIEWS, Reading
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring.answering import ANSWERERS, Answerer, Scored
from teacher_service.scoring.scoring import Selection, select
from tests import tiny
from tests.student_trainer.processes import LocalTeacher
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains
from tests.student_trainer.test_objective import CPU, unit

CLASSES = (3, 11, 200)


@dataclass(frozen=True)
class ClassLogProbs(Ask):
    """Log-probabilities of a few ids, normalised among themselves, as of a classifier."""

    shared_vocab: int
    classes: tuple[int, ...]

    selector: ClassVar = "classes"
    holds: ClassVar = ("classes", MASSES)

    def columns(self) -> dict[str, Column]:
        return {"classes": Column(pa.list_(pa.float32(), len(self.classes)), "classes")}

    def decode(self, columns: Columns) -> Arrays:
        logprobs_NC = columns.matrix("classes")
        return {
            "class_ids_NC": np.broadcast_to(self.classes, logprobs_NC.shape),
            "class_logprobs_NC": logprobs_NC,
        }

    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        return np.exp(arrays["class_logprobs_NC"]).sum(axis=1)

    def mass_in_words(self, mass: float) -> str:
        return f"{len(self.classes)} classes hold {mass:.1%}"

    def in_words(self) -> str:
        return f"{len(self.classes)} classes of {self.shared_vocab} ids"

    def stored(self) -> dict[str, Any]:
        named = {"selector": self.selector, "shared_vocab": self.shared_vocab}
        return {**named, "classes": self.classes}

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "ClassLogProbs":
        return cls(fields["shared_vocab"], tuple(fields["classes"]))


class ClassAnswerer(Answerer[ClassLogProbs]):
    def find(self, ask: ClassLogProbs, scored: Scored) -> Selection:
        named_NC = torch.tensor(ask.classes).expand(len(scored.last_ND), -1)
        size, shared = len(ask.classes), ask.shared_vocab
        asked = {"num_ids": size, "shared_vocab": shared, "named_NM": named_NC}
        return select(scored.last_ND, scored.head, scored.label_N, **asked)

    def columns(
        self, ask: ClassLogProbs, found: Selection, last_ND: Tensor | None
    ) -> dict[str, Tensor]:
        return {"classes": found.logprobs_NK.log_softmax(-1)}


def class_view(batch: Mapping[str, Tensor], reading: Reading) -> Any:
    """The classes are all that the student could say."""
    kept = {"ids_NK": batch["class_ids_NC"], "logprobs_NK": batch["class_logprobs_NC"]}
    tail_NS = torch.full_like(kept["logprobs_NK"][:, :1], -torch.inf)
    likeliest = {**kept, "log_tail_NS": tail_NS, "label_logprob_N": batch["label_logprob_N"]}
    return VIEWS["logprobs_NK"](likeliest, replace(reading, renormalised=True))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind in the three tables."""
    monkeypatch.setitem(ASKS, ClassLogProbs.selector, ClassLogProbs)
    monkeypatch.setitem(ANSWERERS, ClassLogProbs, ClassAnswerer())
    monkeypatch.setitem(VIEWS, "class_logprobs_NC", class_view)


@pytest.fixture
def question() -> Question:
    return Question(ClassLogProbs(tiny.VOCAB, CLASSES), prefix="some prompts")


def log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the whole vocabulary, float64 [N, V]."""
    ids, positions = batch["input_ids_BT"], batch["position_ids_BT"]
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.double()
    return logits.flatten(0, 1)[batch["loss_index_N"]].log_softmax(-1)


def dense(folder: Any, batch: dict[str, Tensor]) -> Tensor:
    return log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), batch)


def test_it_is_asked_answered_stored_and_learnt_from(tmp_path, tiny_pair, question):
    rows, engine = unit(0, count=4), HFEngine.load(str(tiny_pair.teacher))
    described = json.loads(json.dumps(question.as_dict()))
    assert Question.from_dict(described) == question
    reader = RecordingReader(
        LocalTeacher(engine), tmp_path / "store", teacher=engine.fingerprint, ids="plain"
    )
    reader.submit(rows, question)
    answer = reader.next()
    reader.close()
    answer.check(rows, question, engine.fingerprint)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(rows, answer)
    log_p_NC = dense(tiny_pair.teacher, batch)[:, CLASSES].log_softmax(-1)
    torch.testing.assert_close(batch["class_logprobs_NC"].double(), log_p_NC, rtol=0, atol=1e-4)
    (stored,) = stored_answers(tmp_path / "store")
    assert stored.question == question
    again = StoreReader(tmp_path / "store")
    again.submit(rows, question)
    assert again.next().table.equals(answer.table, check_metadata=True)
    config = plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path)).config
    objective = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)
    (nll_kl_2G,) = objective(batch, mode="evaluate")
    log_q_NC = dense(tiny_pair.student, batch)[:, CLASSES]
    kl = (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum()
    assert float(nll_kl_2G[1].sum()) == pytest.approx(float(kl), rel=1e-4)


def test_it_has_words_and_a_price_and_refuses_what_is_damaged(tiny_pair, question):
    rows, engine = unit(0, count=4), HFEngine.load(str(tiny_pair.teacher))
    answer = engine.score(rows, question)
    assert question.in_words() == "3 classes of 512 ids, shown prompts some pro"
    assert bytes_per_token(question, hidden_width=0) == {"classes": 12, MASSES: 4}
    with pytest.raises(TeacherError, match=r"is to 3 classes of 512 ids, .* asked was top_k 3"):
        answer.check(rows, Question(LikeliestIds(3, tiny.VOCAB)))
    with pytest.raises(TeacherError, match="column classes of an answer is missing"):
        SoftTargets(answer.table.drop_columns(["classes"])).arrays()
    place = answer.table.schema.get_field_index("classes")
    lists = answer.table.column("classes").combine_chunks()
    short = pa.array([entry[:-1] for entry in lists.to_pylist()], lists.type)
    with pytest.raises(TeacherError, match=r"column classes .* every token with loss"):
        SoftTargets(answer.table.set_column(place, "classes", short)).check(rows, question)
