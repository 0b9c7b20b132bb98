"""A teacher that is the student some steps ago: which version of the student answers a step, and
when its weights are put where the teacher finds them.

Version v is the student after v updates. A step is answered by the version that its config names
for it, whatever the timing.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.config.models.following import FollowedStudent
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.question import Question
from shared.targets.weights import WeightFiles, WeightsRef
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks
from student_trainer.state.checkpoint import all_checkpoints, step_of
from student_trainer.state.versions import Versions

FOLLOWED = "followed"  # the name of its state in checkpoints


@dataclass(slots=True)
class FollowedVersions:
    """The versions of the student that teach it; satisfies `Stateful`. All ranks call every method
    together."""

    asked: FollowedStudent
    versions: Versions
    files: RunDir
    _known: dict[int, WeightsRef] = field(default_factory=dict)

    @property
    def lag(self) -> int:
        """How many steps ahead of the one under way may be asked about."""
        return self.asked.lag

    def follow(self, step: int) -> None:
        """Put down the student as it is before step `step` where it is to teach any. Raises what
        `Versions.put` raises."""
        if step % self.asked.every or step in self._known:
            return
        ref, _ = self.versions.put(step, is_needed=self._needed(step).__contains__)
        oldest = self.asked.version(step)
        self._known = {v: kept for v, kept in self._known.items() if v >= oldest} | {step: ref}

    def _needed(self, step: int) -> set[int]:
        """The versions that teach the steps of which any is asked about before the next one, from
        this step on and from every checkpoint on."""
        begun = {*map(step_of, all_checkpoints(self.files.checkpoints)), step}
        ahead = range(self.lag + 1)
        return {self.asked.version(first + later) for first in begun for later in ahead}

    def question(self, question: Question, step: int) -> Question:
        """The question as it is asked about the rows of a step."""
        return replace(question, weights=self._known[self.asked.version(step)])

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"versions": [asdict(ref) for ref in self._known.values()]}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        refs = [WeightsRef(**fields) for fields in state["versions"]]
        self._known = {ref.version: ref for ref in refs}


def open_followed(
    plan: RunPlan, student: Student, engine: Any, ranks: Ranks
) -> FollowedVersions | None:
    """What follows the student of a plan; None where its teacher does not."""
    asked, question = plan.config.followed, plan.training_question
    if asked is None or question is None or plan.mode != "train":
        return None
    files = RunDir(Path(plan.run_dir))
    folder, dtype = WeightFiles(files.followed), plan.config.student.dtype
    goes_to = "the teacher, which follows the student"
    versions = Versions(student, engine, ranks, files, folder, dtype, goes_to)
    return FollowedVersions(asked, versions, files)
