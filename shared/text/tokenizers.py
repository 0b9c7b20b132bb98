"""The handshake: whether a student can learn from a teacher token by token.

Tokenizers are compared by content. What a model's embedding holds beyond its tokenizer (padding
rows) is no difference, nor is the padding or unknown token: padding is never attended to or
learnt from, and which id unknown text maps to is part of the compared encoding.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import xxhash

from shared.errors import HandshakeError
from shared.text.chat import chosen_template

ENCODING_PARTS = ("normalizer", "pre_tokenizer", "model")
# The ways to learn from a teacher of another tokenizer.
ACROSS = (
    "cross_tokenizer=grouped, which compares groups of tokens whose text begins alike, "
    "cross_tokenizer=aligned, which compares tokens of the same bytes and spans of text, or "
    "cross_tokenizer=uld, which compares probabilities by rank"
)
SPECIALS = ("bos", "eos", "pad", "unk")
SPECIALS_THAT_MATTER = ("bos", "eos")
# Flags of an added token, as special tokens have them.
USUAL = {
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}
WRITABLE = ("unk", "pad", "sep", "cls", "mask")  # beside bos and eos, which are always compared


class _Backend(Protocol):
    def to_str(self) -> str: ...


class IdentifiableTokenizer(Protocol):
    """What is asked of a fast tokenizer; transformers' ones fit."""

    chat_template: Any
    name_or_path: str

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """What a tokenizer does, as plain values that pickle and turn into JSON."""

    tokens: tuple[str | None, ...]  # by id; None where an id names nothing
    encoding_digest: str  # normaliser, pre-tokeniser, merges or scores
    special_ids: dict[str, int | None]  # bos, eos, pad, unk
    chat_template: str | None

    @property
    def num_ids(self) -> int:
        """Largest id + 1."""
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """Hash of everything that decides which ids a document becomes; equal for tokenizers
        that `refuse_unless_same` accepts."""
        specials = {name: self.special_ids[name] for name in SPECIALS_THAT_MATTER}
        return _digest(asdict(self) | {"special_ids": specials})

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "TokenizerIdentity":
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        return TokenizerIdentity(**{**fields, "tokens": tuple(fields["tokens"])})


def identify(tokenizer: IdentifiableTokenizer) -> TokenizerIdentity:
    """The identity of a transformers tokenizer. Raises HandshakeError without a fast backend."""
    backend: _Backend | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise HandshakeError(
            f"the tokenizer of {tokenizer.name_or_path} has no fast form (tokenizer.json); "
            "convert it with transformers first"
        )
    described = json.loads(backend.to_str())
    template = tokenizer.chat_template
    return TokenizerIdentity(
        tokens=_by_id(tokenizer.get_vocab()),
        encoding_digest=_digest({part: described.get(part) for part in ENCODING_PARTS}),
        special_ids={name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIALS},
        chat_template=json.dumps(template) if isinstance(template, dict) else template,
    )


def named_templates(identity: TokenizerIdentity) -> dict[str, str] | None:
    """The chat templates of a tokenizer that has several, by name."""
    with suppress(ValueError):
        templates = json.loads(identity.chat_template or "")
        return templates if isinstance(templates, dict) else None
    return None


def same_templates(one: TokenizerIdentity, other: TokenizerIdentity) -> bool:
    """Whether two tokenizers have one chat template, or the same ones by name in any order."""
    templates = (named_templates(identity) or identity.chat_template for identity in (one, other))
    return next(templates) == next(templates)


def with_template(
    identity: TokenizerIdentity, name: str | None, *, model: str
) -> TokenizerIdentity:
    """The identity under one of several named chat templates; None: as it is. Raises DataError for
    a name that there is not."""
    if name is None:
        return identity
    chosen = chosen_template(named_templates(identity) or identity.chat_template, name, model=model)
    return replace(identity, chat_template=chosen)


def rows_digest(tokenizer: IdentifiableTokenizer, identity: TokenizerIdentity) -> str:
    """Hash of everything that decides which ids a row becomes: the identity's, and where a
    tokenizer finds its added tokens otherwise than usual, or its template writes other special
    tokens, these as well."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    unusual = {
        str(index): [token.content, *(bool(getattr(token, flag)) for flag in USUAL)]
        for index, token in added.items()
        if any(bool(getattr(token, flag)) != usual for flag, usual in USUAL.items())
    }
    template = identity.chat_template or ""
    written = {
        f"{name}_token": str(getattr(tokenizer, f"{name}_token", None))
        for name in WRITABLE
        if f"{name}_token" in template
    }
    if not unusual and not written:
        return identity.digest
    return _digest([identity.digest, unusual, written])


def refuse_unless_same(
    teacher: TokenizerIdentity,
    student: TokenizerIdentity,
    *,
    teacher_name: str,
    student_name: str,
    chat_rows: bool = True,
) -> None:
    """Raise HandshakeError, naming the first difference and the way out.

    `chat_rows` False says that no row passes through a chat template; they may differ then.
    """
    names = f"{teacher_name} (teacher) and {student_name} (student)"
    if (difference := _first_difference(teacher.tokens, student.tokens)) is not None:
        raise HandshakeError(
            f"{names} do not share a vocabulary: id {difference} is "
            f"{_token(teacher, difference)} and {_token(student, difference)}; learning token by "
            f"token needs one vocabulary, so take both models from one family, or set {ACROSS}"
        )
    if teacher.encoding_digest != student.encoding_digest:
        raise HandshakeError(
            f"{names} share every id but split text differently (normaliser, pre-tokeniser or "
            "merges); take both models from one family, save one tokenizer into both folders, or "
            f"set {ACROSS}"
        )
    for special in SPECIALS_THAT_MATTER:
        if teacher.special_ids[special] != student.special_ids[special]:
            raise HandshakeError(_special_differs(teacher, student, special, names))
    if chat_rows and not same_templates(teacher, student):
        raise HandshakeError(
            f"{names} have different chat templates ({_template(teacher)} and "
            f"{_template(student)}); save the teacher's tokenizer into the student's folder, or "
            "use a student with the teacher's template"
        )


def same_tokens(one: TokenizerIdentity, other: TokenizerIdentity) -> bool:
    """Whether two tokenizers make the same ids of a text, and end it alike."""
    parts = (
        (side.tokens, side.encoding_digest, [side.special_ids[n] for n in SPECIALS_THAT_MATTER])
        for side in (one, other)
    )
    return next(parts) == next(parts)


def shared_vocab(identity: TokenizerIdentity, *, teacher_rows: int, student_rows: int) -> int:
    """Number of ids that the common tokenizer names and both embeddings hold; only these are
    selected by the teacher, so that mass on padding rows belongs to the tail."""
    return min(identity.num_ids, teacher_rows, student_rows)


def _special_differs(
    teacher: TokenizerIdentity, student: TokenizerIdentity, special: str, names: str
) -> str:
    theirs, ours = (i.special_ids[special] for i in (teacher, student))
    return (
        f"{names} disagree about the {special} token: {named(teacher, theirs)} and "
        f"{named(student, ours)}; set {special}_token in the student's tokenizer_config.json to "
        "the teacher's"
    )


def _by_id(vocab: Mapping[str, int]) -> tuple[str | None, ...]:
    tokens: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        tokens[index] = token
    return tuple(tokens)


def _first_difference(
    teacher: tuple[str | None, ...], student: tuple[str | None, ...]
) -> int | None:
    if teacher == student:
        return None
    pairs = enumerate(zip(teacher, student, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(teacher), len(student)))


def _token(identity: TokenizerIdentity, index: int) -> str:
    token = identity.tokens[index] if index < identity.num_ids else None
    return "nothing" if token is None else json.dumps(token, ensure_ascii=False)


def named(identity: TokenizerIdentity, index: int | None) -> str:
    """A token with its id, as a message names it."""
    return "none" if index is None else f"{_token(identity, index)} ({index})"


def _template(identity: TokenizerIdentity) -> str:
    return "none" if identity.chat_template is None else _digest(identity.chat_template)[:8]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
