"""Which bytes of text each token of a tokenizer stands for.

Known of byte-level tokenizers, whose characters each name a byte, and of those of SentencePiece,
where `▁` is a space and `<0x0A>` a byte. Others lower the case or drop spaces, as WordPiece does,
so that their tokens are not the bytes of a text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import HandshakeError

SPACE = "▁"
# Texts whose tokens must be their bytes, after at most one space that the tokenizer adds.
PROBES = ("Once upon a time", "a  b\tc\n\n  D", "1,234 (x) -> y_z!")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of every token by id, and what is no text."""

    texts: tuple[bytes | None, ...]  # of tokens of text; None: a special one, or an id without one
    specials: Mapping[int, str]  # id -> what a special token is written as
    single: frozenset[int]  # ids written as a byte, as <0x0A>, where the byte may have another
    bos: int | None
    eos: int | None
    unk: int | None  # in place of text that is not known
    adds_space: bool  # before a text that begins without one

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, token: int) -> bytes | None:
        """The bytes that a token stands for; None where it is no text."""
        return self.texts[token] if token < len(self) else None


def token_bytes(tokenizer: Any, *, model: str) -> TokenBytes:
    """The bytes of a fast tokenizer's tokens; `model` is how a message names its model.

    Raises HandshakeError for one whose tokens are not the bytes of a text.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {part.get("type") for part in _parts(described.get("pre_tokenizer"))}
    parts |= {part.get("type") for part in _parts(described.get("decoder"))}
    is_byte_level = "ByteLevel" in parts
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index: token.content for index, token in added.items() if token.special}
    vocab = tokenizer.get_vocab()
    texts: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
    single = set()
    for token, index in vocab.items():
        if index in special:
            continue
        if index in added:
            texts[index] = added[index].content.encode()
            continue
        texts[index] = _byte_level(token) if is_byte_level else _sentence_piece(token)
        if not is_byte_level and _named_byte(token) is not None:
            single.add(index)
    found = TokenBytes(
        tuple(texts),
        special,
        frozenset(single),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        adds_space=False,
    )
    spaces = {_added_spaces(tokenizer, found, text) for text in PROBES}
    if spaces not in ({0}, {1}):
        raise HandshakeError(
            f"the tokens of {model} are not the bytes of the text that they stand for (its "
            "tokenizer changes case, spaces or characters), so that they cannot be aligned with "
            "another tokenizer's; take a model with a byte-level or SentencePiece tokenizer"
        )
    return TokenBytes(*_fields(found), adds_space=spaces == {1})


def _fields(found: TokenBytes) -> tuple[Any, ...]:
    return found.texts, found.specials, found.single, found.bos, found.eos, found.unk


def _added_spaces(tokenizer: Any, found: TokenBytes, text: str) -> int | None:
    """Spaces that the tokens of a text have before it; None where they are not its bytes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [found.texts[index] for index in ids]
    if None in parts:
        return None
    whole = b"".join(part for part in parts if part is not None)
    return {text.encode(): 0, b" " + text.encode(): 1}.get(whole)


def _parts(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A component of a tokenizer.json and those within it."""
    if component is None:
        return []
    inner = component.get("pretokenizers") or component.get("decoders") or []
    return [component, *(part for one in inner for part in _parts(one))]


def _byte_level(token: str) -> bytes | None:
    known = [BYTE_OF.get(character) for character in token]
    return None if None in known else bytes(byte for byte in known if byte is not None)


def _sentence_piece(token: str) -> bytes:
    byte = _named_byte(token)
    return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def _named_byte(token: str) -> int | None:
    """The byte of a token as <0x0A>."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 name their own byte, those from 256 on the rest."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    named = {chr(byte): byte for byte in own}
    return named | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _bytes_by_character()
