"""Domains prepared: rows, borders, held-out text, the cache."""

import copy
import dataclasses
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data import bar, row_store
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare, prepare_domain
from shared.errors import DataError, StorageError
from shared.in_words import in_bytes
from shared.text.tokenizers import identify
from tests import tiny
from tests.shared.text.test_framing import CHATML
from tests.shared.text.test_sources import write

DATA = Data(context=64, validation_rows=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def pairs(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a prompt and a response of random lengths, all different."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"{seed}:{i} " + "ask " * rng.integers(1, 6),
            "response": "x y" * rng.integers(1, 6),
        }
        for i in range(count)
    ]


def prepared(root: Path, tokenizer, *, data: Data = DATA, **domain) -> PreparedDomain:
    domain = {"train": "train.jsonl"} | domain
    return prepare_domain(
        "math",
        Domain(**domain),
        data=data,
        root=root,
        cache=root / "cache",
        tokenizer=lambda: tokenizer,
        tokenizer_digest=identify(tokenizer).digest,
    )


def described(root: Path, domains: dict, **sections: object) -> Config:
    """A config with these domains; its models are never read."""
    job = {
        "name": "x",
        "steps": 1,
        "paths": {"root": str(root)},
        "teachers": {"t": {"model": "t"}},
        "student": {"model": "s"},
        "domains": domains,
        "data": {"context": 64},
    }
    return Config.model_validate(job | sections)


def stores(domain: PreparedDomain) -> tuple[RowStore, RowStore]:
    return RowStore.open(domain.train_path), RowStore.open(domain.validation_path)


def documents_of(store: RowStore, tokenizer) -> list[str]:
    """The text of every document, or piece of one."""
    rows = store.take(range(len(store)))
    columns = (rows.column("input_ids"), rows.column("doc_starts"))
    return [
        tokenizer.decode(part, skip_special_tokens=True)
        for ids, starts in zip(*columns, strict=True)
        for part in np.split(ids, starts[1:])
    ]


def test_no_document_is_in_both_splits_and_few_are_in_neither(tmp_path: Path, tokenizer) -> None:
    rows = pairs(200)
    write(tmp_path / "train.jsonl", *rows)
    training, validation = (
        documents_of(store, tokenizer) for store in stores(prepared(tmp_path, tokenizer))
    )
    assert len(set(training + validation)) == len(training) + len(validation)
    assert set(training + validation) <= {f"{r['prompt']}\n{r['response']}" for r in rows}
    assert len(training) >= 0.95 * 200
    assert len(validation) > 4


def test_where_there_is_no_terminal_a_line_says_how_far_the_reading_is(
    tmp_path: Path, tokenizer, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(bar, "SAID_EVERY_S", 0.0)
    write(tmp_path / "train.jsonl", *pairs(30))
    size = in_bytes((tmp_path / "train.jsonl").stat().st_size)
    prepared(tmp_path, tokenizer)
    printed = capsys.readouterr()
    assert printed.out == ""
    said = [line for line in printed.err.splitlines() if line.startswith("tokenising math: ")]
    assert len(said) >= 30
    assert said[-1].endswith(f" characters of files of {size}")


def test_rows_hold_the_context_at_most_and_are_well_filled(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(500))
    store, _ = stores(prepared(tmp_path, tokenizer))
    lengths = [len(ids) for ids in store.take(range(len(store))).column("input_ids")]
    assert max(lengths) <= 64
    assert np.mean(lengths) > 0.9 * 64


def test_last_tokens_borders_and_prompts_never_have_loss(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(200))
    store, _ = stores(prepared(tmp_path, tokenizer))
    rows = store.take(range(len(store)))
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(newline) == 1
    borders = 0
    for ids, starts, mask in zip(*columns, strict=True):
        assert starts[0] == 0
        for document, counted in zip(
            np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True
        ):
            border = int(np.flatnonzero(document == newline[0])[0])
            assert not counted[:border].any()  # within the prompt
            assert counted[border:-1].all()  # every token of the response, then eos
            assert counted[-1] == 0
            borders += 1
    assert borders > len(rows)
    assert store.num_loss_tokens == rows.num_loss_tokens().sum()


def test_long_text_is_split_into_pieces_that_lose_no_token(tmp_path: Path, tokenizer) -> None:
    long = "the quick brown fox " * 40
    write(tmp_path / "train.jsonl", {"text": long})
    write(tmp_path / "valid.jsonl", {"text": "something else"})
    domain = prepared(tmp_path, tokenizer, validation="valid.jsonl")
    rows = stores(domain)[0].take(range(domain.num_rows))
    ids = np.concatenate(rows.column("input_ids"))
    plain = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert sorted(ids.tolist()) == sorted([1, *plain, 2])
    assert domain.num_loss_tokens == len(ids) - domain.num_rows  # one lost at each piece's end


@pytest.mark.parametrize(("too_long", "num_rows"), [("split", 3), ("cut", 1)])
def test_long_text_is_counted_and_treated_as_configured(
    tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture, too_long: str, num_rows: int
) -> None:
    write(tmp_path / "train.jsonl", {"text": "ab" * 170})
    write(tmp_path / "valid.jsonl", {"text": "something else"})
    tokens = len(tokenizer("ab" * 170)["input_ids"]) + 2
    data = Data(context=-(-tokens // 3), too_long=too_long)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        domain = prepared(tmp_path, tokenizer, data=data, validation="valid.jsonl")
    assert domain.num_rows == num_rows
    assert f"1 longer than {data.context} tokens ({too_long})" in caplog.text


def test_long_text_is_refused_where_configured_naming_the_row(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", {"text": "short"}, {"text": "word " * 200})
    with pytest.raises(DataError, match=r"train\.jsonl:2 has \d+ tokens, more than data\.context"):
        prepared(tmp_path, tokenizer, data=Data(context=64, too_long="refuse"))


def test_documents_without_a_token_to_learn_are_dropped_and_counted(
    tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long_prompt = {"prompt": "word " * 200, "response": "never reached"}
    write(tmp_path / "train.jsonl", *pairs(40), {"text": ""}, long_prompt)
    with caplog.at_level(logging.INFO):
        prepared(tmp_path, tokenizer, data=Data(context=64, too_long="cut"))
    assert "42 documents" in caplog.text
    assert ", 2 dropped" in caplog.text


def test_a_training_row_that_validation_holds_never_trains(
    tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(60)
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "valid.jsonl", *rows[:7], *pairs(5, seed=1))
    with caplog.at_level(logging.INFO):
        domain = prepared(tmp_path, tokenizer, validation="valid.jsonl")
    training, _ = (documents_of(store, tokenizer) for store in stores(domain))
    assert len(training) == 53
    assert not set(training) & {f"{r['prompt']}\n{r['response']}" for r in rows[:7]}
    assert "7 also in the validation text (dropped)" in caplog.text


def test_copies_of_a_held_out_document_leave_training_too(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(100), *pairs(100))
    training, validation = (
        documents_of(store, tokenizer) for store in stores(prepared(tmp_path, tokenizer))
    )
    assert not set(training) & set(validation)
    assert len(training) == 2 * (100 - len(validation))


def test_a_single_book_is_split_between_training_and_validation(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "book.txt").write_text(" ".join(f"sentence number {i}." for i in range(400)))
    domain = prepared(tmp_path, tokenizer, train="book.txt")
    training, validation = (documents_of(store, tokenizer) for store in stores(domain))
    assert len(training) > 10 * len(validation) > 0
    assert not set(training) & set(validation)


def test_validation_rows_are_spread_over_the_text_and_capped(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(50))
    write(tmp_path / "valid.jsonl", *pairs(1500, seed=1))
    domain = prepared(tmp_path, tokenizer, validation="valid.jsonl")
    _, validation = stores(domain)
    assert len(validation) == 4
    numbers = [int(t.split(":")[1].split()[0]) for t in documents_of(validation, tokenizer)]
    assert min(numbers) < 375
    assert max(numbers) > 1125


def test_the_same_text_gives_the_same_rows_in_another_cache(tmp_path: Path, tokenizer) -> None:
    hashes = []
    for name in ("one", "two"):
        write(tmp_path / name / "train.jsonl", *pairs(100))
        store, _ = stores(prepared(tmp_path / name, tokenizer))
        hashes.append(store.take(range(len(store))).hashes())
    assert hashes[0] == hashes[1]


def test_a_second_call_writes_nothing_and_a_change_writes_anew(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(100))
    first = prepared(tmp_path, tokenizer)
    stamp = os.stat(first.train_path).st_mtime_ns
    assert prepared(tmp_path, tokenizer) == first
    assert os.stat(first.train_path).st_mtime_ns == stamp
    others = [
        prepared(tmp_path, tokenizer, data=Data(context=32, validation_rows=4)),
        prepared(tmp_path, tokenizer, data=DATA.model_copy(update={"loss_on": "everything"})),
    ]
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = CHATML
    others.append(prepared(tmp_path, templated))
    write(tmp_path / "train.jsonl", *pairs(101))
    others.append(prepared(tmp_path, tokenizer))
    assert len({first.train_path, *(other.train_path for other in others)}) == 5


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "garble"])
def test_a_damaged_cache_is_built_anew(tmp_path: Path, tokenizer, damage: str) -> None:
    write(tmp_path / "train.jsonl", *pairs(100))
    first = prepared(tmp_path, tokenizer)
    path = Path(first.train_path)
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flip":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "remove":
        path.unlink()
    else:
        (path.parent / "facts.json").write_text("{")
    assert prepared(tmp_path, tokenizer) == first
    assert path.read_bytes() == whole


def test_writers_at_the_same_time_agree(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", *pairs(200))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prepared(tmp_path, tokenizer), range(4)))
    assert len(set(found)) == 1
    assert len(stores(found[0])[0]) == found[0].num_rows
    folders = [p for p in (tmp_path / "cache" / "rows").iterdir() if p.is_dir()]
    assert len(folders) == 1


def test_a_write_that_fails_leaves_no_half_domain(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.jsonl", *pairs(100))
    full = OSError(28, "No space left on device")

    def out_of_space(*_: object, **__: object) -> None:
        raise full

    monkeypatch.setattr(row_store.pa.ipc, "new_file", out_of_space)
    with pytest.raises(
        StorageError, match=r"the disk of .* is full; free space or set paths\.cache"
    ):
        prepared(tmp_path, tokenizer)
    monkeypatch.undo()
    assert prepared(tmp_path, tokenizer).num_rows > 0


@pytest.mark.parametrize(
    ("rows", "valid", "says"),
    [
        ([], None, "domain math is empty: 0 documents, none with a token to learn"),
        ([{"text": ""}], None, "domain math is empty: 1 documents"),
        ([{"text": "a few words"}], None, "no training text left .* name validation text"),
        (pairs(5), pairs(5), "no training text left .* take other text"),
        (pairs(5), [{"text": ""}], "validation text of domain math is empty: 1 documents"),
    ],
)
def test_a_domain_without_enough_text_is_refused(
    tmp_path: Path, tokenizer, rows: list, valid: list | None, says: str
) -> None:
    write(tmp_path / "train.jsonl", *rows)
    named = {}
    if valid is not None:
        write(tmp_path / "valid.jsonl", *valid)
        named = {"validation": "valid.jsonl"}
    with pytest.raises(DataError, match=says) as error:
        prepared(tmp_path, tokenizer, **named)
    assert "\n" not in str(error.value)


def test_natural_weights_are_shares_of_loss_tokens(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "a.jsonl", *pairs(50))
    write(tmp_path / "b.jsonl", *pairs(150, seed=2))
    config = described(tmp_path, {"b": {"train": "b.jsonl"}, "a": {"train": "a.jsonl"}})
    cache = tmp_path / "cache"
    found = prepare(config, tokenizer=lambda: tokenizer, tokenizer_digest="d", cache=cache)
    assert [domain.name for domain in found] == ["b", "a"]
    weights = [domain.natural_weight for domain in found]
    counts = [domain.num_loss_tokens for domain in found]
    assert weights == pytest.approx([c / sum(counts) for c in counts])
    assert sum(weights) == pytest.approx(1)
    assert RowStore.open(found[0].train_path).take([0]).names() == ["b/0"]


def test_no_bar_is_drawn_where_there_is_no_terminal(
    tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", *pairs(30))
    prepared(tmp_path, tokenizer)
    assert capsys.readouterr().err == ""


def test_real_word_problems_keep_their_answers_and_hide_their_questions(
    tmp_path: Path, reference: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference / "models" / "teacher-6m")
    source = reference / "data" / "math" / "gsm8k.valid.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:300]]
    write(tmp_path / "train.jsonl", *rows)
    domain = prepared(tmp_path, tokenizer, data=Data(context=512, validation_rows=2))
    answers = {row["response"] for row in rows}
    learnt = []
    for store in stores(domain):
        taken = store.take(range(len(store)))
        for ids, starts, mask in zip(
            *(taken.column(c) for c in ("input_ids", "doc_starts", "loss_mask")), strict=True
        ):
            for part, counted in zip(
                np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True
            ):
                learnt.append(tokenizer.decode(part[np.flatnonzero(counted) + 1]))
    assert all(text.endswith("<|eos|>") for text in learnt)
    assert {text.removesuffix("<|eos|>") for text in learnt} <= answers
    assert dataclasses.asdict(domain)["num_loss_tokens"] > 10_000
