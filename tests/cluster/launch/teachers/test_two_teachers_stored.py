"""A store of two teachers: a run of both needs neither alive, and names the one it lacks."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cluster.launch.capture import Capture
from cluster.launch.teachers.serving import teaching
from cluster.planning.loading import load
from cluster.planning.preparation import Launch, Prepared, prepare_run, run_plan
from shared.data.row_store import RowStore, take_rows
from shared.errors import ConfigError
from shared.run.plan import RunPlan, open_routing
from shared.run.run_dir import RunDir
from shared.targets.routing import MixedTargets
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.cluster.jobs import WORDS, write_job
from tests.student_trainer.processes import LocalTeacher
from tests.tiny import Pair

pytestmark = pytest.mark.drill

TEACHERS = dict(zip(WORDS, ("wide", "narrow"), strict=True))  # by domain


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_pair: Pair) -> Path:
    """A config of two teachers, each with a domain, on a store."""
    folder = tmp_path_factory.mktemp("two")
    tiny.save_model(folder / "narrow", width=40, layers=2, seed=7)
    models = {"wide": str(tiny_pair.teacher), "narrow": str(folder / "narrow")}
    return write_job(
        folder,
        tiny_pair,
        teachers={name: {"model": model} for name, model in models.items()},
        domains={d: {"train": f"{d}.jsonl", "teacher": teacher} for d, teacher in TEACHERS.items()},
        targets={"store": "store"},
    )


@pytest.fixture(scope="module")
def prepared(job: Path) -> Prepared:
    return prepare_run(load(job, []))


@pytest.fixture(scope="module")
def engines(prepared: Prepared) -> dict[str, HFEngine]:
    return {name: HFEngine.load(asked.model) for name, asked in prepared.config.teachers.items()}


def captured(prepared: Prepared, engines: dict[str, HFEngine], store: Path, *names: str) -> RunPlan:
    """The plan of both, the answers of some to every row in a store."""
    parts = {
        name: run_plan(prepared.taught_by(name), run_dir=store, teacher=engine.fingerprint)
        for name, engine in engines.items()
    }
    plan = RunPlan.joined(prepared.config, prepared.domains, parts)
    for name in names:
        capture = Capture(plan, name, str(store), LocalTeacher(engines[name]), ahead=3)
        capture.all(all_rows=True)
    return plan


def launch_on(job: Path, store: Path) -> Launch:
    free = load(job, [f"targets.store={store}", "targets.teacher_free=true"])
    return Launch(prepare_run(free), RunDir(store.parent / "run"), store.parent / "logs", None)


def test_each_domain_is_read_as_its_teacher_answered_it(job, prepared, engines, tmp_path):
    store = tmp_path / "store"
    live = captured(prepared, engines, store, *engines)
    with teaching(launch_on(job, store)) as (plan, open_reader):
        stored = open_reader(0)
    readers = {
        name: partial(lambda rank, engine: LocalTeacher(engine), engine=engine)
        for name, engine in engines.items()
    }
    asked = open_routing(0, plan=live, readers=readers)
    assert (plan.training_question, plan.validation_question) == (
        live.training_question,
        live.validation_question,
    )
    for question, path in (
        ("training_question", "train_path"),
        ("validation_question", "validation_path"),
    ):
        stores = [RowStore.open(getattr(domain, path)) for domain in plan.domains]
        rows = take_rows(stores, np.array([0, 1, 1, 0]), np.array([0, 1, 2, 3]))
        found = []
        for reader in (stored, asked):
            reader.submit(rows, getattr(plan, question))
            found.append(reader.next())
        for one, other in zip(*(answer.parts for answer in found), strict=True):
            assert isinstance(found[0], MixedTargets)
            assert one.teacher == other.teacher
            np.testing.assert_array_equal(one.index_P, other.index_P)
            pair = [part.targets.arrays().label_logprob_N for part in (one, other)]
            np.testing.assert_allclose(*pair, atol=1e-5)  # scored in other batches
    assert stored.stats.cache_hits == 4
    assert {name: stats.units for name, stats in stored.stats.teachers.items()} == {
        "wide": 2,
        "narrow": 2,
    }
    stored.close()


def test_a_store_without_one_of_the_teachers_names_it(job, prepared, engines, tmp_path):
    store = tmp_path / "store"
    captured(prepared, engines, store, "wide")
    with (
        pytest.raises(ConfigError, match=r"has answers of .*teachers names narrow float32"),
        teaching(launch_on(job, store)),
    ):
        pass
