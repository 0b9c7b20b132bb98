"""A causal language model as a classifier of whole rows, by what it would write after each.

P texts: rows, or their documents   S paths of the tree   T tokens of a text   C classes
D hidden width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets.asks.classes import ClassLogProbs, Tokens
from teacher_service.engine.branching import Branching
from teacher_service.engine.classes.texts import class_columns, names_of, texts_of
from teacher_service.scoring.scoring import ScoringHead
from teacher_service.scoring.verbalising import Tree, continuation_logprobs

TOKENS_AT_ONCE = 2**14  # that a forward pass reads, of texts and the paths after them

# States [N, D] at the positions with loss of rows, in their order.
ReadStates = Callable[[Rows], Tensor]


@lru_cache(maxsize=16)
def _tree(classes: tuple[Tokens, ...]) -> Tree:
    return Tree.of(classes)


@dataclass(frozen=True, slots=True)
class Reading:
    """A model as it is read with."""

    read: ReadStates
    branching: Branching | None  # None: rows must not share a pass
    head: ScoringHead
    limit: int | None  # tokens that it reads at most


def verbalised(rows: Rows, ask: ClassLogProbs, reading: Reading) -> dict[str, np.ndarray]:
    """The columns of an answer. Raises ConfigError for a text that leaves the model no room for the
    classes."""
    texts = texts_of(rows)
    _refuse_overlong(rows, texts, ask, limit=reading.limit)
    logprobs_PC = _continued(texts, ask, reading)
    if ask.content_free:
        logprobs_PC = logprobs_PC - _continued([np.array(ask.content_free)], ask, reading)
    return class_columns(rows, logprobs_PC.log_softmax(1).float().numpy())


def _continued(texts: Sequence[np.ndarray], ask: ClassLogProbs, reading: Reading) -> Tensor:
    """Log-probabilities of the classes' tokens after each text, float64 [P, C]."""
    tree, branching = _tree(ask.classes), reading.branching
    is_asked = len(tree.paths) > 1 and len(texts) > 0
    if branching is not None and not (is_asked and branching.works(texts[0].tolist(), tree.leaves)):
        branching = None
    found_PC = torch.empty(len(texts), len(ask.classes), dtype=torch.float64)
    for part in _parts(texts, tree, alike=branching is not None):
        own = [texts[number] for number in part]
        if branching is not None:
            states_PSD = _branched(own, tree, branching)
        else:
            states_PSD = _states(own, tree, reading.read)
        found_PC[part] = continuation_logprobs(states_PSD, reading.head, tree)
    return found_PC


def _parts(texts: Sequence[np.ndarray], tree: Tree, *, alike: bool) -> list[list[int]]:
    """Numbers of texts that are read together; `alike`: those of one length."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n])) if alike else range(len(texts))
    parts: list[list[int]] = []
    taken, length = TOKENS_AT_ONCE, 0
    for number in order:
        size = sum(len(texts[number]) + len(leaf) for leaf in tree.leaves)
        if taken + size > TOKENS_AT_ONCE or (alike and len(texts[number]) != length):
            parts.append([])
            taken, length = 0, len(texts[number])
        parts[-1].append(number)
        taken += size
    return parts


def _leaf_parts(tree: Tree, length: int) -> list[tuple[Tokens, ...]]:
    """Leaves that are read together after texts of so many tokens in all."""
    parts: list[list[Tokens]] = [[]]
    taken = 0
    for leaf in tree.leaves:
        taken += length + len(leaf)
        if taken > TOKENS_AT_ONCE and parts[-1]:
            parts.append([])
            taken = length + len(leaf)
        parts[-1].append(leaf)
    return [tuple(part) for part in parts]


def _branched(texts: Sequence[np.ndarray], tree: Tree, branching: Branching) -> Tensor:
    """As `_states`, of texts of one length, each read once for the leaves of a part."""
    ids_PT = torch.from_numpy(np.stack(texts).astype(np.int64))
    found: dict[Tokens, Tensor] = {}
    for leaves in _leaf_parts(tree, ids_PT.numel()):
        text_PD, after_PMLD = branching.states(ids_PT, leaves)
        found.setdefault((), text_PD)
        for number, leaf in enumerate(leaves):
            for size in range(1, len(leaf) + 1):
                found.setdefault(leaf[:size], after_PMLD[:, number, size - 1])
    return torch.stack([found[path] for path in tree.paths], dim=1)


def _states(texts: Sequence[np.ndarray], tree: Tree, read: ReadStates) -> Tensor:
    """What the head reads after each path of each text [P, S, D]: each leaf is read with the text
    before it, and has a state after the text and each of its tokens."""
    found: dict[Tokens, Tensor] = {}
    for leaves in _leaf_parts(tree, sum(map(len, texts))):
        paths = [leaf[:size] for leaf in leaves for size in range(len(leaf) + 1)]
        rows = [_row(text, leaf) for text in texts for leaf in leaves]
        states_ND = read(
            Rows.build(
                domains=["classes"] * len(rows),
                indices=range(len(rows)),
                input_ids=[ids for ids, _ in rows],
                doc_starts=[np.zeros(1)] * len(rows),
                loss_masks=[mask for _, mask in rows],
            )
        )
        states_PXD = states_ND.view(len(texts), len(paths), -1)
        for number, path in enumerate(paths):
            found.setdefault(path, states_PXD[:, number])
    return torch.stack([found[path] for path in tree.paths], dim=1)


def _row(text: np.ndarray, leaf: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """A text and a path after it, with loss at the last token of the text and at each of the
    path; one more token, which nobody reads, stands for what they predict."""
    ids = np.array([*text, *leaf, 0])
    mask = np.zeros(len(ids), np.uint8)
    mask[len(text) - 1 : -1] = 1
    return ids, mask


def _refuse_overlong(
    rows: Rows, texts: Sequence[np.ndarray], ask: ClassLogProbs, *, limit: int | None
) -> None:
    if limit is None:
        return
    longest = max(map(len, ask.classes))
    for name, text in zip(names_of(rows), texts, strict=True):
        if len(text) + longest > limit:
            raise ConfigError(
                f"row {name} has {len(text)} tokens as the teacher reads it, and a class up to "
                f"{longest}, together more than the {limit} that it reads; shorten task.template, "
                "or set data.too_long=drop and a lower data.context"
            )
