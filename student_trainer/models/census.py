"""Who trains, who is frozen, what is quantised and adapted: a student's weights, counted.

An expert tensor holds the matrices of all experts of a layer, which bitsandbytes does not quantise.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from student_trainer.models.frozen import num_weights
from student_trainer.models.student import Student


@dataclass(frozen=True, slots=True)
class Census:
    """Numbers of weights, of layers and of expert tensors."""

    trained: int
    frozen: int
    beside: int  # of the frozen ones, those outside decoder and head
    quantised: int  # of the frozen ones, those in nf4
    adapted_layers: int
    expert_tensors: int
    adapted_expert_tensors: int

    def sentence(self, *, adapts: bool, quantises: bool) -> str:
        """For the first lines of a run; `adapts` and `quantises` say what was asked for."""
        parts = [f"the student trains {self.trained:,} weights"]
        if adapts:
            parts[0] += f" in adapters on {self.adapted_layers} linear layers"
        if adapts and self.expert_tensors:
            reached = f"{self.adapted_expert_tensors} of {self.expert_tensors}"
            parts.append(f"{reached} fused expert tensors are adapted")
        if self.frozen:
            parts.append(f"{self.frozen:,} are frozen" + self._of_which(quantises))
        if quantises and self.expert_tensors:
            parts.append(
                f"{self.expert_tensors} fused expert tensors stay unquantised, since nf4 takes "
                "linear layers alone"
            )
        return "; ".join(parts)

    def _of_which(self, quantises: bool) -> str:
        found = [f"{self.quantised:,} in nf4"] * quantises
        if self.beside:
            found.append(f"{self.beside:,} beside decoder and head, exported as they came")
        return f" ({', '.join(found)})" if found else ""


def census(student: Student) -> Census:
    """Count a student's weights, sharded or not."""
    parameters = dict(student.saved.named_parameters())
    inside = {id(p) for part in (student.decoder, student.head) for p in part.parameters()}
    experts = {id(p) for name, p in parameters.items() if _is_expert_tensor(name, p)}
    adapted = _adapted(student.saved)
    frozen = [p for p in parameters.values() if not p.requires_grad]
    return Census(
        trained=sum(num_weights(p) for p in parameters.values() if p.requires_grad),
        frozen=sum(map(num_weights, frozen)),
        beside=sum(num_weights(p) for p in frozen if id(p) not in inside),
        quantised=sum(num_weights(p) for p in frozen if hasattr(p, "quant_state")),
        adapted_layers=len(adapted - experts),
        expert_tensors=len(experts),
        adapted_expert_tensors=len(adapted & experts),
    )


def _is_expert_tensor(name: str, parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "expert" in name and len(shape) == 3 and "lora_" not in name


def _adapted(model: nn.Module) -> set[int]:
    """Which weights of the base have an adapter, by identity."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    return {id(_adapted_weight(layer)) for layer in layers}


def _adapted_weight(layer: Any) -> nn.Parameter:
    """Of a linear layer its matrix; of what wraps one tensor among others, that one."""
    return layer.get_param() if hasattr(layer, "parameter_name") else layer.get_base_layer().weight
