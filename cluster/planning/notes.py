"""What a run says before it starts: how its models differ without keeping one from learning, and
what it does other than its config seems to say."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.planning.description import ModelDescription
from cluster.planning.revisions import revision_notes
from shared.config.losses import RouterBalance
from shared.config.mixture import AdaptiveMixture, FixedMixture
from shared.config.run import Config
from shared.data.trust import Trust
from shared.text.tokenizers import TokenizerIdentity, named, same_templates

if TYPE_CHECKING:
    from cluster.planning.preparation import Prepared


def notes(prepared: "Prepared") -> list[str]:
    """What a run's models do differently, and what it does other than its config seems to say, in
    sentences."""
    config = prepared.config
    found = (
        idle_policy_note(config),
        weights_note(config),
        router_balance_note(config),
        prepared.left_out,
        None if config.task.classifies else trust_note(prepared.trust),
    )
    differences = [note for known in prepared.teachers.values() for note in known.differences]
    told = [*differences, *revision_notes(config)]
    told += prepared.across.notes if prepared.across is not None else ()
    return told + [note for note in found if note is not None]


def trust_note(trust: Trust) -> str | None:
    """A sentence where the student does not run whole units at once."""
    said = trust.in_words()
    return (
        f"The student's states would depend on what shares a batch; it reads {said}."
        if said
        else None
    )


def weights_note(config: Config) -> str | None:
    """A sentence where fixed weights are no shares as they stand."""
    mixture = config.mixture
    if not isinstance(mixture, FixedMixture) or not isinstance(mixture.weights, dict):
        return None
    total = sum(mixture.weights.values())
    never = [name for name, weight in mixture.weights.items() if not weight]
    unseen = f"; {', '.join(never)} is never drawn" if never else ""
    shares = zip(mixture.weights, mixture.shares(mixture.weights), strict=True)
    listed = ", ".join(f"{name} {share:.3g}" for name, share in shares)
    if abs(total - 1) < 1e-6:
        return f"mixture.weights: {listed}{unseen}" if never else None
    return f"mixture.weights sum to {total:g} and are taken as shares: {listed}{unseen}"


def idle_policy_note(config: Config) -> str | None:
    """A sentence where weights that should move stay as they start, since the run is too short."""
    mixture = config.mixture
    if not isinstance(mixture, AdaptiveMixture) or len(config.decision_steps) > 1:
        return None
    return (
        f"mixture.policy {mixture.policy} moves no weight in this run: its first decision would "
        f"take effect at step {mixture.interval + mixture.lag_steps}, and the run has "
        f"{config.steps}; lower mixture.interval or raise steps"
    )


def router_balance_note(config: Config) -> str | None:
    """A sentence where the student's routers learn to use their experts evenly."""
    for loss in config.losses:
        if isinstance(loss, RouterBalance) and loss.weight:
            return (
                f"router_balance {loss.weight:g}: the student's routers learn to use their experts "
                f"evenly, {loss.experts_per_token} a token, as its own config, student.upcycle or "
                "losses ask; {kind: router_balance, weight: 0} among losses leaves that out"
            )
    return None


def pair_notes(teacher: ModelDescription, student: ModelDescription) -> Iterator[str]:
    """A sentence for each difference: the tokens at which they stop, padding with the end of text
    in one of them alone, and chat templates, which no row passes through."""
    sides = [f"{teacher.name} (teacher)", f"{student.name} (student)"]
    names = " and ".join(sides)
    if set(teacher.stop_ids) != set(student.stop_ids):
        yield (
            f"{names} stop at different tokens as their generation_config.json, or config.json, "
            f"has it: {_stops(teacher)} and {_stops(student)}; a student may write on where its "
            "teacher stops: make eos_token_id alike there, and let the text end with it"
        )
    pads = [_pads_with_end(model.identity) for model in (teacher, student)]
    if pads[0] != pads[1]:
        which, other = sides if pads[0] else reversed(sides)
        yield (
            f"{which} pads with its end of text, {other} does not; here padding has no loss and "
            "the end of a text has, but programs that mask by the padding token leave that end "
            "out: make pad_token alike in both tokenizers"
        )
    if not same_templates(teacher.identity, student.identity):
        yield (
            f"{names} have different chat templates; no row of this run passes through one, but a "
            "conversation would look otherwise to each of them: save one tokenizer into both "
            "folders before there are such rows"
        )


def _stops(model: ModelDescription) -> str:
    return ", ".join(named(model.identity, index) for index in model.stop_ids) or "none"


def _pads_with_end(identity: TokenizerIdentity) -> bool:
    pad = identity.special_ids["pad"]
    return pad is not None and pad == identity.special_ids["eos"]
