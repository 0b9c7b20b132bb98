"""The embedded corpus is the same everywhere, clean, split without leaks, and built once."""

import json
import re
from pathlib import Path

import pytest

from cluster.builtin import corpus
from cluster.builtin.corpus import DOMAINS, build_corpus, choose_documents, fingerprint
from cluster.builtin.sources import Document, Source, find_sources
from shared.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "MAX_BYTES", {"train": 90_000, "validation": 9_000})
        return build_corpus(tmp_path_factory.mktemp("cache"))


def texts(folder: Path, domain: str, side: str) -> list[str]:
    lines = (folder / "corpus" / f"{domain}.{side}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}


def test_every_domain_has_text_on_both_sides_within_its_size(folder: Path):
    manifest = json.loads((folder / "corpus" / "manifest.json").read_text())
    assert len(DOMAINS) >= 4
    assert set(manifest["domains"]) == set(DOMAINS)
    for domain in DOMAINS:
        size = sum(len(text.encode()) for text in texts(folder, domain, "train"))
        assert 60_000 <= size <= 90_000
        assert 0 < sum(len(t.encode()) for t in texts(folder, domain, "validation")) <= 9_000
    assert len(manifest["sha256"]) == 64
    assert {"python", "torch", "sympy"} <= set(manifest["packages"])


def test_no_validation_document_nearly_stands_in_the_training_text(folder: Path):
    train = set().union(*(shingles(t) for d in DOMAINS for t in texts(folder, d, "train")))
    for domain in DOMAINS:
        for text in texts(folder, domain, "validation"):
            found = shingles(text)
            assert len(found & train) <= 0.3 * len(found)


def test_the_same_files_give_the_same_bytes(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_BYTES", {"train": 90_000, "validation": 9_000})
    again = build_corpus(tmp_path)
    assert again.name == folder.name
    for path in sorted((folder / "corpus").iterdir()):
        assert path.read_bytes() == (again / "corpus" / path.name).read_bytes()


def test_a_corpus_that_exists_is_not_built_again(folder: Path, monkeypatch):
    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(corpus, "MAX_BYTES", {"train": 90_000, "validation": 9_000})
    monkeypatch.setattr(corpus, "_write_corpus", refuse)
    assert build_corpus(folder.parents[1]) == folder


def test_nothing_is_left_of_a_corpus_that_could_not_be_built(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "MIN_TRAIN_BYTES", 10**9)
    monkeypatch.setattr(corpus, "MAX_BYTES", {"train": 9_000, "validation": 900})
    with pytest.raises(DataError, match="built-in domain python"):
        build_corpus(tmp_path)
    (folder,) = (tmp_path / "default").iterdir()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_another_size_of_a_file_is_another_corpus(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text("a = 1\n")
    sources = {"python": Source((("a.py", path),), lambda files: iter(()))}
    before = fingerprint(sources)
    path.write_text("a = 12\n")
    assert fingerprint(sources) != before


def test_a_document_that_repeats_another_is_dropped(monkeypatch):
    story = " ".join(f"word{i}" for i in range(200))
    fresh = " ".join(f"other{i}" for i in range(200))

    def read(_):
        yield Document("a", story)
        yield Document("b", story + " and a different ending")
        yield Document("c", fresh)
        yield Document("is it", "too short")

    monkeypatch.setattr(corpus, "DOMAINS", ("stories",))
    monkeypatch.setattr(corpus, "MIN_TRAIN_BYTES", 1)
    monkeypatch.setattr(corpus, "is_validation", lambda key: key == "c")
    sides = choose_documents({"stories": Source((), read)})["stories"]
    assert [d.key for d in sides["train"]] == ["a"]
    assert [d.key for d in sides["validation"]] == ["c"]


def test_python_text_has_no_docstrings_and_still_parses(tmp_path: Path):
    path = tmp_path / "a.py"
    body = "def double(x):\n    '''Twice.'''\n    return 2 * x\n\n\n" * 12
    path.write_text(f'"""About.\n\nMore.\n"""\n\n{body}class Empty:\n    """Only this."""\n')
    (document,) = find_sources()["python"].read([("a.py", path)])
    assert "Twice" not in document.text
    assert "About" not in document.text
    namespace: dict = {}
    exec(compile(document.text, "a.py", "exec"), namespace)
    assert namespace["double"](4) == 8


def test_paragraphs_that_licences_share_are_kept_once(tmp_path: Path):
    files = []
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_text(f"Copyright {name * 3}\n\nPermission is  granted,\nfree of charge.\n")
        files.append((name, path))
    found = "".join(d.text for d in find_sources()["legal"].read(files))
    assert found.count("Permission") == 1
    assert found.count("Copyright") == 2


@pytest.mark.parametrize("carrier", ["carrier/_vendor", "site-packages/carrier/files"])
def test_what_another_package_carries_inside_is_no_source(tmp_path: Path, monkeypatch, carrier):
    """A part of it may put such copies on the path, as setuptools and Ray do, once it is
    imported."""
    find_sources.cache_clear()
    before = fingerprint(find_sources())
    inside = tmp_path / carrier
    copy = inside / "torch-1.0.dist-info"
    copy.mkdir(parents=True)
    (copy / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    (copy / "LICENSE").write_text("Another licence.")
    (copy / "RECORD").write_text("torch-1.0.dist-info/LICENSE,,\n")
    monkeypatch.syspath_prepend(inside)
    find_sources.cache_clear()
    assert fingerprint(find_sources()) == before
