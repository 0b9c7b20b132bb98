"""Which files a source stands for, and rows in every format that is read."""

import bz2
import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import DataError
from shared.text.documents import Document
from shared.text.files import left_out, source_files
from shared.text.sources import digest_sources, num_bytes, read_documents

ROWS = [{"prompt": "p é", "response": 'r, "x"\nand'}, {"prompt": "q", "response": "s"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_table(path: Path, *, delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write(path: Path) -> None:
    """The rows as a file's name says."""
    name = path.name.lower()
    if name.endswith(".csv"):
        write_table(path)
    elif name.endswith(".tsv"):
        write_table(path, delimiter="\t")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(LINES))
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(LINES)
    else:
        path.write_bytes(LINES)


def read(root: Path, source: str) -> list[Document]:
    return list(read_documents([source], root=root, columns={}))


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.json", "a.JSON", "a.csv", "a.CSV"),
        *("a.tsv", "a.parquet", "a.PARQUET", "a.jsonl.gz", "a.Jsonl.GZ", "a.jsonl.zst"),
        *("a.jsonl.bz2", "a.train.jsonl.gz"),
    ],
)
def test_rows_are_the_same_in_every_format(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    found = [(d.kind, d.prompt, d.response) for d in read(tmp_path, name)]
    assert found == [("pair", row["prompt"], row["response"]) for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS[0]),
        LINES.decode(),
        json.dumps({"data": ROWS[:1]}),
        json.dumps(ROWS[0], indent=2),
    ],
)
def test_a_json_file_is_a_list_an_object_with_one_or_rows_by_line(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path, "a.json")[0].prompt == "p é"


def test_a_table_of_conversations_holds_them_as_json(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "text"], [json.dumps(turns), ""], ["", "plain"]])
    chat, plain = read(tmp_path, "a.csv")
    assert [(m.role, m.content) for m in chat.messages] == [("user", "hi"), ("assistant", "ho")]
    assert plain.text == "plain"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt,response\na\n", r"a\.csv:2 has 1 cells under a header of 2"),
        ("a.csv", b'prompt,response\n"a" b,c\n', r"a\.csv:2 is no row of a table"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', r"a\.json is no JSON .* at line 2, column"),
        ("a.json", b'"text"', r"holds no list of rows"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read \(.*header"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:30],
            r"a\.jsonl\.gz cannot be read \(Truncated",
        ),
        ("a.txt", LINES, r"a\.txt holds JSON rows under the name of a text; rename it"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read(tmp_path, name)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set as it lies on a hub, and what editors leave."""
    write(tmp_path / "a.jsonl")
    write(tmp_path / "B.JSONL")
    (tmp_path / "story.txt").write_text("once")
    about = (
        "README.md",
        "LICENSE",
        "license-code.txt",
        "readme_zh.md",
        "dataset_infos.json",
        "Thumbs.db",
    )
    for name in (*about, "a.jsonl~", "a.jsonl.bak", "#a.txt#", "#a.jsonl#.swp", ".gitattributes"):
        (tmp_path / name).write_text('{"text": "about"}')
    return tmp_path


def names(folder: Path, source: str) -> list[str]:
    return [path.name for path in source_files(source, root=folder)]


def test_what_is_about_the_data_and_backups_are_no_data(folder: Path) -> None:
    assert names(folder, ".") == ["B.JSONL", "a.jsonl", "story.txt"]
    assert names(folder, "*") == ["B.JSONL", "a.jsonl", "story.txt"]
    assert names(folder, "a.*") == ["a.jsonl"]
    out = sorted(path.name for path in left_out(".", root=folder))
    assert out[:3] == ["#a.jsonl#.swp", "#a.txt#", "LICENSE"]
    assert len(out) == 10


@pytest.mark.parametrize(
    "name", ["a.jsonl.1", "a.jsonl~1", "a.jsonl_old", "a.dat", "a.jl", "a.txt"]
)
@pytest.mark.parametrize("content", ['{"text": "a"}\n', '[{"text": "a"}]', '{\n "text": "a"\n}'])
def test_rows_are_never_read_as_a_text_whatever_their_name(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="holds JSON rows under the name of a text"):
        list(read_documents([name], root=tmp_path, columns={}))


def test_a_glob_matches_both_cases_of_a_suffix_and_what_it_names(folder: Path) -> None:
    assert names(folder, "*.jsonl") == ["B.JSONL", "a.jsonl"]
    assert names(folder, "[ABab].jsonl") == ["B.JSONL", "a.jsonl"]
    assert names(folder, "README*") == ["README.md"]
    assert names(folder, "README.md") == ["README.md"]


ABOUT = (
    *("README", "readme.txt", "README.en.md", "dataset_readme.md", "CHANGELOG.md", "changelog"),
    *("LICENCE.txt", "LICENSE-MIT", "LICENSE.MIT", "LICENSE-2.0.txt", "MIT-LICENSE.txt", "COPYING"),
    *("COPYING.LESSER", "ThirdPartyNotices.txt", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md"),
    *("SECURITY.md", "AUTHORS", "HISTORY.md", "CITATION.cff", "CITATION.bib", "MANIFEST.in"),
    *("dataset_card.md", "model-card.md", "DATASHEET.md", "metadata.json", "metadata.yaml"),
    *("dataset_info.json", "croissant.json", "stats.json", "SHA256SUMS", "SHA256SUMS.gpg"),
    *("md5sums.txt", "checksums.txt", "a.jsonl.sha256", "a.jsonl.md5", "a.jsonl.dvc"),
    *("_SUCCESS", "_metadata", "_common_metadata", "_committed_42", "_started_42", "part-0.crc"),
    *("a.jsonl.crdownload", "a.jsonl:Zone.Identifier"),
)
DATA = (
    *("license.py", "readme.jsonl", "citations.csv", "noticed.txt", "history.txt", "security.md"),
    *("changes.txt", "authors.txt", "driver_license.txt", "sums.txt", "checksum.py", "_part.py"),
    *("__init__.py", "metadata.jsonl", "metadata.csv", "data.json", "train.json", "notice.py"),
)


@pytest.mark.parametrize("name", ABOUT)
def test_what_lies_beside_data_on_a_hub_or_from_spark_is_left_out(
    tmp_path: Path, name: str
) -> None:
    for one in (name, "a.jsonl"):
        (tmp_path / one).write_text('{"text": "a"}')
    assert names(tmp_path, ".") == names(tmp_path, "*") == ["a.jsonl"]
    assert [path.name for path in left_out(".", root=tmp_path)] == [name]
    assert names(tmp_path, name) == [name]


def test_links_lead_to_data_once_and_never_to_nothing(tmp_path: Path) -> None:
    real = tmp_path / "real"
    for name in ("real/far.jsonl", "data/near.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name)
    data = tmp_path / "data"
    (data / "other").symlink_to(real)
    (data / "round").symlink_to(data)
    (data / "second.jsonl").symlink_to(data / "near.jsonl")
    for source in ("data", "data/**/*.jsonl"):
        assert sorted(names(tmp_path, source)) == ["far.jsonl", "near.jsonl"]
    (data / "gone.jsonl").symlink_to(tmp_path / "blob")
    for source in ("data", "data/*.jsonl", "data/gone.jsonl"):
        with pytest.raises(DataError, match=r"gone.jsonl is a link to nothing, .*blob; mend"):
            names(tmp_path, source)


def test_brackets_of_a_folder_that_there_is_are_its_name(tmp_path: Path) -> None:
    (tmp_path / "part[1]").mkdir()
    write(tmp_path / "part[1]" / "a.jsonl")
    assert names(tmp_path, "part[1]/*.jsonl") == names(tmp_path, "part[1]") == ["a.jsonl"]


def test_what_is_neither_file_nor_folder_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        names(tmp_path, "pipe")


def test_data_and_code_by_such_names_are_read(tmp_path: Path) -> None:
    for name in DATA:
        write(tmp_path / name)
    assert sorted(names(tmp_path, ".")) == sorted(DATA)


def test_logs_and_scraps_of_other_programs_are_left_out(tmp_path: Path) -> None:
    for name in ("_delta_log/0.json", "_temporary/0/b.json", "part/c.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "a"}')
    assert names(tmp_path, ".") == names(tmp_path, "**/*.json") == ["c.json"]
    assert names(tmp_path, "_delta_log") == ["0.json"]


def test_a_digest_follows_the_format_and_not_the_case(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.JSONL", "c.ndjson.py"):
        (tmp_path / name).write_bytes(LINES)
    one, two, text = (digest_sources([n], root=tmp_path) for n in ("a.jsonl", "b.JSONL", "*.py"))
    assert one == two != text


def test_the_size_of_compressed_text_is_not_known(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz"):
        write(tmp_path / name)
    assert num_bytes(["a.jsonl"], root=tmp_path) == len(LINES)
    assert num_bytes(["a.jsonl", "b.jsonl.gz"], root=tmp_path) is None
