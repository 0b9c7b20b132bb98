"""What whoever writes for a run is asked for."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from shared.config.run import Config
from shared.data.rollouts import RowPrompt
from shared.data.rows import Rows
from shared.targets.generation import (
    NO_END,
    Continuations,
    Drawn,
    GenerationSpec,
    Openings,
    Partner,
)
from student_trainer.sources.generated.continuing import continued, spec_of
from student_trainer.sources.generated.partners import Partners

SOURCE = {"student": 1.0, "max_new_tokens": 9, "min_new_tokens": 3, "temperature": 0.7}
MIXED = SOURCE | {"temperature": 1.0, "top_p": 1.0, "min_new_tokens": 0, "teacher_mix": 0.25}
CONFIG = {
    "name": "a",
    "seed": 7,
    "teachers": {"big": {"model": "big"}},
    "student": {"model": "small"},
    "domains": {"math": {"train": "math.jsonl"}},
    "steps": 4,
    "source": SOURCE | {"top_p": 0.9},
}


def test_every_option_of_writing_and_the_seed_reach_who_writes() -> None:
    config = Config.model_validate(CONFIG)
    found = spec_of(config, 5, ends=(2, 4), vocab=11)
    assert found == GenerationSpec(
        5,
        stop_ids=(2, 4),
        temperature=0.7,
        seed=7,
        top_p=0.9,
        min_new_tokens=3,
        vocab=11,
        logprobs=True,
    )


def test_no_more_tokens_are_asked_for_than_fit_into_the_row() -> None:
    found = spec_of(Config.model_validate(CONFIG), 2, ends=(2,), vocab=11)
    assert (found.max_new_tokens, found.min_new_tokens) == (2, 2)


class Echo:
    """Answers every opening with a token, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Openings, Partner | None]] = []

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        return self.generate_mixed(openings, spec, None)

    def generate_mixed(
        self, openings: Openings, spec: GenerationSpec, partner: Partner | None
    ) -> Continuations:
        self.asked.append((openings, partner))
        num = len(openings)
        drawn = Drawn(logprobs=[np.zeros(1, np.float32)] * num, end_ids=[NO_END] * num)
        ids = [[5]] * num
        return Continuations.build(
            openings, spec, teacher={}, output_ids=ids, stopped=[False] * num, drawn=drawn
        )


def written(echo: Echo, of_rows: Sequence[str], prompts: Sequence[RowPrompt], **options) -> None:
    """Go on from prompts of rows of these domains."""
    config = Config.model_validate(CONFIG | options)
    plan: Any = SimpleNamespace(config=config, ends=(2,), openings={})
    partners = None
    if config.source.teacher_mix:
        partners = Partners(plan, {name: cast(Any, name) for name in config.teachers})
    rows = Rows.build(
        domains=of_rows,
        indices=range(len(of_rows)),
        input_ids=[[1, 3, 4]] * len(of_rows),
        doc_starts=[[0]] * len(of_rows),
        loss_masks=[[0, 0, 1]] * len(of_rows),
    )
    found = continued(echo, prompts, rows, rows.names(), plan=plan, vocab=11, partners=partners)
    assert [rollout.prompt for rollout in found] == list(prompts)


def prompt(row: int, document: int) -> RowPrompt:
    return RowPrompt(row, document, np.array([1, 3], np.int32), room=4, answer=1)


def test_documents_of_a_row_with_one_prompt_are_draws_of_their_own() -> None:
    echo = Echo()
    written(echo, ["math"], [prompt(0, 0), prompt(0, 1)])
    ((openings, _),) = echo.asked
    assert len(set(openings.hashes())) == 2


def test_each_domains_teacher_has_its_share_in_what_is_written_there() -> None:
    echo = Echo()
    teachers = {"big": {"model": "big"}, "old": {"model": "old"}}
    domains = {
        "math": {"train": "math.jsonl", "teacher": "big"},
        "code": {"train": "code.jsonl", "teacher": "old"},
    }
    written(
        echo,
        ["math", "code", "math"],
        [prompt(row, 0) for row in range(3)],
        teachers=teachers,
        domains=domains,
        source=MIXED,
    )
    asked = {partner.generator: openings.names() for openings, partner in echo.asked if partner}
    assert asked == {"big": ["math/0", "math/2"], "old": ["code/1"]}
    assert [partner.share for _, partner in echo.asked if partner] == [0.25, 0.25]
