"""The file of prompts: what it says, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from shared.prompts.prompts import Example, Prompt, PromptSet, read_prompts

MATHS = Prompt("Answer briefly.", (Example("2+2", "4"), Example("", "Sums are finite. é")))
PROMPTS = PromptSet({"maths": MATHS, "code": Prompt("Write Python."), "empty": Prompt()})


def written(
    folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None
) -> Path:
    """The file of `PROMPTS`, changed."""
    content = PROMPTS.to_dict()
    change(content)
    path = folder / "prompts.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_is_read_as_it_was_written_whatever_else_it_says(tmp_path: Path) -> None:
    path = written(tmp_path, lambda content: content["domains"]["maths"].update(scores=[1, 2]))
    read = read_prompts(path, domains=["maths", "code", "empty", "another"])
    assert read == PROMPTS
    assert read.id == PROMPTS.id
    assert read.of("maths") == MATHS
    assert read.of("another") == Prompt()


def test_a_set_is_named_by_its_prompts_that_are_not_empty() -> None:
    shuffled = PromptSet({"code": Prompt("Write Python."), "maths": MATHS})
    assert shuffled.id == PROMPTS.id != ""
    assert PromptSet({"empty": Prompt()}).id == PromptSet({}).id == ""
    swapped = PromptSet({"maths": Prompt("Write Python."), "code": MATHS})
    assert swapped.id != PROMPTS.id


def test_every_part_of_a_prompt_is_in_its_id() -> None:
    prompts = [
        MATHS,
        Prompt("Answer briefly!", MATHS.examples),
        Prompt(MATHS.instruction, MATHS.examples[::-1]),
        Prompt(MATHS.instruction, MATHS.examples[:1]),
        Prompt(MATHS.instruction, (Example("2+24", ""), MATHS.examples[1])),
        Prompt("", MATHS.examples),
    ]
    assert len({prompt.id for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.json cannot be read: No such file or directory; write it with"),
        ('{"format": 1, "dom', r"prompts\.json is no whole JSON file \(Unterminated .*repair it"),
        ("[1]", "is no file of prompts: it lacks format and domains; write it with"),
        ('{"model": "x"}', "is no file of prompts: it lacks format and domains"),
        ('{"format": 7, "domains": {}}', "has format 7, this version reads 1"),
        ('{"format": 1, "domains": {"a": {"prompt": "Hi"}}}', "domain a is not a prompt of inst"),
        (
            '{"format": 1, "domains": {"a": {"id": "", "prompt": '
            '{"instruction": 3, "examples": []}}}}',
            "domain a is not a prompt of instruction and examples with its id",
        ),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_a_prompt_that_was_changed_under_its_id_is_refused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["domains"]["code"]["prompt"]["instruction"] = "Write Perl."

    with pytest.raises(ConfigError, match=f"code has the id '{Prompt('Write Perl.').id}', record"):
        read_prompts(written(tmp_path, change))


def test_a_prompt_for_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt for maths, which is none of the domains code, e"):
        read_prompts(written(tmp_path), domains=["code", "empty"])
