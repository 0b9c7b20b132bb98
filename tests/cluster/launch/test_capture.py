"""`tutelage capture`: what it asks, that it goes on, and that a run needs no teacher after it."""

import contextlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch.distributed as dist

from cluster.cli import main
from cluster.launch import capture as capturing
from cluster.launch.capture import Capture, Captured, training_units
from cluster.launch.repeating import Again, Widest, refuse_unsound
from cluster.planning.handshake import training_question
from shared.config.mixture import DDKMixture
from shared.config.models.teachers import Teacher
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import HandshakeError, TeacherError
from shared.mixture.weight_log import DomainReport
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan, open_routing
from shared.run.run_dir import RunDir
from shared.store.answer_files import Holding
from shared.store.readers import StoreReader
from shared.store.target_store import stored_answers
from shared.targets.routing import MixedTargets, RunReader
from shared.targets.soft_targets import SoftTargets
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.loader import Loader
from student_trainer.torchrun import StandingWeights
from teacher_service.engine.hf import HFEngine
from tests.cluster.jobs import write_job
from tests.cluster.launch.test_asked import kept_as
from tests.cluster.planning.test_ordering import PHASES
from tests.cluster.planning.test_prompting import PROMPTS, write_prompts
from tests.student_trainer.processes import LocalTeacher
from tests.student_trainer.runs import plan_of, plan_of_two, prepared_domains
from tests.tiny import VOCAB, Pair

SMALL_GB = 0.0005  # less than validation answers over the whole vocabulary take


@pytest.fixture(scope="module")
def captured(ray_cluster, tmp_path_factory, tiny_pair) -> tuple[Path, str]:
    """A config with prompts, phases and projected hidden states, with little room for answers of
    validation, whose answers are captured; and what that said."""
    folder = tmp_path_factory.mktemp("captured")
    write_prompts(folder)
    job = write_job(
        folder,
        tiny_pair,
        steps=6,
        evaluation={"store_gb": SMALL_GB},
        prompts="prompts.json",
        losses=[{"kind": "forward_kl"}, {"kind": "hidden_states", "layers": {2: 1}}],
        mixture={"policy": "fixed"},
        progressive=PHASES | {"difficulty": "teacher_nll"},
        targets={
            "store": str(folder / "store"),
            "top_k": 16,
            "store_ids": "plain",
            "hidden": {"width": 8, "calibration_rows": 4},
        },
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["capture", str(job)]) == 0
    return job, said.getvalue()


def test_capture_without_a_store_is_refused_before_anything_starts(tmp_path, tiny_pair, capsys):
    assert main(["capture", str(write_job(tmp_path, tiny_pair))]) == 2
    assert "set targets.store=FOLDER" in capsys.readouterr().err


def test_capture_refuses_what_is_not_there_before_it_is_learnt(tmp_path, tiny_pair, capsys):
    job = write_job(tmp_path, tiny_pair, targets={"store": "store"})
    options = ("source={student: 0.5, dataset: 0.5, max_new_tokens: 8}", "baseline=false")
    assert main(["capture", str(job), *options]) == 2
    assert "no capture can ask about it; run with targets.store" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_captured_run_needs_no_teacher(captured, tiny_pair, tmp_path, capsys):
    """Its tokenizer and config alone, and it refuses the answers of a teacher of another name."""
    job, store = captured[0], captured[0].parent / "store"
    assert {answers.question.prefix for answers in stored_answers(store)} == {PROMPTS.id}
    assert set(kept_as(store).values()) == {pa.uint16()}
    bare = tmp_path / tiny_pair.teacher.name
    shutil.copytree(tiny_pair.teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    free = [str(job), "targets.teacher_free=true", f"teachers.tiny.model={bare}"]
    assert main(["run", *free, "name=warm"]) == 0
    other = bare.rename(tmp_path / "other")
    assert main(["run", *free[:2], f"teachers.tiny.model={other}", "name=other"]) == 2
    said = "has answers of teacher float32, but teachers names other float32; name that teacher"
    assert said in capsys.readouterr().err
    run = RunDir(job.parent / "runs" / "warm")
    summary = json.loads(run.summary.read_text())
    assert summary["cache_hit_rate"] == 1.0
    lines = read_metrics(run.metrics)
    assert all(line.cache_hits == line.units > 0 for line in lines)
    assert {line.phase for line in lines} == {0, 1}
    assert kinds(run.path) == {"bucketed-16"}


class Counting(LocalTeacher):
    """A real teacher in this process that counts the rows it answers, and may die."""

    def __init__(self, engine: HFEngine, *, dies_after: int | None = None) -> None:
        super().__init__(engine)
        self.answered: Counter[bytes] = Counter()
        self.dies_after = dies_after

    def next(self) -> SoftTargets:
        if self.dies_after is not None and self.stats.units >= self.dies_after:
            raise TeacherError("it is gone")
        targets = super().next()
        self.answered.update(targets.table.column("row_hash").to_pylist())
        return targets


@pytest.fixture(scope="module")
def engine(tiny_pair: Pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


@pytest.fixture
def plan(tmp_path: Path, tiny_pair: Pair, engine: HFEngine) -> RunPlan:
    """Two epochs and a half of two domains under fixed weights."""
    domains = prepared_domains(tmp_path)
    made = plan_of(tmp_path / "run", tiny_pair, domains, steps=15, student={"workers": 1}, seed=4)
    return replace(made, teacher=engine.fingerprint)


def all_keys(plan: RunPlan, *, training: bool) -> set[bytes]:
    paths = [d.train_path if training else d.validation_path for d in plan.domains]
    stores = [RowStore.open(path) for path in paths]
    return {key for store in stores for key in store.take(range(len(store))).hashes()}


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """One rank on its own."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def drawn(plan: RunPlan, ranks: Ranks, reader: RunReader | None = None) -> list[Rows]:
    """The units of a run in order; with a reader, every one is answered."""
    shutil.rmtree(plan.run_dir, ignore_errors=True)
    Path(plan.run_dir).mkdir()
    controller = StandingWeights(plan)
    controller.observe(DomainReport(0, (0.0, 0.0), (0, 0), (0.0, 0.0)))
    log = FollowedLog(plan.config, ranks, controller)
    loader = Loader(
        DataSet(plan, ranks, log),
        log,
        ranks=ranks,
        domains=tuple(plan.config.domains),
        reader=reader,
        question=plan.training_question,
    )
    units = []
    for index in range(plan.config.steps):
        step = loader.step(index)
        for unit, targets in zip(step.units, loader.answers(step), strict=True):
            if isinstance(targets, SoftTargets):
                targets.check(unit, plan.training_question)
            if isinstance(targets, MixedTargets):
                assert sum(len(part.targets.table) for part in targets.parts) == len(unit)
            units.append(unit)
    return units


def test_the_rows_are_those_of_the_run_in_its_order_each_once(plan, ranks):
    for steps in (2, 15):
        short = replace(plan, config=plan.config.model_copy(update={"steps": steps}))
        run = [key for unit in drawn(short, ranks) for key in unit.hashes()]
        asked = [key for unit in training_units(short, all_rows=False) for key in unit.hashes()]
        assert asked == list(dict.fromkeys(run))
    assert len(asked) == len(set(asked)) < len(run)
    first = [unit.hashes() for unit in drawn(plan, ranks)[:4]]
    assert [unit.hashes() for unit in training_units(plan, all_rows=False)][:4] == first


def test_drawn_ids_are_captured_for_every_draw_that_a_run_asks_for(plan, engine, ranks, tmp_path):
    changed = {"selector": "threshold", "draws": 2}
    targets = plan.config.targets.model_copy(update=changed)
    config = plan.config.model_copy(update={"targets": targets})
    plan = replace(plan, config=config, training_question=training_question(config, VOCAB))
    run = [key for unit in drawn(plan, ranks) for key in unit.hashes()]
    asked = [key for unit in training_units(plan, all_rows=False) for key in unit.hashes()]
    assert asked == list(dict.fromkeys(run))
    rows = all_keys(plan, training=True)
    assert len(rows) < len(asked) <= 2 * len(rows)
    everything = [key for unit in training_units(plan, all_rows=True) for key in unit.hashes()]
    assert len(everything) == len(set(everything)) == 2 * len(rows)
    store = str(tmp_path / "store")
    captured = Capture(plan, "t", store, LocalTeacher(engine), ahead=3).all(all_rows=False)
    assert captured.training is not None
    assert captured.training.rows == len(asked)
    reader = StoreReader(store)
    for seed in (plan.config.seed, 5):
        config = plan.config.model_copy(update={"seed": seed, "steps": 6})  # the first epoch
        assert drawn(replace(plan, config=config), ranks, reader)
    assert reader.stats.cache_hits == reader.stats.units > 0
    reader.close()


def test_where_weights_move_every_row_is_asked(plan):
    config = plan.config.model_copy(update={"steps": 1, "mixture": DDKMixture(interval=2)})
    for moving, all_rows in ((replace(plan, config=config), False), (plan, True)):
        units = training_units(moving, all_rows=all_rows)
        assert {key for unit in units for key in unit.hashes()} == all_keys(plan, training=True)


def test_a_capture_that_was_stopped_asks_nothing_twice_and_serves_any_order(
    plan, engine, ranks, tmp_path
):
    store = str(tmp_path / "store")
    dying = Counting(engine, dies_after=12)
    with pytest.raises(TeacherError):
        Capture(plan, "t", store, dying, ahead=3).all(all_rows=False)
    assert 0 < len(dying.answered) < len(all_keys(plan, training=True))
    second = Counting(engine)
    captured = Capture(plan, "t", store, second, ahead=3).all(all_rows=False)
    units = Widest(training_units(plan, all_rows=False))
    assert list(units)
    assert units.unit is not None
    again_to_compare = set(units.unit.documents().hashes())
    assert set(dying.answered) & set(second.answered) <= again_to_compare
    assert captured.training is not None
    assert captured.training.rows == len(all_keys(plan, training=True))
    assert captured.validation.rows == len(all_keys(plan, training=False))
    assert 0 <= captured.again.mean <= captured.again.largest < 1e-4
    (asked,) = re.findall(r"asked (\d+) rows", captured.lines())
    rows = captured.training.rows + captured.validation.rows
    assert int(asked) == rows - len(dying.answered)
    for seed, batch in (
        (4, {}),
        (5, {"rows_per_step": 4, "micro_batch": 1}),
        (6, {"micro_batch": 8}),
    ):
        config = plan.config.model_copy(
            update={"seed": seed, "batch": plan.config.batch.model_copy(update=batch)}
        )
        reader = StoreReader(store)
        units = drawn(replace(plan, config=config), ranks, reader)
        assert reader.stats.cache_hits == reader.stats.units == len(units) > 0
        reader.close()


def test_nothing_is_asked_where_all_is_stored(plan, engine, tmp_path):
    store = str(tmp_path / "store")
    Capture(plan, "t", store, Counting(engine), ahead=3).all(all_rows=True)
    second = Counting(engine)
    captured = Capture(plan, "t", store, second, ahead=3).all(all_rows=True)
    assert (captured.asked_rows, captured.asked_tokens) == (0, 0)
    assert second.stats.units <= 2 * 3 * plan.config.batch.micro_batch  # documents scored again


class Unsteady(LocalTeacher):
    """A teacher whose answers are off by 7 nats where a unit has several rows."""

    def next(self) -> SoftTargets:
        targets = super().next()
        if len(targets.table) == 1:
            return targets
        column = targets.table.column("label_logprob").combine_chunks()
        moved = pa.ListArray.from_arrays(column.offsets, pc.subtract(column.values, 7.0))
        place = targets.table.column_names.index("label_logprob")
        field = targets.table.schema.field(place)
        return replace(
            targets, table=targets.table.set_column(place, field, moved.cast(field.type))
        )


def test_answers_that_depend_on_their_batch_are_stored_and_refused(plan, engine, tmp_path):
    store = str(tmp_path / "store")
    found = Capture(plan, "t", store, Unsteady(engine), ahead=3).all(all_rows=False)
    assert found.again.largest == pytest.approx(7, abs=1e-3)
    with pytest.raises(
        HandshakeError, match=r"teacher t depend .* differ by \d(\.\d)? nats"
    ) as said:
        refuse_unsound({"t": Teacher(model="m")}, {"t": found.again})
    assert said.value.exit_code == 2
    assert found.training is not None
    assert found.training.rows == len(all_keys(plan, training=True))


def test_rounding_of_the_teachers_type_is_allowed():
    refuse_unsound({"t": Teacher(model="m")}, {"t": Again(1e-3, 1e-4)})
    refuse_unsound({"t": Teacher(model="m", dtype="bfloat16")}, {"t": Again(0.4, 0.02)})
    refuse_unsound({"t": Teacher(model="m")}, {"t": Again(0.9, 0.2, in_int8=True)})
    for teacher in (Teacher(model="m"), Teacher(model="m", quantisation="nf4")):
        with pytest.raises(HandshakeError):
            refuse_unsound({"t": teacher}, {"t": Again(0.4, 0.02)})


def test_a_capture_whose_answers_are_unsound_ends_with_2(tmp_path, tiny_pair, monkeypatch, capsys):
    job = write_job(tmp_path, tiny_pair, targets={"store": "store"})
    found = Captured(None, Holding(4, 9, 99), 4, 9, 1.0, Again(7.0, 1.0))
    monkeypatch.setattr(capturing, "capture", lambda *_, **__: {"tiny": found})
    assert main(["capture", str(job)]) == 2
    said = capsys.readouterr()
    assert "the answers of teacher tiny depend on what shares a batch" in said.err
    assert "asked 4 rows" in said.out
    assert "tutelage run" not in said.out


@pytest.mark.parametrize(
    "bits", [{"quantisation": "int8"}, {"stored": "in 8 bits by bitsandbytes"}]
)
def test_a_teacher_in_int8_is_known_by_what_it_is(plan, engine, tmp_path, bits):
    teacher = plan.teacher | bits
    capture = Capture(replace(plan, teacher=teacher), "t", "", LocalTeacher(engine), ahead=3)
    assert capture.again == Again(in_int8=True)


def test_each_of_two_teachers_is_asked_about_its_domains_alone(tmp_path, tiny_pair, ranks):
    """What both wrote is what a run of both reads."""
    engines = {
        name: HFEngine.load(str(folder))
        for name, folder in (("a", tiny_pair.teacher), ("b", tiny_pair.student))
    }
    folders = {"a": tiny_pair.teacher, "b": tiny_pair.student}
    options = {"student": {"workers": 1}, "steps": 5}
    domains = prepared_domains(tmp_path)
    plan = plan_of_two(tmp_path / "run", tiny_pair, domains, folders, **options)
    parts = {
        name: replace(part, teacher=engines[name].fingerprint) for name, part in plan.parts.items()
    }
    plan, store = replace(plan, parts=parts), str(tmp_path / "store")
    for name, engine in engines.items():
        reader = LocalTeacher(engine)
        captured = Capture(plan, name, store, reader, ahead=3).all(all_rows=False)
        rows = [row for unit in drawn(plan, ranks) for row in unit.names()]
        (domain,) = plan.parts[name].config.domains
        own = {row for row in rows if row.startswith(f"{domain}/")}
        assert captured.training is not None
        assert captured.training.rows == len(own)
        assert captured.validation.rows == 5
    readers = {
        name: lambda rank, part=part: StoreReader(store, teacher=part.teacher)
        for name, part in parts.items()
    }
    assert drawn(plan, ranks, open_routing(0, plan=plan, readers=readers))


def widths(store: Path) -> set[int]:
    return {answers.question.ask.num_ids for answers in stored_answers(store)}


def test_validation_answers_beyond_the_budget_are_kept_over_the_likeliest_ids(captured, capsys):
    """A run reads them with no teacher alive, as above."""
    job, told = captured
    assert "those over targets.top_k and the tail are kept" in told
    assert widths(job.parent / "store") == {16}
    asked = (f"evaluation.store_gb={SMALL_GB / 2}", "evaluation.kl=full")
    assert main(["capture", str(job), *asked]) == 2
    said = capsys.readouterr().err
    assert "evaluation.kl is full: validation answers over the whole vocabulary would take" in said
    assert f"more than evaluation.store_gb {SMALL_GB / 2}" in said


@pytest.mark.drill
def test_a_run_asks_anew_for_what_has_no_room_and_reads_what_is_stored_whole(
    ray_cluster, tmp_path, tiny_pair, capsys
):
    store = tmp_path / "store"
    targets = {"store": str(store), "top_k": 16}
    job = write_job(tmp_path, tiny_pair, steps=2, targets=targets, evaluation={})
    small, free = f"evaluation.store_gb={SMALL_GB}", "targets.teacher_free=true"
    assert main(["run", str(job), small, "name=live"]) == 0
    assert "the teacher is asked each time" in capsys.readouterr().out
    assert widths(store) == {16}
    assert main(["capture", str(job)]) == 0
    assert widths(store) == {16, VOCAB}
    assert main(["run", str(job), small, free, "name=whole"]) == 0
    assert kinds(tmp_path / "runs" / "whole") == kinds(tmp_path / "runs" / "live") == {"full"}


def kinds(run: Path) -> set[str]:
    summary = json.loads((run / "summary.json").read_text())
    return {domain["kl_kind"] for domain in summary["domains"].values()}
