"""DistiLLM's scheduler and its replay buffer: the state machine, and a run that is gone on with."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shared.config.source import AdaptiveShare
from shared.data.rollouts import DATA_SET, STUDENT
from shared.run.metrics import read_metrics
from student_trainer.sources.generated.adaptive import Adaptive, oldest_step
from student_trainer.sources.generated.rollouts import Rollouts
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import prepared_domains
from tests.student_trainer.sources.generated.test_rollouts import files, texts, written_plan

ROWS = 40
# From the first look on, whatever the loss does: a share that grows fast, and a small buffer.
SECTION = {"every": 2, "start": 0.6, "growth": 0.2, "tolerance": 0.0, "replay_rows": 2}
LR = {"lr": 0.3}  # so that validation loss grows


def scheduler(*, steps: int = 100, **options) -> Adaptive:
    return Adaptive(AdaptiveShare(**options), 0, steps)


def test_the_share_grows_with_every_loss_that_is_worse_by_the_tolerance():
    """Only a loss that raises it is compared with from then on."""
    adaptive = scheduler()
    shares = []
    for loss in (3.0, 3.05, 3.11, 3.15, 3.22, 2.0, 3.0):
        adaptive.follow(loss)
        shares.append(round(adaptive.phi, 6))
    assert shares == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2]
    for loss in range(4, 20):
        adaptive.follow(float(loss))
    assert adaptive.phi == 1.0


@pytest.mark.parametrize(
    ("adaptive", "share"),
    [(scheduler(start=0.3), 0.4), (scheduler(growth=0.25), 0.25), (scheduler(tolerance=0.5), 0.0)],
    ids=["start", "growth", "tolerance"],
)
def test_every_option_decides(adaptive, share):
    for loss in (3.0, 3.2):
        adaptive.follow(loss)
    assert adaptive.phi == pytest.approx(share)
    assert [step for step in range(9) if scheduler(every=4).is_due(step)] == [0, 4, 8]


def deal(adaptive: Adaptive, step: int):
    return adaptive.deal(step, np.arange(ROWS) % 2, of_rows=lambda domain, share: share)


def test_nothing_is_written_while_the_share_is_0():
    found = deal(scheduler(), 3)
    assert (found.who_R == DATA_SET).all()
    assert not found.replayed


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_block_is_near_its_share(share: float):
    for step in range(20):
        written = (deal(scheduler(start=share), step).who_R == STUDENT).sum()
        assert abs(written - share * ROWS) <= 1


def test_a_full_buffer_is_learnt_from_more_and_more():
    adaptive, again = scheduler(start=1.0, replay_rows=10), []
    for step in range(100):
        found = deal(adaptive, step)
        assert ((found.who_R == STUDENT).sum() + len(found.replayed)) == ROWS
        for place, (written, _) in found.replayed.items():
            assert written < step
            assert place % 2 in (0, 1)
        again.append(len(found.replayed))
    assert again[0] == 0  # the buffers are filled
    assert all(len(buffer) == 10 for buffer in adaptive.buffers.values())
    for step in (25, 50, 75, 99):
        assert abs(again[step] - ROWS * step / 100) <= 1


def test_every_step_and_seed_deals_otherwise():
    def dealt(step: int, seed: int = 0) -> list[int]:
        return deal(Adaptive(AdaptiveShare(start=0.5), seed, 100), step).who_R.tolist()

    assert dealt(3) == dealt(3)
    assert dealt(3) != dealt(4)
    assert dealt(3) != dealt(3, seed=1)


def test_all_is_written_anew_while_a_buffer_is_not_full():
    adaptive = scheduler(start=1.0, replay_rows=30)
    assert (deal(adaptive, 99).who_R == STUDENT).all()  # 20 rows of each domain
    assert not deal(adaptive, 99).replayed  # 40 by then, as they are there for the next step
    assert deal(adaptive, 99).replayed


def test_what_is_replayed_is_of_the_rows_own_domain():
    adaptive = scheduler(start=1.0, replay_rows=5)
    for step in range(90):
        for place, (_, written) in deal(adaptive, step).replayed.items():
            assert written % 2 == place % 2


def test_every_place_of_a_full_buffer_is_learnt_again_as_often():
    adaptive, counts = scheduler(start=1.0, replay_rows=5), np.zeros(5)
    for step in range(100):
        kept = {domain: list(buffer) for domain, buffer in adaptive.buffers.items()}
        for place, written in deal(adaptive, step).replayed.items():
            counts[kept[place % 2].index(written)] += 1
    share = counts.sum() / 5
    assert (abs(counts - share) < 5 * np.sqrt(share)).all()


def test_the_state_goes_on_where_it_was():
    one, other = scheduler(start=0.5, replay_rows=7), scheduler(replay_rows=7)
    for step in range(30):
        deal(one, step)
    one.follow(2.0)
    other.restore(one.state())
    assert oldest_step(other.state()) == min(s for b in one.buffers.values() for s, _ in b)
    for step in range(30, 60):
        ours, theirs = deal(one, step), deal(other, step)
        assert (ours.who_R == theirs.who_R).all()
        assert ours.replayed == theirs.replayed
    assert other.state() == one.state()
    assert oldest_step(scheduler().state()) == np.inf


def test_nothing_is_forgotten_that_a_damaged_checkpoint_may_need(tmp_path: Path):
    """Of an older checkpoint, which is passed where the newest is sound."""
    adaptive = scheduler(start=1.0, replay_rows=ROWS)
    deal(adaptive, 3)
    plan = SimpleNamespace(
        run_dir=str(tmp_path), config=SimpleNamespace(source=SimpleNamespace(updates=1))
    )
    rollouts = Rollouts(None, plan, None, None, adaptive=adaptive)  # type: ignore[arg-type]
    state = tmp_path / "checkpoints" / "step-000005" / "state.json"
    state.parent.mkdir(parents=True)
    for damage in (None, "{", "{}"):
        if damage is not None:
            state.write_text(damage)
        assert rollouts._oldest_resumed() == 0
    state.write_text(json.dumps({"adaptive": adaptive.state()}))
    assert rollouts._oldest_resumed() == 3


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive")
    material = tiny.save_pair(folder / "pair"), prepared_domains(folder)
    plan = written_plan(
        folder / "run",
        *material,
        source={"student": 0.0, "dataset": 1.0, "adaptive": SECTION},
        losses=[{"kind": "skew_reverse_kl"}],
        optimiser=LR,
        steps=10,
        checkpoints={"every": 2, "keep": 2},
    )
    run_jobs([as_job("resumed", plan, at=8)], folder / "jobs")
    return folder / "run"


def test_a_killed_run_ends_with_the_same_weights(resumed: Path):
    again = resumed.with_name("run-resumed")
    weights, others = weights_after(resumed, 10), weights_after(again, 10)
    assert all((weights[key] == others[key]).all() for key in weights)
    assert comparable_lines(resumed)[8:] == comparable_lines(again)[-2:]


def test_the_share_moves_and_old_text_is_learnt_again(resumed: Path):
    lines = read_metrics(resumed / "metrics.jsonl")
    assert lines[0].student_share < lines[-1].student_share
    own = {version for version, _ in texts(resumed, 9)} - {DATA_SET}
    assert own
    assert max(own) < 8  # written for steps before, and not by the weights of step 8
    kept = [files(resumed, step) for step in range(10)]
    assert all(kept[8:])
    assert not all(kept)  # behind what the oldest checkpoint needs
