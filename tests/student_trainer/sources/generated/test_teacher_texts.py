"""A teacher that writes what is learnt: once, kept, the same after a kill, with hard labels too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.data.rollouts import DATA_SET, STUDENT, TEACHER, RowPrompt, prompts_of, writers
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import StorageError
from shared.prompts.prefix import Opening
from shared.run.metrics import read_metrics
from shared.targets.generation import Continuations, GenerationSpec, Openings
from student_trainer.sources.generated.teacher_texts import TeacherPrompt, TeacherTexts, TextFiles
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import LocalWriter, as_job, teacher
from tests.student_trainer.runs import plan_of
from tests.student_trainer.sources.generated.test_rollouts import ENDS, files, texts, written_plan
from tests.telling import asked, telling

ALONE = {"teacher": 1.0, "student": 0.0, "dataset": 0.0}
# Killed after the checkpoint at step 2 of 4, and gone on from there.
RESUMED = {
    "three-shares": {"source": {"teacher": 0.5, "student": 0.25, "dataset": 0.25}},
    "hard-labels-alone": {"source": ALONE, "losses": [{"kind": "cross_entropy"}]},
    "divergence": {"source": {**ALONE, "temperature": 0.5}, "losses": [{"kind": "forward_kl"}]},
}


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs = [
        as_job("resumed", written_plan(folder / "resumed" / name, *material, **RESUMED[name]), at=2)
        for name in asked(
            request, "name", among=RESUMED, always=("three-shares", "hard-labels-alone")
        )
    ]
    for draws in (1, 2):
        plan = written_plan(
            folder / "resumed" / f"draws-{draws}",
            *material,
            source={**ALONE, "draws": draws},
            losses=[{"kind": "cross_entropy"}],
            batch={"rows_per_step": 48, "micro_batch": 8},
            checkpoints={"every": 100},
        )
        jobs.append(as_job("train", plan))
    run_jobs(jobs, folder / "jobs")
    return folder / "resumed"


@pytest.mark.parametrize("name", telling(RESUMED, "three-shares", "hard-labels-alone"))
def test_a_killed_run_ends_with_the_same_weights(resumed: Path, name: str):
    run = resumed / name
    again = run.with_name(f"{name}-resumed")
    assert same_weights(run, again)
    assert comparable_lines(run)[2:] == comparable_lines(again)[-2:]
    assert all(line.texts.tokens for line in read_metrics(again / "metrics.jsonl"))


def test_who_writes_a_row_is_told_apart(resumed: Path):
    found = read_metrics(resumed / "three-shares" / "metrics.jsonl")
    wrote = [version for step in (2, 3) for version, _ in texts(resumed / "three-shares", step)]
    assert set(wrote) == {DATA_SET, TEACHER, 1, 2}
    tokens = sum(line.tokens for line in found)
    for metric, share in (("texts", 0.5), ("rollouts", 0.25)):
        own = sum(getattr(line, metric).tokens for line in found)
        assert abs(own / tokens - share) < 0.2
    alone = read_metrics(resumed / "hard-labels-alone" / "metrics.jsonl")
    assert all(line.texts.tokens == line.tokens and line.rollouts is None for line in alone)
    assert all(0 <= line.texts.empty <= line.texts.texts for line in alone)


@pytest.mark.parametrize(("draws", "last"), [(1, 1), (2, 2)])
def test_draws_take_turns_from_epoch_to_epoch(resumed: Path, draws: int, last: int):
    """A step draws about as many rows as there are: what was written in the first epochs serves the
    later ones."""
    run = resumed / f"draws-{draws}"
    written = {int(path.name[5:11]) for path in (run / "teacher_texts").glob("*.arrow")}
    assert {0, draws - 1} <= written <= set(range(last + 1))
    found = read_metrics(run / "metrics.jsonl")
    assert found[-1].texts.tokens > 0 == found[-1].teacher_tokens_written
    assert found[0].teacher_tokens_written > 0


def test_hard_labels_are_learnt_from_the_teacher_and_never_from_the_student(resumed: Path):
    """A mean over all tokens counts 0 for what the student wrote."""
    alone = read_metrics(resumed / "hard-labels-alone" / "metrics.jsonl")[0]
    assert alone.loss == pytest.approx(np.log(tiny.VOCAB), rel=0.2)
    third = read_metrics(resumed / "three-shares" / "metrics.jsonl")[0]
    heard = 1 - third.rollouts.tokens / third.tokens
    assert third.terms["cross_entropy"] == pytest.approx(heard * np.log(tiny.VOCAB), rel=0.2)


def test_what_is_gone_on_from_are_prompts_of_the_training_text(resumed: Path, material):
    """Validation text never enters a prompt."""
    run = resumed / "three-shares"
    plan = written_plan(resumed / "prompts", *material, **RESUMED["three-shares"])
    stores = {d.name: RowStore.open(d.train_path) for d in plan.domains}
    seen = 0
    for path in (path for step in (2, 3) for path in files(run, step)):
        rows = Rows(pa.ipc.open_file(path).read_all())
        pairs = zip(rows.names(), rows.versions(), rows.column("input_ids"), strict=True)
        for name, version, ids in pairs:
            if version == DATA_SET:
                continue
            domain, index = name.split("/")
            given = stores[domain].take([int(index)])
            prompt = next(iter(prompts_of(given, plan.config.source, context=64)))
            assert (ids[: len(prompt.input_ids)] == prompt.input_ids).all()
            seen += 1
    assert seen


@pytest.mark.parametrize("shares", [(0.25, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 0.7), (0.1, 0.05)])
def test_rows_are_dealt_by_quotas(shares: tuple[float, float]):
    found = writers(*shares, range(2000))
    for start, stop in ((0, 2000), (17, 400), (5, 6)):
        for who, share in zip((STUDENT, TEACHER), shares, strict=True):
            assert abs((found[start:stop] == who).sum() - share * (stop - start)) <= 2
    assert (writers(*shares, range(300, 500)) == found[300:500]).all()


class Counting(LocalWriter):
    """A teacher that counts what it is asked to write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(teacher(str(folder)))
        self.asked: list[np.ndarray] = []

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        self.asked += openings.ids()
        return super().generate(openings, spec)


def prompts(names: Sequence[str], *, room: int = 5, temperature: float = 1.0):
    spec = GenerationSpec(room, ENDS, temperature, vocab=tiny.VOCAB, logprobs=True)
    return [
        TeacherPrompt(
            RowPrompt(row, 0, np.array([3 + len(name), 9, 11], np.int32), room, room),
            name=name,
            domain="code",
            draw=f"{name}/0",
            spec=spec,
        )
        for row, name in enumerate(names)
    ]


@pytest.fixture
def opened(tmp_path: Path, material):
    plan = plan_of(tmp_path / "run", *material)

    def opened(rank: int = 0, **fields):
        writer = Counting(plan.config.teachers["t"].model)
        files = TextFiles(tmp_path / "texts")
        return writer, TeacherTexts(replace(plan, **fields), rank, files, {"t": writer})

    return opened


def ids_of(rollouts) -> list[list[int]]:
    return [rollout.output_ids.tolist() for rollout in rollouts]


def test_a_text_is_written_once(opened):
    writer, texts_ = opened()
    first = ids_of(texts_.written(0, prompts(["code/1", "code/2", "code/1"])))
    assert len(writer.asked) == 2
    assert first[0] == first[2]
    assert ids_of(texts_.written(1, prompts(["code/2", "code/31"])))[0] == first[1]
    assert len(writer.asked) == 3
    other, again = opened()
    assert ids_of(again.written(0, prompts(["code/1", "code/2", "code/1"]))) == first
    assert not other.asked
    assert texts_.take_tokens() > 0 == again.take_tokens()


def test_a_rank_reads_what_any_wrote_before_and_itself_now(opened):
    opened(rank=0)[1].written(3, prompts(["code/1"]))
    writer, texts_ = opened(rank=1)
    texts_.written(3, prompts(["code/1"]))
    assert len(writer.asked) == 1
    texts_.written(4, prompts(["code/1"]))
    assert len(writer.asked) == 1
    early, texts_ = opened(rank=1)
    texts_.written(2, prompts(["code/1"]))
    assert len(early.asked) == 1


def test_a_rank_that_is_given_other_rows_of_a_step_keeps_what_it_wrote(opened):
    opened()[1].written(3, prompts(["code/1", "code/31"]))
    opened()[1].written(3, prompts(["code/1", "code/311"]))  # as of another number of ranks
    writer, texts_ = opened()
    texts_.written(4, prompts(["code/1", "code/31", "code/311"]))
    assert not writer.asked


def test_of_two_texts_of_a_step_all_ranks_learn_one_later(opened, tmp_path: Path):
    """Two ranks wrote one opening; the texts of a teacher that rounds may differ."""
    files_, (asked,) = TextFiles(tmp_path / "texts"), prompts(["code/1"])
    (rollout,) = opened(rank=1)[1].written(3, [asked])
    ((identity, answer),) = files_.of(range(4))
    other = pa.array([[5, 5]], answer.table.schema.field("output_ids").type)
    place = answer.table.column_names.index("output_ids")
    other_text = Continuations(answer.table.set_column(place, "output_ids", other))
    files_.folder.joinpath(f"step-000003.rank-1.{identity}.arrow").unlink()
    ranks = [opened(rank=rank)[1] for rank in (0, 1)]
    ranks[1].written(3, [asked])
    files_.kept(3, 0, identity, other_text)
    found = [ids_of(texts_.written(4, [asked]))[0][:2] for texts_ in ranks]
    assert found == [[5, 5], [5, 5]]
    assert rollout.output_ids.tolist()[:2] != [5, 5]


@pytest.mark.parametrize("change", ["temperature", "room", "teacher", "draw"])
def test_a_text_is_known_by_all_that_decides_it(opened, change: str):
    writer, texts_ = opened()
    texts_.written(0, prompts(["code/1"]))
    (asked,) = prompts(["code/1"])
    if change == "teacher":
        writer, texts_ = opened(teacher={"model": "another"})
        with pytest.raises(Exception, match="from another teacher"):
            texts_.written(1, [asked])
    else:
        options = {"temperature": 0.5} if change == "temperature" else {"room": 4}
        (other,) = prompts(["code/1"], **(options if change != "draw" else {}))
        texts_.written(1, [replace(other, draw="code/1/1") if change == "draw" else other])
    assert len(writer.asked) == (1 if change == "teacher" else 2)


def test_the_teacher_is_shown_its_prompt_and_the_student_is_not(opened):
    opening = Opening(np.zeros(0, np.int32), np.array([7, 8], np.int32))
    writer, texts_ = opened(openings={"code": opening})
    (rollout,) = texts_.written(0, prompts(["code/1"]))
    assert writer.asked[0].tolist() == [7, 8, 9, 9, 11]
    assert rollout.prompt.input_ids.tolist() == [9, 9, 11]


def test_a_torn_file_is_named(opened, tmp_path: Path):
    opened()[1].written(0, prompts(["code/1"]))
    (path,) = (tmp_path / "texts").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StorageError, match=f"{path.name}.* cannot be read .*--fresh"):
        opened()[1].written(1, prompts(["code/1"]))
