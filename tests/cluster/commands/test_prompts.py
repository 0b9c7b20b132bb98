"""`tutelage prompts optimise` on tiny models, and the splits it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cluster.cli import main
from cluster.prompt_search.splits import Split, Task, question, task_of
from cluster.prompt_search.teacher import ScoreStore, asked_of, refuse_unfit, same_answer
from shared.config.file import load_config, resolve
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.data.tokenise import prepare_domain
from shared.errors import ConfigError, DataError, HandshakeError
from shared.prompts.prefix import opening, shown
from shared.prompts.prompts import Prompt, read_prompts
from shared.text.sources import read_documents
from teacher_service.engine.hf import HFEngine
from tests.answers import question_of
from tests.cluster.jobs import two_teachers, write_job
from tests.tiny import VOCAB

PROMPT_SEARCH = {
    "rounds": 1,
    "beam": 1,
    "paraphrases": 1,
    "keywords": 1,
    "examples": 1,
    "dev_documents": 8,
    "confirm_documents": 6,
    "pool_documents": 10,
    "max_new_tokens": 5,
    "to": "found.json",
    "instructions": {"pairs": "Write it."},
}
DOMAINS = {"pairs": {"train": "pairs.jsonl"}, "letters": {"train": "letters.jsonl"}}


@pytest.fixture
def job(tmp_path, tiny_pair, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    rows = [{"prompt": f"q {n}", "response": f"a {n % 5}"} for n in range(60)]
    rows += rows[:20]  # some questions come twice
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return write_job(tmp_path, tiny_pair, domains=DOMAINS, prompt_search=PROMPT_SEARCH)


def config_of(job: Path, *overrides: str) -> Config:
    return resolve(load_config(job, overrides), base=job.parent)


def task(name: str, config: Config) -> Task:
    return task_of(name, config, AutoTokenizer.from_pretrained(config.student.model))


def questions(found: Task) -> tuple[set[str], set[str], set[str]]:
    dev, confirm = (
        {question(document) for document in split.documents} for split in (found.dev, found.confirm)
    )
    return dev, confirm, {example.prompt or example.response for example in found.pool}


@pytest.mark.parametrize("name", DOMAINS)
def test_the_splits_share_no_question(job, name):
    found = task(name, config_of(job))
    dev, confirm, pool = questions(found)
    assert (len(dev), len(confirm)) == (8, 6)
    assert len(pool) == (10 if name == "pairs" else 0), "texts are longer than half the context"
    assert not dev & confirm
    assert not (dev | confirm) & pool


@pytest.mark.parametrize("name", DOMAINS)
def test_no_split_holds_text_that_is_held_out_for_validation(job, name, tmp_path):
    config = config_of(job, "prompt_search.pool_documents=1000")
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    prepared = prepare_domain(
        name,
        config.domains[name],
        data=config.data,
        root=tmp_path,
        cache=tmp_path / "cache",
        tokenizer=lambda: tokenizer,
        tokenizer_digest="tiny",
        progress=False,
    )

    store = RowStore.open(prepared.validation_path)
    rows = store.take(list(range(len(store))))
    validation = " ".join(tokenizer.batch_decode(rows.column("input_ids")))
    for text in set.union(*questions(task(name, config))):
        asked = f"{text}\n" if name == "pairs" else text
        assert asked not in validation


def test_named_validation_text_is_in_no_split(job, tmp_path):
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[:15]))
    held = {question(d) for d in read_documents([str(tmp_path / "held.jsonl")], root=tmp_path, columns={})}  # fmt: skip  # noqa: E501
    found = task("pairs", config_of(job, "domains.pairs.validation=held.jsonl"))
    assert not held & set.union(*questions(found))


def test_splits_are_fixed_by_the_seed(job):
    one, again, other = (
        task("pairs", config_of(job, f"seed={seed}")).dev.digest for seed in (0, 0, 1)
    )
    assert one == again != other


def test_too_little_text_and_a_metric_without_right_answers_are_refused(job):
    with pytest.raises(DataError, match=r"domain pairs has .* needs 80 to develop on and 6 to"):
        task("pairs", config_of(job, "prompt_search.dev_documents=80"))
    with pytest.raises(ConfigError, match="rows of domain letters are not prompts with responses"):
        task("letters", config_of(job, "prompt_search.metric=accuracy"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prompt_search.dev_documents=80", "domain pairs has"),
        ("prompt_search.metric=accuracy", "are not prompts with responses"),
        ("prompt_search.instructions={odd: Write.}", "none of the domains pairs, letters"),
        ("prompt_search.to=.", "a folder; name a file"),
        (
            f"prompt_search.instructions={{pairs: {'Write it. ' * 60}}}",
            "more than the 128 that the teacher reads; shorten it, or lower data.context",
        ),
        ("prompt_search.max_new_tokens=120", "tokens and an answer of up to 120, "),
        ("domains.pairs.columns={teacher_prompt: hint}", "has a teacher_prompt for each row"),
    ],
)
def test_bad_input_is_a_sentence_before_anything_starts(job, override, said, capsys, monkeypatch):
    monkeypatch.setattr("cluster.session.session.connected", None)
    assert main(["prompts", "optimise", str(job), override]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_text_as_long_as_the_teachers_context_can_be_tried_without_a_prompt(job):
    found = task("letters", config_of(job, "data.context=128"))
    refuse_unfit(found, None, max_new_tokens=None, limit=128)
    with pytest.raises(HandshakeError, match="for its longest document of 128 tokens, 1 more than"):
        refuse_unfit(found, None, max_new_tokens=None, limit=127)


def test_the_room_for_an_answer_is_that_of_the_longest_right_one_of_both_splits(job, tmp_path):
    rows = [{"prompt": f"q {n}", "response": "a " * (1 + n)} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    places = set()
    for seed in range(8):
        config = config_of(job, f"seed={seed}")
        found = task("pairs", config)
        answers = [
            [len(found.tokenizer.encode(d.response, add_special_tokens=False)) for d in documents]
            for documents in (found.dev.documents, found.confirm.documents)
        ]
        assert found.longest_answer == max(map(max, answers)) + 1, "an end follows it"
        places.add(max(answers[0]) > max(answers[1]))
    assert places == {True, False}


def test_a_split_is_its_rows_in_their_order(job):
    dev = task("pairs", config_of(job)).dev
    table = dev.rows.table
    turned = table.take([1, 0, *range(2, len(dev.rows))])
    assert Split(Rows(turned), dev.documents).digest != dev.digest
    assert Split(Rows(turned.take([1, 0, *range(2, len(dev.rows))])), ()).digest == dev.digest


def test_an_answer_is_right_but_for_whitespace_and_what_follows_an_empty_line():
    assert same_answer(" a  b\n", "a b", chat=True)
    assert not same_answer("a b c", "a b", chat=True)
    assert same_answer("a b\n\nnext\nc", "a b", chat=False)
    assert not same_answer("a b\n\nnext\nc", "a b", chat=True)
    assert same_answer("a\n\nb", "a\n\nb", chat=False)


def test_a_store_torn_by_a_kill_loses_the_torn_line_alone(tmp_path):
    path = tmp_path / "scores" / "x.jsonl"
    ScoreStore(path).add(Prompt("one"), values := np.array([0.0, 1.0]))
    with path.open("a") as file:
        file.write('{"prompt": "tw')
    store = ScoreStore(path)
    assert store.get(Prompt("one")).tolist() == values.tolist()
    assert store.get(Prompt("two")) is None
    store.add(Prompt("two"), values)
    assert ScoreStore(path).get(Prompt("two")).tolist() == [0.0, 1.0]


def test_in_a_chat_an_answer_is_asked_for_and_ends_as_its_turn_does(job):
    config = config_of(job)
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = task_of("pairs", config, tokenizer)
    assert found.stop_ids == (tokenizer.eos_token_id,)
    shown_rows = shown(
        found.dev.rows, {"pairs": opening(Prompt("Write it."), tokenizer, found.kind)}
    )
    (first, *_), asked = found.dev.documents, tokenizer.batch_decode(asked_of(shown_rows).ids())
    assert asked[0] == f"[system]Write it.<|eos|>[user]{first.prompt}<|eos|>[assistant]"


@pytest.mark.parametrize(("option", "is_control"), [("auto", 0), ("text", 0), ("control", 1)])
def test_special_tokens_in_rows_are_what_training_takes_them_for(
    job, tmp_path, option: str, is_control: int
):
    rows = [{"prompt": f"q {n}", "response": f"a <|eos|> {n}"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config_of(job, f"data.special_tokens={option}")
    found = task("pairs", config)
    (eos,) = found.stop_ids
    for ids in found.dev.rows.column("input_ids"):
        assert ids.tolist().count(eos) == 1 + is_control


def likelihood(job: Path) -> float:
    """Mean over the letters' confirming split of the mean log-probability per token."""
    config = config_of(job)
    split = task("letters", config).confirm
    engine = HFEngine.load(config.teachers["tiny"].model)
    spec = question_of(top_k=1, shared_vocab=VOCAB)
    rows = [split.rows.part(slice(n, n + 1)) for n in range(len(split.rows))]
    return float(np.mean([engine.score(r, spec).arrays().label_logprob_N.mean() for r in rows]))


def test_the_command_writes_what_training_reads_and_the_second_time_asks_for_no_score(
    ray_cluster, job, tmp_path, capsys, monkeypatch
):
    assert main(["prompts", "optimise", str(job)]) == 0
    said = capsys.readouterr().out
    assert "pairs, round 1: " in said
    assert "best prompt found" in said
    assert str(tmp_path / "found.json") in said
    first = (tmp_path / "found.json").read_text()
    assert set(read_prompts(tmp_path / "found.json").prompts) == {"pairs", "letters"}
    pairs, letters = json.loads(first)["domains"].values()
    assert (pairs["metric"], letters["metric"]) == ("accuracy", "likelihood")
    origins = {line["origin"] for line in pairs["history"]}
    assert {"no prompt", "config", "generic"} < origins
    assert letters["without_prompt"]["mean"] == pytest.approx(likelihood(job), abs=1e-5)

    def refuse(*_: object) -> None:
        raise AssertionError("a score that is known is asked for again")

    monkeypatch.setattr("cluster.prompt_search.teacher.Scorer._submit", refuse)
    assert main(["prompts", "optimise", str(job)]) == 0
    assert (tmp_path / "found.json").read_text() == first


@pytest.mark.drill
def test_every_teacher_is_searched_for_on_its_own_domains(ray_cluster, tmp_path, tiny_pair):
    search = PROMPT_SEARCH | {"to": str(tmp_path / "found.json"), "instructions": {}}
    job = write_job(tmp_path, tiny_pair, prompt_search=search, **two_teachers(tiny_pair))
    assert main(["prompts", "optimise", str(job)]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["domains"]) == ["letters", "numbers"]
    dtypes = {name: asked["dtype"] for name, asked in found["teachers"].items()}
    assert dtypes == {"one": "float32", "two": "bfloat16"}
