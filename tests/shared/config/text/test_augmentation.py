"""Augmentation in a config: what it needs, and what has no meaning beside it."""

import pytest
from pydantic import ValidationError

from tests.shared.config.test_run import config

HALF = {"share": 0.5}


def test_nothing_is_changed_unless_a_share_is_named():
    assert not config().augmentation.applies
    assert config(augmentation=HALF).augmentation.applies


def test_a_teacher_fills_masks_where_a_share_of_documents_has_some():
    assert not config(augmentation=HALF).augmentation.fills
    assert not config(augmentation={"mask": 0.2}).augmentation.fills
    rules = {"replace": 0, "swap": 0, "delete": 0}
    filled = config(augmentation=HALF | {"mask": 0.2, "copies": 3} | rules).augmentation
    assert filled.fills
    assert not filled.by_rules.fills
    assert (filled.by_rules.share, filled.by_rules.replace) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"augmentation": HALF | {"replace": 0, "swap": 0, "delete": 0}},
            "mask, replace, swap and delete are 0",
        ),
        (
            {"augmentation": HALF | {"copies": 2}},
            "copies is 2, but augmentation.mask is 0, so that the teacher fills nothing",
        ),
        ({"augmentation": HALF | {"mask": 1.2}}, "augmentation.mask"),
        ({"augmentation": HALF | {"mask": 0.1, "candidates": 0}}, "augmentation.candidates"),
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
