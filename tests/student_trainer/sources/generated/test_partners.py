"""A teacher with a share in every token that the student writes: kept with the rollouts, the same
after a kill."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.data.rows import OWN, Rows
from shared.prompts.prefix import Opening
from shared.run.plan import RunPlan
from shared.targets.generation import Continuations, GenerationSpec, Openings, Partner
from student_trainer.sources.generated.partners import Partners
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import LocalWriter, as_job, teacher
from tests.student_trainer.sources.generated.test_rollouts import (
    LORA,
    files,
    lines,
    texts,
    written_plan,
)
from tests.telling import asked, telling

SHARE = 0.4
MIXED = {"teacher_mix": SHARE}
MINILLM = [
    {"kind": "reverse_kl"},
    {"kind": "policy_gradient", "credit": "later_mean", "clip": 0.2},
    {"kind": "cross_entropy"},
]
# Killed after the checkpoint at step 2 of 4, and gone on from there.
RESUMED = {
    "minillm": {"source": MIXED | {"updates": 2, "lag": 1}, "losses": MINILLM},
    "cut-law": {"source": MIXED | {"temperature": 0.7, "top_p": 0.8, "min_new_tokens": 3}},
    "adapters": {"source": MIXED, "student": LORA | {"zero": 3}},
}


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs = [
        as_job("resumed", written_plan(folder / "resumed" / name, *material, **RESUMED[name]), at=2)
        for name in asked(request, "name", among=RESUMED)
    ]
    strict = {"source": MIXED | {"lag": 0}, "losses": MINILLM}
    for name, options in {"strict": strict, "alone": {"steps": 1}}.items():
        jobs.append(as_job("train", written_plan(folder / "resumed" / name, *material, **options)))
    run_jobs(jobs, folder / "jobs")
    one = written_plan(
        folder / "resumed" / "one-rank",
        *material,
        **strict,
        student={"workers": 1},
        steps=1,
    )
    run_jobs([as_job("train", one)], folder / "jobs-one", ranks=1)
    return folder / "resumed"


def rows_of(run: Path, step: int) -> Rows:
    tables = [pa.ipc.open_file(path).read_all() for path in files(run, step)]
    return Rows(pa.concat_tables(tables).sort_by("place"))


def weights_of(rows: Rows) -> np.ndarray:
    """q / (share p + (1 - share) q) of the tokens that the student wrote."""
    written_N = np.repeat(rows.versions() >= 0, rows.num_loss_tokens())
    return np.exp(rows.own_logprobs() - rows.behaviour())[written_N]


@pytest.mark.parametrize("name", telling(RESUMED, "minillm"))
def test_a_killed_run_ends_with_the_same_weights(resumed: Path, name: str):
    run = resumed / name
    again = run.with_name(f"{run.name}-resumed")
    assert same_weights(run, again)
    assert comparable_lines(run)[2:] == comparable_lines(again)[-2:]


def test_weights_are_kept_with_the_rollouts_and_bounded_by_the_share(resumed: Path):
    weight_N = np.concatenate([weights_of(rows_of(resumed / "strict", step)) for step in (2, 3)])
    assert len(weight_N) > 40
    assert 0 < weight_N.min() < 0.9
    assert 1.1 < weight_N.max() <= 1 / (1 - SHARE) + 1e-5
    (line, *_) = lines(resumed / "strict")
    assert 0 < line.rollouts.importance_ratio < 1 / (1 - SHARE)
    assert abs(line.rollouts.importance_ratio - 1) > 1e-4


def test_without_a_share_nothing_is_kept_beside_and_all_weights_are_1(resumed: Path):
    rows = rows_of(resumed / "alone", 0)
    assert OWN not in rows.table.column_names
    assert (weights_of(rows) == 1).all()
    assert OWN in rows_of(resumed / "strict", 2).table.column_names


def test_the_share_changes_what_is_written_and_the_number_of_ranks_does_not(resumed: Path):
    own = [ids for version, ids in texts(resumed / "alone", 0) if version >= 0]
    mixed = [ids for version, ids in texts(resumed / "one-rank", 0) if version >= 0]
    assert own != mixed
    assert lines(resumed / "one-rank")[0].loss == pytest.approx(
        lines(resumed / "strict")[0].loss, rel=1e-5
    )


class Recorded:
    """A student's generator that keeps who it was to write with."""

    partner: Partner | None = None

    def generate_mixed(
        self, openings: Openings, spec: GenerationSpec, partner: Partner
    ) -> Continuations:
        self.partner = partner
        return LocalWriter(partner.generator).generate(openings, spec)  # type: ignore[arg-type]


def test_the_teacher_is_shown_its_prompt(tmp_path: Path, material):
    plan: RunPlan = written_plan(tmp_path / "run", *material, source=MIXED)
    opening = Opening(np.zeros(0, np.int32), np.array([7, 8], np.int32))
    plan.openings["code"] = opening  # type: ignore[index]
    (model,) = (asked.model for asked in plan.config.teachers.values())
    partners, student = Partners(plan, {"t": LocalWriter(teacher(model))}), Recorded()
    asked = Openings.build(names=["code/1"], input_ids=[[9, 11]]).with_draws(["one"])
    spec = GenerationSpec(3, temperature=1.0, logprobs=True)
    partners.generate(student, asked, spec, domains=["code"], draws=["one"])  # type: ignore[arg-type]
    assert student.partner is not None
    assert student.partner.openings.ids()[0].tolist() == [7, 8, 9, 11]
    assert student.partner.share == SHARE
