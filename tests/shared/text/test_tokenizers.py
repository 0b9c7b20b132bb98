"""The handshake between tokenizers."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.errors import HandshakeError
from shared.text.tokenizers import TokenizerIdentity, identify, refuse_unless_same, shared_vocab
from tests import tiny


@pytest.fixture
def identity(folder: Path) -> TokenizerIdentity:
    return identify(AutoTokenizer.from_pretrained(folder))


def shake(teacher: TokenizerIdentity, student: TokenizerIdentity, **options: bool) -> None:
    refuse_unless_same(teacher, student, teacher_name="big", student_name="small", **options)


def with_backend(folder: Path, change) -> TokenizerIdentity:
    """The identity after `change` edited the tokenizer's own JSON."""
    from tokenizers import Tokenizer

    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    return identify(
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(described)),
            pad_token="<|pad|>",
            bos_token="<|bos|>",
            eos_token="<|eos|>",
        )
    )


def test_a_tokenizer_is_the_same_as_itself_loaded_again(
    folder: Path, identity: TokenizerIdentity
) -> None:
    again = identify(AutoTokenizer.from_pretrained(folder))
    assert again == identity
    assert again.digest == identity.digest
    shake(identity, again)


def test_an_identity_survives_pickle_and_json(identity: TokenizerIdentity) -> None:
    assert pickle.loads(pickle.dumps(identity)) == identity
    through_json = json.loads(json.dumps(dataclasses.asdict(identity)))
    assert TokenizerIdentity.from_dict(through_json) == identity


def test_ids_are_the_tokenizers_own(folder: Path, identity: TokenizerIdentity) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert identity.num_ids == len(tokenizer) == tiny.VOCAB
    assert identity.tokens[17] == tokenizer.convert_ids_to_tokens(17)
    assert identity.special_ids == {"bos": 1, "eos": 2, "pad": 0, "unk": None}


def test_the_first_id_that_differs_is_named_with_both_tokens(identity: TokenizerIdentity) -> None:
    tokens = list(identity.tokens)
    tokens[300], tokens[400] = tokens[400], tokens[300]
    other = dataclasses.replace(identity, tokens=tuple(tokens))
    with pytest.raises(HandshakeError) as error:
        shake(identity, other)
    both = [json.dumps(t, ensure_ascii=False) for t in (identity.tokens[300], other.tokens[300])]
    assert f"id 300 is {both[0]} and {both[1]}" in str(error.value)
    assert "big (teacher) and small (student)" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_that_only_one_side_has_is_a_difference(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = identify(tokenizer)
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(HandshakeError, match='id 512 is "<think>" and nothing'):
        shake(identify(tokenizer), plain)


def test_other_merges_over_the_same_ids_are_refused(
    folder: Path, identity: TokenizerIdentity
) -> None:
    other = with_backend(folder, lambda d: d["model"]["merges"].reverse())
    assert other.tokens == identity.tokens
    with pytest.raises(HandshakeError, match="share every id but split text differently"):
        shake(identity, other)


def test_another_normaliser_is_refused(folder: Path, identity: TokenizerIdentity) -> None:
    other = with_backend(folder, lambda d: d.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(HandshakeError, match="split text differently"):
        shake(identity, other)


@pytest.mark.parametrize("special", ["bos", "eos"])
def test_another_bos_or_eos_is_refused_in_its_own_sentence(
    identity: TokenizerIdentity, special: str
) -> None:
    ids = identity.special_ids | {special: None}
    with pytest.raises(HandshakeError, match=f"disagree about the {special} token: .* and none"):
        shake(identity, dataclasses.replace(identity, special_ids=ids))


@pytest.mark.parametrize("special", ["pad", "unk"])
def test_another_padding_or_unknown_token_changes_nothing_learnt(
    identity: TokenizerIdentity, special: str
) -> None:
    ids = identity.special_ids | {special: 9}
    other = dataclasses.replace(identity, special_ids=ids)
    assert shake(identity, other) is None
    assert other.digest == identity.digest


def test_another_chat_template_is_refused_where_rows_pass_through_one(
    identity: TokenizerIdentity,
) -> None:
    other = dataclasses.replace(identity, chat_template="{{ messages }}")
    with pytest.raises(HandshakeError, match=r"different chat templates \(none and [0-9a-f]{8}\)"):
        shake(identity, other)
    assert shake(identity, other, chat_rows=False) is None


def test_anything_that_changes_framing_changes_the_digest(identity: TokenizerIdentity) -> None:
    changed = [
        dataclasses.replace(identity, tokens=(*identity.tokens, "x")),
        dataclasses.replace(identity, encoding_digest="other"),
        dataclasses.replace(identity, special_ids=identity.special_ids | {"eos": 1}),
        dataclasses.replace(identity, chat_template="x"),
    ]
    assert len({identity.digest, *(other.digest for other in changed)}) == 5


def test_padding_rows_are_no_ids(identity: TokenizerIdentity) -> None:
    assert shared_vocab(identity, teacher_rows=640, student_rows=576) == 512
    assert shared_vocab(identity, teacher_rows=640, student_rows=500) == 500


def test_the_real_pair_shares_its_tokenizer_and_not_that_of_another_model(reference: Path) -> None:
    models = reference / "models"
    teacher, student, other = (
        identify(AutoTokenizer.from_pretrained(models / name))
        for name in ("teacher-6m", "student-base-1m", "stories260k")
    )
    assert shake(teacher, student) is None
    with pytest.raises(HandshakeError, match='id 0 is "<\\|pad\\|>" and "<unk>"'):
        shake(teacher, other)
