"""How a student goes on from prompts: those of one room together, and what it is asked for.

R rows of a rank for a step
"""

from collections.abc import Sequence

from shared.config.run import Config
from shared.data.rollouts import Rollout, RowPrompt
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from shared.targets.generation import GenerationSpec, Generator, Openings
from student_trainer.sources.generated.partners import Partners


def continued(
    generator: Generator,
    prompts: Sequence[RowPrompt],
    rows: Rows,
    drawn_R: Sequence[str],
    *,
    plan: RunPlan,
    vocab: int,
    partners: Partners | None,
) -> list[Rollout]:
    """What the student writes after prompts of rows, in their order; those of one room, and of one
    teacher that has a share in it, together. `drawn_R` names the draws, `vocab` is how many ids
    may be written."""
    name_R, domain_R = rows.names(), rows.domains()
    groups: dict[tuple[int, str], list[int]] = {}
    for line, prompt in enumerate(prompts):
        beside = partners.teacher_of(domain_R[prompt.row]) if partners else ""
        groups.setdefault((prompt.room, beside), []).append(line)
    found: dict[int, Rollout] = {}
    for (room, _), lines in sorted(groups.items()):
        asked = [prompts[line] for line in lines]
        draws = [f"{drawn_R[prompt.row]}/{prompt.document}" for prompt in asked]
        openings = Openings.build(
            names=[name_R[prompt.row] for prompt in asked],
            input_ids=[prompt.input_ids for prompt in asked],
        ).with_draws(draws)
        spec = spec_of(plan.config, room, ends=plan.ends, vocab=vocab)
        if partners is None:
            answer = generator.generate(openings, spec)
        else:
            domains = [domain_R[prompt.row] for prompt in asked]
            answer = partners.generate(generator, openings, spec, domains=domains, draws=draws)
        own = answer.own_logprobs() or [None] * len(asked)
        parts = zip(answer.written(), answer.logprobs(), answer.stopped(), own, strict=True)
        found |= {
            line: Rollout(prompt, *part)
            for line, prompt, part in zip(lines, asked, parts, strict=True)
        }
    return [found[line] for line in range(len(prompts))]


def spec_of(config: Config, room: int, *, ends: tuple[int, ...], vocab: int) -> GenerationSpec:
    """What whoever writes for a run is asked for, where `room` tokens still fit into a row."""
    source = config.source
    return GenerationSpec(
        room,
        stop_ids=ends,
        temperature=source.temperature,
        seed=config.seed,
        top_p=source.top_p,
        min_new_tokens=min(source.min_new_tokens, room),
        vocab=vocab,
        logprobs=True,
    )
