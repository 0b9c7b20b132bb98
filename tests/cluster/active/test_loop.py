"""Rounds to their end: which student goes on, when they stop, and that a kill changes nothing."""

import json
import re
from pathlib import Path

import pytest

from cluster.active.asking import Ask, Log
from cluster.active.folder import read_json, read_lines
from shared.text.sources import sources_of
from tests.cluster.active.scripted import (
    Killed,
    Rounds,
    active_job,
    config_of,
    files_of,
    line,
    new_rows,
)
from tests.telling import telling


@pytest.fixture
def job(tmp_path, tiny_pair) -> Path:
    return active_job(tmp_path, tiny_pair)


def test_the_teachers_rows_are_learnt_and_the_best_student_is_exported(job):
    rounds = Rounds(config_of(job))
    standing = rounds.teach()
    accuracies = [
        sum(a["text"] == a["right"] for a in answers) / len(answers)
        for number in range(len(rounds.trained))
        for answers in [read_json(rounds.folder.round(number).answers)["validation"]]
    ]
    assert len(accuracies) == 4
    assert accuracies[0] < max(accuracies) == accuracies[standing.best]
    exported = (rounds.folder.export / "student.txt").read_text()
    assert exported == f"rounds-round-{standing.best}"
    assert standing.stopped == "The teacher has written in 3 rounds (active.rounds)."


def test_a_round_trains_on_the_users_text_and_all_rows_before_from_the_best_student(job):
    rounds = Rounds(config_of(job), accuracies=[0.5, 0.2, 0.6, 0.6])
    rounds.teach()
    exports = [str(rounds.folder.round(number).run.export) for number in range(4)]
    models = [config.student.model for config in rounds.trained]
    assert models == [rounds.config.student.model, exports[0], exports[0], exports[2]]
    written = [str(rounds.folder.round(number).rows) for number in range(3)]
    (known,) = rounds.trained[0].domains["colours"].train
    for number, config in enumerate(rounds.trained):
        assert config.domains["colours"].train == [known, *written[:number]]
        assert config.domains["colours"].validation == rounds.config.domains["colours"].validation
        assert config.active is None
    assert len({config.name for config in rounds.trained}) == 4
    assert len({config.seed for config in rounds.trained}) == 4


def test_every_round_may_start_from_the_student_of_the_config(job):
    rounds = Rounds(config_of(job, "active.start=base"))
    rounds.teach()
    assert {config.student.model for config in rounds.trained} == {rounds.config.student.model}


@pytest.mark.parametrize(
    ("accuracies", "trained", "best"),
    [
        ([0.5, 0.4, 0.3, 0.9], 3, 0),  # two rounds without a gain
        ([0.5, 0.4, 0.6, 0.6, 0.5, 0.9], 5, 2),  # one as good is no gain
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 5),
    ],
)
def test_rounds_stop_exactly_at_patience(job, accuracies, trained, best):
    rounds = Rounds(config_of(job, "active.rounds=5", "active.patience=2"), accuracies=accuracies)
    standing = rounds.teach()
    assert (len(rounds.trained), standing.best) == (trained, best)
    assert ("active.patience" in standing.stopped) == (trained < 6)


def test_the_best_round_may_be_that_of_the_lowest_loss(job):
    rounds = Rounds(config_of(job, "active.metric=loss"), accuracies=[0.9, 0.1, 0.1, 0.1])
    assert rounds.teach().best == 3


@pytest.mark.parametrize(
    "every", telling([1, 4], 4), ids=["at every moment", "at one moment of four"]
)
def test_a_killed_command_goes_on_to_the_same_files_without_asking_twice(job, every):
    def say(ask: Ask) -> str:  # some answers need repair, some rows are left out
        if ask.purpose == "rows" and ask.seed % 2:
            return "no JSON"
        return "\n".join([new_rows(ask), line("", "red"), line("a word", "mauve")])

    whole = Rounds(config_of(job, "paths.runs=whole"), say)
    expected = whole.teach()
    assert {ask.purpose for ask in whole.writer.asked} == {"rows", "repair"}
    for kill_at in range(0, whole.ticks, every):
        config = config_of(job, f"paths.runs=killed-{kill_at}")
        killed = Rounds(config, say, kill_at=kill_at)
        with pytest.raises(Killed):
            killed.teach()
        again = Rounds(config, say)
        assert again.teach() == expected
        assert files_of(again.folder.path) == files_of(whole.folder.path)
        asked = [*killed.writer.asked, *again.writer.asked]
        assert len(asked) == len(whole.writer.asked)


def test_a_finished_command_does_nothing_the_second_time_and_more_rounds_when_asked(job):
    rounds = Rounds(config_of(job))
    rounds.teach()
    again = Rounds(config_of(job))
    again.teach()
    assert not again.trained
    assert not again.writer.asked
    more = Rounds(config_of(job, "active.rounds=4", "active.patience=9"))
    more.teach()
    assert len(more.trained) == 1


def test_the_budget_is_counted_exactly_and_never_exceeded(job):
    free = Rounds(config_of(job, "paths.runs=free"))
    free.teach()
    told = Log(free.folder.asked).told()
    assert len(told) == 6
    spent = [one.answer.read + one.answer.written for one in told]
    assert Log(free.folder.asked).spent() == sum(spent)
    # All of the first round, then room for one prompt and the longest answer to it, and no more.
    budget = sum(spent[:2]) + told[2].answer.read + 60
    for left, answered in ((0, 3), (-1, 2)):
        config = config_of(job, f"paths.runs=less{left}", f"active.budget_tokens={budget + left}")
        rounds = Rounds(config)
        standing = rounds.teach()
        assert len(rounds.writer.asked) == answered
        assert "active.budget_tokens" in standing.stopped
        assert Log(rounds.folder.asked).spent() == sum(spent[:answered]) <= budget + left
        assert rounds.folder.export.exists()


def test_a_budget_too_small_for_one_prompt_is_a_sentence_after_the_export(job):
    rounds = Rounds(config_of(job, "active.budget_tokens=61"))
    standing = rounds.teach()
    assert standing.refused
    assert re.match(r".*budget_tokens is 61, but the first prompt .* may take", standing.stopped)
    assert not rounds.writer.asked
    assert rounds.folder.export.exists()


def test_a_budget_that_was_raised_counts_what_other_waves_took(job):
    def say(ask: Ask) -> str:
        return new_rows(ask) if ask.purpose == "rows" and ask.seed % 2 else "no JSON"

    cheap = Rounds(config_of(job, "active.prompts=6", "active.rounds=1", "paths.runs=free"), say)
    cheap.teach()
    whole = Log(cheap.folder.asked).spent()
    for first, raised in ((0.4, 0.7), (0.5, 0.8), (0.6, 0.9)):
        for part in (first, raised):
            budget = int(part * whole)
            options = ("active.prompts=6", "active.rounds=1", f"paths.runs=part{first}")
            rounds = Rounds(config_of(job, *options, f"active.budget_tokens={budget}"), say)
            rounds.teach()
            rounds.folder.round(0).rows.unlink(missing_ok=True)
            assert Log(rounds.folder.asked).spent() <= budget


def test_a_round_of_which_nothing_is_kept_says_so_and_goes_on_once_asked_otherwise(job):
    refused = Rounds(config_of(job), lambda ask: "nothing")
    standing = refused.teach()
    assert standing.refused
    assert "nothing that the teacher wrote in round 0 is learnt (malformed 2)" in standing.stopped
    assert refused.folder.export.exists()
    assert [o["reason"] for o in read_lines(refused.folder.round(0).left_out)] == ["malformed"] * 2
    again = Rounds(config_of(job), lambda ask: "nothing")
    assert again.teach().refused
    assert not again.writer.asked
    otherwise = Rounds(config_of(job, "active.temperature=0.9"))
    assert not otherwise.teach().refused
    assert len(otherwise.trained) == 3, "round 0 is not trained again"


def test_rows_say_where_they_come_from(job):
    rounds = Rounds(config_of(job))
    rounds.teach()
    told = {one.digest: one for one in Log(rounds.folder.asked).told()}
    for number in range(3):
        for row in read_lines(rounds.folder.round(number).rows):
            found = row["provenance"]
            ask = told[found["asked"]]
            assert found["round"] == ask.ask.round == number
            assert found["teacher"] == rounds.writer.fingerprint
            assert row["prompt"] in ask.answer.text
            assert found["parents"] == list(ask.ask.parents)
            assert set(found["parents"]) <= set(rounds.material.train)


def test_rows_have_the_names_that_the_domain_gives_its_columns(job, tmp_path):
    for name in ("known", "held"):
        lines = [json.loads(text) for text in (tmp_path / f"{name}.jsonl").open()]
        text = "".join(json.dumps({"q": r["prompt"], "a": r["response"]}) + "\n" for r in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    rounds = Rounds(config_of(job, "domains.colours.columns={prompt: q, response: a}"))
    rounds.teach()
    assert set(read_lines(rounds.folder.round(0).rows)[0]) == {"q", "a", "provenance"}
    assert len(rounds.trained) == 4


def test_as_many_prompts_are_answered_as_are_asked_for(job):
    rounds = Rounds(config_of(job, "active.train_prompts=7", "active.validation_prompts=5"))
    rounds.teach()
    told = [read_json(rounds.folder.round(number).answers) for number in range(4)]
    assert {(len(one["train"]), len(one["validation"])) for one in told} == {(7, 5)}
    drawn = [{answer["key"] for answer in one["train"]} for one in told]
    assert len(set.union(*drawn)) > 7, "other training prompts in every round"
    held = [[answer["key"] for answer in one["validation"]] for one in told]
    assert held == held[:1] * 4


def test_one_domain_of_several_grows(job):
    rounds = Rounds(config_of(job, "domains.letters.train=letters.jsonl", "active.domain=colours"))
    rounds.teach()
    first, last = rounds.trained[0], rounds.trained[-1]
    assert first.domains["letters"] == last.domains["letters"] == rounds.config.domains["letters"]
    grown = sources_of(last.domains["colours"], "train")
    assert len(grown) == 4
