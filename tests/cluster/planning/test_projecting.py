"""Which projection a run takes: fitted on what the teacher says of real rows, or on nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run
from cluster.planning.projecting import projection_of
from cluster.planning.prompting import Showing
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.targets.question import Question
from teacher_service.scoring.projection import load_projections
from tests.answers import question_of
from tests.cluster.jobs import write_job
from tests.student_trainer.processes import LocalTeacher, teacher
from tests.tiny import VOCAB, Pair

FINGERPRINT = {"model": "tiny"}


def prepared(folder: Path, pair: Pair, **hidden: object) -> Prepared:
    losses = [{"kind": "hidden_states", "layers": {1: 1, 3: 2}}]
    targets = {"hidden": {"width": 8, "calibration_rows": 6, **hidden}}
    return prepare_run(load(write_job(folder, pair, losses=losses, targets=targets), []))


def nobody(rank: int) -> LocalTeacher:
    raise AssertionError("no teacher is to be asked")


def asked_of(made: Prepared, pair: Pair, *, fingerprint: dict[str, str]) -> list[Question]:
    """What a teacher is asked until the projection is known; nothing where it is kept."""
    engine, asked = teacher(str(pair.teacher)), []

    class Noting(LocalTeacher):
        def submit(self, rows: Rows, spec: Question) -> None:
            asked.append(spec)
            super().submit(rows, spec)

    projection_of(made, fingerprint, lambda rank: Noting(engine))
    return asked


@pytest.mark.parametrize(
    "changed", [{}, {"width": 9}, {"calibration_rows": 5}, "layers", "fingerprint", "prompts"]
)
def test_a_pca_is_made_anew_for_whatever_decides_it_and_for_nothing_else(
    tmp_path, tiny_pair, changed
):
    made, fingerprint = prepared(tmp_path, tiny_pair), FINGERPRINT
    assert asked_of(made, tiny_pair, fingerprint=FINGERPRINT)
    if isinstance(changed, dict):
        made = prepared(tmp_path, tiny_pair, **changed)
    elif changed == "layers":
        losses = [loss.model_copy(update={"layers": {2: 1}}) for loss in made.config.losses]
        made = replace(made, config=made.config.model_copy(update={"losses": losses}))
    elif changed == "prompts":
        made = replace(made, showing=Showing("digest"))
    else:
        fingerprint = {"model": "another"}
    asked = asked_of(made, tiny_pair, fingerprint=fingerprint)
    assert bool(asked) == bool(changed)
    assert {spec.prefix for spec in asked} <= {made.showing.prompts}


def test_random_directions_read_no_rows_and_ask_no_teacher(tmp_path, tiny_pair):
    made = prepared(tmp_path, tiny_pair, projection="random")
    gone = tuple(replace(d, train_path=str(tmp_path / "gone.arrow")) for d in made.domains)
    digest = projection_of(replace(made, domains=gone), FINGERPRINT, nobody)
    assert load_projections(made.config.paths.cache, digest)[3].shape == (48, 8)
    assert projection_of(made, FINGERPRINT, nobody) == digest


def test_a_pca_keeps_the_leading_directions_of_the_first_rows_and_is_made_once(tmp_path, tiny_pair):
    made = prepared(tmp_path, tiny_pair)
    engine = teacher(str(tiny_pair.teacher))
    digest = projection_of(made, FINGERPRINT, lambda rank: LocalTeacher(engine))
    assert projection_of(made, FINGERPRINT, nobody) == digest
    spec = question_of(1, VOCAB, hidden_layers=(3,), hidden_encoding="fp32")
    states_ND = np.concatenate(
        [
            engine.score(RowStore.open(d.train_path).take(range(6)), spec).arrays().hidden_ND[3]
            for d in made.domains
        ]
    ).astype(np.float64)
    matrix_DE = load_projections(made.config.paths.cache, digest)[3]
    kept = np.square(states_ND @ matrix_DE).sum()
    best = np.square(np.linalg.svd(states_ND, compute_uv=False)[:8]).sum()
    assert kept == pytest.approx(best, rel=1e-5)
