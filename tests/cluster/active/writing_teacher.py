"""A tiny teacher that has learnt to answer prompts for rows with the same rows."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import Pair

STEPS = 200


def save_writing_teacher(folder: Path, pair: Pair, prompts: Sequence[str], answer: str) -> Path:
    """Save a model of the pair's tokenizer that writes `answer` after prompts like these, whatever
    stands in the middle of them; takes some seconds."""
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(pair.teacher)
    config = LlamaConfig.from_pretrained(pair.teacher)
    config.initializer_range, config.max_position_embeddings = 0.02, 1024
    model = LlamaForCausalLM(config).float()
    target = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        before = torch.tensor([1, *_ids(tokenizer, f"{prompts[step % len(prompts)]}\n")])
        middle = slice(20, max(20, len(before) - 60))
        noise = torch.randint(3, config.vocab_size, before[middle].shape)
        changed = torch.rand(noise.shape) < step % 4 / 4
        before[middle] = torch.where(changed, noise, before[middle])
        input_ids = torch.cat([before, torch.tensor(target)])[None]
        labels = torch.full_like(input_ids, -100)
        labels[:, -len(target) :] = input_ids[:, -len(target) :]
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
