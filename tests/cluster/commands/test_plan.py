"""`tutelage plan` through the command line, on folders that hold no weights."""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.commands.plan import plan
from cluster.sizing.estimate import Estimate
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.in_words import in_bytes
from shared.targets.payload import bytes_per_token
from teacher_service.engine.hf import HFEngine
from tests.answers import question_of
from tests.cluster.jobs import write_job
from tests.student_trainer.runs import prepared_domains
from tests.telling import telling
from tests.tiny import VOCAB, Pair


@pytest.fixture
def bare(tiny_pair, tmp_path) -> Pair:
    """The pair's folders without weights."""
    return without_weights(tiny_pair, tmp_path)


def without_weights(whole: Pair, folder: Path) -> Pair:
    pair = Pair(folder / "teacher", folder / "student")
    for one, copy in zip((whole.teacher, whole.student), vars(pair).values(), strict=True):
        shutil.copytree(one, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return pair


def planned(capsys, *arguments: object) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def plain(tiny_pair, tmp_path_factory) -> tuple[Estimate, str, Path]:
    """The estimate of a job as it is, what was told of it, and its folder; of models without
    weights."""
    folder, told = tmp_path_factory.mktemp("plain"), io.StringIO()
    path = write_job(folder, without_weights(tiny_pair, folder))
    with contextlib.redirect_stdout(told):
        found = plan(path, ())
    return found, told.getvalue(), folder


def test_a_plan_names_each_part_and_reads_no_weights(plain):
    _, told, folder = plain
    for part in ("weights", "optimiser", "gradients", "activations", "loss", "in all", "fits"):
        assert part in told
    assert "bytes a token" in told
    assert "<- configured" in told
    assert not (folder / "runs").exists()


def test_memory_and_bytes_grow_with_what_is_asked(plain, bare, tmp_path, capsys):
    path, (least, *_) = write_job(tmp_path, bare), plain
    longer = planned(capsys, path, "data.context=128")
    wider = planned(capsys, path, "batch.micro_batch=4", "targets.top_k=128")
    for found in (longer, wider):
        activations = found["student"]["activations"]["most_bytes"]
        assert least.student.activations.most_bytes < activations
    shipped = sum(least.wire.bytes_per_token.values())
    assert shipped < sum(wider["wire"]["bytes_per_token"].values())


def test_bytes_a_token_are_those_of_a_real_answer(tiny_pair, tmp_path, capsys):
    path = write_job(tmp_path, tiny_pair, targets={"selector": "top_k", "top_k": 32})
    found = planned(capsys, path)
    (domain, _) = prepared_domains(tmp_path)
    rows: Rows = RowStore.open(domain.train_path).take(range(4))
    question = question_of(32, VOCAB, temperatures=(1.0,), encoding="fp16")
    answer = HFEngine.load(str(tiny_pair.teacher)).score(rows, question)
    flat = sum(c.combine_chunks().flatten().nbytes for c in answer.table.columns[1:])
    per_token = flat / rows.num_loss_tokens().sum()
    assert sum(found["wire"]["bytes_per_token"].values()) == pytest.approx(per_token, rel=0.02)
    assert found["wire"]["bytes_per_token"] == bytes_per_token(question, hidden_width=48)


def test_gpus_by_name_give_time_cost_and_replicas(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare)
    asked = (path, "student.gpus=1", "teachers.tiny.gpus=1", "--gpu", "H100", "--price", "2")
    found = planned(capsys, *asked)
    seconds = max(
        found["pace"]["student_s"], found["pace"]["teacher_s"] / found["pace"]["replicas"]
    )
    assert found["cost"] == pytest.approx(2 * 2 * seconds * found["config"]["steps"] / 3600)


def test_copies_that_write_are_planned_for_at_their_most(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare)
    on_gpus, copies = (
        ("student.gpus=1", "teachers.tiny.gpus=1"),
        "rollouts={replicas: {min: 1, max: 3}, cpus: 2}",
    )
    found = plan(
        path, (*on_gpus, "source={student: 1, max_new_tokens: 8}", copies), gpu="H100", price=2
    )
    told = capsys.readouterr().out
    assert "keep one worker busy" in told
    assert "3 x 1 GPUs and 2 CPUs for copies of the student that write, each with " in told
    assert "for 5 GPUs at 2 an hour" in told
    assert found.copies is not None
    assert found.copies.processes == 3
    assert found.copies.memory.parts["keys and values"] > 0
    asked = (*on_gpus, "source={student: 1, max_new_tokens: 8, batch_rows: 4096}", copies)
    assert main(["plan", str(path), *asked, "--gpu", "H100", "--gpu-memory", "1.4GB"]) == 2
    said = capsys.readouterr().err
    assert "a copy of the student that writes takes" in said
    assert "set source.batch_rows=2048, or lower source.max_new_tokens, 8" in said


def test_a_plan_says_what_vllm_takes_in_place_of_the_parts(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare, targets={"selector": "top_k", "top_k": 8})
    teacher = ("teachers.tiny.engine=vllm", f"teachers.tiny.python={sys.executable}")
    plan(path, (*teacher, "teachers.tiny.gpus=0.5"))
    said = capsys.readouterr().out
    assert "tiny computes in vLLM: the parts above are what transformers would take" in said
    assert "vLLM takes 45 % of each GPU" in said
    copies = f"rollouts={{replicas: 1, engine: vllm, python: {sys.executable}}}"
    plan(path, ("source={student: 1, max_new_tokens: 8}", copies))
    said = capsys.readouterr().out
    assert "tiny computes in vLLM" not in said
    assert "a copy computes in vLLM" in said
    assert "keeps keys and values beside the weights" in said


@pytest.mark.parametrize(("workers", "batches"), telling([(1, 9), (2, 11)], (2, 11)))
def test_what_a_teacher_keeps_of_texts_is_planned_for(bare, tmp_path, capsys, workers, batches):
    path = write_job(tmp_path, bare, losses=[{"kind": "policy_gradient"}])
    source = "source={student: 1, max_new_tokens: 8, teacher_mix: 0.2}"
    (teacher,) = plan(path, (source, f"student.workers={workers}")).teachers
    assert teacher.memory.parts["kept batches"] > 0
    keeps = f"tiny writes 32 texts of up to 64 tokens at once, and keeps {batches} batches, whose"
    assert keeps in capsys.readouterr().out


def test_modules_of_a_teacher_that_learn_are_planned_for(plain, bare, tmp_path, capsys):
    (frozen,) = plain[0].teachers
    path = write_job(tmp_path, bare)
    (taught,) = planned(capsys, path, "teachers.tiny.online_modules={r: 4}")["teachers"]
    assert taught["memory"]["parts"]["modules"] > 0
    assert taught["memory"]["parts"]["activations"] > frozen.memory.parts["activations"]


def test_what_models_do_before_the_first_step_is_said_and_has_room(plain, bare, tmp_path, capsys):
    path, (alone, *_) = write_job(tmp_path, bare), plain
    filled = planned(capsys, path, "augmentation={mask: 0.2, share: 0.5, copies: 3}")
    (said,) = set(filled["notes"]) - set(alone.notes)
    assert said.startswith("the teacher reads all training text 3 times to fill masks before")
    kinds = "losses=[{kind: preference, pairs: written}]"
    paired = planned(capsys, path, kinds, "mixture={policy: fixed}", "data.too_long=drop")
    assert any("write after every prompt of training text before" in n for n in paired["notes"])
    (before,), (after,) = alone.teachers, paired["teachers"]
    assert sum(after["memory"]["parts"].values()) > sum(before.memory.parts.values())


@pytest.mark.parametrize(
    "changes",
    telling(["online_modules={r: 4}", "follow_student={lag: 2}"], "follow_student={lag: 2}"),
)
def test_a_probe_of_a_teacher_that_changes_is_refused(tiny_pair, tmp_path, capsys, changes):
    one = replace(tiny_pair, teacher=tiny_pair.student)  # the student's own, that it may follow it
    path = write_job(tmp_path, one)
    assert main(["plan", str(path), f"teachers.tiny.{changes}", "--probe"]) == 2
    said = capsys.readouterr().err
    assert f"or probe with teachers.tiny.{changes.partition('=')[0]}=null" in said


def test_replicas_that_follow_the_need_are_planned_for_at_their_most(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare)
    found = planned(capsys, path, "teachers.tiny.replicas={min: 1, max: 3}")
    assert [side["processes"] for side in found["teachers"]] == [3]


def test_workers_that_follow_the_room_are_planned_for_at_their_most(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare, student={"model": str(bare.student), "zero": 2})
    found = planned(capsys, path, "student.workers={min: 1, max: 3}")
    assert found["student"]["processes"] == 2  # among which two micro-batches divide
    alone = planned(capsys, path, "student.workers=1")["student"]["memory"]["parts"]
    (note,) = [note for note in found["notes"] if "workers" in note]
    assert note.startswith("all of this is for 2 workers; with 1, the fewest, a worker takes ")
    assert f"takes {in_bytes(sum(alone.values()))} in place of" in note


def test_where_no_process_has_a_gpu_the_time_is_said_to_need_a_probe(bare, tmp_path, capsys):
    path = write_job(tmp_path, bare)
    assert main(["plan", str(path), "--gpu", "H100"]) == 0
    said = "not known: the config gives no process a GPU (gpus), or measure: --probe"
    assert said in capsys.readouterr().out
    assert main(["plan", str(path), "student.gpus=1"]) == 0
    assert "not known: name GPUs (--gpu), or measure: --probe" in capsys.readouterr().out


NO_ROOM = [
    (("student.gpus=1", "--gpu-memory", "1.05GB"), "a student worker takes"),
    (("teachers.tiny.gpus=1", "--gpu-memory", "1.05GB"), "a replica of tiny takes"),
    (("--memory", "1GiB"), "all processes together take"),
    (("--memory", "64MB"), "of the machine's 64.0 MB, most of it for"),
]


@pytest.mark.parametrize(
    ("options", "part"),
    telling(
        NO_ROOM,
        (("teachers.tiny.gpus=1", "--gpu-memory", "1.05GB"), "a replica of tiny takes"),
        (("--memory", "64MB"), "of the machine's 64.0 MB, most of it for"),
    ),
)
def test_what_has_no_room_is_refused_with_the_part_and_the_way_out(
    options, part, bare, tmp_path, capsys
):
    path = write_job(tmp_path, bare)
    assert main(["plan", str(path), *options]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1
    assert "set batch.micro_batch=1" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--gpu", "Z9"), "--gpu is 'Z9', which is not known"),
        (("--gpu-memory", "lots"), "--gpu-memory is 'lots', which is no size"),
        (("student.model=nowhere",), "student.model"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(options, sentence, bare, tmp_path, capsys):
    assert main(["plan", str(write_job(tmp_path, bare)), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_built_in_model_that_is_not_there_is_not_made(tmp_path, capsys):
    from cluster.commands.runs import RECIPES

    asked = (RECIPES / "demo.yaml", f"paths.cache={tmp_path}")
    assert main(["plan", *map(str, asked)]) == 2
    assert "the first `tutelage run` makes" in capsys.readouterr().err
    assert not [*Path(tmp_path).glob("*/models")]


def test_losses_that_ask_no_teacher_ship_nothing(bare, tmp_path, capsys):
    path = write_job(
        tmp_path, bare, losses=[{"kind": "cross_entropy"}], mixture={"policy": "fixed"}
    )
    found = planned(capsys, path)
    assert found["wire"] is None
    assert Config.model_validate(found["config"]).needs_teacher is False
