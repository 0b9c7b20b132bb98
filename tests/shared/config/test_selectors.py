"""What a selector serves follows from what losses declare: a further loss edits no list."""

from typing import ClassVar, Literal

import pytest

from shared.config.losses import KINDS, Divergence, ReverseKL
from shared.config.selectors import check_selector, check_student_ids, chosen


class Weighted(Divergence):
    """Sums over the student in one of two directions."""

    student_weighted: ClassVar[str | None] = "direction backward"

    kind: Literal["weighted"] = "weighted"
    direction: Literal["onward", "backward"] = "backward"

    @property
    def weighs_by_student(self) -> bool:
        return self.direction == "backward"


class Linear(Divergence):
    """Linear in the teacher's probabilities."""

    takes_drawn_ids: ClassVar[bool] = True

    kind: Literal["linear"] = "linear"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for section in (Weighted, Linear):
        monkeypatch.setitem(KINDS, section.model_fields["kind"].default, section)


def test_a_loss_that_weighs_by_the_student_lets_it_name_ids() -> None:
    check_student_ids(8, "auto", [Weighted()])  # type: ignore[list-item]
    for losses in ([Weighted(direction="onward")], [Linear()]):
        with pytest.raises(ValueError, match="no loss weighs ids") as caught:
            check_student_ids(8, "auto", losses)  # type: ignore[arg-type]
        said = str(caught.value)
        assert "with divergence reverse_kl or weighted with direction backward" in said
        assert "or take reverse_kl, jsd with beta above 0, skew_reverse_kl, total_var" in said
        assert "linear" not in said.partition("take")[2]


def test_drawn_ids_serve_what_takes_them() -> None:
    check_selector("threshold", [Linear()])  # type: ignore[list-item]
    assert chosen("auto", [Linear()], keeps_all=False) == "threshold"  # type: ignore[list-item]
    assert chosen("auto", [Linear(), Weighted()], keeps_all=False) == "top_k"  # type: ignore[list-item]
    for refused in (Weighted(), ReverseKL()):
        with pytest.raises(ValueError, match="forward_kl, soft_cross_entropy or linear"):
            check_selector("threshold", [Linear(), refused])  # type: ignore[list-item]
