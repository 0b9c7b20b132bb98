"""How well a student that marks entities finds them: it writes every validation text again, and can
write nothing but that text and marks around words.

Y types of entities
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig

from shared.across.token_bytes import TokenBytes
from shared.config.tasks.task import TEXT, TYPE
from student_trainer.evaluation.copying import CLOSE, OPEN, Copying, State, Vocabulary
from student_trainer.evaluation.tags import RIGHT, TOLD, TRUE, tag_scores
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run
    from student_trainer.tasks.marking import Marking

SPELT_OUT = 3  # times as many tokens as the row's own, within which a copy must be written


class MarkedRow(NamedTuple):
    """A validation row: what is asked, and what is right."""

    opening: list[int]  # token ids
    copying: Copying
    true: frozenset[tuple[int, int]]
    kind: str  # of entities
    end: int  # the token that follows the text
    most: int  # tokens that may be written


def evaluate_marks(run: "Run", task: "Marking", measured: Evaluation) -> Evaluation:
    """The evaluation with the student's scores by domain; all ranks together."""
    tokens, domains = task.tokens(), tuple(run.config.domains)
    vocabulary = Vocabulary.of(tokens.texts)
    spans_GY3 = np.zeros((len(domains), len(task.types), 3))
    run.engine.eval()
    for rows in run.validation.own_units(run.validation.rows_per_unit):
        columns = zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True)
        asked = [asked_of(ids, mask, task, tokens) for ids, mask in columns]
        found = told(run.student.saved, asked, tokens, vocabulary, device=run.engine.device)
        for row, spans, name in zip(asked, found, rows.domains(), strict=True):
            counts = spans_GY3[domains.index(name), task.types.index(row.kind)]
            counts[[RIGHT, TOLD, TRUE]] += len(spans & row.true), len(spans), len(row.true)
    run.engine.train()
    spans_GY3 = run.ranks.sum(spans_GY3)
    scored = {
        name: replace(one, student_scores=tag_scores(spans_GY3[g], list(task.types)))
        for g, (name, one) in enumerate(measured.domains.items())
    }
    return replace(measured, domains=scored)


def asked_of(ids: np.ndarray, mask: np.ndarray, task: "Marking", tokens: TokenBytes) -> MarkedRow:
    """A row of one document, taken apart."""
    first = int(np.argmax(mask))
    opening, labels = ids[: first + 1].tolist(), ids[first + 1 :].tolist()
    written = [tokens.of(label) for label in labels]
    size = written.index(None) if None in written else len(written)
    copy = b"".join(part or b"" for part in written[:size])
    copying = Copying.of(copy.replace(OPEN, b"").replace(CLOSE, b""))
    whole = copying.whole(copying.after([State()], copy))
    prompt = b"".join(tokens.of(one) or b"" for one in opening).decode(errors="replace")
    return MarkedRow(
        opening,
        copying,
        frozenset(whole.spans if whole else ()),
        _kind(prompt, copying.text.decode().strip(), task),
        labels[size] if size < len(labels) else tokens.eos or 0,
        SPELT_OUT * len(labels),
    )


def _kind(prompt: str, text: str, task: "Marking") -> str:
    """The type that a prompt is about."""
    asked = {name: task.template.replace(TYPE, name).replace(TEXT, text) for name in task.types}
    return next(name for name, said in asked.items() if said.strip() in prompt)


@torch.no_grad()
def told(
    model: Any,
    rows: Sequence[MarkedRow],
    tokens: TokenBytes,
    vocabulary: Vocabulary,
    *,
    device: torch.device,
) -> list[frozenset[tuple[int, int]]]:
    """The spans of bytes that a model marks in each text, writing its likeliest copy token by
    token; those of a copy that does not end within `most` tokens that are closed by then."""
    if not rows:
        return []
    width = max(len(row.opening) for row in rows)
    ids_BT = torch.full((len(rows), width), rows[0].end)
    mask_BT = torch.zeros_like(ids_BT)
    for line, row in enumerate(rows):
        ids_BT[line, width - len(row.opening) :] = torch.tensor(row.opening)
        mask_BT[line, width - len(row.opening) :] = 1
    writing = _Writing(rows, tokens, vocabulary, [[State()] for _ in rows], [width] * len(rows))
    ends = sorted({row.end for row in rows})
    model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(row.most for row in rows),
            eos_token_id=ends,
            pad_token_id=ends[0],
        ),
        prefix_allowed_tokens_fn=writing.allowed,
    )
    return [frozenset(states[0].spans if states else ()) for states in writing.states]


@dataclass(slots=True)
class _Writing:
    """Copies under way."""

    rows: Sequence[MarkedRow]
    tokens: TokenBytes
    vocabulary: Vocabulary
    states: list[list[State]]  # of each row
    read: list[int]  # tokens of each that the states know

    def allowed(self, line: int, ids_T: torch.Tensor) -> list[int]:
        """What a row may be continued with: the token that ends it, once its text is written."""
        row = self.rows[line]
        for token in ids_T[self.read[line] :].tolist():
            if row.copying.whole(self.states[line]) is None:
                written = self.tokens.of(token) or b""
                self.states[line] = row.copying.after(self.states[line], written)
        self.read[line] = len(ids_T)
        if row.copying.whole(self.states[line]) is not None:
            return [row.end]
        return self.vocabulary.allowed(row.copying, self.states[line]) or [row.end]
