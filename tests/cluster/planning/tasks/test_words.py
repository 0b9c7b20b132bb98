"""The rows of a task that tags: those of its student, and what its teacher reads of each word."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from cluster.planning.preparation import prepare_run
from cluster.planning.tasks.words import _add_text
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.config.tasks.task import Tagging
from shared.data.packing import RaggedRows
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import ConfigError, DataError, HandshakeError
from shared.prompts.class_reading import OwnHead
from shared.targets.question import Question
from shared.text.documents import Document
from shared.text.tagged import Span, TaggedText
from teacher_service.engine.classes.texts import labels_of, places_of, texts_of
from teacher_service.engine.opening import open_engine
from tests.student_trainer.tasks import classified
from tests.student_trainer.tasks.tagged import TAGS, config_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    classified.save_models(folder)
    return folder


def stores(config: Config) -> tuple[RowStore, RowStore]:
    """The student's and the teacher's training rows."""
    (domain,) = prepare_run(config).domains
    assert domain.teacher_paths is not None
    return RowStore.open(domain.train_path), RowStore.open(domain.teacher_paths["train"])


def test_the_teacher_reads_a_document_for_each_word_with_it_marked_and_knows_its_tag(
    tmp_path, models
):
    task = {"kind": "tagging", "template": "In {text} the marked is"}
    config = config_of(tmp_path, "run", models=models, task=task)
    (domain,) = config.domains.values()
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    own, teachers = stores(config)
    rows = [json.loads(line) for line in Path(str(domain.train)).read_text().splitlines()]
    assert len(own) == len(teachers) == len(rows)
    for number, row in enumerate(rows):
        (ids,), (mask,) = (own.take([number]).column(c) for c in ("input_ids", "loss_mask"))
        tags = ids[len(ids) - mask.sum() :].tolist()
        taken = teachers.take([number])
        (read,), (starts,) = taken.column("input_ids"), taken.column("doc_starts")
        ends = [*starts[1:], len(read)]
        assert [int(read[end - 1]) for end in ends] == tags
        told = [tokenizer.decode(read[a + 1 : b - 1]) for a, b in zip(starts, ends, strict=True)]
        words = [text.partition("<<< ")[2].partition(" >>>")[0] for text in told]
        for text, word in zip(told, words, strict=True):
            plain = text.replace(f"<<< {word} >>>", word, 1)
            assert plain == f"In {row['text']} the marked is\n"
        entities = {row["text"][e["start"] : e["end"]].split()[0] for e in row["entities"]}
        assert {w for w, t in zip(words, tags, strict=True) if TAGS[t][0] == "B"} == entities


@pytest.fixture(scope="module")
def heads(models) -> dict[str, str]:
    """Token classifiers of the tags in another order, of two tokenizers."""
    found = {}
    for base in ("own", "student"):
        torch.manual_seed(3)
        model = AutoModelForTokenClassification.from_pretrained(
            models / base, id2label=dict(enumerate(TAGS[::-1]))
        )
        model.save_pretrained(models / f"{base}-head")
        AutoTokenizer.from_pretrained(models / base).save_pretrained(models / f"{base}-head")
        found[base] = str(models / f"{base}-head")
    return found


@pytest.mark.parametrize("base", ["own", "student"])
def test_a_token_classifier_says_of_each_word_what_transformers_says_at_its_first_token(
    tmp_path, models, heads, base
):
    config = config_of(tmp_path, "run", models=models, teachers={"t": {"model": heads[base]}})
    prepared = prepare_run(config)
    (domain,) = prepared.domains
    assert domain.teacher_paths is not None
    store = RowStore.open(domain.teacher_paths["train"])
    ask = prepared.teachers["t"].classes()
    assert ask is not None
    engine = open_engine(Teacher(model=heads[base]), cache=None, context=None)
    answer = engine.score(store.take(range(len(store))), Question(ask))
    model = AutoModelForTokenClassification.from_pretrained(heads[base]).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(heads[base])
    expected, order = [], [TAGS[::-1].index(tag) for tag in TAGS]
    for row in map(json.loads, Path(str(config.domains["names"].train)).read_text().splitlines()):
        read = tokenizer(row["text"], return_tensors="pt", return_offsets_mapping=True)
        spans = read.pop("offset_mapping")[0].tolist()
        for word in re.finditer(r"\w+|[^\w\s]", row["text"]):
            at = next(n for n, (a, b) in enumerate(spans) if a < b and b > word.start())
            with torch.no_grad():
                expected.append(model(**read).logits[0, at, order].log_softmax(-1))
    apart = torch.stack(expected).std(0)
    assert apart.min() > 1e-3, "words are told apart by more than rounding"
    found_NC = answer.arrays().kept["class_logprobs_NC"]
    np.testing.assert_allclose(found_NC, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_words_that_share_a_token_of_the_teacher_are_told_one_by_one(models, heads):
    tokenizer = AutoTokenizer.from_pretrained(models / "own")
    told = {"tokenizer_digest": "", "limit": None}
    reading = OwnHead(Tagging(types=["kind", "place"]), lambda: tokenizer, "t", TAGS, **told)
    found, words = RaggedRows([], [], []), [Span(0, 1), Span(1, 3), Span(4, 8)]
    document = Document("pair", "here", prompt="def self")
    text = TaggedText(np.zeros(1), [0, 1, 2], words, [])
    _add_text(found, document, text, np.array([1, 2, 0]), reading=reading)
    row = Rows.build(
        domains=["x"],
        indices=[0],
        input_ids=found.input_ids,
        doc_starts=found.doc_starts,
        loss_masks=found.loss_masks,
    )
    ids = tokenizer("def self")["input_ids"]
    assert [text.tolist() for text in texts_of(row)] == [ids, ids], "two words are in one token"
    assert [places.tolist() for places in places_of(row)] == [[1], [1, 2]]
    assert labels_of(row).tolist() == [1, 2, 0]
    engine = open_engine(Teacher(model=heads["own"]), cache=None, context=None)
    answer = engine.score(row, Question(reading.ask()))
    model = AutoModelForTokenClassification.from_pretrained(heads["own"]).double().eval()
    order = [TAGS[::-1].index(tag) for tag in TAGS]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0][[1, 1, 2]][:, order]
    found_NC = answer.arrays().kept["class_logprobs_NC"]
    np.testing.assert_allclose(found_NC, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_a_teacher_reads_the_words_of_every_text_though_the_student_reads_them_alike(
    tmp_path, models
):
    rows = [{"text": f"def {word} list", "entities": []} for word in ("If", "if", "iF")]
    rows[1]["entities"] = [{"start": 7, "end": 11, "type": "kind"}]
    config = config_of(tmp_path, "run", models=models, student={"model": str(models / "own")})
    path = Path(str(next(iter(config.domains.values())).train))
    texts = [*rows, *map(json.loads, path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    _, teachers = stores(config)
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    read = teachers.take([0, 1, 2]).column("input_ids")
    for ids, row in zip(read, rows, strict=True):
        assert row["text"].split()[1] in tokenizer.decode(ids)
        others = {"If", "if", "iF"} - {row["text"].split()[1]}
        assert not any(other in tokenizer.decode(ids) for other in others)


def test_a_corrected_text_is_read_anew_though_the_student_reads_it_as_before(tmp_path, models):
    config = config_of(tmp_path, "run", models=models, student={"model": str(models / "own")})
    (domain,) = config.domains.values()
    (before,) = prepare_run(config).domains
    path = Path(str(domain.train))
    path.write_text(path.read_text().replace("return", "RETURN"))
    (after,) = prepare_run(config).domains
    assert before.teacher_paths != after.teacher_paths


def test_a_teacher_reads_of_a_text_what_the_student_does(tmp_path, models):
    config = config_of(tmp_path, "run", models=models, data={"context": 12})
    own, teachers = stores(config)
    tokenizer = AutoTokenizer.from_pretrained(config.teachers["t"].model)
    (domain,) = config.domains.values()
    texts = [json.loads(line)["text"] for line in Path(str(domain.train)).read_text().splitlines()]
    assert all(len(ids) <= 12 for ids in own.take(range(len(own))).column("input_ids"))
    long = [n for n, text in enumerate(texts) if len(tokenizer(text)["input_ids"]) > 12]
    for number in long:
        (read,) = teachers.take([number]).column("input_ids")
        plain = tokenizer.decode(read).replace("<<< ", "").replace(" >>>", "")
        assert texts[number][:4] in plain
        assert texts[number] not in plain
    assert long


def test_a_classifier_of_whole_texts_is_no_teacher_of_words(tmp_path, models):
    classified.save_classifier(models / "texts", models / "own", TAGS)
    config = config_of(
        tmp_path, "run", models=models, teachers={"t": {"model": str(models / "texts")}}
    )
    with pytest.raises(HandshakeError, match=r"a classifier of whole texts, and task is tagging"):
        prepare_run(config)


def test_types_are_in_the_order_that_is_asked_for_and_are_all_of_training_rows(tmp_path, models):
    task: dict[str, Any] = {"kind": "tagging", "types": ["place", "kind"]}
    config = config_of(tmp_path, "run", models=models, task=task)
    assert config.task.classes == ["O", "B-place", "I-place", "B-kind", "I-kind"]
    with pytest.raises(ConfigError, match=r"task.types names who, which no training row has"):
        config_of(tmp_path, "run", models=models, task=task | {"types": ["place", "kind", "who"]})
    with pytest.raises(DataError, match=r":\d+ has an entity of type 'kind', .*task.types"):
        config_of(tmp_path, "run", models=models, task=task | {"types": ["place"]})


def test_shots_and_episode_decide_the_training_rows_and_no_validation_row(tmp_path, models):
    found = {}
    for name, shots, episode in (("all", None, 0), ("one", 1, 0), *(("e", 1, n) for n in (1, 2))):
        task = {"kind": "tagging", "shots": shots, "episode": episode}
        config = config_of(tmp_path, "run", models=models, task=task)
        (domain,) = prepare_run(config).domains
        train, held = (RowStore.open(path) for path in domain.paths.values())
        ids = train.take(range(len(train))).column("input_ids")
        found[name, episode] = (len(train), len(held), [one.tolist() for one in ids])
    assert found["all", 0][0] == 12
    assert found["one", 0][0] <= 2, "a row or two have an entity of both types"
    assert {held for _, held, _ in found.values()} == {12}
    assert any(found["e", n][2] != found["one", 0][2] for n in (1, 2))
