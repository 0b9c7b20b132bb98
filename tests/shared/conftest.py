"""Parts shared by the tests of `shared`."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder: Path):
    """The tiny tokenizer, without a chat template."""
    return AutoTokenizer.from_pretrained(folder)
