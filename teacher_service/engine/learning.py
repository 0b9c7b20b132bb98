"""LearningEngine: a teacher whose LoRA modules learn beside its student; satisfies `Engine`.

Its model is frozen, and answers as any engine does what is asked without a version. With one, the
modules of that version answer. An update is a pure function of a version, rows and what the student
says of them, so that any replica may take it, also again.

N positions with loss   M those of a pass, or ids that the student names   D hidden width
X those ids and all others together
"""

import math

import torch
from torch import Tensor

from shared.config.models.modules import TrainedModules
from shared.data.rows import Rows
from shared.errors import ConfigError, NonFiniteLossError
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.lessons import Learnt, Lesson
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import ModuleFiles
from teacher_service.engine.description import Engine, TeacherDescription
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.lora import LoraModules
from teacher_service.scoring.module_losses import Lessons, backward


class LearningEngine:
    """An engine with modules on it."""

    def __init__(
        self, engine: Engine, asked: TrainedModules, *, seed: int, files: ModuleFiles
    ) -> None:
        """Raises ConfigError for an engine that forms no gradient."""
        if not isinstance(engine, HFEngine):
            raise ConfigError(
                f"teachers.NAME.online_modules is set, but a {type(engine).__name__} forms no "
                "gradient; take an engine of transformers, or leave them out"
            )
        engine.model.requires_grad_(False)
        self._engine, self._asked = engine, asked
        self.modules = LoraModules(engine.decoder.module, asked, seed=seed, files=files)

    def describe(self) -> TeacherDescription:
        """What was loaded, without the modules."""
        return self._engine.describe()

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`; as the modules of the question's version have it."""
        with self.modules.on(question.weights):
            return self._engine.score(rows, question)

    def ship_head(self) -> ShippedHead:
        """See `Engine`; modules leave the head alone."""
        return self._engine.ship_head()

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`; without modules."""
        return self._engine.generate(openings, spec)

    def learn(self, rows: Rows, lesson: Lesson) -> Learnt:
        """Take one update. Raises NonFiniteLossError before any weight changes, ConfigError for
        modules that change nothing, and what `LoraModules` raises."""
        tokens = max(1, int(rows.num_loss_tokens().sum()))
        nll = kl = 0.0
        with self.modules.learning(lesson.modules), torch.enable_grad():
            first = 0
            for size in lesson.units:
                unit_nll, unit_kl = self._form(rows.part(slice(first, first + size)), tokens)
                nll, kl, first = nll + unit_nll, kl + unit_kl, first + size
        if not (math.isfinite(nll + kl) and self.modules.gradient_is_finite()):
            raise NonFiniteLossError(
                "the teacher's modules have a loss, or a gradient, that is not finite on rows "
                f"{rows.named()}; lower teachers.NAME.online_modules.lr or eta, or look at these "
                "rows"
            )
        written = self.modules.update()
        means = {"nll": nll / tokens, "kl": kl / tokens}
        return Learnt.build(rows, written, fingerprint=self._engine.fingerprint, **means)

    def _form(self, rows: Rows, tokens: int) -> tuple[float, float]:
        """Add a unit's gradient to that of the modules; returns the sums of both losses."""
        layout = self._engine.lay_out(rows)
        ids_NM, logprob_NX = rows.student_ids(), rows.student_logprobs()
        lessons = Lessons(
            torch.from_numpy(layout.label_N),
            None if ids_NM is None else torch.tensor(ids_NM).long(),
            None if logprob_NX is None else torch.tensor(logprob_NX),
        )
        found = [
            backward(
                self._reached(hidden_MD),
                self._engine.head,
                lessons.at(entry_M, torch.device("cpu")),
                eta=self._asked.eta,
                reverse=self._asked.divergence == "reverse_kl",
                multiplier=1 / tokens,
            )
            for entry_M, hidden_MD in self._engine.last_states(layout)
        ]
        return sum(nll for nll, _ in found), sum(kl for _, kl in found)

    def _reached(self, hidden_MD: Tensor) -> Tensor:
        """The same, which depends on the modules. Raises ConfigError where it does not."""
        if not hidden_MD.requires_grad:
            raise ConfigError(
                "teachers.NAME.online_modules.target_modules is "
                f"{self._asked.target_modules}, layers whose weights the teacher reads past them, "
                "so that modules beside them change nothing; name others, or all-linear"
            )
        return hidden_MD
