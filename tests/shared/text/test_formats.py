"""Files that are not what their names say, and rows that their format would hide."""

import codecs
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import DataError
from shared.text.documents import Document
from shared.text.sources import read_documents

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def read(root: Path, name: str, content: bytes) -> list[Document]:
    (root / name).write_bytes(content)
    return list(read_documents([name], root=root, columns={}))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt;response\na;b\n", "semicolons between .* has commas; write it with c"),
        ("a.csv", b"prompt\tresponse\na\tb\n", "has tabs between .* rename it to end in .tsv"),
        ("a.tsv", b"prompt,response\na,b\n", "has commas between .* rename it to end in .csv"),
        ("a.csv", b"prompt|response\na|b\n", "has bars between its columns"),
        ("a.csv", b"text,id,text\na,1,b\n", "has two columns named 'text'; rename one"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl:1 has 'text' twice"),
        ("a.json", b'[{"text": "a", "text": "b"}]', r"a\.json has 'text' twice"),
        *((f"a{end}", LFS, "is a pointer of Git LFS") for end in (".jsonl", ".txt", ".parquet")),
        ("a.txt", "plain".encode("utf-16-le"), "it is UTF-16 without a mark, by its zero bytes"),
        ("a.txt", "plain ä".encode("utf-16-be"), "it is UTF-16 without a mark"),
        ("a.txt", "plain".encode("utf-32-le"), "it is UTF-32 without a mark"),
        ("a.txt", "plain".encode("utf-32"), "is not UTF-8 .it is UTF-32.; convert it, as `iconv"),
        ("a.txt", "plain".encode("utf-16"), "is not UTF-8 .it is UTF-16.; convert it"),
        (
            "a.jsonl",
            '{"text": "a"}\n'.encode("utf-16-le"),
            r"a\.jsonl:1 is not UTF-8 .it is UTF-16 w",
        ),
        ("a.csv", "text\na\n".encode("utf-32-be"), r"a\.csv:1 is not UTF-8 .it is UTF-32 without"),
        ("a.csv", "text\na\ncafé\n".encode("latin-1"), r"a\.csv:3 is not .* 0xe9 at 3, .* Latin-1"),
        ("a.txt", b"a\0b plain text", "is not UTF-8 .it holds zero bytes, as binary files do"),
        ("a.txt", "a\ufdd0b".encode(), r"holds U\+FDD0, which is no character of a text"),
        ("a.psv", b"text|id\na|1\n", r"is a \.psv file, which is not read; rows are read from"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"is not UTF-8 .it is compressed, .* in .gz says.; rename it so, or name the text",
        ),
        ("a.txt", b"PK\x03\x04\xff", "is no text .it is a .zip or Office file.; convert it"),
        ("a.txt", b"PK\x03\x04plain", "is no text .it is a .zip or Office file.; convert it"),
        ("a.jsonl", b"PK\x03\x04\xff", "is not UTF-8 .it is a .zip or Office file.; convert it"),
        ("a.txt", b"%PDF-1.4 plain", "is no text .it is a PDF.; convert it"),
        ("a.txt", rb"{\rtf1 plain}", "is no text .it is RTF.; convert it"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "is not UTF-8 .it is a PNG image."),
        ("a.txt", b"\xff\xd8\xff\xe0", "is not UTF-8 .it is a JPEG image."),
        ("a", b"\x7fELF\x02\0\0", "is not UTF-8 .it is a program."),
        (
            "a.txt.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0),
            r"rename it to end in \.jsonl\.gz",
        ),
        (
            "a.json",
            b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            "several .* train",
        ),
        ("a.json", b"", r"a\.json is no JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl:1 has a number of too"),
        ("a.json", b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", "a.json has a number of too"),
        ("a.jsonl", b'[\n{"text": "a"}\n]\n', "a.jsonl:1 is no JSON .* several is named .json"),
        ("a.parquet", b"PAR1" + bytes(9) + b"PAR1", "a.parquet is not readable as Parquet"),
    ],
)
def test_what_a_file_is_instead_is_said(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    with pytest.raises(DataError, match=says) as error:
        read(tmp_path, name, content)
    assert "\n" not in str(error.value)


def test_one_column_may_hold_other_separators(tmp_path: Path) -> None:
    found = read(tmp_path, "a.csv", b'text\na;b\n"c, d"\n')
    assert [d.text for d in found] == ["a;b", "c, d"]


def test_a_json_object_is_a_row_or_holds_rows_beside_what_is_said_of_them(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "a.json", json.dumps({"messages": TURNS}, indent=1).encode())
    assert [m.content for m in row.messages] == ["hi", "ho"]
    told = {"version": "1.0", "data": [{"text": "a"}, {"text": "b"}]}
    assert [d.text for d in read(tmp_path, "b.json", json.dumps(told).encode())] == ["a", "b"]


def test_rows_by_line_may_begin_with_a_byte_order_mark_under_either_name(tmp_path: Path) -> None:
    raw = codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "b"}\n'
    for name in ("a.json", "a.jsonl"):
        assert [d.text for d in read(tmp_path, name, raw)] == ["a", "b"]


def test_a_table_of_parquet_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{n * n:x}" for n in range(3000)]}), whole)
    raw = bytearray(whole.getvalue())
    raw[2000:2100] = bytes(100)
    no_text = pa.Array.from_buffers(  # bytes that the file says are text
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": no_text}), tmp_path / "b.parquet")
    for name, content in (("a", bytes(raw)), ("b", (tmp_path / "b.parquet").read_bytes())):
        with pytest.raises(DataError, match=rf"{name}.parquet is not readable as Parquet"):
            read(tmp_path, f"{name}.parquet", content)


def test_frames_of_zstandard_follow_each_other(tmp_path: Path) -> None:
    raw = b"".join(
        pa.compress(f'{{"text": "{n}"}}\n'.encode(), "zstd", asbytes=True) for n in range(3)
    )
    assert [d.text for d in read(tmp_path, "a.jsonl.zst", raw)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\n\r\n  \n"), ("a.csv", b""), ("a.csv", b"text\n")],
)
def test_files_without_a_row_give_none(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, name, content) == []


def test_a_table_of_parquet_without_our_columns_is_refused_by_its_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1 has no text, .*it has body, id"):
        list(read_documents(["a.parquet"], root=tmp_path, columns={}))


def test_turns_may_be_a_list_of_objects_or_an_object_of_lists(tmp_path: Path) -> None:
    columns = {"from": ["human", "gpt"], "value": ["hi", "ho"]}
    table = pa.table({"conversations": [columns], "messages": pa.nulls(1)})
    pq.write_table(table, tmp_path / "a.parquet")
    (found,) = read_documents(["a.parquet"], root=tmp_path, columns={})
    assert [(m.role, m.content) for m in found.messages] == [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize(("end", "codec"), [(".gzip", "gzip"), (".zstd", "zstd")])
def test_long_names_of_compressions_are_read_too(tmp_path: Path, end: str, codec: str) -> None:
    content = pa.compress(b'{"text": "a"}\n', codec=codec, asbytes=True)
    (document,) = read(tmp_path, f"a.JSONL{end}", content)
    assert document.text == "a"


@pytest.mark.parametrize("mark", ["NaN", "nan", "null", "NULL", "None", "<NA>", "\\N", " nan "])
def test_a_cell_that_a_program_writes_for_a_missing_one_is_no_text(tmp_path, mark: str) -> None:
    """In a table; as a string of JSON it is what it says."""
    header, row = b"prompt,input,response,text\n", f"a,{mark},b,{mark}\n".encode()
    (found,) = read(tmp_path, "a.csv", header + row)
    assert (found.prompt, found.response, found.unread) == ("a", "b", ())
    with pytest.raises(DataError, match=r"a\.csv:3: response is null; .* \.jsonl words"):
        read(tmp_path, "a.csv", header + row + f"a,,{mark},\n".encode())
    with pytest.raises(DataError, match=r"b\.tsv:2: text is null"):
        read(tmp_path, "b.tsv", f"id\ttext\n1\t{mark}\n".encode())
    line = json.dumps({"prompt": "a", "response": mark})
    assert read(tmp_path, "a.jsonl", line.encode())[0].response == mark
    assert read(tmp_path, "c.csv", f"text\nis {mark} a number\n".encode())[0].text.startswith("is")
