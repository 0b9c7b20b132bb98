"""A student that writes its own rows: on time, the same after a kill, on any number of ranks."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.data.rollouts import DATA_SET, with_rollouts
from shared.data.rows import Rows
from shared.errors import CheckpointError
from shared.run.metrics import StepMetrics, read_metrics
from shared.run.plan import RunPlan
from student_trainer.sources.generated.rollout_files import RolloutFiles
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of
from tests.telling import asked, telling

ENDS = tuple(
    range(3, tiny.VOCAB // 6)
)  # so that some of what a random student writes ends by itself
LOSSES = [{"kind": "jsd"}, {"kind": "cross_entropy", "weight": 0.5}]
LORA = {"train": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.3}}
# Killed after the checkpoint at step 2 of 4, and gone on from there.
RESUMED = {
    "lag-0": {"targets": {"student_ids": 4}, "losses": [{"kind": "reverse_kl"}]},
    "lag-1": {"source": {"lag": 1}, "student": LORA | {"zero": 3}},
    "lag-2": {"source": {"lag": 2}},
    "own-text-alone": {
        "source": {"student": 1.0, "dataset": 0.0},
        "student": {"zero": 0},
        "losses": [
            {"kind": "reverse_kl"},
            {"kind": "policy_gradient", "credit": "later_mean", "clip": 0.2},
        ],
    },
    "several-updates": {
        "source": {"updates": 3, "lag": 1},
        "losses": [{"kind": "policy_gradient", "credit": "return", "whiten": True, "clip": 0.2}],
    },
    "moving-weights": {"mixture": {"policy": "odm", "interval": 2, "lag_steps": 1}},
}
# As the reference, but for what is named.
VARIANTS = {
    "reference": {},
    "one-at-a-time": {"source": {"batch_rows": 1}},
    "zero-0": {"student": {"zero": 0}},
    "zero-3": {"student": {"zero": 3}},
    "seed": {"seed": 7},
    "temperature": {"source": {"temperature": 0.3}},
    "greedy": {"source": {"temperature": 0.0}},
    "top-p": {"source": {"top_p": 0.2}},
    "least": {"source": {"min_new_tokens": 6}},
    "most": {"source": {"max_new_tokens": 3}},
    "prompt": {"source": {"prompt_tokens": 2}},
    "strict": {"source": {"lag": 0}},
}
LONG = ("reference", "strict", "zero-3", "least")  # the others take one step


def written_plan(folder: Path, pair: tiny.Pair, domains, **options) -> RunPlan:
    source = {"student": 0.5, "dataset": 0.5, "max_new_tokens": 10, "prompt_tokens": 6}
    source |= options.pop("source", {})
    options = {"log_every": 1, "losses": LOSSES, **options}
    plan = replace(plan_of(folder, pair, domains, source=source, **options), ends=ENDS)
    mark_exported(plan)
    return plan


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs = []
    for name in asked(request, "name", among=RESUMED, always=("lag-0", "lag-1", "several-updates")):
        options = RESUMED[name]
        plan = written_plan(folder / "resumed" / name, *material, **options)
        jobs.append(as_job("decided" if "mixture" in options else "resumed", plan, at=2))
    run_jobs(jobs, folder / "jobs-resumed")
    return folder / "resumed"


@pytest.fixture(scope="module")
def variants(folder: Path, material) -> Path:
    jobs = []
    for name, options in VARIANTS.items():
        options = {"checkpoints": {"every": 100}, "steps": 4 if name in LONG else 1, **options}
        jobs.append(as_job("train", written_plan(folder / "variants" / name, *material, **options)))
    run_jobs(jobs, folder / "jobs-variants")
    plan = written_plan(
        folder / "variants" / "one-rank",
        *material,
        checkpoints={"every": 100},
        student={"workers": 1},
        steps=1,
    )
    run_jobs([as_job("train", plan)], folder / "jobs-one", ranks=1)
    return folder / "variants"


def texts(run: Path, step: int) -> list[tuple[int, list[int]]]:
    """Version and token ids of the rows of a step, in its order."""
    tables = [pa.ipc.open_file(path).read_all() for path in files(run, step)]
    table = pa.concat_tables(tables).sort_by("place")
    return list(
        zip(table.column("version").to_pylist(), table.column("input_ids").to_pylist(), strict=True)
    )


def files(run: Path, step: int) -> list[Path]:
    return sorted((run / "rollouts").glob(f"step-{step:06d}.rank-*.arrow"))


def own(run: Path, step: int) -> list[list[int]]:
    return [ids for version, ids in texts(run, step) if version >= 0]


def lines(run: Path) -> list[StepMetrics]:
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.parametrize("name", telling(RESUMED, "lag-0", "lag-1", "several-updates"))
def test_a_killed_run_ends_with_the_same_weights(resumed: Path, name: str):
    run = resumed / name
    again = run.with_name(f"{run.name}-resumed")
    assert same_weights(run, again)
    assert comparable_lines(run)[2:] == comparable_lines(again)[-2:]
    assert any(line.rollouts and line.rollouts.tokens for line in lines(again))


@pytest.mark.parametrize("lag", telling([0, 1, 2], 0, 1))
def test_step_s_learns_what_version_s_minus_lag_wrote(resumed: Path, lag: int):
    for run in (resumed / f"lag-{lag}", resumed / f"lag-{lag}-resumed"):
        for step in (2, 3):
            versions = {version for version, _ in texts(run, step)}
            assert versions == {-1, step - lag}
        assert [line.rollouts.lag for line in lines(run)[-2:]] == [lag, lag]


def test_a_block_is_written_once_for_several_updates(resumed: Path):
    """What a token was drawn with stays as it was: the ratio is of the weights of each update."""
    for name in ("several-updates", "several-updates-resumed"):
        run = resumed / name
        assert not files(run, 1)
        assert not files(run, 2)
        assert {version for version, _ in texts(run, 3)} == {-1, 2}
        assert lines(run)[-1].rollouts.lag == 1
        stale = [line.rollouts.importance_ratio for line in lines(run)[-2:]]
        assert min(abs(ratio - 1) for ratio in stale) > 1e-5
    first, second, third, _ = lines(resumed / "several-updates")
    assert first.rollouts.tokens == second.rollouts.tokens == third.rollouts.tokens
    assert [line.rollouts.lag for line in (first, second, third)] == [0, 1, 2]


def test_what_is_written_is_kept_as_long_as_a_checkpoint_may_need_it(resumed: Path):
    for name in ("lag-0", "lag-1"):
        assert not files(resumed / name, 1)  # behind the oldest checkpoint, that of step 2
        assert len(files(resumed / name, 2)) == len(files(resumed / name, 3)) == 2


def test_a_resume_without_what_was_written_says_so(resumed: Path, tmp_path: Path):
    kept = RolloutFiles(tmp_path)
    for path in files(resumed / "lag-1", 2):
        shutil.copy(path, tmp_path)
    whole = pa.concat_tables(
        [pa.ipc.open_file(path).read_all() for path in sorted(tmp_path.glob("*.arrow"))]
    ).sort_by("place")
    names, place_R = Rows(whole).names(), np.arange(len(whole))
    found = kept.read(2, names, place_R=place_R, version=1)
    assert found.names() == names
    with pytest.raises(CheckpointError, match=r"step 3 before it, but weights \[1, 1\] wrote them"):
        kept.read(2, names, place_R=place_R, version=0)
    with pytest.raises(CheckpointError, match="holds other rows"):
        kept.read(2, names[::-1], place_R=place_R, version=1)
    first, second = sorted(tmp_path.glob("*.arrow"))
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"{second.name} cannot be read .not an Arrow file."):
        kept.read(2, names, place_R=place_R, version=1)
    shutil.copy(files(resumed / "lag-1", 2)[1], second)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"4 of 8 are not in .*--fresh"):
        kept.read(2, names, place_R=place_R, version=1)
    with pytest.raises(CheckpointError, match=r"8 of 8 are not in .*were not decided"):
        kept.read(3, names, place_R=place_R, version=2)


def test_what_is_forgotten_ends_where_it_says(tmp_path: Path):
    kept = RolloutFiles(tmp_path)
    names = [f"step-{step:06d}.rank-{rank}.arrow" for step in range(6) for rank in (0, 1)]
    for name in names:
        (tmp_path / name).touch()
    kept.forget(before=2, since=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == names[4:8]


def test_ranks_whose_rows_are_of_different_epochs_are_read_together(tmp_path: Path):
    """Of a selector that draws, rows of one epoch ask for another draw than those of the next."""
    kept, ids, mask = RolloutFiles(tmp_path), np.arange(4), np.array([1, 1, 1, 0])
    for rank in (0, 1):
        rows = Rows.build(
            domains=["a", "a"],
            indices=[2 * rank, 2 * rank + 1],
            input_ids=[ids, ids],
            doc_starts=[np.zeros(1)] * 2,
            loss_masks=[mask, mask],
        ).with_draws(np.full(2, rank))
        place_R = np.array([2 * rank, 2 * rank + 1])
        found = with_rollouts(rows, [], version_R=np.full(2, DATA_SET))
        kept.keep(3, rank, found, place_R=place_R, version=2)
    assert kept.read(3, None, place_R=np.arange(4), version=2).draws().tolist() == [0, 0, 1, 1]


def test_who_holds_which_rows_and_weights_changes_no_text(variants: Path):
    """The first two steps are written by the first weights."""
    for name in ("one-rank", "one-at-a-time", "zero-0", "zero-3"):
        ours, theirs = lines(variants / name), lines(variants / "reference")
        for step, (line, other) in enumerate(zip(ours, theirs, strict=False)):
            if step < 2:
                assert texts(variants / name, step) == texts(variants / "reference", step)
            assert line.rollouts.rollouts == other.rollouts.rollouts
            assert line.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.mark.parametrize("name", ["seed", "temperature", "greedy", "top-p", "prompt", "most"])
def test_every_option_that_is_accepted_changes_what_is_written(variants: Path, name: str):
    assert own(variants / name, 0) != own(variants / "reference", 0)


def test_strictly_on_policy_ratios_are_one(variants: Path):
    """So the log-probability kept is that of the weights that learn, at every token: what wrote
    is what trains."""
    for line in lines(variants / "strict"):
        assert line.rollouts.importance_ratio == pytest.approx(1, abs=1e-5)
    assert lines(variants / "reference")[0].rollouts.importance_ratio == pytest.approx(1, abs=1e-5)
    stale = [abs(line.rollouts.importance_ratio - 1) for line in lines(variants / "reference")[1:]]
    assert min(stale) > 1e-4


def test_lengths_are_as_asked(variants: Path):
    def lengths(name: str) -> np.ndarray:
        tables = [
            pa.ipc.open_file(path).read_all()
            for step in range(len(lines(variants / name)))
            for path in files(variants / name, step)
        ]
        rows = Rows(pa.concat_tables(tables)).documents()
        versions = Rows(pa.concat_tables(tables)).versions()
        counts = np.array([len(s) for s in Rows(pa.concat_tables(tables)).column("doc_starts")])
        return rows.num_loss_tokens()[np.repeat(versions >= 0, counts)]

    assert lengths("reference").max() == 10 > lengths("reference").min()
    assert lengths("most").max() == 3
    assert lengths("least").min() >= 6 > lengths("reference").min()


def test_shares_are_near(variants: Path):
    found = lines(variants / "reference")
    share = sum(line.rollouts.tokens for line in found) / sum(line.tokens for line in found)
    assert 0.3 < share < 0.7
    for line in found:
        assert 0 <= line.rollouts.ended <= 1
