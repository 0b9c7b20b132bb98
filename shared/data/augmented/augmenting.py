"""Documents changed: masked tokens as a teacher filled them (`fills`), then, by rules, tokens
replaced by those of another domain's text, swapped and left out (after Learning to Augment, arXiv
2101.08106, and EDA, arXiv 1901.11196).

Which documents are changed, and how, is a pure function of the seed, the row, its document, the
epoch and the teacher's fills. A document's first and last token and special tokens stay, and a
token that has loss keeps it.

R rows   T tokens of a document
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from shared.config.text.augmentation import Augmentation
from shared.data.augmented.fills import Fills, changeable, ordinary
from shared.data.row_store import RowStore
from shared.data.rows import DRAW, Rows

UNCHANGED = 0  # in place of the number of a changed document
TRIES = 8  # to find a row of another domain with a token that is no special one


@dataclass(frozen=True, slots=True)
class Augmenter:
    """Changes documents of a run's rows."""

    section: Augmentation
    stores: Sequence[RowStore]  # of all domains, to take tokens from
    seed: int
    special_ids: Collection[int]  # that are neither changed nor taken
    fills: Sequence[Fills] = ()  # of all domains, where the teacher filled masks

    def changed(self, rows: Rows, domain_R: np.ndarray, epoch_R: np.ndarray) -> Rows:
        """The rows with their share of documents changed, and the number of each that is."""
        names, found = rows.names(), []
        index_R = rows.table.column("index").to_pylist()
        columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        for row, (ids, starts, mask) in enumerate(zip(*columns, strict=True)):
            draw = f"{self.seed}/{names[row]}/{epoch_R[row]}"
            filled = ids
            if self.fills:
                filled = self.fills[domain_R[row]].put(ids, row=index_R[row], epoch=epoch_R[row])
            parts = (np.split(each, starts[1:]) for each in (ids, filled, mask))
            documents = [
                self._document(own, put, loss, f"{draw}/{number}", domain=domain_R[row])
                for number, (own, put, loss) in enumerate(zip(*parts, strict=True))
            ]
            found.append(documents)
        lengths = [[len(ids) for ids, _, _ in documents] for documents in found]
        built = Rows.build(
            domains=rows.domains(),
            indices=index_R,
            input_ids=[np.concatenate([ids for ids, _, _ in each]) for each in found],
            doc_starts=[np.cumsum([0, *each[:-1]]) for each in lengths],
            loss_masks=[np.concatenate([mask for _, mask, _ in each]) for each in found],
        )
        if DRAW in rows.table.column_names:
            built = built.with_draws(rows.draws())
        return built.with_changed([np.array([number for *_, number in each]) for each in found])

    def _document(
        self,
        ids_T: np.ndarray,
        filled_T: np.ndarray,
        mask_T: np.ndarray,
        draw: str,
        *,
        domain: int,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """A document and its loss mask, changed or not, and its number; `filled_T` has it with its
        masks filled."""
        number = xxhash.xxh64_intdigest(draw.encode()) >> 1 | 1
        random = np.random.default_rng(number)
        if random.random() >= self.section.share:
            return ids_T, mask_T, UNCHANGED
        may_T = changeable(ids_T, self.special_ids)
        ids_T = filled_T.copy()
        self._replace(ids_T, may_T, random, domain=domain)
        has_loss_T = np.append(False, mask_T[:-1].astype(bool))  # of a token as a label
        _swap(ids_T, has_loss_T, may_T, random, share=self.section.swap)
        stays_T = ~(may_T & (random.random(len(ids_T)) < self.section.delete))
        mask_T = np.append(has_loss_T[stays_T][1:], False).astype(np.uint8)
        return ids_T[stays_T], mask_T, number

    def _replace(
        self, ids_T: np.ndarray, may_T: np.ndarray, random: np.random.Generator, *, domain: int
    ) -> None:
        """Put tokens of a row of another domain, or of the only one, in place of some."""
        chosen = np.flatnonzero(may_T & (random.random(len(ids_T)) < self.section.replace))
        if not len(chosen):
            return
        others = [n for n in range(len(self.stores)) if n != domain] or [domain]
        for _ in range(TRIES):
            store = self.stores[others[int(random.integers(len(others)))]]
            (taken_T,) = store.take([int(random.integers(len(store)))]).column("input_ids")
            taken_T = taken_T[ordinary(taken_T, self.special_ids)]
            if len(taken_T):
                ids_T[chosen] = random.choice(taken_T, len(chosen))
                return


def _swap(
    ids_T: np.ndarray,
    has_loss_T: np.ndarray,
    may_T: np.ndarray,
    random: np.random.Generator,
    *,
    share: float,
) -> None:
    """Have pairs of neighbours change places, so that `share` of the tokens do in the mean."""
    at, chance_T = 1, random.random(len(ids_T))
    while at < len(ids_T) - 1:
        alike = may_T[at] and may_T[at + 1] and has_loss_T[at] == has_loss_T[at + 1]
        if alike and chance_T[at] < share / (2 - share):
            ids_T[[at, at + 1]] = ids_T[[at + 1, at]]
            at += 1
        at += 1
