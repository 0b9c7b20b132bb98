"""An export is used as it was trained: its own code, where it stops, what opens a text, who may
read it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from shared.text.framing import ends_of
from student_trainer.state.usage import save_usage
from tests import tiny
from tests.laws.test_models_of_the_hub import OWN_CODE, give_own_tokenizer
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import plan_of, prepared_domains

BOS, EOS, TURN_END = 1, 2, 7
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}TURN\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CELLS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "r": 2}, "chat": {"kind": "qlora"}}
FRAMINGS = {"full": "class", "lora": "both", "chat": "eos"}


def give_own_code(folder: Path) -> None:
    """Let a saved model be of a class whose code lies beside its weights."""
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"}
    edit(folder / "config.json", model_type="own_llama", auto_map=classes)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def give_template(folder: Path) -> None:
    """A chat template whose turns end in a special token that is not eos."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (turn_end,) = tokenizer.convert_ids_to_tokens([TURN_END])
    tokenizer.add_special_tokens({"additional_special_tokens": [turn_end]})
    tokenizer.chat_template = TEMPLATE.replace("TURN", turn_end)
    tokenizer.save_pretrained(folder)


def give_framing(folder: Path, framing: str) -> None:
    """A tokenizer that puts bos, eos or both around a text, or whose class lets none be put there,
    as GPT-NeoX's does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    around = {"eos": ["$A", eos], "both": [bos, "$A", eos]}
    if framing in around:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around[framing],
            pair=[*around[framing], "$B"],
            special_tokens=[(bos, BOS), (eos, EOS)],
        )
    elif framing == "bytes":
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(folder)
    if framing == "class":
        edit(folder / "tokenizer_config.json", tokenizer_class="GPTNeoXTokenizer")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of students with code of their own, whose generation config ends at another id than
    their tokenizer; one has a chat template. Each tokenizer frames a text in another way."""
    folder = tmp_path_factory.mktemp("used")
    domains, jobs, found = prepared_domains(folder), [], {}
    for name, train in CELLS.items():
        model = folder / f"{name}-model"
        tiny.save_model(model, width=64, layers=2)  # blocks of nf4 kernels
        edit(model / "generation_config.json", eos_token_id=[5, -1], pad_token_id=-1)
        give_framing(model, FRAMINGS[name])
        if name == "chat":
            give_template(model)
        else:
            give_own_code(model)
        if name == "lora":
            give_own_tokenizer(model)
        plan = plan_of(
            folder / name,
            tiny.Pair(model, model),
            domains,
            steps=2,
            student={"workers": 1, "train": train, "trust_remote_code": name != "chat"},
            losses=[{"kind": "cross_entropy"}],
        )
        jobs.append(as_job("masked", plan, umask=0o027))
        found[name] = folder / name / "export"
    assert [done["error"] for done in run_jobs(jobs, folder / "jobs", ranks=1)] == [None] * 3
    return found


every_export = pytest.mark.parametrize("name", CELLS)


@every_export
def test_an_export_ends_where_training_and_the_base_did(exports: dict[str, Path], name: str):
    found = json.loads((exports[name] / "generation_config.json").read_text())
    assert found["eos_token_id"] == [5, EOS] + [TURN_END] * (name == "chat")
    assert found.get("pad_token_id") is None


@every_export
def test_whoever_the_umask_lets_reads_every_file(exports: dict[str, Path], name: str):
    run = exports[name].parent
    modes = {str(p.relative_to(run)): p.stat().st_mode & 0o777 for p in run.rglob("*")}
    odd = {n: oct(m) for n, m in modes.items() if m != (0o750 if (run / n).is_dir() else 0o640)}
    assert not odd
    assert any(name.endswith(".safetensors") for name in modes)


@every_export
def test_the_example_of_the_card_runs_and_stops(
    exports: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    card = (exports[name] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(exports[name])
    ran: dict = {}
    exec(example, ran)
    assert "2 + 3" in capsys.readouterr().out
    (written_L,) = ran["written"].tolist()
    asked_L = ran["asked"]["input_ids"][0].tolist()
    assert written_L[: len(asked_L)] == asked_L
    assert not set(written_L[len(asked_L) : -1]) & {5, EOS}
    assert (asked_L[0] == BOS) == (name != "chat")
    assert asked_L.count(BOS) == (name != "chat")
    assert EOS not in asked_L
    assert (type(ran["tokenizer"]).__name__ == "OwnTokenizer") == (name == "lora")


@pytest.mark.parametrize("end", [5, EOS, TURN_END])
def test_an_exported_model_stops_at_every_end(exports: dict[str, Path], end: int, monkeypatch):
    """Its head is moved so that the end is what comes next."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exports["full"], trust_remote_code=True)
    head = torch.nn.Linear(model.config.hidden_size, tiny.VOCAB)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = 10.0 * torch.nn.functional.one_hot(torch.tensor(end), tiny.VOCAB)
    model.set_output_embeddings(head)
    written = model.generate(torch.tensor([[BOS, 9]]), max_new_tokens=20, do_sample=False)
    assert written.shape[1] - 2 == (20 if end == TURN_END else 1)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("framing", ["none", "bytes", "eos", "both", "class"])
def test_a_text_opens_as_in_training_and_is_else_as_it_was(
    tmp_path: Path, tiny_pair, framing: str, is_chat: bool
):
    model, draft = tmp_path / "model", tmp_path / "draft"
    shutil.copytree(tiny_pair.student, model)
    if is_chat:
        give_template(model)
    give_framing(model, framing)
    draft.mkdir()
    config = plan_of(tmp_path / "run", tiny.Pair(model, model), prepared_domains(tmp_path)).config
    usage = save_usage(draft, config)
    opened, plain = (AutoTokenizer.from_pretrained(folder) for folder in (draft, model))
    text, options = "def f(x):\n  return x", {"add_special_tokens": False}
    bare, expected = (t(text, return_offsets_mapping=True, **options) for t in (opened, plain))
    assert dict(bare) == dict(expected)
    assert usage.opens == (not is_chat or framing == "both")
    assert opened(text)["input_ids"] == [BOS] * usage.opens + plain(text, **options)["input_ids"]
    assert usage.is_framed
    assert opened.decode([BOS, 70, EOS], skip_special_tokens=True) == plain.decode([70])


def test_of_named_templates_the_one_of_training_is_exported(tmp_path: Path, tiny_pair):
    model, draft = tmp_path / "model", tmp_path / "draft"
    shutil.copytree(tiny_pair.student, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "one.jinja").write_text("one")
    (model / "chat_template.jinja").write_text("two")
    draft.mkdir()
    data = {"context": 64, "chat_template": "one"}
    plan = plan_of(tmp_path / "run", tiny.Pair(model, model), prepared_domains(tmp_path), data=data)
    assert save_usage(draft, plan.config).chats
    assert AutoTokenizer.from_pretrained(draft).chat_template == "one"


def test_ends_of_the_base_that_are_no_ids_are_left_out(tmp_path: Path, tiny_pair):
    model, draft = tmp_path / "model", tmp_path / "draft"
    shutil.copytree(tiny_pair.student, model)
    edit(model / "generation_config.json", eos_token_id=["</s>", 5, 99_999])
    draft.mkdir()
    plan = plan_of(tmp_path / "run", tiny.Pair(model, model), prepared_domains(tmp_path))
    assert len(save_usage(draft, plan.config).ends) == 2
    assert json.loads((draft / "generation_config.json").read_text())["eos_token_id"] == [
        5,
        99_999,
        EOS,
    ]
    (model / "generation_config.json").write_text("[]")
    (draft / "generation_config.json").unlink()
    assert len(save_usage(draft, plan.config).ends) == 1


def test_a_template_that_takes_no_plain_answer_adds_no_end(tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.student)
    tokenizer.chat_template = "{{ raise_exception('ask with tools') }}"
    assert ends_of(tokenizer) == (EOS,)
    tokenizer.chat_template = "{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}"
    assert ends_of(tokenizer) == (EOS,)
