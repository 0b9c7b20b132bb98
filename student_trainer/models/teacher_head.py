"""The teachers' LM heads on a student's device, where teachers ship their last hidden states."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from shared.run.plan import RunPlan
from shared.targets.asks.head_location import find_head
from shared.targets.asks.last_states import LastStates
from shared.targets.routing import among, called
from student_trainer.losses.kernel.averaged import AveragedHeads
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead

TeacherHeads = dict[str, TeacherHead | AveragedHeads]


def load_teacher_heads(plan: RunPlan, device: torch.device) -> TeacherHeads:
    """By teacher, or by what an average of several is called, the heads that a plan's answers stand
    before, plain tensors without a gradient; empty where they hold ids. Raises ConfigError where
    the cache lacks or garbles one."""
    heads: dict[str, TeacherHead] = {}
    for name, part in plan.by_teacher.items():
        questions = filter(None, (part.training_question, part.validation_question))
        asks = [q.ask for q in questions if isinstance(q.ask, LastStates)]
        if asks:
            path = find_head(plan.config.paths.cache, asks[0].head)
            heads[name] = TeacherHead(_loaded(path, device), asks[0].shared_vocab)
    return heads | _averaged(plan, heads)


def _averaged(plan: RunPlan, heads: dict[str, TeacherHead]) -> TeacherHeads:
    """Those of averages that a domain is learnt from."""
    config = plan.config
    asked = [among(config.teachers_of(name), config.teachers) for name in config.domains]
    return {
        called(shares): AveragedHeads.of([heads[name] for name in shares], [*shares.values()])
        for shares in asked
        if heads and len(shares) > 1
    }


def _loaded(path: Path, device: torch.device) -> Head:
    found = load_file(path, device=str(device))
    soft_cap = found.get("soft_cap")
    return Head(
        found["weight"],
        found.get("bias"),
        logit_scale=found["logit_scale"].item(),
        soft_cap=None if soft_cap is None else soft_cap.item(),
    )
