"""Search for the prompt under which a teacher does best: perturb, test, keep a beam, stop, confirm.

After the operators of PromptAid (arXiv 2304.01964), with rules in place of its user: the beam is
kept by lower confidence bound on a fixed development set, and what wins there must win again on
examples that nothing was chosen by. It knows no teacher: whoever scores and paraphrases is passed
in, and with the same answers the same seed finds the same prompts.

E examples of a split
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from cluster.prompt_search import wording
from cluster.prompt_search.examples import Relevance
from cluster.prompt_search.trial import Candidate, Estimate, Score, Trial
from shared.config.verbs.prompt_search import PromptSearch
from shared.prompts.prompts import Example, Prompt

Paraphrase = Callable[[str, int, int], list[str]]  # (instruction, how many, seed) -> rewrites
Report = Callable[[int, int], None]  # (round, candidates about to be scored)

GENERIC = (
    "Answer the question.",
    "Give a short and exact answer to the following input.",
    "Read the text and write the correct response.",
)
CONFIRM_ERRORS = 1.645  # standard errors: of one prompt that is no better, 1 in 20 is kept
TRADE_OFFS = (0.3, 0.6, 0.9)
EXAMPLE_SETS = 3  # of a prompt in a round
NEAR_WORDS = 3  # tried for each keyword


@dataclass(frozen=True, slots=True)
class Material:
    """What prompts of a domain are made of."""

    instruction: str | None  # of the config
    pool: tuple[Example, ...]  # never of the development set or the confirming one
    questions: tuple[str, ...]  # of the development set


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search has found."""

    prompt: Prompt  # empty where no prompt is better than none
    winner: Trial  # on the development set
    confirmed: Estimate  # the winner's score on the confirming split
    without: Estimate  # that of no prompt
    gain: Estimate  # paired
    stopped: str  # why the search ended
    history: tuple[Trial, ...]

    @property
    def kept(self) -> bool:
        """Whether the winner is better than no prompt beyond doubt."""
        return bool(self.prompt)


def search(
    material: Material,
    settings: PromptSearch,
    *,
    score: Score,
    confirm: Score,
    paraphrase: Paraphrase,
    seed: int,
    report: Report = lambda round, count: None,
) -> Outcome:
    """Find the best prompt on the development set, then compare it with none on another split."""
    trials: dict[str, Trial] = {}
    operators = Operators(material, settings, paraphrase, seed)

    def test(number: int, candidates: Sequence[Candidate]) -> None:
        fresh = list({c.prompt.id: c for c in candidates if c.prompt.id not in trials}.values())
        report(number, len(fresh))
        for candidate, values_E in zip(fresh, score([c.prompt for c in fresh]), strict=True):
            trials[candidate.prompt.id] = Trial(candidate, number, values_E)

    test(0, starting_pool(material))
    beam = best_of(trials.values(), settings.beam)
    stopped = f"{settings.rounds} rounds are done"
    for number in range(1, settings.rounds + 1):
        before = beam[0]
        test(number, [new for parent in beam for new in operators.first(parent, number)])
        test(number, [new for parent in beam for new in operators.second(parent, number, trials)])
        beam = best_of(trials.values(), settings.beam)
        if not is_gain(beam[0], before):
            stopped = f"round {number} gained less than one standard error"
            break
    return _confirmed(beam[0], confirm, stopped, tuple(trials.values()))


def starting_pool(material: Material) -> list[Candidate]:
    """No prompt, the config's instruction, and a few that fit anything."""
    given = [Candidate(Prompt(material.instruction), "config")] if material.instruction else []
    generic = [Candidate(Prompt(text), "generic") for text in GENERIC]
    return [Candidate(Prompt(), "no prompt"), *given, *generic]


def best_of(trials: Iterable[Trial], count: int) -> list[Trial]:
    """The trials with the highest lower bounds; ties go to the higher mean, then the earlier."""
    fitting = [(t, t.estimate) for t in trials if t.estimate is not None]
    ranked = sorted(fitting, key=lambda pair: (-pair[1].above(), -pair[1].mean))
    return [trial for trial, _ in ranked[:count]]


def is_gain(best: Trial, before: Trial) -> bool:
    """Whether the best prompt beats the one before by a standard error of their differences."""
    if best is before:
        return False
    assert best.values_E is not None
    assert before.values_E is not None
    difference = Estimate.of(best.values_E - before.values_E)
    return difference.mean > 0 and difference.above() >= 0


class Operators:
    """Makes new candidates of old ones."""

    def __init__(
        self, material: Material, settings: PromptSearch, paraphrase: Paraphrase, seed: int
    ) -> None:
        self._material, self._settings = material, settings
        self._paraphrase, self._seed = paraphrase, seed
        texts = [example.prompt or example.response for example in material.pool]
        self._relevance = Relevance(texts, material.questions)

    def first(self, parent: Trial, number: int) -> list[Candidate]:
        """Rewrites, choices of examples, and the instruction with each keyword left out."""
        prompt = parent.candidate.prompt
        dropped = [
            self._reworded(prompt, wording.without(prompt.instruction, word), f"without {word!r}")
            for word in self._keywords(prompt, number)
        ]
        return [
            *(c for c in dropped if c.prompt.instruction),
            *self._paraphrased(prompt, number),
            *self._with_examples(prompt, number),
        ]

    def second(self, parent: Trial, number: int, trials: dict[str, Trial]) -> list[Candidate]:
        """Near words in place of the keywords, for those first that the score hangs on."""
        prompt, made = parent.candidate.prompt, []
        words = self._keywords(prompt, number)
        for word in sorted(words, key=lambda word: self._without(prompt, word, trials)):
            near = self._shuffled(wording.near_words(word), prompt, number, word)[:NEAR_WORDS]
            made += [
                self._reworded(
                    prompt,
                    wording.replaced(prompt.instruction, word, other),
                    f"{other!r} for {word!r}",
                )
                for other in near
            ]
        return made

    def _keywords(self, prompt: Prompt, number: int) -> list[str]:
        """The content words of a round: with many, other ones each time."""
        words = wording.content_words(prompt.instruction)
        return self._shuffled(words, prompt, number, "keywords")[: self._settings.keywords]

    def _without(self, prompt: Prompt, word: str, trials: dict[str, Trial]) -> float:
        """The score that is left when a word is."""
        left = replace(prompt, instruction=wording.without(prompt.instruction, word))
        trial = trials.get(left.id)
        return trial.estimate.mean if trial and trial.estimate else float("-inf")

    def _paraphrased(self, prompt: Prompt, number: int) -> list[Candidate]:
        """The teacher's rewrites that pass, and where they are too few, rewrites by rule."""
        wanted, original = self._settings.paraphrases, prompt.instruction
        if not original or not wanted:
            return []
        seed = self._stream(prompt, number, "paraphrase").integers(2**31)
        told = [text.strip() for text in self._paraphrase(original, wanted, int(seed))]
        passed = list(dict.fromkeys(t for t in told if wording.acceptable(t, original)))
        made = [self._reworded(prompt, text, "paraphrase by the teacher") for text in passed]
        rules = self._shuffled(list(wording.rewrites(original).items()), prompt, number, "rules")
        made += [self._reworded(prompt, text, f"rewrite: {name}") for name, text in rules]
        return made[:wanted]

    def _with_examples(self, prompt: Prompt, number: int) -> list[Candidate]:
        """The instruction with other examples; sizes, trade-offs and half of the pool vary."""
        pool, most = self._material.pool, self._settings.examples
        if not pool or not most:
            return []
        made = []
        for turn in range(EXAMPLE_SETS):
            rng = self._stream(prompt, number, f"examples {turn}")
            count, trade_off = int(rng.integers(1, most + 1)), float(rng.choice(TRADE_OFFS))
            half = rng.permutation(len(pool))[: max(count, (len(pool) + 1) // 2)]
            among = sorted(int(position) for position in half)
            chosen = self._relevance.choose(among, count=count, trade_off=trade_off)
            examples = tuple(pool[i] for i in chosen)
            origin = f"{len(examples)} examples at trade-off {trade_off:g}"
            made.append(Candidate(Prompt(prompt.instruction, examples), origin, prompt.id))
        return made

    def _reworded(self, prompt: Prompt, instruction: str, origin: str) -> Candidate:
        return Candidate(replace(prompt, instruction=instruction), origin, prompt.id)

    def _shuffled(self, items: list, prompt: Prompt, number: int, purpose: str) -> list:
        order = self._stream(prompt, number, purpose).permutation(len(items))
        return [items[i] for i in order]

    def _stream(self, prompt: Prompt, number: int, purpose: str) -> np.random.Generator:
        """Random numbers of their own for each use."""
        use = f"{self._seed}/{number}/{prompt.id}/{purpose}"
        return np.random.default_rng(xxhash.xxh3_64_intdigest(use.encode()))


def _confirmed(winner: Trial, confirm: Score, stopped: str, history: tuple[Trial, ...]) -> Outcome:
    prompt = winner.candidate.prompt
    with_E, without_E = confirm([prompt, Prompt()])
    assert with_E is not None, "what fits the development set fits here"
    assert without_E is not None
    gain = Estimate.of(with_E - without_E)
    kept = gain.above(CONFIRM_ERRORS) > 0
    return Outcome(
        prompt=prompt if kept else Prompt(),
        winner=winner,
        confirmed=Estimate.of(with_E),
        without=Estimate.of(without_E),
        gain=gain,
        stopped=stopped,
        history=history,
    )
