"""Explanations that a teacher reads step by step, and rewrites from the first wrong one on."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.active.answers import Answer
from cluster.active.asking import Ask, Log
from cluster.active.chains import Chain, final_answer, steps_of
from cluster.active.folder import read_lines
from cluster.active.records import Answers
from cluster.evaluation.items import Item
from shared.config.run import Config
from tests.cluster.active.scripted import (
    Killed,
    Rounds,
    active_job,
    config_of,
    files_of,
    write_rows,
)

ELAD = {
    "method": "elad",
    "rounds": 2,
    "patience": 4,
    "budget_tokens": 50_000,
    "train_prompts": 12,
    "validation_prompts": 6,
    "max_new_tokens": 60,
    "temperature": 0.5,
    "questions": 4,
    "samples": 3,
    "sample_temperature": 1.0,
    "answer_marker": "=>",
}


def worked(a: int, b: int) -> list[str]:
    """The right steps of a sum."""
    return [f"take  {a}", f"add {b} to {a}", f"which is {a + b}", f"=> {a + b}"]


def sums(pairs: Sequence[tuple[int, int]]) -> list[dict[str, str]]:
    """Rows of a question and its worked answer."""
    return [
        {"prompt": f"sum of {a} and {b}", "response": "\n".join(worked(a, b))} for a, b in pairs
    ]


@pytest.fixture
def job(tmp_path, tiny_pair) -> Path:
    job = active_job(tmp_path, tiny_pair, active=ELAD)
    write_rows(tmp_path / "known.jsonl", sums([(n, n + 3) for n in range(12)]))
    write_rows(tmp_path / "held.jsonl", sums([(n, n + 5) for n in range(8)]))
    return job


def of_sum(text: str) -> tuple[int, int]:
    """The numbers of the question in a prompt."""
    question = text.split("Question:\n")[-1]
    found = re.match(r"sum of (\d+) and (\d+)", question)
    assert found
    return int(found[1]), int(found[2])


def verdict(ask: Ask) -> str:
    """A teacher that knows the right steps and writes them in words of its own."""
    a, b = of_sum(ask.text)
    asked = ask.text.split("Next step:\n")[-1].split("\n\n")[0]
    if ask.purpose == "verify":
        return "Yes." if asked in worked(a, b) else "no, it is not"
    right = ask.text.split("which are right:\n")[1].split("\n\n")[0]
    done = 0 if right == "(none)" else len(right.split("\n"))
    return "\n".join([*(f"{step} indeed" for step in worked(a, b)[done:-1]), worked(a, b)[-1]])


class Explained(Rounds):
    """Rounds whose student errs at step n % 4 of its n-th training explanation, and at none of
    every fourth; it is the less sure the later it comes."""

    def _answer(self, config: Config, train: Sequence[Item], validation: Sequence[Item]) -> Answers:
        found = super()._answer(config, train, validation)
        chains = []
        for n, item in enumerate(train):
            assert item.document is not None
            steps = list(steps_of(item.document.response))
            if n % 5 != 4:
                steps[n % 4] += " WRONG"
                steps[n % 4 + 1 :] = ["so on", "=> 0"]
            chains.append(Chain(item.key, tuple(steps), within=n / 100, between=0.0))
        self.chains = {chain.key: chain for chain in chains}
        return Answers(found.train, found.validation, found.loss, tuple(chains))


def taught(config: Config, say: Callable[[Ask], str] = verdict) -> Explained:
    rounds = Explained(config, say)
    rounds.teach()
    return rounds


def test_steps_before_the_first_wrong_one_are_kept_verbatim_and_the_rest_is_the_teachers(job):
    rounds = taught(config_of(job, "active.rounds=1", "active.questions=12"))
    first = Explained(rounds.config)
    train = rounds.material.train_items(0)
    chains = {c.key: c for c in first._answer(rounds.trained[0], train, train[:1]).chains}
    kept = {row["prompt"]: row for row in read_lines(rounds.folder.round(0).rows)}
    places = set()
    for n, item in enumerate(train):
        assert item.document is not None
        row, steps = kept.get(item.document.prompt), chains[item.key].steps
        if n == 0 or n % 5 == 4 or n % 4 == 3:
            assert row is None, "it is sure, it is right, or with its last step as the training row"
            continue
        assert row is not None
        wrong = n % 4
        places.add(wrong)
        told = row["response"].split("\n")
        a, b = of_sum(f"Question:\n{row['prompt']}")
        assert tuple(told[:wrong]) == steps[:wrong]
        assert "WRONG" not in row["response"]
        assert "so on" not in row["response"]
        assert told[wrong:-1] == [f"{step} indeed" for step in worked(a, b)[wrong:-1]]
        assert item.key in row["provenance"]["parents"]
    assert places == {0, 1, 2}


def test_the_explanations_that_the_student_is_least_sure_of_are_read(job):
    rounds = taught(config_of(job, "active.rounds=1"))
    items = rounds.material.train_items(0)
    read = {ask.parents[-1] for ask in rounds.writer.asked}
    assert read == {item.key for item in items[-ELAD["questions"] :]}
    asks = [ask for ask in rounds.writer.asked if ask.purpose == "verify"]
    assert all(ask.max_new_tokens <= 8 for ask in asks)


def test_a_teacher_that_finds_nothing_errs_or_cannot_be_read_leaves_nothing_to_learn(job):
    def reasons(name: str, say: Callable[[Ask], str]) -> set[str]:
        rounds = Explained(config_of(job, f"paths.runs={name}"), say)
        standing = rounds.teach()
        assert standing.refused
        return {one["reason"] for one in read_lines(rounds.folder.round(0).left_out)}

    assert reasons("yes", lambda ask: "yes") == {"nothing to correct"}
    assert reasons("odd", lambda ask: "perhaps") == {"malformed"}
    assert reasons("none", lambda ask: "no" if ask.purpose == "verify" else " ") == {"malformed"}
    wrong = reasons("wrong", lambda ask: "no" if ask.purpose == "verify" else "=> -1")
    assert wrong == {"wrong answer"}

    def by_heart(ask: Ask) -> str:
        return "no" if ask.purpose == "verify" else "\n".join(worked(*of_sum(ask.text)))

    assert reasons("known", by_heart) == {"in training"}


def test_the_budget_ends_readings_and_is_never_exceeded(job):
    free = taught(config_of(job, "paths.runs=free", "active.rounds=1"))
    spent = Log(free.folder.asked).spent()
    for part in (0.2, 0.5, 0.9):
        budget = int(spent * part)
        config = config_of(job, f"paths.runs=part{part}", f"active.budget_tokens={budget}")
        rounds = Explained(config, verdict)
        standing = rounds.teach()
        assert "active.budget_tokens" in standing.stopped
        assert Log(rounds.folder.asked).spent() <= budget


def test_a_killed_command_goes_on_to_the_same_files(job):
    whole = taught(config_of(job, "paths.runs=whole"))
    for kill_at in range(0, whole.ticks, 5):
        config = config_of(job, f"paths.runs=killed-{kill_at}")
        with pytest.raises(Killed):
            Explained(config, verdict, kill_at=kill_at).teach()
        again = taught(config)
        assert files_of(again.folder.path) == files_of(whole.folder.path)


def test_a_student_that_is_sure_of_everything_ends_the_rounds(job):
    class Sure(Explained):
        def _answer(
            self, config: Config, train: Sequence[Item], validation: Sequence[Item]
        ) -> Answers:
            found = super()._answer(config, train, validation)
            sure = tuple(Chain(c.key, c.steps, 0.0, 0.0) for c in found.chains)
            return Answers(found.train, found.validation, found.loss, sure)

    standing = Sure(config_of(job), verdict).teach()
    assert standing.stopped == "The student is sure of every explanation that it was asked for."


def test_an_answer_is_right_where_its_final_answer_is():
    right, text = ("\n".join(worked(2, 3)), "two and three\n=> 5")
    assert Answer("k", final_answer(right, "=>"), final_answer(text, "=>"), 0.5).is_right
