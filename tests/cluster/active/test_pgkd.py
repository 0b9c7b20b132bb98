"""Which rows a prompt shows, in which order, and that none is validation text."""

import json
from pathlib import Path

import pytest

from cluster.active import pgkd
from cluster.active.answers import Answer, mistakes
from cluster.active.asking import Ask
from cluster.active.classes import ClassScore, accuracy, by_class, macro_f1, weakest
from cluster.active.filtering import Row
from cluster.active.folder import read_json, read_lines
from cluster.active.records import Answers
from tests.cluster.active.scripted import (
    ACTIVE,
    Rounds,
    active_job,
    config_of,
    line,
    material_for,
    new_rows,
    rows,
    write_rows,
)

# right, answered, probability
CONFUSED = {
    "a": ("red", "red", 0.9),
    "b": ("red", "green", 0.6),
    "c": ("green", "blue", 0.8),
    "d": ("blue", "mauve", 0.99),  # no class
    "e": ("blue", "blue", 0.5),
    "f": ("blue", "red", 0.6),
}
HEADS = [
    "Write rows.",
    "Classes:",
    "Rows:",
    "How a student does on its weakest classes:",
    "It answers rightly:",
    "It answers wrongly:",
    "It is sure of a wrong class:",
    "Write 3 new rows,",
]


@pytest.fixture
def job(tmp_path, tiny_pair) -> Path:
    return active_job(tmp_path, tiny_pair)


def answers() -> list[Answer]:
    return [Answer(key, *told) for key, told in CONFUSED.items()]


def test_hard_negatives_are_wrong_in_a_class_and_the_surest_come_first():
    found = mistakes(answers(), ["red", "green", "blue"])
    assert [(one.key, one.text) for one in found] == [("c", "blue"), ("b", "green"), ("f", "red")]


def test_the_report_is_precision_recall_and_f1_of_every_class():
    found = by_class(answers(), ["red", "green", "blue"])
    assert found["red"] == ClassScore(1 / 2, 1 / 2, 1 / 2, rows=2, answered=2)
    assert found["green"] == ClassScore(0, 0, 0, rows=1, answered=1)
    assert found["blue"] == ClassScore(1 / 2, 1 / 3, 2 / 5, rows=3, answered=2)
    assert accuracy(answers()) == 2 / 6
    assert macro_f1(found.values()) == pytest.approx((1 / 2 + 0 + 2 / 5) / 3)
    assert weakest(found, 2) == ["green", "blue"]


def prompts_of(job: Path, *overrides: str) -> tuple[list[Ask], Answers, dict[str, str]]:
    """The prompts of a first round, what was answered, and the training prompts by key."""
    rounds = Rounds(config_of(job, *overrides))
    rounds.teach()
    found = Answers.from_dict(read_json(rounds.folder.round(0).answers))
    train = {key: document.prompt for key, document in rounds.material.train.items()}
    return pgkd.asks(rounds.material, found, 0), found, train


def rows_under(text: str, head: str) -> list[dict]:
    """The rows of one part of a prompt."""
    (block,) = [block for block in text.split("\n\n") if block.startswith(head)]
    return [json.loads(one) for one in block.splitlines()[1:]]


def test_a_prompt_has_its_parts_in_order_and_the_rows_each_is_about(job):
    (first, second), found, train = prompts_of(job)
    blocks = first.text.split("\n\n")
    assert all(block.startswith(head) for block, head in zip(blocks, HEADS, strict=True))
    assert blocks[1] == "Classes:\nblue, green, red"
    assert len(blocks[3].splitlines()) == 1 + ACTIVE["report_classes"]
    hard = mistakes(found.train, ["blue", "green", "red"])
    shown = [rows_under(ask.text, HEADS[6]) for ask in (first, second)]
    assert [row["prompt"] for row in shown[0]] == [train[a.key] for a in hard[0:4:2]]
    assert [row["prompt"] for row in shown[1]] == [train[a.key] for a in hard[1:4:2]]
    assert shown[0][0]["answered"] == hard[0].text != shown[0][0]["response"]
    assert shown[0][0]["probability"] == round(hard[0].probability, 3)
    right = {train[a.key] for a in found.train if a.is_right}
    assert {row["prompt"] for row in rows_under(first.text, HEADS[4])} <= right
    assert first.text != second.text
    assert first.seed != second.seed


def test_as_many_rows_are_shown_as_are_asked_for(job):
    (only,), found, _ = prompts_of(
        job, "active.prompts=1", "active.hard_negatives=1", "active.shots=4", "active.correct=0"
    )
    assert len(rows_under(only.text, HEADS[2])) == 4
    assert len(rows_under(only.text, HEADS[6])) == 1
    assert "It answers rightly" not in only.text
    assert len(rows_under(only.text, HEADS[5])) == ACTIVE["incorrect"]
    assert not [a for a in found.train if a.key not in only.parents and a.key in only.text]


def test_no_prompt_holds_validation_text_and_no_validation_row_is_written(job, tmp_path):
    held = rows(30, seed=2)
    # Validation rows that stand in the training text, too, in other case.
    leaked = [{"prompt": r["prompt"].upper(), "response": r["response"]} for r in held[:20]]
    with (tmp_path / "known.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in leaked))

    def say(ask: Ask) -> str:  # the teacher knows validation text by heart
        return "\n".join([new_rows(ask), *(line(**row) for row in held)])

    rounds = Rounds(config_of(job, "active.train_prompts=200"), say)
    rounds.teach()
    assert len(rounds.writer.asked) == 6
    for ask in rounds.writer.asked:
        assert not [row for row in held if row["prompt"].casefold() in ask.text.casefold()]
    for number in range(3):
        paths = rounds.folder.round(number)
        prompts = {row["prompt"].casefold() for row in read_lines(paths.rows)}
        assert prompts
        assert not prompts & {row["prompt"].casefold() for row in held}
        reasons = [one["reason"] for one in read_lines(paths.left_out)]
        assert reasons.count("in validation") == 2 * len(held)
    sources = [config.domains["colours"].validation for config in rounds.trained]
    assert sources == [str(tmp_path / "held.jsonl")] * 4


def test_a_malformed_answer_is_sent_back_once(job):
    def say(ask: Ask) -> str:
        return "never" if ask.purpose == "repair" or ask.seed % 2 else new_rows(ask)

    config = config_of(job, "active.prompts=8", "active.rounds=1")
    rounds = Rounds(config, say)
    rounds.teach()
    broken = [ask for ask in rounds.writer.asked if ask.purpose == "rows" and ask.seed % 2]
    repairs = [ask for ask in rounds.writer.asked if ask.purpose == "repair"]
    assert len(broken) == len(repairs) > 0
    assert all("never" in ask.text and "blue, green, red" in ask.text for ask in repairs)
    left_out = read_lines(rounds.folder.round(0).left_out)
    assert [one["reason"] for one in left_out].count("malformed") == len(broken)
    mended = config_of(job, "active.prompts=8", "active.rounds=1", "paths.runs=mended")
    again = Rounds(mended, lambda ask: new_rows(ask) if ask.purpose == "repair" else "never")
    again.teach()
    assert len(read_lines(again.folder.round(0).rows)) > 0


def test_what_a_class_is_and_how_many_there_may_be_is_the_responses(job, tmp_path):
    assert material_for(config_of(job)).classes == ("blue", "green", "red")
    write_rows(
        tmp_path / "known.jsonl", [{"prompt": f"p {n}", "response": f"r {n}"} for n in range(5)]
    )
    assert len(material_for(config_of(job)).classes) == ACTIVE["max_classes"]


def test_a_repair_that_leaves_no_room_is_not_asked_for(job):
    rounds = Rounds(config_of(job, "active.rounds=1"), lambda ask: "long " * 2000)
    rounds.writer.room = 1500
    assert rounds.teach().refused
    assert {ask.purpose for ask in rounds.writer.asked} == {"rows"}
    left_out = read_lines(rounds.folder.round(0).left_out)
    assert [one["reason"] for one in left_out] == ["malformed"] * 2


def test_validation_text_of_every_kind_and_domain_is_held_out(job, tmp_path):
    said = [{"role": "user", "content": "the rose number 1"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "mixed.jsonl").write_text(
        (tmp_path / "held.jsonl").read_text() + json.dumps({"messages": said}) + "\n"
    )
    write_rows(tmp_path / "other.jsonl", [{"prompt": "The rose  number 2.", "response": "no"}])
    with (tmp_path / "known.jsonl").open("a") as file:
        for number in (1, 2, 3):
            file.write(line(f"the rose number {number}", "red") + "\n")
    material = material_for(
        config_of(
            job,
            "domains.colours.validation=mixed.jsonl",
            "domains.more={train: letters.jsonl, validation: other.jsonl}",
            "active.domain=colours",
        )
    )
    prompts = {document.prompt for document in material.train.values()}
    assert "the rose number 3" in prompts
    assert not prompts & {"the rose number 1", "the rose number 2"}
    sieve = material.sieve([])
    assert sieve.reason(Row("the rose number 1", "red"), fits=True) == "in validation"
    assert sieve.reason(Row("the rose number 2", "red"), fits=True) == "in validation"


def test_classes_are_the_same_but_for_spaces(job, tmp_path):
    spaced = [{"prompt": f"p {n}", "response": ("a  b", "a b", "c")[n % 3]} for n in range(9)]
    write_rows(tmp_path / "known.jsonl", spaced)
    assert material_for(config_of(job)).classes == ("a b", "c")


def test_rows_are_looked_for_until_there_are_enough_that_fit(job, tmp_path):
    long = [{"prompt": "p " * 300 + str(n), "response": "red"} for n in range(40)]
    short = [{"prompt": f"p {n}", "response": "blue"} for n in range(3)]
    write_rows(tmp_path / "known.jsonl", long + short)
    material = material_for(config_of(job, "active.train_prompts=2"))
    assert len(material.train_items(0)) == 2
