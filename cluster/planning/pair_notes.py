"""What two models of a pair do differently that does not keep one from learning from the other."""

from collections.abc import Iterator

from cluster.planning.description import ModelDescription
from shared.text.tokenizers import TokenizerIdentity, named, same_templates


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
