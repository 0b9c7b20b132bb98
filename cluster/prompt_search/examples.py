"""Which worked examples are shown: maximal marginal relevance (Carbonell and Goldstein, 1998).

P examples of the pool   Q questions of the development set   F hashed features
"""

import itertools
from collections.abc import Sequence

import numpy as np
import xxhash

from cluster.prompt_search.wording import WORD

NUM_FEATURES = 4096


def vectors(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF over hashed words and pairs of words, each row of length 1 or 0: [texts, F]."""
    counts_PF = np.zeros((len(texts), NUM_FEATURES))
    for row, text in enumerate(texts):
        words = [word.lower() for word in WORD.findall(text)]
        for feature in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]:
            counts_PF[row, xxhash.xxh32_intdigest(feature.encode()) % NUM_FEATURES] += 1
    seen_F = (counts_PF > 0).sum(axis=0)
    weights_F = np.log((1 + len(texts)) / (1 + seen_F)) + 1
    scaled_PF = counts_PF * weights_F
    norms_P1 = np.linalg.norm(scaled_PF, axis=1, keepdims=True)
    return np.divide(scaled_PF, norms_P1, out=np.zeros_like(scaled_PF), where=norms_P1 > 0)


class Relevance:
    """How near the texts of a pool are to each other and to the questions."""

    def __init__(self, pool: Sequence[str], questions: Sequence[str]) -> None:
        both = vectors([*pool, *questions])
        pool_PF, questions_QF = both[: len(pool)], both[len(pool) :]
        self._relevance_P = (pool_PF @ questions_QF.T).mean(axis=1)  # mean cosine
        self._alike_PP = pool_PF @ pool_PF.T

    def choose(self, among: Sequence[int], *, count: int, trade_off: float) -> list[int]:
        """Positions in the pool of `count` texts, of those that stand at `among`.

        Each next text has the largest trade_off * relevance - (1 - trade_off) * largest cosine
        with those chosen. Ties go to the first.
        """
        offered_P, chosen = np.array(among, dtype=int), list[int]()
        for _ in range(min(count, len(offered_P))):
            gain_P = trade_off * self._relevance_P[offered_P]
            if chosen:
                alike_PC = self._alike_PP[offered_P][:, chosen]
                gain_P -= (1 - trade_off) * alike_PC.max(axis=1)
            gain_P[np.isin(offered_P, chosen)] = -np.inf
            chosen.append(int(offered_P[gain_P.argmax()]))
        return chosen
