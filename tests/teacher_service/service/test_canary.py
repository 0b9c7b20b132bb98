"""Every replica of a service is watched from its start; a run stops where one is not sound."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import EngineError
from shared.targets.canary import INTERVAL
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.service import service
from teacher_service.service.pool import TeacherPool
from tests.answers import question_of
from tests.teacher_service.scripted import VOCAB, Scripted, invented, make_rows

SPEC = question_of(8, VOCAB)
ANY = Teacher(model="any", cpus=0.1)


@dataclass(frozen=True)
class Unsound(Scripted):
    """Answers as if it had no weights, or as another model from when a file is there."""

    flat: bool = False
    other_from: str = ""

    def score(self, rows: Rows, spec: Question) -> SoftTargets:
        answer = invented(rows, spec)
        label = answer.table.schema.get_field_index("label_logprob")
        column = answer.table.column(label)
        if self.flat:
            column = _mapped(column, lambda logprob: -4.852)
        if self.other_from and Path(self.other_from).exists():
            column = _mapped(column, lambda logprob: logprob - 1)
        return SoftTargets(answer.table.set_column(label, "label_logprob", column))


def _mapped(column, change):
    lists = [[change(each) for each in row] for row in column.to_pylist()]
    return pa.array(lists, column.type)


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"canary-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def test_an_engine_without_weights_serves_nobody(name):
    starting = service.start(name, ANY, detached=False, make_engine=Unsound(flat=True))
    with pytest.raises(EngineError, match=r"of scripted gives every token .* as if it had no w"):
        starting.described()


def test_a_run_stops_where_an_engine_is_not_what_it_was(name, tmp_path):
    engine = Unsound(other_from=str(tmp_path / "other"))
    described = service.start(name, ANY, detached=False, make_engine=engine).described()
    pool = TeacherPool(0, service=name, teacher=described.fingerprint)
    asked = [make_rows([[5]], seed=n) for n in range(INTERVAL)]
    for rows in asked[:-1]:
        pool.submit(rows, SPEC)
        pool.next()
    Path(engine.other_from).touch()
    pool.submit(asked[-1], SPEC)
    with pytest.raises(EngineError, match="1 nats off its own first answer"):
        pool.next()
