"""The student as a config has it: the model, what of it trains, and on how many workers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config.base import Dtype, Momentum, Name, Positive, Section
from shared.config.models.attention import Attention


class FullTraining(Section):
    """Every weight of the student trains."""

    kind: Literal["full"] = "full"


class LoRATraining(Section):
    """Low-rank adapters train, the base is frozen."""

    kind: Literal["lora"] = "lora"
    r: int = Field(default=16, ge=1)
    alpha: Positive = 32.0
    dropout: Momentum = 0.0
    target_modules: Name | Annotated[list[Name], Field(min_length=1)] = "all-linear"


class QLoRATraining(LoRATraining):
    """Adapters on a base quantised to nf4 by bitsandbytes."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]


class Upcycle(Section):
    """A dense student becomes a sparse mixture of experts, copies of its FFNs (sparse upcycling,
    arXiv 2212.05055; defaults of LLaVA-MoD, arXiv 2408.15881)."""

    # What the loss of the routers counts. LLaVA-MoD has as much of the sum over layers of its own
    # form, top-1 as in DeepSpeed; this is that of transformers, over the layers together.
    balance: ClassVar[float] = 0.01

    every: int = Field(
        default=2, ge=1, description="from the first on, one layer in so many has them"
    )
    experts: int = Field(default=4, ge=2, description="of such a layer")
    top_k: int = Field(default=2, ge=1, description="experts a token is sent to")
    train: Literal["experts", "all"] = Field(
        default="experts", description="experts and routers alone, or every weight"
    )

    @property
    def shape(self) -> dict[str, int]:
        """What decides the weights that it begins with, beside a seed."""
        return {"every": self.every, "experts": self.experts, "top_k": self.top_k}

    def in_words(self) -> str:
        """What it makes of a model."""
        layers = "every layer" if self.every == 1 else f"one layer in {self.every}"
        return f"{self.experts} experts in {layers}, {self.top_k} a token"

    @model_validator(mode="after")
    def _enough_experts(self) -> "Upcycle":
        if self.top_k > self.experts:
            raise ValueError(
                f"upcycle.top_k is {self.top_k}, more than upcycle.experts, which is "
                f"{self.experts}; lower top_k, or raise experts"
            )
        return self


class Elastic(Section):
    """Bounds of a number of workers that follows what the cluster has room for."""

    min: int = Field(default=1, ge=1, description="workers without which training waits")
    max: int = Field(ge=1, description="workers that train where there is room, at most")

    @model_validator(mode="after")
    def _in_order(self) -> "Elastic":
        if self.min > self.max:
            raise ValueError(
                f"workers.min is {self.min}, more than workers.max, which is {self.max}; raise "
                "max, or lower min"
            )
        return self


class Student(Section):
    """The model that learns, and the workers it trains on."""

    model: Name
    revision: Name | None = None
    trust_remote_code: bool = False
    train: Annotated[FullTraining | LoRATraining | QLoRATraining, Field(discriminator="kind")] = (
        FullTraining()
    )
    upcycle: Upcycle | None = Field(
        default=None, description="make it a mixture of experts first, which then trains"
    )
    dtype: Dtype = "float32"
    attention: Attention = Field(
        default="auto", description="auto (the library's choice), sdpa, eager or flash_attention_2"
    )
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    activation_checkpointing: bool = False
    workers: Annotated[int, Field(ge=1)] | Elastic = Field(
        default=1, description="training processes; with min and max as many as find room"
    )
    gpus: float = Field(default=0, ge=0, description="GPUs of one worker")
    cpus: float = Field(default=1, ge=0, description="CPUs of one worker")
    max_restarts: int = Field(
        default=3, ge=0, description="restarts of the worker group after a crash"
    )

    @model_validator(mode="after")
    def _experts_train_whole(self) -> "Student":
        if self.upcycle and self.upcycle.train == "all" and self.train.kind != "full":
            raise ValueError(
                f"student.upcycle.train is all, but student.train.kind is {self.train.kind}, with "
                "which adapters train; leave upcycle.train out, or set student.train.kind=full"
            )
        return self

    @property
    def bounds(self) -> Elastic:
        """Between which numbers of workers it trains; a fixed number is both."""
        found = self.workers
        return found if isinstance(found, Elastic) else Elastic(min=found, max=found)

    def counts(self, rows_per_step: int, micro_batch: int) -> tuple[int, ...]:
        """Numbers of workers in bounds among which a step's micro-batches divide, ascending."""
        most = min(self.bounds.max, rows_per_step // micro_batch)
        numbers = range(self.bounds.min, most + 1)
        return tuple(n for n in numbers if not rows_per_step % (micro_batch * n))


def check_workers(student: Student, rows_per_step: int, micro_batch: int) -> None:
    """Raise ValueError where no number of workers divides a step's micro-batches."""
    if student.counts(rows_per_step, micro_batch):
        return
    bounds = student.bounds
    if not isinstance(student.workers, Elastic):
        raise ValueError(
            f"batch.rows_per_step is {rows_per_step}, not a multiple of batch.micro_batch x "
            f"student.workers = {micro_batch * bounds.min}; change one of the three"
        )
    raise ValueError(
        f"batch.rows_per_step is {rows_per_step}, not a multiple of batch.micro_batch = "
        f"{micro_batch} times any student.workers from {bounds.min} to {bounds.max}; change one of "
        "the three"
    )
