"""The whole run in one frozen tree: every section, and that they fit together.

Defaults stand on the fields and nowhere else; an unknown key is refused. Reading YAML,
overrides and suggestions for misspelt keys live in `shared.config.file`.
Relative model, data and store paths are relative to `paths.root`.
"""

from typing import Literal

from pydantic import Field, model_validator

from shared.config.adaptive_losses import check_preference, teachers_write_texts
from shared.config.base import Fraction, LocalPath, Momentum, Positive, Section, Seed
from shared.config.domains import Data, Domain
from shared.config.losses import TAID, ForwardKL, Loss, check_single
from shared.config.mixture import AdaptiveMixture, DDKMixture, FixedMixture, Mixture, check_mixture
from shared.config.models.cross_tokenizer import CrossTokenizer, check_cross_tokenizer
from shared.config.models.engines import check_engines
from shared.config.models.following import FollowedStudent, check_following
from shared.config.models.modules import TrainedModules, check_modules
from shared.config.models.rollouts import RolloutService, check_rollouts
from shared.config.models.similarity import check_similarity
from shared.config.models.student import Student, check_workers
from shared.config.models.teachers import Teacher, check_teachers, shares_of
from shared.config.progressive import Progressive
from shared.config.selectors import Selector, check_selector, check_student_ids, chosen
from shared.config.source import TokenSources, check_mix, check_source
from shared.config.targets import Service, Targets
from shared.config.tasks.balance import Balance, check_balance
from shared.config.tasks.task import LanguageModel, Task, check_task
from shared.config.text.augmentation import Augmentation, check_augmentation
from shared.config.verbs.active import Active, check_active
from shared.config.verbs.prompt_search import PromptSearch
from shared.config.verbs.stages import Stages, check_stages
from shared.config.weighting import Uniform, Weighting, check_weighting
from shared.mixture.phases import check_progressive


class Paths(Section):
    """Where things are read from and written to."""

    root: LocalPath = "."
    runs: LocalPath = "runs"
    cache: LocalPath = "~/.cache/tutelage"


class Batch(Section):
    """Rows of one optimiser step over all workers, and rows of one forward pass."""

    rows_per_step: int = Field(default=8, ge=1)
    micro_batch: int = Field(default=4, ge=1)


class Optimiser(Section):
    """AdamW with warm-up and decay."""

    lr: Positive = 1e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr_fraction: Fraction = 0.1
    clip_norm: Positive | None = 1.0
    balance: Balance | None = Field(
        default=None, description="keep the vision and the language part of a student in step"
    )


class Evaluation(Section):
    """Validation before and after training."""

    kl: Literal["auto", "full", "bucketed"] = Field(
        default="auto",
        description="full vocabulary up to 32,768 tokens, else over top_k and the tail",
    )
    store_gb: Positive = Field(
        default=2.0,
        description="most that `targets.store` keeps of answers to all validation rows over the "
        "full vocabulary, GB; `capture` keeps those over top_k and the tail beyond it",
    )
    far_student: Literal["stop", "say"] = Field(
        default="stop",
        description="what a run does whose student begins further from its teacher, in KL, than "
        "ln of their vocabulary",
    )


class Checkpoints(Section):
    """When the run is saved and how many checkpoints stay."""

    every: int = Field(default=100, ge=1, description="steps")
    keep: int = Field(default=2, ge=1)


class Config(Section):
    """One run."""

    # Files are named after it, with a few characters more than these; a name has 255 at most.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    seed: Seed = 0
    steps: int = Field(ge=1)
    log_every: int = Field(default=10, ge=1)
    paths: Paths = Paths()
    teachers: dict[str, Teacher] = Field(min_length=1)
    student: Student
    task: Task = Field(
        default=LanguageModel(),
        description="language_model, image_text, marking, classification or tagging of words",
    )
    domains: dict[str, Domain] = Field(min_length=1)
    data: Data = Data()
    prompts: LocalPath | None = Field(
        default=None, description="file of prompts the teacher is shown and the student is not"
    )
    batch: Batch = Batch()
    source: TokenSources = Field(
        default=TokenSources(),
        description="dataset, student or teacher (what they write from the prompts of rows), or "
        "shares of them",
    )
    rollouts: RolloutService = RolloutService()
    targets: Targets = Targets()
    cross_tokenizer: CrossTokenizer | None = Field(
        default=None,
        description="grouped, aligned or uld: how to learn from a teacher of another tokenizer",
    )
    losses: list[Loss] = Field(default_factory=lambda: [ForwardKL()], min_length=1)
    augmentation: Augmentation = Augmentation()
    weighting: Weighting = Field(
        default=Uniform(), description="what each token counts in the losses"
    )
    optimiser: Optimiser = Optimiser()
    mixture: Mixture = FixedMixture()
    progressive: Progressive | None = Field(
        default=None, description="phases from simple to complex text"
    )
    service: Service = Service()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    prompt_search: PromptSearch = PromptSearch()
    active: Active | None = Field(
        default=None, description="rounds of `tutelage active`, in which the teacher writes"
    )
    stages: Stages = Field(
        default_factory=dict,
        description="NAME: {option: value}: runs one after the other, each from what the one "
        "before it exported, with its options and those changed here",
    )
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        default_factory=list,
        description="wandb, mlflow, trackio: where curves go beside the run folder",
    )
    baseline: bool = Field(
        default=False,
        description="also train a copy on hard labels alone, on identical rows and steps",
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss learns from the teacher rather than from the text alone."""
        return any(loss.asks_teacher for loss in self.losses)

    def teacher_of(self, domain: str) -> str:
        """The name of the teacher that a domain is learnt from, of several that of the largest
        weight."""
        shares = self.teachers_of(domain)
        return max(shares, key=shares.__getitem__)

    def teachers_of(self, domain: str) -> dict[str, float]:
        """The teachers whose average a domain is learnt from, with shares that sum to 1."""
        return shares_of(self.domains[domain].teacher or next(iter(self.teachers)))

    def taught_by(self, teacher: str) -> "Config":
        """The part of the run that one teacher teaches: it alone, and its domains."""
        domains = {
            name: domain.model_copy(update={"teacher": teacher})
            if isinstance(domain.teacher, dict)
            else domain
            for name, domain in self.domains.items()
            if teacher in self.teachers_of(name)
        }
        teachers = {teacher: self.teachers[teacher]}
        return self.model_copy(update={"teachers": teachers, "domains": domains})

    @property
    def taid(self) -> TAID | None:
        """The interpolated loss, of which there is at most one."""
        return next((loss for loss in self.losses if isinstance(loss, TAID)), None)

    @property
    def accumulation(self) -> int:
        """Micro-batches per worker and optimiser step, of as many workers as there may be."""
        return self.batch.rows_per_step // (self.batch.micro_batch * self.most_workers)

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, ascending: those in bounds among which a
        step's micro-batches divide."""
        return self.student.counts(self.batch.rows_per_step, self.batch.micro_batch)

    @property
    def fewest_workers(self) -> int:
        """Workers without which the run does not go on."""
        return self.worker_counts[0]

    @property
    def most_workers(self) -> int:
        """Workers that the run has where there is room."""
        return self.worker_counts[-1]

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Teacher layers whose hidden states the losses ask for, ascending."""
        return tuple(sorted({t for loss in self.losses for t in loss.teacher_layers}))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures whose tail mass the teacher ships: 1 first, then those of the losses."""
        others = {t for loss in self.losses for t in loss.temperatures} - {1.0}
        return (1.0, *sorted(others))

    def selector_for(self, vocabulary: int) -> Selector:
        """What `targets.selector` stands for with so many shared ids."""
        if self.cross_tokenizer is not None:
            return "top_k"
        keeps_all = self.targets.top_k == vocabulary
        draws = all(teacher.draws for teacher in self.teachers.values())
        return chosen(self.targets.selector, self.losses, keeps_all=keeps_all, draws=draws)

    @property
    def prefetch_steps(self) -> int:
        """Blocks whose units may be under way beyond the current one; none where they depend on
        the weights that the student has before it."""
        if self.targets.student_ids:
            return 0
        return min(2, self.mixture.lag_steps)

    @property
    def rollout_lag(self) -> int:
        """Steps between the weights that write a block's rollouts and the step that learns it."""
        asked = self.source.lag
        return min(1, self.prefetch_steps) if asked is None else asked

    @property
    def modules(self) -> TrainedModules | None:
        """What learns beside the student on its teacher's side, where a loss asks the teacher."""
        found = (teacher.online_modules for teacher in self.teachers.values() if self.needs_teacher)
        return next(found, None)

    @property
    def followed(self) -> FollowedStudent | None:
        """Which student of the steps before is the teacher, where a loss asks the teacher."""
        found = (teacher.follow_student for teacher in self.teachers.values() if self.needs_teacher)
        return next(found, None)

    @property
    def modules_lag(self) -> int:
        """Steps between the modules that answer and the step that learns from them."""
        asked = self.modules and self.modules.lag
        return min(1, self.prefetch_steps) if asked is None else asked

    @property
    def decision_interval(self) -> int | None:
        """Steps between decisions of the controller; None: weights are decided once, at step 0."""
        if isinstance(self.mixture, AdaptiveMixture):
            return self.mixture.interval
        if self.progressive is None or self.progressive.interval is not None:
            return self.progressive and self.progressive.interval
        return max(self.mixture.lag_steps, self.steps // (10 * self.progressive.phases))

    @property
    def decision_steps(self) -> range:
        """Steps at which the trainer hands over a report: 0, K, 2K, ... while a block is left to
        rule."""
        if self.decision_interval is None:
            return range(1)
        return range(0, max(1, self.steps - self.mixture.lag_steps), self.decision_interval)

    @property
    def decides_from_validation(self) -> bool:
        """Whether a report to the controller needs the student's loss on validation text."""
        stalls = self.progressive is not None and self.progressive.plateau is not None
        return self.mixture.needs_validation or stalls

    @property
    def stop_ratio(self) -> float | None:
        """How near the teacher ends training; None: it takes all its steps."""
        return self.mixture.stop_ratio if isinstance(self.mixture, DDKMixture) else None

    def losses_in(self, phase: int) -> list[Loss]:
        """The losses with the weights they have in a progressive phase."""
        if self.progressive is None:
            return self.losses
        phases = self.progressive.phases
        return [loss.in_phase(phase, phases=phases) for loss in self.losses]

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        check_task(self)
        check_balance(self)
        check_workers(self.student, self.batch.rows_per_step, self.batch.micro_batch)
        check_teachers(
            self.teachers,
            {name: domain.teacher for name, domain in self.domains.items()},
            exact=self.targets.exact is not None,
            scored=self._scored_by_one,
        )
        if len(self.teachers) > 1 and self.hidden_layers:
            raise ValueError(
                "losses has a hidden_states, which learns one projection to one teacher's width, "
                f"but teachers has {len(self.teachers)}; leave it out, or keep one teacher"
            )
        check_single(self.losses)
        check_weighting(self.weighting, self.losses, classifies=self.task.classifies)
        check_augmentation(self)
        check_preference(self)
        check_selector(self.targets.selector, self.losses)
        check_engines(
            self.teachers,
            self.targets,
            temperatures=self.temperatures,
            hidden_layers=self.hidden_layers,
            difficulty=self.progressive and self.progressive.difficulty,
            writes_at=self.source.temperature if teachers_write_texts(self) else None,
            mixes=self.source.teacher_mix > 0,
            waited_s=self.service.unit_deadline_s,
        )
        check_student_ids(self.targets.student_ids, self.targets.selector, self.losses)
        check_mixture(self.mixture, domains=self.domains)
        check_source(
            self.source,
            self.losses,
            context=self.data.context,
            most_ahead=self.prefetch_steps,
            policy=self.mixture.policy,
            fixed_weights=isinstance(self.mixture, FixedMixture) and self.progressive is None,
            baseline=self.baseline,
            teacher_free=self.targets.teacher_free,
        )
        check_rollouts(
            self.rollouts, self.source, self.student, waited_s=self.service.unit_deadline_s
        )
        check_modules(self.teachers, self.targets, self.source, most_ahead=self.prefetch_steps)
        check_following(
            self.teachers, self.student, self.targets, self.source, rollout_lag=self.rollout_lag
        )
        check_mix(self.source, {name: self.teachers_of(name) for name in self.domains})
        check_active(self.active, name=self.name, domains=self.domains, teachers=self.teachers)
        check_stages(self.stages, name=self.name, rounds=self.active is not None)
        check_cross_tokenizer(self)
        check_similarity(self)
        self._phases_fit()
        self._nothing_contradicts()
        return self

    @property
    def _scored_by_one(self) -> str | None:
        """What one teacher scores rows for, and how to do without, as a sentence tells it."""
        if self.progressive is not None and self.progressive.difficulty != "length":
            return (
                "progressive orders rows by what one teacher finds difficult; set "
                "progressive.difficulty=length"
            )
        if self.weighting.scored_centre is not None:
            return (
                f"weighting.centre is the {self.weighting.scored_centre} of what one teacher "
                "scores; set weighting.centre=running"
            )
        return None

    def _nothing_contradicts(self) -> None:
        if self.targets.exact and self.evaluation.kl == "bucketed":
            raise ValueError(
                f"targets.exact is {self.targets.exact}, with which every KL is over the full "
                "vocabulary, but evaluation.kl is bucketed; remove one of the two"
            )
        for name in self.trackers:
            if self.trackers.count(name) > 1:
                raise ValueError(f"trackers has {name} twice; name each once")

    def _phases_fit(self) -> None:
        if self.progressive is not None:
            mixture = self.mixture
            check_progressive(
                self.progressive,
                self.decision_steps,
                steps=self.steps,
                lag=mixture.lag_steps,
                mixture_interval=mixture.interval if isinstance(mixture, AdaptiveMixture) else None,
                opens_with_gap=mixture.opens_with_report,
            )
        elif any(getattr(loss, "final_weight", None) is not None for loss in self.losses):
            raise ValueError(
                "losses has a hidden_states with final_weight, the weight in the last phase, but "
                "progressive is not set; set it or remove final_weight"
            )
