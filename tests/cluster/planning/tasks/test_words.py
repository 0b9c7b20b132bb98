"""The rows of a task that tags: those of its student, and what its teacher reads of each word."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.planning.preparation import prepare_run
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.errors import ConfigError, DataError
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
