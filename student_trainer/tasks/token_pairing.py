"""A teacher of another tokenizer: its answers at the positions of the student's rows.

N positions with loss of the student's unit   M those of the teacher's   S spans, or temperatures
K ids kept per position   V ids of the student
"""

from dataclasses import dataclass

import numpy as np

from shared.across.alignment import NONE, Alignment, align
from shared.across.token_pair import ABSENT, TokenPair
from shared.data.layout import Layout
from shared.data.rows import Rows
from shared.targets.paired import PairedTargets


@dataclass(frozen=True, slots=True)
class TokenPairing:
    """Satisfies `Pairing`."""

    pair: TokenPair

    def arrays(self, rows: Rows, layout: Layout, answer: PairedTargets) -> dict[str, np.ndarray]:
        """See `Pairing`. `compared_N` are positions at which both models begin a token after the
        same bytes; there `ids_NK` are the student's ids of what the teacher kept, `logprobs_NK`
        and `log_tail_NS` the teacher's, and `absent_NK` marks what the student does not have.
        Elsewhere all mass is in the tail. With groups those are named in place of ids, each once,
        `group_V` has that of each of the student's ids, and nothing is compared where the next
        tokens of the text are in different ones. `label_logprob_N` are the teacher's nats of each
        span, in equal shares on the student's tokens of it, so that their sum is that of the text;
        where the teacher says nothing, as of an end that it does not have, their mean stands.
        `span_N`, `span_logprob_N` and `span_share_N` are of spans of several tokens, where there
        are some."""
        found, told = align(rows, answer.rows, self.pair), answer.targets.arrays()
        nats_S = _summed(found, told.label_logprob_N)
        at_N = _beginnings(found)
        arrays = self._compared(found, at_N, told.kept, layout.label_N)
        arrays["label_logprob_N"] = in_shares(found, nats_S)
        return arrays if self.pair.group_V is not None else arrays | _merged(found, nats_S)

    def _compared(
        self, found: Alignment, at_N: np.ndarray, kept: dict[str, np.ndarray], label_N: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What the teacher shipped at the position of its own that stands beside each."""
        is_compared_N, at_N, label_M = at_N != NONE, np.maximum(at_N, 0), found.label_M
        if not len(label_M):  # of a unit that the teacher does not read
            kept = {name: np.zeros((1, *v.shape[1:]), v.dtype) for name, v in kept.items()}
            label_M = np.zeros(1, np.int64)
        teachers_NK, theirs_N = kept["ids_NK"][at_N], label_M[at_N]
        ids_NK, none_N1 = self._students(teachers_NK), ~is_compared_N[:, None]
        logprobs_NK = np.where(none_N1, np.float32(0), kept["logprobs_NK"][at_N])
        span_N = np.where(is_compared_N, found.span_N, NONE)
        is_absent_NK = (ids_NK == ABSENT) | none_N1
        is_absent_NK |= np.append(found.is_shifted_S, False)[span_N][:, None]
        group_V = self.pair.group_V
        absent_N = np.zeros_like(label_N) if group_V is None else group_V[label_N]
        if group_V is None:  # the first token of several is no whole outcome of the other's
            is_merged_N = np.append(found.is_merged_S, False)[span_N]
            own_NK = (ids_NK == label_N[:, None]) | (teachers_NK == theirs_N[:, None])
            is_absent_NK |= is_merged_N[:, None] & own_NK
        else:
            is_absent_NK |= (group_V[label_N] != self._students(theirs_N))[:, None]
            logprobs_NK, is_absent_NK = _in_groups(ids_NK, logprobs_NK, is_absent_NK)
        arrays = {
            "compared_N": is_compared_N,
            "ids_NK": np.where(is_absent_NK, absent_N[:, None], ids_NK),
            "absent_NK": is_absent_NK,
            "logprobs_NK": logprobs_NK,
            "log_tail_NS": np.where(none_N1, np.float32(0), kept["log_tail_NS"][at_N]),
        }
        return arrays if group_V is None else arrays | {"group_V": group_V.astype(np.int64)}

    def _students(self, teachers: np.ndarray) -> np.ndarray:
        """The student's ids, or groups, of the teacher's ids; ABSENT where there is none."""
        is_known = teachers < len(self.pair.student_of_W)
        found = self.pair.student_of_W[np.where(is_known, teachers, 0)].astype(np.int64)
        return np.where(is_known, found, ABSENT)


def _in_groups(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, is_absent_NK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of groups in place of ids that may repeat: at the first id of each group
    that of all, and the others absent with none."""
    at = np.nonzero(~is_absent_NK)
    place = at[0] * (ids_NK.max(initial=0) + 1) + ids_NK[at]
    order = np.argsort(place, kind="stable")
    _, first = np.unique(place[order], return_index=True)
    sums = np.logaddexp.reduceat(logprobs_NK[at][order], first) if len(first) else []
    heads = tuple(index[order][first] for index in at)
    summed_NK = np.where(is_absent_NK, logprobs_NK, -np.inf).astype(np.float32)
    summed_NK[heads] = sums
    is_other_NK = np.ones_like(is_absent_NK)
    is_other_NK[heads] = False
    return summed_NK, is_other_NK


def _summed(found: Alignment, label_logprob_M: np.ndarray) -> np.ndarray:
    """The teacher's log-probability of the tokens of each span [S], nats."""
    held = found.span_M != NONE
    spans, values = found.span_M[held], label_logprob_M[held]
    return np.bincount(spans, weights=values, minlength=len(found.is_whole_S))


def in_shares(found: Alignment, nats_S: np.ndarray) -> np.ndarray:
    """The teacher's nats of each span on the student's tokens of it, float32 [N]."""
    is_told_S = np.bincount(found.span_M[found.span_M != NONE], minlength=len(nats_S)) > 0
    is_told_N = np.append(is_told_S, False)[found.span_N]
    of_span_N = np.append(nats_S / np.maximum(found.tokens_S, 1), 0.0)[found.span_N]
    mean = of_span_N[is_told_N].mean() if is_told_N.any() else 0.0
    return np.where(is_told_N, of_span_N, mean).astype(np.float32)


def _beginnings(found: Alignment) -> np.ndarray:
    """The teacher's position at which the span that a position begins begins [N]; NONE elsewhere,
    and where the span is not whole."""
    own_S, others_S = found.firsts(found.span_N), found.firsts(found.span_M)
    is_there_S = found.is_whole_S & (own_S != NONE) & (others_S != NONE)
    at_N = np.full(len(found.span_N), NONE, np.int64)
    at_N[own_S[is_there_S]] = others_S[is_there_S]
    return at_N


def _merged(found: Alignment, nats_S: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of spans of several tokens, by the positions of the student in them."""
    if not found.is_merged_S.any():
        return {}
    is_held_N = np.append(found.is_merged_S, False)[found.span_N]
    tokens_N = np.append(found.tokens_S, 1)[found.span_N]
    nats_N = np.append(nats_S, 0.0)[found.span_N]
    return {
        "span_N": np.where(is_held_N, found.span_N, NONE),
        "span_logprob_N": np.where(is_held_N, nats_N, 0.0).astype(np.float32),
        "span_share_N": np.where(is_held_N, 1 / tokens_N, 0.0).astype(np.float32),
    }
