"""Two small tokenizers made by hand: one as SentencePiece has it, one of bytes."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def sentence_piece() -> Any:
    """`ab c` is `▁ab`, `▁`, `c`; what is no letter is written in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "ab", "▁ab", "▁a"]
    pieces += sorted(set("Oncepatimeb DUVW1234x->y_z!()") - set("abc "))
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(own, bos="<s>", eos="</s>", unk="<unk>")


def byte_level(*, with_ends: bool = True) -> Any:
    """`ab c` is `ab`, `Ġc`; a token of its own for two line ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|begin|>", "<|end|>", *alphabet, "ab", "Ġc"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "c")]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_tokens([AddedToken("\n\n", normalized=False)])
    ends = {"bos": "<|begin|>", "eos": "<|end|>"} if with_ends else {}
    return _fast(own, **ends)


def word_piece() -> Any:
    """Drops spaces and case, as BERT's does."""
    pieces = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789", *"(),->_!"]
    pieces += [f"##{piece}" for piece in pieces[1:]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    own = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer()
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece()
    return _fast(own, unk="[UNK]")


def _fast(own: Tokenizer, **special: str) -> Any:
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=own, **named)
