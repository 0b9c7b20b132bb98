"""RunPlan: everything a student worker is told, resolved once by the driver before it starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.mixture.weight_log import ControllerClient
from shared.prompts.prefix import Opening
from shared.targets.reader import TargetReader
from shared.targets.spec import TargetSpec


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A resolved run; plain values only, so it pickles small."""

    config: Config  # model, adapter and store paths are absolute here
    run_dir: str
    domains: tuple[PreparedDomain, ...]  # config order
    target_spec: TargetSpec | None  # None: no loss needs a teacher
    evaluation_spec: TargetSpec | None  # None: no teacher to compare with
    kl_kind: str  # "full", "bucketed-K" or "none"
    teacher: dict[str, str] | None  # the engine's fingerprint
    packed: bool  # whether the student keeps packed documents apart
    mode: Literal["train", "evaluate"] = "train"
    teacher_width: int | None = None  # of the hidden states it ships; None: no loss asks for them
    # By domain; what the teacher is shown and the student is not. Readers do it.
    openings: Mapping[str, Opening] = field(default_factory=dict)

    @property
    def draws(self) -> int:
        """Draws of a row that take turns from epoch to epoch; 1 where no ids are drawn."""
        drawn = self.target_spec is not None and self.target_spec.is_drawn
        return self.config.targets.draws if drawn else 1


OpenReader = Callable[[int], TargetReader]  # rank -> reader; picklable
OpenController = Callable[[], ControllerClient]  # called on rank 0 only; picklable
