"""What models wrote, read back, and its means and differences with their errors."""

import numpy as np
import pytest

from cluster.evaluation.generations import (
    Generation,
    Written,
    read_generations,
    with_differences,
    with_scores,
    write_generations,
)
from cluster.evaluation.results import DomainResults, Results
from cluster.evaluation.scores import Scores
from cluster.evaluation.statistics import Estimate, Measures
from cluster.evaluation.table import table
from shared.errors import CheckpointError

NOTHING = Measures(nll=None, bits_per_byte=None, kl=None, ece=None)
GENERATOR = np.random.default_rng(5)


def generations(f1_by_model: dict[str, list[float]], *, rouge: float | None = 0.5, room: int = 9):
    """A generation for each position of the lists, the first two answers cut."""
    (count,) = {len(values) for values in f1_by_model.values()}
    return [
        Generation(
            "qa",
            key=f"{number:016x}",
            prompt=f"question {number}",
            right="it",
            max_new_tokens=room,
            step=7,
            models={
                name: Written("text", number < 2, Scores(float(f1[number] == 1), f1[number], rouge))
                for name, f1 in f1_by_model.items()
            },
        )
        for number in range(count)
    ]


def test_a_file_holds_what_was_written(tmp_path) -> None:
    path = tmp_path / "generations.jsonl"
    one = Generation("text", "0f", "once\u2028 <b>", "up", 4, None, {"after": Written("é\n", True)})
    found = [*generations({"teacher": [0.5, 1.0]}), one]
    write_generations(path, found)
    assert len(path.read_text().split("\n")) == 4
    assert read_generations(path) == found
    assert read_generations(tmp_path / "none.jsonl") == []
    path.write_text("{}\n")
    with pytest.raises(CheckpointError, match="`tutelage eval` writes it again"):
        read_generations(path)


def test_means_are_over_prompts_with_their_usual_error() -> None:
    f1 = GENERATOR.uniform(size=30)
    found = with_scores(NOTHING, generations({"after": f1.tolist()}), "after")
    assert found.token_f1.value == pytest.approx(f1.mean())
    assert found.token_f1.error == pytest.approx(f1.std(ddof=1) / np.sqrt(30))
    assert found.rouge_l == Estimate(0.5, 0.0)
    assert found.cut == 2
    assert with_scores(NOTHING, generations({"after": f1.tolist()}), "teacher") == NOTHING
    bare = with_scores(NOTHING, generations({"after": f1.tolist()}, rouge=None), "after")
    assert bare.rouge_l is None
    assert bare.token_f1 == found.token_f1


def test_differences_are_paired_by_prompt() -> None:
    before = GENERATOR.uniform(size=30)
    after = before + GENERATOR.normal(0.1, 0.01, 30)
    both = generations({"before": before.tolist(), "after": after.tolist()})
    found = with_differences(NOTHING, both, both, model="after", other="before")
    assert found.token_f1.value == pytest.approx((after - before).mean())
    assert found.token_f1.error == pytest.approx((after - before).std(ddof=1) / np.sqrt(30))
    assert found.cut is None


def test_another_run_is_compared_on_the_same_prompts_and_room_alone() -> None:
    own, other = generations({"after": [1.0, 0.0, 1.0]}), generations({"after": [0.5, 0.0, 0.5]})
    asked = {"model": "after", "other": "after"}
    found = with_differences(NOTHING, own, other[::-1], **asked)
    assert found.token_f1.value == pytest.approx(1 / 3)
    longer = generations({"after": [0.5, 0.0, 0.5]}, room=10)
    for others in (other[:2], [], longer):
        assert with_differences(NOTHING, own, others, **asked) == NOTHING


def test_the_table_shows_scores_below_in_at_most_100_columns() -> None:
    both = generations({"before": [0.0] * 3, "after": [1.0, 0.5, 0.0]})
    models = {name: with_scores(NOTHING, both, name) for name in ("before", "after")}
    lesser = with_differences(NOTHING, both, both, model="after", other="before")
    domain = DomainResults(3, 9, 9, "full", 3, models, {"after - before": lesser})
    text = DomainResults(3, 9, 9, "full", 0, {"after": NOTHING})
    lines = table(Results("run", {"qa": domain, "prose": text})).splitlines()
    assert max(map(len, lines)) <= 100
    start = next(n for n, line in enumerate(lines) if "exact match" in line)
    shown = [line.split() for line in lines[start + 1 : start + 4]]
    zero, half = ["0.000", "±", "0.000"], ["0.500", "±", "0.000"]
    assert shown[0] == ["qa", "before", *zero, *zero, *half, "2"]
    assert shown[1] == ["after", "0.333", "±", "0.333", "0.500", "±", "0.289", *half, "2"]
    assert shown[2][:3] == ["after", "-", "before"]
    assert shown[2][3:6] == ["+0.333", "±", "0.333"]
    assert shown[2][-1] == "-"
    assert not any("prose" in line for line in lines[start:])
    assert any("of 3 answers" in line for line in lines)
