"""A student and a teacher of another tokenizer, and text that both have read.

N positions with loss
"""

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.builtin.models import train_tokenizer
from cluster.selftest import models
from shared.across import groups
from shared.across.groups import Reader
from shared.across.token_bytes import TokenBytes, token_bytes
from shared.across.token_pair import TokenPair, pair_tokens
from shared.across.translating import Translator
from shared.data.row_store import RaggedRows, RowStore, write_rows
from shared.data.rows import Rows
from shared.targets.paired import PairedTargets
from student_trainer.objective import Objective
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.token_pairing import TokenPairing
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import question_of
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains

CPU = torch.device("cpu")
FEW = 300  # tokens of the teacher's tokenizer
LINES = [line[:30] for line in inspect.getsource(inspect.getdoc).splitlines() if line][:8]


@cache
def tokenizer(vocab: int) -> Any:
    """A byte-level tokenizer of so many tokens."""
    return train_tokenizer([inspect.getsource(inspect)], vocab=vocab)


@dataclass(frozen=True)
class Across:
    """A pair of models, and one unit of text in the tokens of each."""

    folder: Path
    teacher_vocab: int
    student_rows: Rows
    teacher_rows: Rows
    pair: TokenPair

    @property
    def tokens(self) -> tuple[TokenBytes, TokenBytes]:
        return tuple(token_bytes(tokenizer(v), model="m") for v in (tiny.VOCAB, self.teacher_vocab))

    def answer(self, top_k: int, temperatures: tuple[float, ...] = (1.0,)) -> PairedTargets:
        """What the teacher says of its rows."""
        spec = question_of(top_k, self.teacher_vocab, temperatures=temperatures, encoding="fp32")
        engine = HFEngine.load(str(self.folder / "pair" / "teacher"))
        return PairedTargets(self.teacher_rows, engine.score(self.teacher_rows, spec))

    def objective(self, **options: Any) -> Objective:
        """The student under a config's losses."""
        pair = tiny.Pair(self.folder / "pair" / "teacher", self.folder / "pair" / "student")
        domains = prepared_domains(self.folder)
        config = plan_of(self.folder / "run", pair, domains, **options).config
        return Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)

    def batch(self, answer: PairedTargets) -> Batch:
        """The unit with the teacher's part at the student's positions."""
        layouts = Layouts(DOMAINS, True, CPU, CAUSAL_LM, pairing=TokenPairing(self.pair))
        return layouts.batch(self.student_rows, answer)


def across(folder: Path, *, teacher_vocab: int, in_groups: bool = False) -> Across:
    """Random models around two tokenizers, and two rows of two documents."""
    pair = tiny.save_pair(folder / "pair")
    models.save_model(pair.teacher, tokenizer(teacher_vocab), width=48, layers=3, seed=1)
    path = folder / "rows.arrow"
    write_rows(path, domain=DOMAINS[0], rows=_rows())
    own, others = (token_bytes(tokenizer(v), model="m") for v in (tiny.VOCAB, teacher_vocab))
    pairing = pair_tokens(own, others, student_rows=tiny.VOCAB, teacher_rows=teacher_vocab)
    if in_groups:
        readers = (Reader(own, tokenizer(tiny.VOCAB)), Reader(others, tokenizer(teacher_vocab)))
        pairing = groups.in_groups(pairing, *readers, student_rows=tiny.VOCAB)
    store = RowStore.open(path)
    found = Translator(own, others, pairing, tokenizer(teacher_vocab)).translated(store)
    assert found.left_out == 0
    write_rows(folder / "teacher.arrow", domain=DOMAINS[0], rows=found.rows)
    theirs = RowStore.open(folder / "teacher.arrow")
    every = range(len(store))
    return Across(folder, teacher_vocab, store.take(every), theirs.take(every), pairing)


def _rows() -> RaggedRows:
    """Lines of a source, two to a document and two documents to a row; of the first of a row the
    beginning is not learnt."""
    own, rows = tokenizer(tiny.VOCAB), RaggedRows([], [], [])
    for first in range(0, 8, 4):
        ids, masks = [], []
        for start in (first, first + 2):
            inner = own("\n".join(LINES[start : start + 2]))["input_ids"]
            ids.append(np.array([own.bos_token_id, *inner, own.eos_token_id]))
            masks.append(np.array([1] * (len(inner) + 1) + [0], np.uint8))
        masks[0][:7] = 0
        rows.input_ids.append(np.concatenate(ids))
        rows.doc_starts.append(np.array([0, len(ids[0])]))
        rows.loss_masks.append(np.concatenate(masks))
    return rows
