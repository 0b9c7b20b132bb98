"""A teacher shown a prompt answers about the student's positions as if it had read it first.

N positions with loss, all rows end to end   V vocabulary
"""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.data.packing import Fit, pack, pieces_of
from shared.data.rows import Rows
from shared.prompts.prefix import Opening, PromptedReader, opening
from shared.prompts.prompts import Example, Prompt
from shared.targets.question import Question
from shared.targets.reader import ReaderStats
from shared.targets.soft_targets import SoftTargets
from shared.text.documents import Document
from shared.text.framing import encode
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import decoded, question_of

PROMPTS = {
    "maths": Prompt("Answer briefly.", (Example("2+2", "4"),)),
    "code": Prompt("", (Example("", "def f(self):"),)),
}
SPEC = question_of(top_k=tiny.VOCAB, shared_vocab=tiny.VOCAB, encoding="fp32", prompts="some")
CONTEXT = 48
TEXTS = [
    ("maths", Document("pair", "a:1", prompt="inspect the class", response="no source for it")),
    ("maths", Document("text", "a:2", text="return None if the object has no file " * 6)),  # split
    ("maths", Document("pair", "a:3", prompt="3+3", response="6")),
    ("code", Document("text", "b:1", text="if isinstance(object, type):")),
    ("code", Document("text", "b:2", text="for name in names: yield name")),
    ("plain", Document("text", "c:1", text="the module's name")),
    ("plain", Document("text", "c:2", text="a frame")),
]


class InProcess:
    """A `TargetReader` around an engine."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine, self.stats = engine, ReaderStats()
        self.sent: deque[Rows] = deque()

    def submit(self, rows: Rows, spec: Question) -> None:
        self.sent.append(rows)
        self.spec = spec

    def next(self) -> SoftTargets:
        return self.engine.score(self.sent.popleft(), self.spec)

    def close(self) -> None:
        self.sent.clear()


@pytest.fixture(scope="module")
def engine(tiny_pair: tiny.Pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


@pytest.fixture(scope="module")
def tokenizer(tiny_pair: tiny.Pair) -> Any:
    return AutoTokenizer.from_pretrained(tiny_pair.teacher)


def rows_of(tokenizer: Any, order: list[int]) -> Rows:
    """The texts of each domain in some order, packed as for training."""
    parts = []
    for domain in ("maths", "code", "plain"):
        documents = [TEXTS[i][1] for i in order if TEXTS[i][0] == domain]
        encoded = encode(iter(documents), tokenizer=tokenizer, loss_on="responses")
        packed = pack(pieces_of(encoded, context=CONTEXT, too_long="split", fit=Fit()),
                      context=CONTEXT)  # fmt: skip
        parts += [(domain, *row) for row in zip(
            packed.input_ids, packed.doc_starts, packed.loss_masks, strict=True)]  # fmt: skip
    domains, ids, starts, masks = zip(*parts, strict=True)
    return Rows.build(
        domains=domains,
        indices=range(len(parts)),
        input_ids=ids,
        doc_starts=starts,
        loss_masks=masks,
    )


def openings(tokenizer: Any) -> dict[str, Opening]:
    return {name: opening(prompt, tokenizer, "text") for name, prompt in PROMPTS.items()}


def answer(engine: HFEngine, rows: Rows, openings: dict[str, Opening]) -> np.ndarray:
    """Log-probabilities [N, V] in the order of the ids, as training would get them."""
    reader = PromptedReader(InProcess(engine), openings)
    reader.submit(rows, SPEC)
    arrays = decoded(reader.next())
    full_NV = np.full(arrays.ids_NK.shape, np.nan)
    np.put_along_axis(full_NV, arrays.ids_NK, arrays.logprobs_NK, axis=1)
    return full_NV


def dense(folder: Path, tokenizer: Any, rows: Rows) -> np.ndarray:
    """The same from transformers: prompt and document in one line, one document at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for domain, ids, mask in documents(rows):
        before = []
        if domain in PROMPTS:
            before = tokenizer(PROMPTS[domain].text(), add_special_tokens=False)["input_ids"]
        bos = [tokenizer.bos_token_id] if before else []
        rest = ids[1:] if before and ids[0] == tokenizer.bos_token_id else ids
        line = [*bos, *before, *rest]
        with torch.no_grad():
            logits = model(torch.tensor([line]), use_cache=False).logits[0].double()
        at = len(line) - len(ids) + np.flatnonzero(mask)
        found.append(logits.log_softmax(1)[at].numpy())
    return np.concatenate(found)


def documents(rows: Rows) -> list[tuple[str, list[int], np.ndarray]]:
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    return [
        (domain, ids.tolist(), mask)
        for domain, row, starts, masks in zip(rows.domains(), *columns, strict=True)
        for ids, mask in zip(np.split(row, starts[1:]), np.split(masks, starts[1:]), strict=True)
    ]


def test_answers_are_those_of_one_pass_over_prompt_and_document(
    engine: HFEngine, tokenizer: Any, tiny_pair: tiny.Pair
) -> None:
    rows = rows_of(tokenizer, list(range(len(TEXTS))))
    assert max(len(starts) for starts in rows.column("doc_starts")) > 1
    assert any(ids[0] != 1 for _, ids, _ in documents(rows))  # the rest of a split document
    got_NV = answer(engine, rows, openings(tokenizer))
    np.testing.assert_allclose(got_NV, dense(tiny_pair.teacher, tokenizer, rows), atol=1e-4)
    plain_NV = answer(engine, rows, {})
    shown_N = np.repeat([d != "plain" for d in rows.domains()], rows.num_loss_tokens())
    assert np.abs(got_NV - plain_NV)[shown_N].max(axis=1).min() > 1e-3  # each position heard it


def test_an_empty_prompt_gives_the_answers_of_none(engine: HFEngine, tokenizer: Any) -> None:
    rows = rows_of(tokenizer, list(range(len(TEXTS))))
    empty = {name: opening(Prompt(), tokenizer, "text") for name in PROMPTS}
    np.testing.assert_allclose(
        answer(engine, rows, empty), answer(engine, rows, {}), rtol=0, atol=1e-5
    )


def test_a_documents_answers_do_not_depend_on_its_neighbours(
    engine: HFEngine, tokenizer: Any
) -> None:
    by_document: list[dict[tuple[str, tuple[int, ...]], np.ndarray]] = []
    for order in (list(range(len(TEXTS))), [6, 2, 4, 0, 5, 3, 1]):
        rows = rows_of(tokenizer, order)
        found_NV, at = answer(engine, rows, openings(tokenizer)), 0
        by_document.append({})
        for domain, ids, mask in documents(rows):
            by_document[-1][domain, tuple(ids)] = found_NV[at : at + mask.sum()]
            at += mask.sum()
    one, other = by_document
    assert set(one) == set(other)
    assert list(one) != list(other)
    for key, found_NV in one.items():
        np.testing.assert_allclose(found_NV, other[key], rtol=0, atol=1e-4)
