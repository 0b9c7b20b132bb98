"""A run whose teacher is shown prompts that the student is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.cli import main
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.mixture.weight_log import read_log
from shared.prompts.prompts import Example, Prompt, PromptSet
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from shared.store.target_store import stored_answers
from student_trainer.state.checkpoint import step_of
from tests.cluster.jobs import WORDS, write_job
from tests.shared.prompts.test_prefix import WITH_DEFAULT_SYSTEM
from tests.shared.text.test_framing import CHATML, LLAMA_2
from tests.tiny import Pair

PROMPTS = PromptSet(
    {
        "letters": Prompt("Greek letters in words.", (Example("", "alpha beta gamma"),)),
        "numbers": Prompt("Numbers from one to ten."),
    }
)


def write_prompts(folder: Path, prompts: PromptSet = PROMPTS) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts.to_dict() | {"history": ["of the search"]}))
    return path


@pytest.fixture(scope="module")
def prompted(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A config whose run has finished, with a store."""
    folder = tmp_path_factory.mktemp("prompted")
    write_prompts(folder)
    store = {"store": str(folder / "store")}
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_states", "layers": {2: 1}}]
    job = write_job(
        folder,
        tiny_pair,
        prompts="prompts.json",
        targets=store | {"hidden": {"width": 8, "calibration_rows": 4}},
        losses=losses,
    )
    assert main(["run", str(job)]) == 0
    return job


@pytest.fixture
def run_dir(prompted: Path) -> RunDir:
    return RunDir(prompted.parent / "runs" / "job")


def teacher_nlls(run_dir: RunDir, pair: Pair) -> dict[str, float]:
    """Nats per loss token of the validation rows, prompt and document in one line each."""
    model: Any = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.teacher)
    found = {}
    for path in (run_dir.path.parent.parent / "cache" / "rows").glob("*/validation.arrow"):
        store = RowStore.open(path)
        rows = store.take(range(len(store)))
        domain, total = rows.domains()[0], 0.0
        before = tokenizer(PROMPTS.of(domain).text(), add_special_tokens=False)["input_ids"]
        for ids, mask in documents(rows):
            line = [1, *before, *(ids[1:] if ids[0] == 1 else ids)]
            with torch.no_grad():
                log_p = model(torch.tensor([line])).logits[0].double().log_softmax(1)
            at = np.flatnonzero(mask)
            total -= float(log_p[len(line) - len(ids) + at, ids[at + 1]].sum())
        found[domain] = total / store.num_loss_tokens
    return found


def documents(rows: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and loss mask of every document, in order."""
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    parts = []
    for ids, starts, mask in zip(*columns, strict=True):
        whole = (ids.astype(np.int64), mask)
        parts += zip(*(np.split(array, starts[1:]) for array in whole), strict=True)
    return parts


def test_validation_and_weights_are_of_the_teacher_as_it_was_shown(run_dir, tiny_pair):
    expected = teacher_nlls(run_dir, tiny_pair)
    summary = json.loads(run_dir.summary.read_text())["domains"]
    for name, domain in summary.items():
        assert domain["teacher_nll"] == pytest.approx(expected[name], abs=1e-4)
    ratio_D = [np.exp(summary[name]["student_nll_before"] - expected[name]) for name in WORDS]
    factors = read_log(run_dir.weight_log, WORDS).entries[0].factors  # DDK, Eq. 1
    np.testing.assert_allclose(factors, np.exp(ratio_D) / np.exp(ratio_D).sum(), rtol=1e-3)


def test_every_answer_is_stored_under_the_prompts_and_the_run_keeps_them(prompted, run_dir):
    answers = stored_answers(prompted.parent / "store")
    assert {stored.question.prefix for stored in answers} == {PROMPTS.id}
    assert run_dir.prompts.read_text() == (prompted.parent / "prompts.json").read_text()


@pytest.mark.drill
def test_a_run_resumes_to_the_same_end(run_dir, prompted):
    weights = (run_dir.export / "model.safetensors").read_bytes()
    losses = [line.loss for line in read_metrics(run_dir.metrics)]
    run_dir.summary.unlink()
    shutil.rmtree(max(run_dir.checkpoints.iterdir(), key=step_of))
    shutil.rmtree(run_dir.export)
    assert main(["run", str(prompted)]) == 0
    assert (run_dir.export / "model.safetensors").read_bytes() == weights
    assert [line.loss for line in read_metrics(run_dir.metrics)] == losses


@pytest.mark.drill
def test_the_store_serves_without_a_teacher(prompted, run_dir):
    assert main(["run", str(prompted), "name=stored", "targets.teacher_free=true"]) == 0
    stored = RunDir(run_dir.path.parent / "stored")
    weights = [(r.export / "model.safetensors").read_bytes() for r in (run_dir, stored)]
    assert weights[0] == weights[1]


def test_the_store_serves_no_teacher_that_is_shown_nothing(prompted, capsys):
    plain = ["run", str(prompted), "name=plain", "targets.teacher_free=true", "prompts=null"]
    assert main(plain) == 2
    assert "asked is threshold" in capsys.readouterr().err


def test_other_prompts_under_the_same_name_are_refused(prompted, run_dir, tmp_path, capsys):
    moved = write_prompts(tmp_path)
    assert main(["run", str(prompted), f"prompts={moved}"]) == 0
    other = PromptSet({"letters": PROMPTS.of("letters")})
    write_prompts(tmp_path, other)
    for changed in (f"prompts={moved}", "prompts=null"):
        assert main(["run", str(prompted), changed]) == 2
        assert "started with other values of prompts;" in capsys.readouterr().err


@pytest.mark.drill
def test_an_evaluation_shows_the_teacher_what_the_run_was_shown(prompted, run_dir, tiny_pair):
    (prompted.parent / "prompts.json").rename(prompted.parent / "elsewhere.json")
    try:
        assert main(["eval", str(run_dir.path)]) == 0
    finally:
        (prompted.parent / "elsewhere.json").rename(prompted.parent / "prompts.json")
    expected = teacher_nlls(run_dir, tiny_pair)
    found = json.loads((run_dir.path / "evaluation.json").read_text())
    for name, domain in found.items():
        assert domain["teacher_nll"] == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "overrides", "said"),
    [
        (None, [], "prompts.json cannot be read: No such file or directory; write it with"),
        ({"fiction": Prompt("A.")}, [], "prompt for fiction, which is none of the domains letters"),
        (
            {"numbers": Prompt("one two " * 40)},
            [],
            "the prompt of domain numbers has {n} tokens and its longest document 64, together "
            "more than the 128 that the teacher reads; shorten the prompt",
        ),
        (
            {"numbers": Prompt("one two " * 14)},
            [],
            "the 128 that the teacher reads; shorten the prompt, or set data.context=",
        ),
        (
            {"numbers": Prompt("one")},
            ["losses=[{kind: cross_entropy}]"],
            "no loss asks a teacher, who would be shown them; leave prompts out, add a loss",
        ),
    ],
)
def test_prompts_that_cannot_be_shown_are_refused_before_the_start(
    tmp_path, tiny_pair, capsys, prompts, overrides, said
):
    job = write_job(tmp_path, tiny_pair, prompts="prompts.json")
    if prompts is not None:
        write_prompts(tmp_path, PromptSet(prompts))
    assert main(["run", str(job), *overrides]) == 2
    message = capsys.readouterr().err
    if "{n}" in said:
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair.teacher)
        said = said.format(n=1 + len(tokenizer(prompts["numbers"].text())["input_ids"]))
    assert said in " ".join(message.split())
    assert not (tmp_path / "runs" / "job").exists()


@pytest.mark.parametrize(
    ("template", "text", "overrides", "said"),
    [
        (
            WITH_DEFAULT_SYSTEM,
            '{"prompt": "one", "response": "two"}\n',
            ["data.loss_on=everything"],
            "domain numbers would learn what the chat template puts before its text, which the "
            "teacher sees after a prompt; set data.loss_on=responses",
        ),
        (
            CHATML,
            '{"prompt": "one", "response": "two"}\n',
            ["domains.numbers.train=[numbers.jsonl, letters.jsonl]"],
            "domain numbers has both plain text and conversations, which a prompt would open "
            "differently; make them two domains",
        ),
        (
            LLAMA_2,
            '{"prompt": "one", "response": "two"}\n',
            [],
            "a prompt, its instruction as a system message and its examples as turns: the chat "
            "template of",
        ),
    ],
)
def test_prompts_that_do_not_go_with_a_chat_are_refused_before_the_start(
    tmp_path, tiny_pair, capsys, template, text, overrides, said
):
    pair = Pair(tmp_path / "teacher", tmp_path / "student")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair.teacher)
    tokenizer.chat_template = template
    for name in ("teacher", "student"):
        shutil.copytree(getattr(tiny_pair, name), getattr(pair, name))
        tokenizer.save_pretrained(getattr(pair, name))
    job = write_job(tmp_path, pair, prompts="prompts.json")
    (tmp_path / "numbers.jsonl").write_text(text)
    write_prompts(tmp_path, PromptSet({"numbers": Prompt("one")}))
    assert main(["run", str(job), *overrides]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs" / "job").exists()
