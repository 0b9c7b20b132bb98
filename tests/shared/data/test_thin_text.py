"""Too little text for what a run decides from it is refused, with the way out."""

from pathlib import Path

import pytest

from shared.data.row_store import RowStore
from shared.data.tokenise import prepare
from shared.errors import DataError
from tests.shared.data.test_tokenise import DATA, described, pairs
from tests.shared.text.test_sources import write


@pytest.mark.parametrize("policy", ["ddk", "sheared", "doremi", "odm", "fixed"])
def test_a_policy_on_validation_text_needs_two_rows_of_it(
    tmp_path: Path, tokenizer, policy: str
) -> None:
    write(tmp_path / "a.jsonl", *pairs(50))
    write(tmp_path / "valid.jsonl", *pairs(1, seed=2))
    domains = {"thin": {"train": "a.jsonl", "validation": "valid.jsonl"}}
    config = described(tmp_path, domains, mixture={"policy": policy})
    given = {"tokenizer": lambda: tokenizer, "tokenizer_digest": "d", "cache": tmp_path / "cache"}
    if policy in ("ddk", "sheared"):
        said = rf"domain thin has 1 validation row .* {policy}, .* text under domains.thin.valid"
        with pytest.raises(DataError, match=said):
            prepare(config, **given)
    else:
        assert len(RowStore.open(prepare(config, **given)[0].validation_path)) == 1


def test_one_validation_row_by_configuration_is_told_from_too_little_text(
    tmp_path: Path, tokenizer
) -> None:
    write(tmp_path / "a.jsonl", *pairs(200))
    data = DATA.model_copy(update={"validation_rows": 1})
    domains = {"long": {"train": "a.jsonl"}}
    config = described(tmp_path, domains, mixture={"policy": "ddk"}, data=data)
    with pytest.raises(DataError, match=r"which needs 2 rows; set data.validation_rows=2 or more"):
        prepare(config, tokenizer=lambda: tokenizer, tokenizer_digest="d", cache=tmp_path / "cache")


@pytest.mark.parametrize("plateau", [0.01, None])
def test_a_plateau_needs_two_validation_rows_too(
    tmp_path: Path, tokenizer, plateau: float | None
) -> None:
    write(tmp_path / "a.jsonl", *pairs(50))
    write(tmp_path / "valid.jsonl", *pairs(1, seed=2))
    domains = {"thin": {"train": "a.jsonl", "validation": "valid.jsonl"}}
    progressive = {"plateau": plateau, "max_steps": 2}
    config = described(tmp_path, domains, steps=100, progressive=progressive)
    given = {"tokenizer": lambda: tokenizer, "tokenizer_digest": "d", "cache": tmp_path / "cache"}
    if plateau:
        with pytest.raises(DataError, match=r"for progressive.plateau, .* progressive.max_steps"):
            prepare(config, **given)
    else:
        assert len(RowStore.open(prepare(config, **given)[0].validation_path)) == 1


def test_a_domain_with_fewer_rows_than_phases_is_refused(tmp_path: Path, tokenizer) -> None:
    write(tmp_path / "a.jsonl", *pairs(50))
    config = described(
        tmp_path,
        {"small": {"train": "a.jsonl"}},
        steps=1000,
        progressive={"phases": 40, "plateau": None, "max_steps": 20},
    )
    with pytest.raises(DataError, match=r"domain small has .* too few for progressive.phases 40"):
        prepare(config, tokenizer=lambda: tokenizer, tokenizer_digest="d", cache=tmp_path / "cache")
