"""What a model writes on validation prompts with a right answer: how near it is, how long, how
varied, and whether one of several draws is right.

Right is the exact match of `cluster.evaluation.scores`. `pass@k` is the unbiased estimate of Chen
et al. 2021 (arXiv 2107.03374), Eq. 1, here of k = 1 and k = `DRAWS` among `DRAWS` draws at
temperature 1; distinct-2 (Li et al. 2016, arXiv 1510.03055) is of what is written greedily.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cluster.evaluation.items import Item, items_of, rows_of
from cluster.evaluation.scores import scores
from cluster.planning.preparation import Prepared
from cluster.prompt_search.teacher import answer_in, asked_of
from shared.targets.generation import GenerationSpec, Generator

PROMPTS, ROOM, DRAWS, POSITIONS = 64, 16, 8, 5


def items_by_domain(prepared: Prepared, tokenizer: Any) -> dict[str, list[Item]]:
    """The same prompts for every cell."""
    config = prepared.config
    return {
        domain.name: items_of(config, domain, tokenizer, count=PROMPTS, seed=0)
        for domain in prepared.domains
    }


def written(
    generator: Generator,
    items: Mapping[str, Sequence[Item]],
    tokenizer: Any,
    *,
    ends: tuple[int, ...],
) -> dict[str, dict[str, float]]:
    """The measures of one model, by domain."""
    return {
        name: _of_domain(generator, own, tokenizer, ends=ends)
        for name, own in items.items()
        if any(item.is_scored for item in own)
    }


@torch.no_grad()
def kl_by_position(
    models: tuple[Any, Any], generator: Generator, items: Sequence[Item], *, ends: tuple[int, ...]
) -> list[float]:
    """KL(teacher || student), of these two models, at each token that the student writes greedily,
    over the whole vocabulary, nats: the mean at each of `POSITIONS` that half of the texts
    reach."""
    openings = asked_of(rows_of(list(items)))
    written = generator.generate(openings, GenerationSpec(ROOM, ends))
    found_P: list[list[float]] = [[] for _ in range(POSITIONS)]
    texts = list(zip(openings.ids(), written.ids(), strict=True))
    for opening, answer in texts:
        ids_1L = torch.tensor([[*opening.tolist(), *answer.tolist()]])
        laws = [model(ids_1L).logits[0, len(opening) - 1 :] for model in models]
        teacher_LV, student_LV = (law_LV.double().log_softmax(-1) for law_LV in laws)
        kl_L = (teacher_LV.exp() * (teacher_LV - student_LV)).sum(-1)
        for kls, kl in zip(found_P, kl_L.tolist(), strict=False):
            kls.append(kl)
    return [float(np.mean(kls)) for kls in found_P if len(kls) >= len(texts) / 2]


def distinct_2(texts: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring ids among all pairs of all texts; 0 where there is none."""
    pairs = [pair for ids in texts for pair in itertools.pairwise(ids)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _of_domain(
    generator: Generator, items: Sequence[Item], tokenizer: Any, *, ends: tuple[int, ...]
) -> dict[str, float]:
    openings = asked_of(rows_of(list(items)))
    right = [tokenizer.decode(item.right_ids, skip_special_tokens=True).strip() for item in items]
    greedy = generator.generate(openings, GenerationSpec(ROOM, ends))
    ids = [each.tolist() for each in greedy.ids()]
    found = [scores(*pair) for pair in zip(_answers(ids, right, tokenizer), right, strict=True)]
    matches_SP = []
    for seed in range(DRAWS):
        spec = GenerationSpec(ROOM, ends, temperature=1.0, seed=seed)
        drawn = [each.tolist() for each in generator.generate(openings, spec).ids()]
        answers = _answers(drawn, right, tokenizer)
        matches_SP.append([scores(*pair).exact_match for pair in zip(answers, right, strict=True)])
    return {
        "exact_match": float(np.mean([one.exact_match for one in found])),
        "token_f1": float(np.mean([one.token_f1 for one in found])),
        "pass_1": float(np.mean(matches_SP)),
        f"pass_{DRAWS}": float(np.max(matches_SP, axis=0).mean()),
        "distinct_2": distinct_2(ids),
        "tokens": float(np.mean([len(each) for each in ids])),
        "ended": float(np.mean(greedy.stopped())),
    }


def _answers(ids: Sequence[Sequence[int]], right: Sequence[str], tokenizer: Any) -> list[str]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    chat = bool(tokenizer.chat_template)
    return [answer_in(text, truth, chat=chat) for text, truth in zip(texts, right, strict=True)]
