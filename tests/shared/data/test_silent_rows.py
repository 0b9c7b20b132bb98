"""Rows that say that nothing of them is learnt are left out and counted, whatever the task."""

from pathlib import Path

import pytest

from shared.config.domains import Data, Domain
from shared.data.row_cache import facts_of
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare_domain
from shared.prompts.marking import MarkFraming
from shared.text.classified import ClassFraming, labels_in
from shared.text.framings import TaskFraming
from shared.text.tagged import TagFraming
from tests.shared.text.test_framing import CHATML, chatting
from tests.shared.text.test_sources import write

ENTITY = {"start": 0, "end": 3, "type": "who"}
MARKS = MarkFraming(("who",), "{type}: {text}", "responses", "auto")
SILENT = ({"loss": False}, {"train": False}, {"skip": True})
TASKS = {
    "classification": (ClassFraming(("x", "y")), {"label": "x"}),
    "tagging": (TagFraming(("O", "B-who", "I-who")), {"entities": [ENTITY]}),
    "marking": (MARKS, {"entities": [ENTITY]}),
}


def prepared(root: Path, tokenizer, rows: list[dict], **told):
    """The domain's stored training rows, and what became of its documents."""
    write(root / "train.jsonl", *rows)
    write(root / "valid.jsonl", rows[0] | {"text": "Eve ran", "prompt": "Eve ran"})
    domain = prepare_domain(
        "d",
        Domain(train="train.jsonl", validation="valid.jsonl"),
        data=Data(context=64),
        root=root,
        cache=root / "cache",
        tokenizer=lambda: tokenizer,
        tokenizer_digest="x",
        **told,
    )
    account = facts_of(domain.train_path).training.account
    return RowStore.open(domain.train_path), account


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_a_task_that_says_it_is_not_learnt_is_left_out(
    tmp_path: Path, tokenizer, task: str
) -> None:
    framing: TaskFraming
    framing, more = TASKS[task]
    rows = [{"text": f"Ann {n}"} | more for n in range(3)]
    plain, _ = prepared(tmp_path, tokenizer, rows, classes=framing)
    out = [{"text": "Bob"} | said for said in SILENT]  # with nothing to learn
    store, account = prepared(tmp_path, tokenizer, [*rows, *out], classes=framing)
    columns = [one.take(range(3)).column("input_ids") for one in (plain, store)]
    assert len(store) == len(plain) == 3
    assert all(map(lambda a, b: a.tolist() == b.tolist(), *columns))
    assert (account.tally.not_learnt, account.fit.without_loss) == (3, 3)
    assert account.tally.unread == {}


def test_a_preference_that_says_it_is_not_learnt_is_left_out_and_counted_once(
    tmp_path: Path, tokenizer
) -> None:
    rows = [{"prompt": f"p {n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    out = [{"prompt": "Bob", "chosen": "a", "rejected": "a"} | said for said in SILENT]
    _, account = prepared(tmp_path, tokenizer, [*rows, *out], pairs=True)
    assert (account.fit.documents, account.tally.not_learnt) == (6, 3)
    assert account.fit.without_loss == 3


def test_a_row_that_would_be_refused_is_left_out_where_it_says_so(
    tmp_path: Path, tokenizer
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    broken = {"messages": [*turns, {"role": "assistant", "content": None}], "skip": True}
    rows = [{"messages": turns}, {"messages": [*turns, *turns]}, broken]
    _, account = prepared(tmp_path, chatting(tokenizer, CHATML), rows)
    assert (account.fit.documents, account.tally.not_learnt) == (3, 1)


def test_a_class_that_left_out_rows_alone_have_is_none(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "z", "train": False}]
    write(tmp_path / "train.jsonl", *rows)
    assert list(labels_in({"d": Domain(train="train.jsonl")}, root=tmp_path)) == ["x"]


def test_a_column_that_a_domain_names_says_nothing_of_a_rows_loss(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "a", "train": False})
    domain = Domain(train="train.jsonl", columns={"label": "train"})
    with pytest.raises(Exception, match="its label is False, the name of no class"):
        labels_in({"d": domain}, root=tmp_path)
