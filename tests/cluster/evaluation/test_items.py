"""Which openings models go on from: validation text alone, its last answer, in seeded order."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cluster.evaluation.items import FOLLOWING, OPENING, framed_by, items_of, rows_of
from cluster.prompt_search.teacher import asked_of
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare_domain
from shared.prompts.prefix import opening, shown
from shared.prompts.prompts import Prompt
from shared.text.tokenizers import identify
from tests import tiny
from tests.shared.text.test_framing import CHATML

PAIRS = [{"prompt": f"say {n}", "response": f"it is {n}"} for n in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chatting(folder: Path):
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = CHATML
    return found


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(
    root: Path, tokenizer, *, data: dict | None = None, **domain: str
) -> tuple[Config, PreparedDomain]:
    config = Config.model_validate(
        {
            "name": "x",
            "steps": 1,
            "paths": {"root": str(root), "cache": str(root / "cache")},
            "teachers": {"t": {"model": "t"}},
            "student": {"model": "s"},
            "domains": {"qa": {"train": "train.jsonl"} | domain},
            "data": {"context": 48, "validation_rows": 8} | (data or {}),
        }
    )
    made = prepare_domain(
        "qa",
        config.domains["qa"],
        data=config.data,
        root=root,
        cache=root / "cache",
        tokenizer=lambda: tokenizer,
        tokenizer_digest=identify(tokenizer).digest,
        progress=False,
    )
    return config, made


def drawn(root: Path, tokenizer, *, count: int = 50, seed: int = 0, **parts):
    config, domain = prepared(root, tokenizer, **parts)
    return items_of(config, domain, tokenizer, count=count, seed=seed)


@pytest.mark.parametrize("loss_on", ["responses", "everything"])
def test_held_out_prompts_are_those_of_validation_rows(tmp_path, tokenizer, loss_on) -> None:
    lines(tmp_path / "train.jsonl", PAIRS)
    config, domain = prepared(tmp_path, tokenizer, data={"loss_on": loss_on})
    found = items_of(config, domain, tokenizer, count=50, seed=0)
    rows = RowStore.open(domain.validation_path).take(range(1))
    held_out = tokenizer.batch_decode(rows.column("input_ids"))[0]
    assert 1 <= len(found) <= 3  # a twentieth of the documents
    for item in found:
        assert item.is_scored
        assert f"{item.document.prompt}\n{item.document.response}" in held_out


def test_validation_text_is_drawn_by_seed_and_content(tmp_path, tokenizer) -> None:
    lines(tmp_path / "train.jsonl", PAIRS[:20])
    lines(tmp_path / "held.jsonl", PAIRS[20:])
    found = drawn(tmp_path, tokenizer, count=7, validation="held.jsonl")
    assert len({item.key for item in found}) == 7
    assert {item.document.prompt for item in found} <= {row["prompt"] for row in PAIRS[20:]}
    again = drawn(tmp_path, tokenizer, count=7, validation="held.jsonl")
    assert [item.key for item in again] == [item.key for item in found]
    fewer = drawn(tmp_path, tokenizer, count=3, validation="held.jsonl")
    assert [item.key for item in fewer] == [item.key for item in found[:3]]
    other = drawn(tmp_path, tokenizer, count=7, seed=1, validation="held.jsonl")
    assert {item.key for item in other} != {item.key for item in found}
    lines(tmp_path / "held.jsonl", [{"prompt": "another", "response": "one"}, *PAIRS[20:]])
    more = drawn(tmp_path, tokenizer, count=8, validation="held.jsonl")
    assert len({i.key for i in more} & {i.key for i in found}) >= 7


def test_the_opening_ends_where_the_answer_begins(tmp_path, tokenizer) -> None:
    lines(tmp_path / "train.jsonl", PAIRS)
    item, *_ = drawn(tmp_path, tokenizer)
    (asked,) = asked_of(rows_of([item])).ids()
    assert tokenizer.decode(asked, skip_special_tokens=True) == f"{item.document.prompt}\n"
    assert item.right_ids[-1] == tokenizer.eos_token_id
    right = tokenizer.decode(item.right_ids, skip_special_tokens=True)
    assert right == item.document.response


def test_of_a_conversation_the_last_answer_is_asked_for(tmp_path, chatting) -> None:
    def turns(number: int) -> list[dict]:
        talk = [("user", f"a{number}"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
        return [{"role": role, "content": content} for role, content in talk]

    lines(tmp_path / "train.jsonl", [{"messages": turns(n)} for n in range(40)])
    unanswered = [{"messages": turns(n)[:-1]} for n in range(40, 50)]
    lines(tmp_path / "held.jsonl", [*unanswered, {"messages": turns(99)}])
    data = {"context": 160}
    (item,) = drawn(tmp_path, chatting, data=data, validation="held.jsonl")
    (asked,) = asked_of(rows_of([item])).ids()
    assert chatting.decode(asked).endswith("<|im_start|>assistant\n")
    assert "b" in chatting.decode(asked)
    assert chatting.decode(item.right_ids).startswith("d e")
    assert item.shown(chatting) == "a99\nb\nc"


def test_documents_beyond_the_context_are_no_items(tmp_path, tokenizer) -> None:
    long = [{"prompt": f"say {n}", "response": "very long " * 30} for n in range(9)]
    lines(tmp_path / "train.jsonl", PAIRS)
    lines(tmp_path / "held.jsonl", [*long, {"prompt": "short", "response": "one"}])
    found = drawn(tmp_path, tokenizer, validation="held.jsonl")
    assert [item.document.prompt for item in found] == ["short"]


def test_plain_text_is_opened_and_not_scored(tmp_path, tokenizer) -> None:
    text = [{"text": " ".join(f"word{n}x{i}" for i in range(60))} for n in range(60)]
    lines(tmp_path / "train.jsonl", text)
    found = drawn(tmp_path, tokenizer, data={"context": 120})
    assert 1 <= len(found) <= 4
    for item in found:
        assert not item.is_scored
        assert item.num_opening == OPENING
        assert 0 < item.num_right <= FOLLOWING
        assert any(item.shown(tokenizer) in row["text"] for row in text)
    assert len(drawn(tmp_path, tokenizer, count=1, data={"context": 120})) == 1


def test_another_tokenizer_frames_documents_its_own_way(tmp_path, tokenizer, chatting) -> None:
    lines(tmp_path / "train.jsonl", PAIRS)
    config, domain = prepared(tmp_path, tokenizer)
    items = items_of(config, domain, tokenizer, count=2, seed=0)
    framed = framed_by(chatting, items, config)
    assert [item.key for item in framed] == [item.key for item in items]
    for own, plain in zip(asked_of(rows_of(framed)).ids(), items, strict=True):
        assert chatting.decode(own).endswith("<|im_start|>assistant\n")
        assert plain.document.prompt in chatting.decode(own)


def test_a_teacher_is_shown_its_prompt_first(tmp_path, tokenizer) -> None:
    lines(tmp_path / "train.jsonl", PAIRS)
    items = drawn(tmp_path, tokenizer, count=2)
    before = opening(Prompt("Answer briefly."), tokenizer, "pair")
    plain = asked_of(rows_of(items)).ids()
    prompted = asked_of(shown(rows_of(items), {"qa": before})).ids()
    for own, longer in zip(plain, prompted, strict=True):
        whole = np.concatenate([before.shown_ids, own[len(before.plain_ids) :]])
        assert longer.tolist() == whole.tolist()
