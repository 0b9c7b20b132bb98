"""Augmentation in a config: what it needs, and what has no meaning beside it."""

import pytest
from pydantic import ValidationError

from tests.shared.config.test_run import config

HALF = {"share": 0.5}


def test_nothing_is_changed_unless_a_share_is_named():
    assert not config().augmentation.applies
    assert config(augmentation=HALF).augmentation.applies


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"augmentation": HALF | {"replace": 0, "swap": 0, "delete": 0}},
            "replace, swap and delete are 0",
        ),
        ({"augmentation": {"share": 1.5}}, "augmentation.share"),
        (
            {"augmentation": HALF, "losses": [{"kind": "cross_entropy"}]},
            "is 0.5, but no loss asks a teacher",
        ),
        (
            {"augmentation": HALF, "source": "student"},
            "but source has student 1; set source=dataset",
        ),
        (
            {"augmentation": HALF, "targets": {"store": "s", "teacher_free": True}},
            "targets.teacher_free leaves no teacher",
        ),
        (
            {"augmentation": HALF, "cross_tokenizer": "aligned"},
            "cross_tokenizer is aligned, whose teacher has rows of its own",
        ),
        (
            {"augmentation": HALF, "task": "image_text", "data": {"too_long": "drop"}},
            "task is image_text, whose images stand in the text",
        ),
        ({"weighting": {"policy": "reinforced"}}, "but augmentation.share is 0"),
        ({"augmentation": HALF, "weighting": {"policy": "reinforced", "start": 0}}, "start"),
        ({"augmentation": HALF, "weighting": {"policy": "reinforced", "every": 0}}, "every"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        config(**options)
