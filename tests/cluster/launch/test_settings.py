"""Options of a config that decide how a run is served and restarted reach what they are about."""

from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from ray.train import TrainingFailedError

from cluster.launch.students import training
from cluster.launch.teachers import serving
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import TeacherError, TutelageError
from shared.run.run_dir import RunDir
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from tests.answers import question_of
from tests.teacher_service.scripted import Scripted, make_rows

POISON = 2  # below every id of make_rows


def launch_of(folder: Path, **parts: object) -> SimpleNamespace:
    """The parts of a launch that serving reads."""
    fields = {
        "name": "a",
        "steps": 1,
        "teachers": {"t": {"model": "a"}},
        "student": {"model": "b"},
        "domains": {"math": {"train": "m"}},
        **parts,
    }
    return SimpleNamespace(config=Config.model_validate(fields), run_dir=RunDir(folder))


def test_a_pool_is_what_the_config_says(ray_cluster, tmp_path):
    name = f"settings-{uuid4().hex[:8]}"
    asked = {"in_flight": 2, "max_unit_failures": 2, "unit_deadline_s": 77.0}
    try:
        engine = Scripted(fails_on=POISON, delay_s=0.5)
        described = service.start(name, Teacher(model="any", cpus=0.1), detached=False, make_engine=engine).described()  # fmt: skip  # noqa: E501
        config = launch_of(tmp_path, service=asked).config
        settings = serving.pool_settings(
            config, name, teacher=described.fingerprint, client="a", own=False
        )
        pool = open_pool(0, **settings)
        for seed in range(4):
            rows = make_rows([[9]], seed=seed)
            pool.submit(rows, question_of(top_k=4, shared_vocab=100))
        while not (sent := sum(unit.ref is not None for unit in pool._units)):
            pool._pump(0.1)  # the client hears of the replica
        assert sent == 2
        assert pool._unit_deadline_s == 77.0
        for _ in range(4):
            pool.next()
        ids = rows.column("input_ids")[0].copy()
        ids[0] = POISON
        poisoned = type(rows).build(
            domains=["text"],
            indices=[0],
            input_ids=[ids],
            doc_starts=rows.column("doc_starts"),
            loss_masks=rows.column("loss_mask"),
        )
        pool.submit(poisoned, question_of(top_k=4, shared_vocab=100))
        with pytest.raises(TeacherError, match="failed 2 times"):
            pool.next()
    finally:
        service.stop(name)


@pytest.mark.parametrize("most", [0, 2])
def test_workers_are_restarted_as_often_as_the_config_says(
    ray_cluster, tmp_path, most, monkeypatch
):
    """The drills kill real workers; here every attempt ends as if one had died."""
    launch = launch_of(tmp_path, student={"model": "b", "max_restarts": most})
    attempts = []

    class Dying:
        def __init__(self, *parts: object, number: int) -> None:
            attempts.append(number)

        def error(self, look: object) -> TrainingFailedError:
            return TrainingFailedError("killed")

        def stop(self) -> None: ...

    monkeypatch.setattr(training, "_Attempt", Dying)
    (tmp_path / "logs").mkdir()
    asked = training.Training(launch.config, tmp_path, bundle={}, attempt=tmp_path / "logs")
    with (
        training.students(asked) as workers,
        pytest.raises(TutelageError, match=f"failed {most + 1} times"),
    ):
        workers.train("an assignment")  # type: ignore[arg-type]
    assert attempts == list(range(most + 1))
