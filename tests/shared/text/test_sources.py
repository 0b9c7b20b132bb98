"""Reading text, and saying what is wrong with it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config.domains import HubDataset
from shared.errors import DataError
from shared.text.documents import Document, Message
from shared.text.files import source_files
from shared.text.sources import digest_sources, read_documents


def write(path: Path, *rows: object) -> Path:
    """A .jsonl file; strings are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def read(root: Path, *sources: str | HubDataset, columns: dict | None = None) -> list[Document]:
    """All documents."""
    return list(read_documents(sources, root=root, columns=columns or {}))


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_the_three_kinds_of_rows_are_read_with_their_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"text": "one", "licence": "MIT"},
        "",
        {"prompt": "p", "response": "r", "text": None},
        {"messages": TURNS},
    )
    assert read(tmp_path, "a.jsonl") == [
        Document("text", f"{file}:1", text="one"),
        Document("pair", f"{file}:3", prompt="p", response="r"),
        Document(
            "messages", f"{file}:4", messages=(Message("user", "hi"), Message("assistant", "hello"))
        ),
    ]


def test_columns_rename_fields(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"question": "p", "answer": "r"})
    (found,) = read(tmp_path, "a.jsonl", columns={"prompt": "question", "response": "answer"})
    assert (found.kind, found.prompt, found.response) == ("pair", "p", "r")


def test_a_folder_gives_every_visible_file_in_order_and_text_files_whole(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.jsonl", {"text": "rows"})
    (tmp_path / "d" / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "d" / "c" / "deep.md").parent.mkdir()
    (tmp_path / "d" / "c" / "deep.md").write_text("# é")
    (tmp_path / "d" / ".hidden").write_bytes(b"\xff")
    assert [d.text for d in read(tmp_path, "d")] == ["x = 1\ny = 2\n", "rows", "# é"]


def test_globs_and_absolute_paths_and_lists_of_sources(tmp_path: Path) -> None:
    write(tmp_path / "m" / "x.train.jsonl", {"text": "x"})
    write(tmp_path / "m" / "y.train.jsonl", {"text": "y"})
    write(tmp_path / "m" / "y.valid.jsonl", {"text": "z"})
    absolute = str(tmp_path / "m" / "y.valid.jsonl")
    assert [d.text for d in read(tmp_path, "**/*.train.jsonl", absolute)] == ["x", "y", "z"]


def test_parquet_rows_are_read_as_json_rows_are(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "messages": [TURNS, TURNS], "text": [None, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": TURNS})
    from_parquet, from_json = read(tmp_path, "a.parquet"), read(tmp_path, "a.jsonl")
    assert [d.messages for d in from_parquet] == [d.messages for d in from_json]
    assert from_parquet[1].where.endswith("a.parquet:2")


def test_a_table_of_parquet_says_which_rows_are_not_learnt(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "weight": [0.0, 1.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    silent: list[str] = []
    told = {"columns": {}, "silent": lambda: silent.append("a")}
    found = read_documents(["a.parquet"], root=tmp_path, **told)
    assert [(d.text, d.unread) for d in found] == [("b", ())]
    assert silent == ["a"]


def test_a_dataset_is_read_from_a_saved_folder_and_from_a_folder_of_files(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["p", "q"], "response": ["r", "s"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "files" / "train.parquet")
    for name in ("saved", "files"):
        found = read(tmp_path, HubDataset(dataset=name))
        assert [(d.prompt, d.response) for d in found] == [("p", "r"), ("q", "s")]
        assert found[1].where == f"{name}[train]:2"
        digests = [digest_sources([HubDataset(dataset=name)], root=tmp_path) for _ in range(2)]
        assert digests[0] == digests[1]


def test_a_dataset_that_does_not_exist_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="'no/such-set', split 'train', cannot be loaded") as error:
        read(tmp_path, HubDataset(dataset="no/such-set"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("[" * 100_000, r"a.jsonl:2 is nested too deeply"),
        ('{"text": "a"', r"a.jsonl:2 is no JSON .*column"),
        ("[1, 2]", r"a.jsonl:2 is a list, not an object"),
        ({"body": "x", "id": 3}, r"a.jsonl:2 has no text, .*it has body, id"),
        ({"prompt": "x"}, r"a.jsonl:2 has no .*it has prompt"),
        ({}, r"a.jsonl:2 has no .*it is empty"),
        ({"text": 7}, r"a.jsonl:2: text is int 7, not a string"),
        ({"prompt": "x", "response": ["y"]}, r"a.jsonl:2: response is a list"),
        ({"messages": "hi"}, r"a.jsonl:2: messages is str 'hi', not a list"),
        ({"messages": []}, r"a.jsonl:2: messages is an empty list"),
        ({"messages": [{"role": "user"}]}, r"message 1 is not an object with role and content"),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
            r"content of message 2 is null",
        ),
        ({"messages": [{"role": None, "content": "x"}]}, r"role of message 1 is null"),
        ({"messages": [{"role": " ", "content": "x"}]}, r"role of message 1 is empty; name who"),
        (
            {"messages": [{"role": "model", "parts": [{"text": "x"}]}]},
            r"message 1 is not an object with role and content, it has role, parts",
        ),
        ({"messages": {"role": "user", "content": "x"}}, r"messages is a dict, not a list of role"),
        (
            {"messages": [{"role": "tool", "content": [{"city": "Oslo"}]}]},
            r"content of message 1 has a part without a text; only text is read",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": "f(x)"}]},
            r"tool_calls of message 2 is str 'f\(x\)', not a list of objects",
        ),
        ({"messages": [TURNS[0], TURNS[1] | {"skip": True}]}, r"message 2 has skip: True, which"),
        ({"x" * 200: 1, **dict.fromkeys("abcdefghijklmn", 1)}, r"x{40}, a, .*, k, 3 more: name"),
        ({"text": None}, r"a.jsonl:2: text is null; write a string, or leave the row out"),
        ({"prompt": "x", "response": None}, r"a.jsonl:2: response is null"),
        ({"messages": None, "id": 1}, r"a.jsonl:2: messages is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"content of message 1 has a part of type 'image_url'; only text is read",
        ),
        ('{"text": "a\tb"}', r"is no JSON \(Invalid control character at column 12\)"),
        ({"messages": TURNS, "tools": {"name": "f"}}, r"tools is a dict, not a list of objects"),
        ({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}, r"message 2 has weight: 0.5"),
        (
            {"messages": [TURNS[0], TURNS[1] | {"mask": 1}]},
            r"message 2 has mask: 1, which says",
        ),
        (
            {"messages": [TURNS[0], TURNS[1] | {"train": True, "masked": True}]},
            r"message 2 says both that it is learnt and that it is not",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]},
            r"has a system field and opens with a system message",
        ),
        ('{"text": "\\ud800"}', r"a.jsonl:2: text holds half a surrogate pair"),
        ({"text": "a\ufdd0"}, r"a.jsonl:2: text holds U\+FDD0, which is no character, no valid"),
        ({"prompt": [TURNS[0]], "response": 3}, r"response is int 3, not a list of role and cont"),
        ({"messages": [["hi", "ho"]]}, r"message 1 is a list, not an object with role and content"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, row: object, says: str
) -> None:
    write(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(DataError, match=says) as error:
        read(tmp_path, "a.jsonl")
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 0xe9 at 3, which Latin-1"):
        read(tmp_path, "a.txt")
    (tmp_path / "b.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"b\.jsonl:1 is not UTF-8 \(it is UTF-16\)"):
        read(tmp_path, "b.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not UTF-8"):
        read(tmp_path, "a.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ok"}\n')
    assert [d.text for d in read(tmp_path, "a.jsonl")] == ["ok"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("data/maths/gsm8k.jsonl", r"does not exist; .*data has math"),
        ("data/math/gsm9k.jsonl", r"does not exist; .*math has gsm8k\.jsonl"),
        ("data/math/*.parquet", r"matches no file; .*math has gsm8k\.jsonl"),
        ("data/empty", r"is a folder without files"),
        (
            "data/table.xlsx",
            r"is a \.xlsx file, which is not read; rows are read from",
        ),
        ("data/t.jsonl.xz", r"is a \.xz file, which is not read"),
        ("data/t.parquet.gz", r"is a \.parquet\.gz file, which is not read"),
        ("data/saved", r"was written by `save_to_disk` .* name it as a dataset: {dataset: saved}"),
        ("data/about", r"has nothing to learn from, only README\.md"),
    ],
)
def test_a_missing_source_names_what_is_there(tmp_path: Path, source: str, says: str) -> None:
    write(tmp_path / "data" / "math" / "gsm8k.jsonl", {"text": "x"})
    (tmp_path / "data" / "empty").mkdir()
    for name in ("table.xlsx", "t.jsonl.xz", "t.parquet.gz", "saved/state.json", "about/README.md"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("a,b\n")
    with pytest.raises(DataError, match=says):
        source_files(source, root=tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"a\.parquet is not readable as Parquet"):
        read(tmp_path, "a.parquet")


def test_a_digest_follows_content_and_not_names(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "x"})
    write(tmp_path / "b.jsonl", {"text": "x"})
    one, two = (digest_sources([name], root=tmp_path) for name in ("a.jsonl", "b.jsonl"))
    assert one == two
    write(tmp_path / "b.jsonl", {"text": "y"})
    assert digest_sources(["b.jsonl"], root=tmp_path) != one
