"""The teacher's head on a student's device, where the teacher ships its last hidden states."""

import torch
from safetensors.torch import load_file

from shared.run.plan import RunPlan
from shared.targets.head_location import find_head
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead


def load_teacher_head(plan: RunPlan, device: torch.device) -> TeacherHead | None:
    """The head that a plan's answers stand before, plain tensors without a gradient; None where
    they hold ids. Raises ConfigError where the cache lacks or garbles it."""
    specs = [spec for spec in (plan.target_spec, plan.evaluation_spec) if spec and spec.head]
    if not specs:
        return None
    path = find_head(plan.config.paths.cache, specs[0].head)
    found = load_file(path, device=str(device))
    soft_cap = found.get("soft_cap")
    head = Head(
        found["weight"],
        found.get("bias"),
        logit_scale=found["logit_scale"].item(),
        soft_cap=None if soft_cap is None else soft_cap.item(),
    )
    return TeacherHead(head, specs[0].shared_vocab)
