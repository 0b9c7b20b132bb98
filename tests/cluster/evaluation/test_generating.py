"""What teacher, student before and after write in `tutelage eval`, on a real run."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import api
from cluster.cli import main
from cluster.evaluation.generations import read_generations
from cluster.evaluation.scores import has_rouge, scores
from tests.cluster.jobs import write_job

LIMIT, PROMPTS = 5, 6

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def run(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A run on prompts with responses, and on plain text; its models answered twice."""
    folder = tmp_path_factory.mktemp("generating")
    draw = random.Random(7)
    rows = [
        {"prompt": f"say {n} {draw.randint(1, 9)}", "response": f"it is {n}"} for n in range(80)
    ]
    for name, part in (("asked", rows[:60]), ("held", rows[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    domains = {
        "asked": {"train": "asked.jsonl", "validation": "held.jsonl"},
        "letters": {"train": "letters.jsonl"},
    }
    job = write_job(folder, tiny_pair, domains=domains)
    asked = ["name=spoken", "steps=4", "baseline=false", "mixture={policy: fixed}"]
    assert main(["run", str(job), *asked]) == 0
    run = folder / "runs" / "spoken"
    options = ["--generate", str(PROMPTS), "--max-new-tokens", str(LIMIT)]
    assert main(["eval", str(run), *options]) == 0
    return run


def written_by(folder: Path, prompt: str) -> str:
    """What a user of a folder gets for a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*bos, *tokenizer(f"{prompt}\n", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False)
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_each_model_writes_as_its_folder_does(run, tiny_pair) -> None:
    folders = {
        "teacher": tiny_pair.teacher,
        "before": tiny_pair.student,
        "after": run / "export",
    }
    found = [g for g in read_generations(run / "generations.jsonl") if g.domain == "asked"]
    assert len(found) == PROMPTS
    questions = [json.loads(line) for line in (run.parents[1] / "held.jsonl").open()]
    assert {(g.prompt, g.right) for g in found} <= {(q["prompt"], q["response"]) for q in questions}
    for generation in found[:2]:
        assert generation.max_new_tokens == LIMIT
        assert generation.step == 4
        for name, folder in folders.items():
            assert generation.models[name].text == written_by(folder, generation.prompt)


def test_scores_stand_in_the_table_with_their_errors(run, capsys) -> None:
    found = json.loads((run / "eval.json").read_text())["domains"]["asked"]
    generations = [g for g in read_generations(run / "generations.jsonl") if g.domain == "asked"]
    assert found["prompts"] == PROMPTS
    for name in ("teacher", "before", "after"):
        told = found["models"][name]
        own = [scores(g.models[name].text.split("\n\n")[0], g.right) for g in generations]
        assert told["token_f1"]["value"] == pytest.approx(sum(s.token_f1 for s in own) / PROMPTS)
        assert told["cut"] == sum(g.models[name].cut for g in generations)
        assert (told["rouge_l"] is not None) == has_rouge()
    assert set(found["differences"]) == {"after - before"}
    assert found["differences"]["after - before"]["exact_match"] is not None


def test_plain_text_is_written_on_and_scored_by_nothing(run) -> None:
    found = json.loads((run / "eval.json").read_text())["domains"]["letters"]
    assert found["prompts"] == 0
    assert found["models"]["after"]["token_f1"] is None
    generations = [g for g in read_generations(run / "generations.jsonl") if g.domain == "letters"]
    assert 1 <= len(generations) <= 4
    for generation in generations:
        assert set(generation.models) == {"teacher", "before", "after"}
        assert all(w.scores is None and w.text for w in generation.models.values())


def test_nothing_is_written_where_nothing_is_asked(run, tmp_path) -> None:
    before = (run / "generations.jsonl").read_bytes()
    api.Run(run).evaluate(generate=PROMPTS, max_new_tokens=LIMIT)
    assert (run / "generations.jsonl").read_bytes() == before
    api.Run(run).evaluate(generate=0)
    assert not (run / "generations.jsonl").exists()
    assert json.loads((run / "eval.json").read_text())["domains"]["asked"]["prompts"] == 0


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\\n{% endif %}"
)


def templated(folder: Path, model: Path) -> str:
    """A copy of a model whose tokenizer has a chat template."""
    copy = folder / model.name
    shutil.copytree(model, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    return str(copy)


def conversation(domain: str, number: int) -> str:
    messages = [
        {"role": "user", "content": f"{domain} {number}"},
        {"role": "assistant", "content": f"it is {number}"},
    ]
    return json.dumps({"messages": messages}) + "\n"


def write_conversations(folder: Path, domain: str) -> None:
    """Training text of a domain, and validation text beside it."""
    (folder / f"{domain}.held").mkdir()
    parts = {f"{domain}.jsonl": range(60), f"{domain}.held/rows.jsonl": range(60, 80)}
    for name, numbers in parts.items():
        (folder / name).write_text("".join(conversation(domain, number) for number in numbers))


def answered(model, tokenizer, turn: list[dict[str, str]]) -> str:
    """What transformers writes after a turn in its template."""
    told = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = model.eval().generate(**told, max_new_tokens=LIMIT, do_sample=False)
    return tokenizer.decode(ids[0, told["input_ids"].shape[1] :])


def test_adapters_of_two_teachers_answer_in_the_frame_of_their_template(
    ray_cluster, tiny_pair, tmp_path
) -> None:
    """LoRA, a teacher for each domain, messages: each model answers as its user would have it."""
    teacher, student = (templated(tmp_path, m) for m in (tiny_pair.teacher, tiny_pair.student))
    for domain in ("one", "two"):
        write_conversations(tmp_path, domain)
    taught = {"model": teacher, "cpus": 0.5}
    job = write_job(
        tmp_path,
        tiny_pair,
        teachers={"one": taught, "two": taught | {"dtype": "bfloat16"}},
        domains={
            name: {"train": f"{name}.jsonl", "validation": f"{name}.held", "teacher": name}
            for name in ("one", "two")
        },
        student={"model": student, "cpus": 0.5, "zero": 0, "train": {"kind": "lora"}},
        data={"context": 64, "validation_rows": 12},
        optimiser={"lr": 3e-2},
        mixture={"policy": "fixed"},
    )
    assert main(["run", str(job), "steps=8"]) == 0
    run = tmp_path / "runs" / "job"
    options = ["--generate", str(PROMPTS), "--max-new-tokens", str(LIMIT)]
    assert main(["eval", str(run), *options]) == 0
    table = json.loads((run / "eval.json").read_text())["domains"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = {
        "before": AutoModelForCausalLM.from_pretrained(student),
        "after": AutoPeftModelForCausalLM.from_pretrained(run / "export"),
        ("teacher", "one"): AutoModelForCausalLM.from_pretrained(teacher),
    }
    found = read_generations(run / "generations.jsonl")
    for domain in ("one", "two"):
        asked = [g for g in found if g.domain == domain]
        assert len(asked) == table[domain]["prompts"] == PROMPTS
        for generation in asked[:2]:
            number = generation.right.removeprefix("it is ").strip()
            turn = [{"role": "user", "content": f"{domain} {number}"}]
            for name in ("teacher", "before", "after"):
                if (model := models.get(name, models.get((name, domain)))) is None:
                    continue  # a bfloat16 teacher's products depend on what is multiplied at once
                text = answered(model, tokenizer, turn)
                written = generation.models[name].text
                assert text.removesuffix(tokenizer.eos_token or "") == written
    for name in ("teacher", "before", "after"):
        assert table["two"]["models"][name]["token_f1"] is not None
