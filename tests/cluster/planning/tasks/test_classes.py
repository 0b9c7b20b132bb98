"""From rows to what student and teacher read of them, and what cannot be asked of anybody."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.planning.preparation import prepare_run, run_plan
from cluster.report.text import text_lines, text_of
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.errors import ConfigError, DataError, HandshakeError
from shared.prompts.prefix import shown
from shared.targets.asks.classes import ClassLogProbs, HeadLogProbs
from tests.student_trainer.tasks.classified import (
    LABELS,
    config_of,
    rows_of,
    save_bert,
    save_classifier,
    write_rows,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.save_pair(folder)
    return folder


def asked(
    folder: Path,
    models: Path,
    rows: list[dict[str, Any]],
    *,
    teacher: str | None = None,
    **options: Any,
) -> Config:
    """A config of one domain with these rows, and three others to validate on."""
    train = write_rows(folder / "rows" / "train.jsonl", rows)
    held_out = options.pop("held_out", None) or rows_of(9, count=3)
    valid = write_rows(folder / "rows" / "valid.jsonl", held_out)
    domain = {"train": str(train), "validation": str(valid), **options.pop("domain", {})}
    student = {"model": str(models / "student"), "workers": 1}
    if teacher is not None:
        options["teachers"] = {"t": {"model": teacher}}
    return config_of(
        folder, "run", models=models, domains={"kinds": domain}, student=student, **options
    )


def read_by_teacher(config: Config, row: int = 0) -> tuple[list[str], ClassLogProbs]:
    """What the teacher is sent of a training row, by token, and what it is asked."""
    plan = run_plan(prepare_run(config), run_dir=Path("none"), teacher={"model": "t"})
    rows = RowStore.open(plan.domains[0].train_path).take([row])
    sent = shown(rows, plan.openings)
    (ids,), (mask,) = sent.column("input_ids"), sent.column("loss_mask")
    assert mask.nonzero()[0].tolist() == [len(ids) - 2], "the class follows what is read"
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    assert plan.training_question is not None
    ask = plan.training_question.ask
    assert isinstance(ask, ClassLogProbs)
    assert plan.validation_question == plan.training_question
    return tokenizer.decode(ids[:-1]), ask


def decoded(config: Config, ask: ClassLogProbs) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    assert {tokens[-1] for tokens in ask.classes} == {tokenizer.eos_token_id}, (
        "each comes to its end"
    )
    return [tokenizer.decode(tokens[:-1]) for tokens in ask.classes]


def test_the_teacher_reads_the_template_and_writes_the_words_of_the_classes(tmp_path, models):
    rows = rows_of(3, count=12)
    task = {
        "template": "Q {text}?",
        "verbaliser": {"tell": "say so"},
        "calibration": "content_free",
        "content_free": "nothing",
    }
    config = asked(tmp_path, models, rows, task=task)
    read, ask = read_by_teacher(config)
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    assert read == f"{tokenizer.bos_token}Q {rows[0]['text']}?\n"
    assert config.task.classes == sorted(LABELS)
    assert decoded(config, ask) == ["ask", "ask again", "say so"]
    assert tokenizer.decode(ask.content_free) == f"{tokenizer.bos_token}Q nothing?\n"


def test_the_student_reads_a_text_as_its_tokenizer_frames_it_and_learns_its_class(tmp_path, models):
    rows = [
        {"utterance": row["text"], "intent": n % 2} for n, row in enumerate(rows_of(3, count=8))
    ]
    columns = {"text": "utterance", "label": "intent"}
    config = asked(tmp_path, models, rows, domain={"columns": columns}, held_out=rows_3(rows))
    (domain,) = prepare_run(config).domains
    store = RowStore.open(domain.train_path)
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    assert config.task.classes == ["0", "1"]
    assert len(store) == len(rows)
    for number, row in enumerate(rows):
        (ids,) = store.take([number]).column("input_ids")
        assert ids.tolist() == [*tokenizer(row["utterance"])["input_ids"], row["intent"]]


def rows_3(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"utterance": f"held out {n}"} for n, row in enumerate(rows[:3])]


def test_classes_are_in_the_order_that_is_asked_for(tmp_path, models):
    labels = ["tell", "ask", "ask again"]
    config = asked(tmp_path, models, rows_of(3, count=6), task={"labels": labels})
    _, ask = read_by_teacher(config)
    assert decoded(config, ask) == labels


def test_validation_rows_are_all_used_unless_the_config_says_how_many(tmp_path, models):
    held_out = rows_of(9, count=40)
    every = asked(tmp_path / "every", models, rows_of(3, count=6), held_out=held_out)
    some = asked(
        tmp_path / "some",
        models,
        rows_of(3, count=6),
        held_out=held_out,
        data={"validation_rows": 30},
    )
    counted = [len(RowStore.open(prepare_run(c).domains[0].validation_path)) for c in (every, some)]
    assert counted == [40, 30]


def test_the_small_network_has_nothing_to_adapt(tmp_path, models):
    student = {"model": "tiny", "train": {"kind": "lora"}}
    with pytest.raises(ConfigError, match=r"student.train.kind is lora, .*set .*kind=full"):
        config_of(tmp_path, "run", models=models, student=student)


def test_prompts_and_responses_are_texts_and_classes_too(tmp_path, models):
    pairs = [{"prompt": row["text"], "response": row["label"]} for row in rows_of(3, count=6)]
    config = asked(tmp_path, models, pairs)
    assert config.task.classes == sorted(LABELS)


def test_a_text_beyond_the_context_loses_its_end_for_student_and_is_counted(tmp_path, models):
    rows = rows_of(3, count=6)
    rows[2]["text"] = "return self " * 40
    config = asked(tmp_path, models, rows, data={"context": 20})
    prepared = prepare_run(config)
    lengths = [
        len(ids)
        for ids in RowStore.open(prepared.domains[0].train_path).take(range(6)).column("input_ids")
    ]
    assert max(lengths) == lengths[2] == 20
    read, _ = read_by_teacher(config, 2)
    assert rows[2]["text"].strip() in read, "the teacher reads all that it has room for"


def test_a_teacher_with_little_room_reads_the_beginning_of_a_text(tmp_path, models):
    rows = rows_of(3, count=6)
    rows[0]["text"] = "return self " * 3000
    config = asked(tmp_path, models, rows, data={"context": 20})
    prepared = prepare_run(config)
    limit = prepared.facts.context
    assert limit is not None
    read, ask = read_by_teacher(config)
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    size = len(tokenizer(read, add_special_tokens=False)["input_ids"])
    room = limit - max(map(len, ask.classes))
    assert room // 2 < size <= room
    assert read.endswith("Kind:\n")


def classifier_of(folder: Path, models: Path, labels: tuple[str, ...] = LABELS) -> str:
    """A classifier of these classes as teacher, by a tokenizer of its own."""
    if not (models / "own").exists():
        save_bert(models / "own", own_tokenizer=True)
    save_classifier(folder / "kinds", models / "own", labels)
    return str(folder / "kinds")


def test_a_classifier_as_teacher_reads_a_text_by_its_own_tokenizer(tmp_path, models):
    rows = rows_of(3, count=6)
    rows[1]["text"] = "return self " * 60
    teacher = classifier_of(tmp_path, models, LABELS[::-1])
    config = asked(tmp_path, models, rows, task={"template": "{text}"}, teacher=teacher)
    prepared = prepare_run(config)
    plan = run_plan(prepared, run_dir=Path("none"), teacher={"model": "t"})
    assert plan.training_question is not None
    assert plan.training_question.ask == HeadLogProbs(LABELS)
    assert plan.validation_question == plan.training_question
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    sent = shown(RowStore.open(plan.domains[0].train_path).take([0, 1]), plan.openings)
    first, second = sent.column("input_ids")
    assert first[:-1].tolist() == tokenizer(rows[0]["text"])["input_ids"]
    whole = tokenizer(rows[1]["text"])["input_ids"]
    assert second[:-1].tolist() == [*whole[:63], whole[-1]], "64 is all that it reads"
    assert prepared.showing.notes["kinds"] == (
        "1 text loses its end for the teacher, which reads no more",
    )


def test_texts_that_the_cut_makes_alike_are_counted(tmp_path, models):
    rows = rows_of(3, count=6)
    rows[1]["text"], rows[2]["text"] = ("return self " * 30 + end for end in ("name", "list"))
    prepared = prepare_run(asked(tmp_path, models, rows, data={"context": 20}))
    said = "1 text is to the student what one before it is, and shares the teacher's answer to that"
    assert prepared.showing.notes["kinds"] == (said,)
    found = text_of(prepared.config, prepared.domains, notes=prepared.showing.notes)
    assert f"kinds: {said}" in text_lines(found)


OTHERS = {
    "lacks": (
        ("ask", "tell"),
        r"tells ask, tell apart, and not ask again; name the classes in id2",
    ),
    "has": (
        (*LABELS, "sing"),
        r"tells ask, ask again, tell, sing apart, and sing is no class here",
    ),
    "unnamed": (
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        r"tells LABEL_0, .* apart, and not ask, ask aga",
    ),
}


@pytest.mark.parametrize(("labels", "said"), OTHERS.values(), ids=OTHERS)
def test_a_classifier_of_other_classes_is_refused(tmp_path, models, labels, said):
    teacher = classifier_of(tmp_path, models, labels)
    config = asked(
        tmp_path, models, rows_of(3, count=6), task={"template": "{text}"}, teacher=teacher
    )
    with pytest.raises(ConfigError, match=said):
        prepare_run(config)


def test_words_for_a_language_model_need_one(tmp_path, models):
    teacher = classifier_of(tmp_path, models)
    for task, said in (
        ({"template": "Say {text}"}, r"task.template is 'Say {text}', which language models read"),
        (
            {"template": "{text}", "calibration": "content_free"},
            "task.calibration is 'content_free'",
        ),
    ):
        config = asked(tmp_path, models, rows_of(3, count=6), task=task, teacher=teacher)
        with pytest.raises(ConfigError, match=said):
            prepare_run(config)


def test_a_classifier_teaches_no_next_token(tmp_path, models):
    fields = asked(tmp_path, models, rows_of(3, count=6)).model_dump()
    teachers = {"t": {"model": classifier_of(tmp_path, models)}}
    fields |= {"task": "language_model", "teachers": teachers, "losses": [{"kind": "forward_kl"}]}
    with pytest.raises(
        HandshakeError, match=r"teachers.t.model is .*, a classifier of whole texts, which"
    ):
        prepare_run(Config.model_validate(fields))


REFUSED: list[tuple[list[dict[str, Any]], dict[str, Any], type[Exception], str]] = [
    (
        rows_of(3, count=6),
        {"task": {"verbaliser": {"tell": "ask"}}},
        ConfigError,
        r"writes the classes ask and tell with the same tokens .* write one of them otherwise",
    ),
    (
        rows_of(3, count=6),
        {"task": {"verbaliser": {"tell": ""}}},
        ConfigError,
        r"writes a class as '', which has no token .* write it in words",
    ),
    (
        rows_of(3, count=6),
        {"task": {"labels": [*LABELS, "sing"]}},
        ConfigError,
        r"task.labels names sing, which no training row has; add rows of it, or take it out",
    ),
    (
        rows_of(3, count=6),
        {"task": {"labels": ["ask", "tell"]}},
        DataError,
        r"train.jsonl:2 has the label 'ask again', which is not among task.labels; add it there",
    ),
    (
        rows_of(3, count=6),
        {"held_out": [{"text": "new", "label": "sing"}]},
        DataError,
        r"valid.jsonl:1 has the label 'sing', which is not among task.labels or those of the train",
    ),
    (
        [*rows_of(3, count=6), {"text": "and now"}],
        {},
        DataError,
        r"train.jsonl:7 has no label and no response, it has text; name its label under",
    ),
    (
        [*rows_of(3, count=6), {"text": "and now", "label": ""}],
        {},
        DataError,
        r"train.jsonl:7: its label is '', the name of no class",
    ),
    (
        [*rows_of(3, count=6), {"text": " ", "label": "ask"}],
        {},
        DataError,
        r"train.jsonl:7: its text is ' ', no words; leave the row out",
    ),
    (
        [row | {"label": "ask"} for row in rows_of(3, count=6)],
        {},
        ConfigError,
        r"labels is \['ask'\]; name two classes or more",
    ),
    (
        rows_of(3, count=6),
        {"task": {"template": "{text} " + "word " * 2000}},
        ConfigError,
        r"task.template alone has \d+ tokens for .*; shorten it",
    ),
]


@pytest.mark.parametrize(("rows", "options", "error", "said"), REFUSED)
def test_what_no_teacher_or_student_could_tell_is_refused(
    tmp_path, models, rows, options, error, said
):
    with pytest.raises(error, match=said):
        prepare_run(asked(tmp_path, models, rows, **dict(options)))
