"""Hugging Face datasets as a domain's text: every field of a source counts."""

from pathlib import Path
from typing import Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config.domains import Domain, HubDataset
from shared.errors import DataError
from shared.text.sources import read_documents, sources_of

CARD = """---
configs:
- config_name: long
  data_files:
  - {split: train, path: long.parquet}
  - {split: test, path: long-test.parquet}
- config_name: short
  data_files: short.parquet
---
"""
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two configurations, one of which has two splits, and a file beside it."""
    (tmp_path / "set").mkdir()
    for name in ("long", "long-test", "short"):
        pq.write_table(pa.table({"body": [f"of {name}"]}), tmp_path / "set" / f"{name}.parquet")
    (tmp_path / "set" / "README.md").write_text(CARD)
    (tmp_path / "notes.txt").write_text("of a file")
    return tmp_path


def texts(folder: Path, domain: Domain, split: Literal["train", "validation"]) -> list[str]:
    sources = sources_of(domain, split)
    return [d.text for d in read_documents(sources, root=folder, columns=domain.columns)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_dataset_is_read_as_the_config_describes_it(folder, split):
    source = HubDataset(dataset="set", config="long", split="test")
    fields = {"train": "notes.txt", "columns": {"text": "body"}, split: source}
    assert texts(folder, Domain.model_validate(fields), split) == ["of long-test"]
    fields[split] = HubDataset(dataset="set", config="short")
    assert texts(folder, Domain.model_validate(fields), split) == ["of short"]


@pytest.mark.parametrize("split", SPLITS)
def test_sources_of_all_kinds_stand_side_by_side(folder, split):
    both = [HubDataset(dataset="set", config="long", split="test"), "*.txt"]
    domain = Domain(train=both, validation=both, columns={"text": "body"})
    assert texts(folder, domain, split) == ["of long-test", "of a file"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_revision_goes_to_the_hub(folder, split, listed, monkeypatch):
    """No hub can be asked here: what it would be asked for is the outcome."""
    asked = []

    def load_dataset(name: str, config: str | None, **options: object) -> datasets.Dataset:
        asked.append((name, config, options))
        return datasets.Dataset.from_list([{"text": "of the hub"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubDataset(dataset="some/set", revision="v1")
    fields = {"train": "notes.txt", split: [source] if listed else source}
    assert texts(folder, Domain.model_validate(fields), split) == ["of the hub"]
    assert asked == [("some/set", None, {"split": "train", "revision": "v1"})]


def test_a_saved_dataset_has_whole_splits_alone(tmp_path):
    rows = datasets.Dataset.from_list([{"text": f"row {n}"} for n in range(9)])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "two"))
    for name, split in (("one", "train"), ("two", "train"), ("two", "test")):
        source = HubDataset(dataset=name, split=split)
        assert len(list(read_documents([source], root=tmp_path, columns={}))) == 9
    for name, told, said in (
        ("one", {"split": "train[:5]"}, r"\(train\) and nothing of split 'train\[:5\]'"),
        ("one", {"split": "test"}, "nothing of split 'test'; name one of them"),
        ("one", {"revision": "main"}, "nothing of the revision 'main'"),
        ("two", {"split": "test[5:]"}, r"\(train, test\) and nothing of split 'test\[5:\]'"),
    ):
        source = HubDataset(dataset=name, **told)
        with pytest.raises(DataError, match=said):
            list(read_documents([source], root=tmp_path, columns={}))


def test_columns_that_are_not_read_are_counted_and_not_decoded(tmp_path):
    """An image would need a decoder, and these bytes are none."""
    rows = {"text": ["a"], "image": [{"bytes": b"no image", "path": None}]}
    images = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    images.save_to_disk(str(tmp_path / "set"))
    domain = Domain.model_validate({"train": {"dataset": "set"}})
    (found,) = read_documents(sources_of(domain, "train"), root=tmp_path, columns={})
    assert (found.text, found.unread) == ("a", ("image",))
    with pytest.raises(DataError, match=r"set\[train\]:1 has no body, .*it has image, text"):
        list(read_documents(sources_of(domain, "train"), root=tmp_path, columns={"text": "body"}))


def test_turns_that_a_dataset_keeps_as_an_object_of_lists_are_read(tmp_path):
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features({"conversations": datasets.Sequence(turn)})
    turns = {"from": ["human", "gpt"], "value": ["hi", "ho"]}
    datasets.Dataset.from_dict({"conversations": [turns]}, features=features).save_to_disk(
        str(tmp_path / "set")
    )
    domain = Domain.model_validate({"train": {"dataset": "set"}})
    (found,) = read_documents(sources_of(domain, "train"), root=tmp_path, columns={})
    assert [(m.role, m.content) for m in found.messages] == [("user", "hi"), ("assistant", "ho")]


def test_a_saved_dataset_without_a_row_is_named_and_bars_no_other_split(tmp_path):
    empty = datasets.Dataset.from_dict({"text": []})
    empty.save_to_disk(str(tmp_path / "one"))
    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": rows, "test": empty}).save_to_disk(str(tmp_path / "two"))
    for name, split in (("one", "train"), ("two", "test")):
        source = HubDataset(dataset=name, split=split)
        said = f"dataset '{name}' was written by `save_to_disk` without a row in split '{split}'; w"
        with pytest.raises(DataError, match=said):
            list(read_documents([source], root=tmp_path, columns={}))
    assert texts(tmp_path, Domain(train=HubDataset(dataset="two")), "train") == ["a"]
