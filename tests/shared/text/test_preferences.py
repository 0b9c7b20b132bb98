"""Pairs are told apart by both responses, and those of one prompt are held out together."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from shared.config.domains import Data, Domain
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import facts_of
from shared.data.row_store import RowStore
from shared.data.tokenise import prepare_domain
from shared.text.preferences import read_pairs
from tests import tiny

PROMPTS = [f"what is {n} and {n}" for n in range(30)]
RESPONSES = ("it is four", "it is five", "it is six")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def prepared(
    folder: Path, tokenizer: Any, rows: list[dict[str, str]], *, held: list | None = None
) -> PreparedDomain:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, own in (("train", rows), ("validation", held)):
        if own is not None:
            path = folder / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in own))
            paths[split] = str(path)
    return prepare_domain(
        "pairs",
        Domain(**paths),
        data=Data(context=64, too_long="drop", validation_rows=4),
        root=folder,
        cache=folder / "cache",
        tokenizer=lambda: tokenizer,
        tokenizer_digest="t",
        pairs=True,
        progress=False,
    )


def pair(prompt: str, chosen: int, rejected: int) -> dict[str, str]:
    return {"prompt": prompt, "chosen": RESPONSES[chosen], "rejected": RESPONSES[rejected]}


def texts(path: str, tokenizer: Any) -> list[str]:
    store = RowStore.open(path)
    return [
        tokenizer.decode(ids) for ids in store.take(list(range(len(store)))).column("input_ids")
    ]


def prompts_in(path: str, tokenizer: Any) -> set[str]:
    return {
        prompt for text in texts(path, tokenizer) for prompt in PROMPTS if f"{prompt}\n" in text
    }


def test_one_chosen_response_beside_two_rejected_ones_is_two_pairs(tmp_path, tokenizer):
    rows = [pair(p, *both) for p in PROMPTS for both in ((0, 1), (0, 2), (0, 1))]
    found = prepared(tmp_path, tokenizer, rows)
    fit = facts_of(found.train_path).training.account.fit
    assert (fit.documents, fit.duplicates) == (90, 30), "the third of each is the first again"


def test_a_table_that_has_the_chosen_conversation_too_is_of_both_responses(tmp_path):
    """As of UltraFeedback, whose responses are conversations that begin with the prompt."""
    asked = {"role": "user", "content": "q"}
    chosen, rejected = ([asked, {"role": "assistant", "content": one}] for one in "cr")
    row = {"prompt": "q", "chosen": chosen, "rejected": rejected, "messages": chosen}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    both = list(read_pairs(Domain(train="a.jsonl"), "train", root=tmp_path))
    told = [[(m.role, m.content) for m in found.messages] for found in both]
    assert told == [[("user", "q"), ("assistant", one)] for one in "cr"]
    assert [found.unread for found in both] == [("messages",)] * 2


def test_pairs_of_one_prompt_are_held_out_together(tmp_path, tokenizer):
    rows = [pair(p, *both) for both in ((0, 1), (0, 2), (1, 2)) for p in PROMPTS]
    found = prepared(tmp_path, tokenizer, rows)
    learnt, held = (prompts_in(p, tokenizer) for p in (found.train_path, found.validation_path))
    assert held
    assert not learnt & held
    assert learnt | held == set(PROMPTS)


def test_a_prompt_of_the_validation_text_is_not_learnt(tmp_path, tokenizer):
    rows = [pair(p, 0, 1) for p in PROMPTS]
    found = prepared(tmp_path, tokenizer, rows, held=[pair(PROMPTS[3], 1, 2)])
    assert prompts_in(found.train_path, tokenizer) == set(PROMPTS) - {PROMPTS[3]}
