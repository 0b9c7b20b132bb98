"""What whoever writes for a run is asked for."""

from shared.config.run import Config
from shared.targets.generation import GenerationSpec
from student_trainer.sources.generated.continuing import spec_of

SOURCE = {"student": 1.0, "max_new_tokens": 9, "min_new_tokens": 3, "temperature": 0.7}
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
