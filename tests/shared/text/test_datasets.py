"""Hugging Face datasets as a domain's text: every field of a source counts."""

from pathlib import Path
from typing import Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config.run import Domain
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
    source = {"dataset": "set", "config": "long", "split": "test"}
    fields = {"train": "notes.txt", "columns": {"text": "body"}, split: source}
    assert texts(folder, Domain.model_validate(fields), split) == ["of long-test"]
    fields[split] = {"dataset": "set", "config": "short"}
    assert texts(folder, Domain.model_validate(fields), split) == ["of short"]


@pytest.mark.parametrize("split", SPLITS)
def test_sources_of_all_kinds_stand_side_by_side(folder, split):
    both = [{"dataset": "set", "config": "long", "split": "test"}, "*.txt"]
    fields = {"train": both, "validation": both, "columns": {"text": "body"}}
    assert texts(folder, Domain.model_validate(fields), split) == ["of long-test", "of a file"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_revision_goes_to_the_hub(folder, split, listed, monkeypatch):
    """No hub can be asked here: what it would be asked for is the outcome."""
    asked = []

    def load_dataset(name: str, config: str | None, **options: object) -> list[dict]:
        asked.append((name, config, options))
        return [{"text": "of the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"dataset": "some/set", "revision": "v1"}
    fields = {"train": "notes.txt", split: [source] if listed else source}
    assert texts(folder, Domain.model_validate(fields), split) == ["of the hub"]
    assert asked == [("some/set", None, {"split": "train", "revision": "v1"})]
