"""Masks that a teacher fills before training: whose words, read where, and asked for once.

The teacher is the real engine, in this process.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.launch.teachers.filling import MOST_BEFORE, filled_domains
from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run
from shared.data.augmented.fills import PLACES, Fills
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import DataError
from shared.run.plan import OpenReader
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets
from tests.cluster.jobs import WORDS, write_job
from tests.cluster.planning.test_difficulty import Model
from tests.tiny import Pair

MASKED = {"share": 1.0, "mask": 0.3, "candidates": 3, "replace": 0, "swap": 0, "delete": 0}
CONTEXT = 128  # rows hold several documents, each with room for text before it
LEAST = 8  # tokens of a text that is told from others by its end
ORDINARY = [f"data.context={CONTEXT}", "batch.micro_batch=4"]


def prepared_with(folder: Path, pair: Pair, **options: object) -> Prepared:
    """Two domains of tokenised text, to be filled so."""
    section = MASKED | options
    parts = {"augmentation": section, "mixture": {"policy": "fixed"}}
    path = write_job(folder, pair, **parts)
    for name, words in WORDS.items():
        draw = random.Random(name)
        texts = (" ".join(draw.choices(words, k=12)) for _ in range(40))
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{one}"}}\n' for one in texts))
    return prepare_run(load(path, ORDINARY))


def filled(prepared: Prepared, model: Model) -> dict[str, PreparedDomain]:
    (name,) = prepared.teachers
    domains = filled_domains(prepared, prepared.domains, teachers={name: model.asked})
    return {domain.name: domain for domain in domains}


def fills_of(domain: PreparedDomain) -> Fills:
    assert domain.fills_path is not None
    return Fills.open(domain.fills_path)


@pytest.fixture
def model(tiny_pair: Pair) -> Model:
    return Model("teacher", tiny_pair.teacher)


def likeliest(
    folder: Path, ids: np.ndarray, at: int, *, most: int, special: tuple[int, ...]
) -> set[int]:
    """The likeliest ids at a place after the text to its left, but for its own one and special
    ones, in float64."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits_V = dense(torch.from_numpy(ids[None, :at].astype(np.int64))).logits[0, -1]
    left_out = {*special, int(ids[at])}
    order = [one for one in logits_V.argsort(descending=True).tolist() if one not in left_out]
    return set(order[:most])


def test_fills_are_among_the_teachers_likeliest_ids_after_the_text_to_the_left(
    tmp_path: Path, tiny_pair: Pair, model: Model
) -> None:
    prepared = prepared_with(tmp_path, tiny_pair, across=False)
    seen = set()
    for domain in filled(prepared, model).values():
        store, fills = RowStore.open(domain.train_path), fills_of(domain)
        columns = (store.take([0, 1]).column(name) for name in ("input_ids", "doc_starts"))
        for row, (ids, starts) in enumerate(zip(*columns, strict=True)):
            changed = np.flatnonzero(fills.put(ids, row=row, epoch=0) != ids)
            assert not set(changed) & {*starts, *(starts[1:] - 1), len(ids) - 1}
            for at in changed[:3]:
                first = starts[starts <= at].max()
                own = ids[first:]
                fill = int(fills.put(ids, row=row, epoch=0)[at])
                assert fill in likeliest(
                    tiny_pair.teacher, own, at - first, most=3, special=prepared.special_ids
                )
                assert fill not in prepared.special_ids
                seen.add(fill)
    assert len(seen) > 3


@dataclass
class Watched(Model):
    """Keeps what is asked."""

    asked_rows: list[Rows] = field(default_factory=list)

    @contextmanager
    def serve(self) -> Iterator[OpenReader]:
        with super().serve() as open_reader:
            yield lambda rank: Noted(open_reader(rank), self.asked_rows)


@dataclass
class Noted:
    """A `TargetReader` that keeps what it is asked."""

    reader: TargetReader
    asked_rows: list[Rows]

    @property
    def stats(self) -> ReaderStats:
        return self.reader.stats

    def submit(self, rows: Rows, question: Question) -> None:
        self.asked_rows.append(rows)
        self.reader.submit(rows, question)

    def next(self) -> SoftTargets:
        return self.reader.next()

    def close(self) -> None:
        self.reader.close()


def _ends(ids: np.ndarray, document: list[int]) -> bool:
    return ids.tolist()[-len(document) :] == document


def text_of(domain: PreparedDomain, split: str) -> list[list[int]]:
    store = RowStore.open(domain.paths[split])  # type: ignore[index]
    return [ids.tolist() for ids in store.take(range(len(store))).documents().column("input_ids")]


def test_documents_come_after_training_text_of_another_domain_and_validation_is_never_read(
    tmp_path: Path, tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_with(tmp_path, tiny_pair)
    model = Watched("teacher", tiny_pair.teacher)
    domains = filled(prepared, model)
    num_read = sum(len(ids) for rows in model.asked_rows for ids in rows.column("input_ids"))
    said = re.findall(r"for which it read ([\d,]+) tokens", capsys.readouterr().out)
    assert sum(int(one.replace(",", "")) for one in said) == num_read > 0
    text = {name: text_of(domain, "train") for name, domain in domains.items()}
    held = [one for d in domains.values() for one in text_of(d, "validation") if len(one) > LEAST]
    stores = {name: RowStore.open(domain.train_path) for name, domain in domains.items()}
    rows_of = {
        name: [ids.tolist() for ids in store.take(range(len(store))).column("input_ids")]
        for name, store in stores.items()
    }
    lengths = []
    for rows in model.asked_rows:
        assert rows.table.num_rows <= 4  # as many lines as a micro-batch has rows
        assert max(map(len, rows.column("input_ids"))) <= CONTEXT
        rows = rows.documents()
        columns = (rows.column(name) for name in ("input_ids", "loss_mask"))
        for name, ids, mask in zip(rows.domains(), *columns, strict=True):
            (other,) = set(domains) - {name}
            length = len(ids) - max(len(one) for one in text[name] if _ends(ids, one))
            lengths.append(length)
            assert length <= MOST_BEFORE
            assert not mask[:length].any()
            assert any(one[:length] == ids[:length].tolist() for one in rows_of[other])
            assert not any(_ends(ids, one) for one in held)
    assert held
    assert max(lengths) > LEAST
    alone = prepared_with(tmp_path, tiny_pair, across=False)
    model = Watched("teacher", tiny_pair.teacher)
    letters = filled(alone, model)["letters"]
    starts = [own for rows in model.asked_rows for own in rows.column("doc_starts")]
    assert max(map(len, starts)) > 1  # documents share a line
    assert fills_of(letters).digest != fills_of(domains["letters"]).digest


def test_what_is_filled_is_asked_once_and_other_masks_anew(
    tmp_path: Path, tiny_pair: Pair, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_with(tmp_path, tiny_pair)
    first = filled(prepared, model)
    said = capsys.readouterr().out
    assert f"the teacher filled {fills_of(first['letters']).num_fills:,} masks of" in said
    assert model.services == 2  # of two domains
    assert filled(prepared, model) == first
    assert model.services == 2
    path = Path(str(first["letters"].fills_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    assert filled(prepared, model) == first
    assert path.read_bytes() == whole, "what is damaged is asked again, and is the same"
    for option in ({"mask": 0.2}, {"candidates": 1}, {"copies": 2}):
        other = filled(prepared_with(tmp_path, tiny_pair, **option), model)
        assert fills_of(other["letters"]).digest != fills_of(first["letters"]).digest
    config = prepared.config.model_copy(update={"seed": 5})
    seeded = filled(replace(prepared, config=config), model)
    assert seeded["letters"].fills_path != first["letters"].fills_path


def test_copies_of_a_row_have_masks_of_their_own_and_the_size_of_a_unit_decides_nothing(
    tmp_path: Path, tiny_pair: Pair, model: Model
) -> None:
    prepared = prepared_with(tmp_path, tiny_pair, copies=3)
    found = fills_of(filled(prepared, model)["numbers"])
    places = [tuple(one.as_py()) for one in found.table.column(PLACES)]
    assert len(places) == 3 * prepared.domains[1].num_rows
    assert len({*places[:3]}) == 3
    batch = prepared.config.batch.model_copy(update={"micro_batch": 3})
    paths = prepared.config.paths.model_copy(update={"cache": str(tmp_path / "other")})
    config = prepared.config.model_copy(update={"batch": batch, "paths": paths})
    again = fills_of(filled(replace(prepared, config=config), model)["numbers"])
    assert [tuple(one.as_py()) for one in again.table.column(PLACES)] == places
    assert found.digest == again.digest


def test_text_without_a_token_to_mask_is_refused(
    tmp_path: Path, tiny_pair: Pair, model: Model
) -> None:
    prepared = prepared_with(tmp_path, tiny_pair)
    special = tuple(range(512))
    with pytest.raises(DataError, match=r"augmentation.mask is 0.3, but nothing was masked"):
        filled(replace(prepared, special_ids=special), model)
