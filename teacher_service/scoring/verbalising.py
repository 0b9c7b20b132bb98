"""How likely a causal language model is to write each of a few continuations of a text. Needs torch
alone.

The continuations are a tree: what several begin with is read once. A state is what the head reads
after a text and the tokens of a path into the tree; the text itself is the path of no tokens.

P texts   S states   C continuations   E edges, each a token after a path   D hidden width
V head rows
Log-probabilities are nats, normalised over all V rows of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_service.scoring.scoring import ScoringHead, logits_in_parts

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """Continuations, by what they share."""

    paths: tuple[Tokens, ...]  # after which a token is asked about, the empty one first
    leaves: tuple[Tokens, ...]  # the paths that no other goes on from: reading them reads all
    edges: tuple[tuple[int, int], ...]  # number of a path, and a token after it
    edges_of: tuple[tuple[int, ...], ...]  # of each continuation [C], one for each token

    @staticmethod
    def of(continuations: Sequence[Tokens]) -> "Tree":
        """The tree of continuations of a token or more."""
        ends = {tokens[:n] for tokens in continuations for n in range(len(tokens))}
        paths = sorted(ends, key=lambda path: (len(path), path))
        place = {path: number for number, path in enumerate(paths)}
        edges: dict[tuple[int, int], int] = {}
        edges_of = [
            tuple(
                edges.setdefault((place[tokens[:n]], token), len(edges))
                for n, token in enumerate(tokens)
            )
            for tokens in continuations
        ]
        inner = {path[:-1] for path in paths if path}
        leaves = tuple(path for path in paths if path not in inner)
        return Tree(tuple(paths), leaves, tuple(edges), tuple(edges_of))


@torch.inference_mode()
def continuation_logprobs(states_PSD: Tensor, head: ScoringHead, tree: Tree) -> Tensor:
    """The log-probability of each continuation of each text, float64 [P, C]; `states_PSD` are
    those after the paths of the tree, in its order."""
    num_texts, num_paths, width = states_PSD.shape
    path_E = torch.tensor([path for path, _ in tree.edges])
    token_E = torch.tensor([token for _, token in tree.edges])
    widest = int(path_E.bincount(minlength=num_paths).max())
    edge_SX = torch.zeros(num_paths, widest, dtype=torch.int64)  # padded by any edge
    known_SX = torch.zeros_like(edge_SX, dtype=torch.bool)
    for path in range(num_paths):
        own = (path_E == path).nonzero()[:, 0]
        edge_SX[path, : len(own)], known_SX[path, : len(own)] = own, True
    asked_NX = token_E[edge_SX].repeat(num_texts, 1)
    found_NX = _logprobs(states_PSD.reshape(-1, width), head, asked_NX)
    found_PSX = found_NX.view(num_texts, num_paths, widest)
    logprob_PE = found_PSX.new_empty(num_texts, len(tree.edges))
    logprob_PE[:, edge_SX[known_SX]] = found_PSX[:, known_SX]
    return torch.stack([logprob_PE[:, list(own)].sum(1) for own in tree.edges_of], dim=1)


def _logprobs(states_ND: Tensor, head: ScoringHead, ids_NX: Tensor) -> Tensor:
    """Log-probabilities of ids at each state, float64 [N, X], on the host."""
    found_NX = torch.empty(ids_NX.shape, dtype=torch.float64)
    for part, logits_CV in logits_in_parts(states_ND, head):
        asked_CX = ids_NX[part].to(logits_CV.device)
        whole_C1 = head.vocab.logsumexp(logits_CV)[:, None]
        found_NX[part] = (head.vocab.of(logits_CV, asked_CX) - whole_C1).double().cpu()
    return found_NX
