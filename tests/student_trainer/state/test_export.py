"""What an export names outlasts the job that made it."""

import json
from pathlib import Path

import pytest

from student_trainer.state.export import name_base

COPY = "/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_0123"


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (f"{COPY}/models/base", "models/base"),
        ("/mnt/models/base", "/mnt/models/base"),
        ("some/model", "some/model"),
        (None, None),
    ],
)
def test_an_adapters_base_is_named_as_the_user_did(tmp_path: Path, base: str, named: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    name_base(tmp_path)
    assert json.loads(path.read_text()) == {"base_model_name_or_path": named, "r": 2}


def test_a_whole_model_has_no_base(tmp_path: Path) -> None:
    name_base(tmp_path)
    assert not [*tmp_path.iterdir()]
