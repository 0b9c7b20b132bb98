"""An engine in vLLM answers the same columns as ours, and serves as any other does.

N positions with loss   K ids kept   V vocabulary
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import psutil
import pyarrow as pa
import pytest

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, HandshakeError
from shared.targets.generation import GenerationSpec
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.vllm.engine import VllmEngine
from teacher_service.service import service
from teacher_service.service.pool import TeacherPool
from tests.answers import decoded, question_of
from tests.engines.plain_worker import PlainWorker
from tests.engines.subjects import CONTEXT, STOPS, VOCAB, openings, save_model
from tests.teacher_service.scripted import make_rows

LEVEL = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("vllm") / "model", seed=1)


@pytest.fixture
def worker(folder) -> PlainWorker:
    return PlainWorker(folder)


@pytest.fixture
def engine(worker, folder) -> VllmEngine:
    teacher = Teacher(model=str(folder), engine="vllm", python="~/vllm/bin/python")
    return VllmEngine(worker, teacher, context=CONTEXT)


def masked(rows: Rows) -> Rows:
    """The same rows with less that is learnt: a prompt, and a document of which nothing is."""
    masks = [mask.copy() for mask in rows.column("loss_mask")]
    masks[0][:5] = 0
    masks[1][:] = 0
    column = pa.array(masks, rows.table.schema.field("loss_mask").type)
    place = rows.table.schema.get_field_index("loss_mask")
    return Rows(rows.table.set_column(place, "loss_mask", column))


ROWS = masked(make_rows([[9, 12], [4], [1, 30, 6]], vocab=VOCAB))


@pytest.mark.parametrize(
    ("top_k", "shared", "encoding"),
    [(8, VOCAB, "fp32"), (8, 100, "fp32"), (VOCAB, VOCAB, "fp32"), (100, 100, "fp32")],
)
def test_its_answers_are_those_of_our_own_engine(engine, worker, folder, top_k, shared, encoding):
    """Also where ids that only the teacher has are among its likeliest, and where all are kept."""
    rows = ROWS if shared == VOCAB else masked(make_rows([[9, 12], [4], [1, 30, 6]], vocab=shared))
    question = question_of(top_k, shared, encoding=encoding)
    answer = engine.score(rows, question)
    answer.check(rows, question, engine.describe().fingerprint)
    found, own = decoded(answer), decoded(HFEngine.load(str(folder)).score(rows, question))
    np.testing.assert_array_equal(found.ids_NK, own.ids_NK)
    np.testing.assert_allclose(found.logprobs_NK, own.logprobs_NK, atol=LEVEL)
    np.testing.assert_allclose(found.label_logprob_N, own.label_logprob_N, atol=LEVEL)
    np.testing.assert_allclose(np.exp(found.log_tail_NS), np.exp(own.log_tail_NS), atol=1e-6)
    assert worker.asked == {(8, VOCAB): [8], (8, 100): [8, 164]}.get((top_k, shared), worker.asked)


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_its_answers_are_encoded_as_any(engine, folder, encoding):
    question = question_of(32, VOCAB, encoding=encoding)
    found = decoded(engine.score(ROWS, question))
    own = decoded(HFEngine.load(str(folder)).score(ROWS, question))
    np.testing.assert_allclose(found.logprobs_NK, own.logprobs_NK, atol=0.02)


def test_a_unit_without_loss_is_answered_without_the_worker(engine, worker):
    rows = Rows(ROWS.table.slice(1, 1))
    answer = engine.score(rows, question_of(8, VOCAB))
    answer.check(rows, question_of(8, VOCAB))
    assert not worker.asked


@pytest.mark.parametrize(
    "stored",
    [
        {"temperatures": (1.0, 2.0)},
        {"entropy": True},
        {"student_ids": 2},
        {"selector": "threshold"},
        {"selector": "sampled"},
        {"hidden_layers": (1,)},
        {"head": "digest", "states": "fp32", "states_width": 64},
    ],
)
def test_what_it_cannot_answer_is_refused(engine, stored):
    with pytest.raises(ConfigError, match=r"at temperature 1 and nothing else, and is ask"):
        engine.score(ROWS, question_of(8, VOCAB, **stored))


@pytest.mark.parametrize(
    "asked",
    [
        {"stop_ids": STOPS},
        {"stop_ids": STOPS, "min_new_tokens": 5},
        {"stop_ids": (*STOPS, VOCAB + 7), "vocab": 100},
        {"logprobs": True, "stop_ids": STOPS},
    ],
)
def test_what_it_writes_at_temperature_0_is_what_our_own_engine_writes(engine, folder, asked):
    """The end is left out, no id beyond those shared is written, and what is certain has
    log-probability 0."""
    texts, spec = openings(4, 30, 9, 17, 60), GenerationSpec(12, **asked)
    found, own = engine.generate(texts, spec), HFEngine.load(str(folder)).generate(texts, spec)
    found.check(texts, spec, engine.describe().fingerprint)
    assert [ids.tolist() for ids in found.ids()] == [ids.tolist() for ids in own.ids()]
    assert found.stopped() == own.stopped()
    assert len(set(found.stopped())) == 2 or "min_new_tokens" in asked or "vocab" in asked
    if "logprobs" in asked:
        assert [ids.tolist() for ids in found.written()] == [ids.tolist() for ids in own.written()]
        assert [each.tolist() for each in found.logprobs()] == [
            each.tolist() for each in own.logprobs()
        ]


def test_a_draw_has_a_seed_of_its_own_opening_and_of_the_spec(engine, worker):
    texts, seeds = openings(4, 9), {}
    for seed in (0, 1):
        spec = GenerationSpec(3, temperature=1.0, seed=seed)
        engine.generate(texts, spec)
        seeds[seed] = list(worker.seeds)
        engine.generate(texts.at([1]), spec)
        assert worker.seeds == seeds[seed][1:]
    assert len({*seeds[0], *seeds[1]}) == 4
    assert all(0 <= each < 2**63 for own in seeds.values() for each in own)


@pytest.mark.parametrize(("context", "longest"), [(None, CONTEXT), (999, CONTEXT), (40, 40)])
def test_a_text_may_be_as_long_as_model_and_rows_are(worker, folder, context, longest):
    teacher = Teacher(model=str(folder), engine="vllm", python="~/vllm/bin/python")
    engine = VllmEngine(worker, teacher, context=context)
    assert engine.describe().max_context == longest
    question = question_of(8, VOCAB)
    engine.score(make_rows([[longest]], vocab=VOCAB), question)
    with pytest.raises(HandshakeError, match=f"context is {longest}"):
        engine.score(make_rows([[longest + 1]], vocab=VOCAB), question)


def test_what_no_engine_can_answer_is_refused_as_by_ours(engine):
    with pytest.raises(HandshakeError, match="300 ids are asked for and the teacher"):
        engine.score(ROWS, question_of(8, 300))
    with pytest.raises(HandshakeError, match=f"has 129 tokens .* context is {CONTEXT}"):
        engine.score(make_rows([[129]], vocab=VOCAB), question_of(8, VOCAB))
    with pytest.raises(HandshakeError, match="holds token id"):
        engine.score(make_rows([[90]], vocab=4 * VOCAB), question_of(8, VOCAB))
    with pytest.raises(ConfigError, match=r"at temperatures from 0\.01 to 2; change it"):
        engine.generate(openings(4), GenerationSpec(4, temperature=2.5))
    with pytest.raises(ConfigError, match="ships no head"):
        engine.ship_head()


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"vllm-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def test_a_teacher_in_vllm_is_asked_through_its_own_python(name, folder, tmp_path):
    """Of an environment that is not there the service says so."""
    python = str(tmp_path / "python")
    teacher = Teacher(model=str(folder), engine="vllm", python=python, cpus=0.1)
    with pytest.raises(ConfigError, match=f"python is {python}, which is no program"):
        service.start(name, teacher, detached=False).described()


@pytest.mark.drill
def test_a_service_of_it_answers_and_comes_back_from_the_end_of_its_process(
    name, folder, vllm_python
):
    python, others = str(vllm_python), workers()
    teacher = Teacher(model=str(folder), engine="vllm", python=python, cpus=0.5)
    described = service.start(name, teacher, detached=False, context=CONTEXT).described()
    assert described.fingerprint["engine"].startswith("vllm ")
    pool = TeacherPool(0, service=name, teacher=described.fingerprint, unit_deadline_s=300)
    question, own = question_of(8, VOCAB), HFEngine.load(str(folder))
    before = asked(pool, question)
    expected = decoded(own.score(ROWS, question)).label_logprob_N
    np.testing.assert_allclose(before, expected, atol=LEVEL)
    (process,) = workers() - others
    os.kill(process, signal.SIGKILL)
    np.testing.assert_array_equal(asked(pool, question), before)
    assert pool.stats.retried_units > 0


def asked(pool: TeacherPool, question) -> np.ndarray:
    pool.submit(ROWS, question)
    return decoded(pool.next()).label_logprob_N


def workers() -> set[int]:
    """Process ids of engines in environments of their own."""
    named = ((p.pid, (p.info["cmdline"] or [""])[0]) for p in psutil.process_iter(["cmdline"]))
    return {pid for pid, name in named if name.startswith("ray::VllmWorker")}
