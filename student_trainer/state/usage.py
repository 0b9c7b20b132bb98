"""How an export is used: its tokenizer, where it stops, and how a text is given to it.

Training frames a text as bos, text, eos and joins a prompt and its response by a newline, unless
the tokenizer has a chat template (`shared.text.framing`). The exported files agree with that.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from shared.config.run import Config
from shared.config.tasks.task import Tagging
from shared.loading import SPECIAL_IDS, without_negative
from shared.text.chat import chosen_template
from shared.text.framing import ends_of

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user of an export has to know, in tokens."""

    ends: tuple[str, ...]  # any of them ends what it writes
    bos: str | None  # opens a text, if any token does
    eos: str | None  # closes it
    opens: bool  # whether `tokenizer(text)` puts it there
    is_framed: bool  # whether `tokenizer(text)` puts there what opens a text, and nothing else
    chats: bool  # whether prompts pass through a chat template
    place: str | None = None  # that holds the place of an image, of a model that sees
    # Whether it tells classes of texts, framed as its tokenizer does, or of their words.
    classifies: Literal["", "Sequence", "Token"] = ""

    @property
    def framed(self) -> str:
        """What a plain text was in training."""
        return ", ".join(filter(None, (self.bos, "the text", self.eos)))


def save_usage(draft: Path, config: Config) -> Usage:
    """Write the tokenizer and the generation config into an export.

    Of several named chat templates the one that rows passed through is kept.
    `tokenizer(text)` opens with bos where all text did, which is where there is no chat template,
    and never adds an end.
    The generation config ends at the tokenizer's eos, at what ends a turn of the template, and
    where it did before.
    """
    student = config.student
    asked = {"revision": student.revision or "main"}
    tokenizer = AutoTokenizer.from_pretrained(
        student.model, **asked, trust_remote_code=student.trust_remote_code
    )
    if config.task.classifies:  # texts were framed as the tokenizer does by itself
        kind = "Token" if isinstance(config.task, Tagging) else "Sequence"
        return _save_of_classifier(draft, tokenizer, kind)
    tokenizer.chat_template = chosen_template(
        tokenizer.chat_template, config.data.chat_template, model=student.model
    )
    processor = None
    if config.task.sees:
        processor = AutoProcessor.from_pretrained(
            student.model, **asked, trust_remote_code=student.trust_remote_code
        )
        processor.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    wanted = _trained_frame(tokenizer)
    if _frame(tokenizer) != wanted:
        opening, _ = wanted
        tokenizer = _reframed(draft, tokenizer, opening, trusted=student.trust_remote_code)
    if not (draft / GENERATION).exists():
        _copy_generation_config(draft, student.model, **asked)
    ends = _end_at(draft / GENERATION, ends_of(tokenizer))
    return Usage(
        ends=tuple(filter(None, tokenizer.convert_ids_to_tokens(list(ends)))),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        is_framed=_frame(tokenizer) == wanted,
        opens=_frame(tokenizer)[0] == [tokenizer.bos_token_id],
        chats=bool(tokenizer.chat_template),
        place=processor and processor.image_token,
    )


def _save_of_classifier(draft: Path, tokenizer: Any, kind: Literal["Sequence", "Token"]) -> Usage:
    if tokenizer.pad_token is None:  # as in training, see `shared.model_parts.pad_with`
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(draft)
    return Usage(
        ends=(),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        is_framed=True,
        opens=False,
        chats=False,
        classifies=kind,
    )


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer(text)` puts before and after those of the text."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


def _trained_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the export's is to be: what opened a text in training, no end, since what comes after a
    text is for the model to say. Where prompts pass through a chat template, texts open as they
    did."""
    if tokenizer.chat_template:
        return _frame(tokenizer)[0], []
    bos = tokenizer.bos_token_id
    return [] if bos is None else [bos], []


def _reframed(draft: Path, tokenizer: Any, opening: list[int], *, trusted: bool) -> Any:
    """The saved tokenizer with `opening` before every text and nothing after it, as it was where
    its own code undoes that. A class of transformers that would undo it gives way to the plain one.
    """
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    backend, tokens = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(opening)
    framing = TemplateProcessing(
        single=[*tokens, "$A"],
        pair=[*tokens, "$A", "$B:1"],
        special_tokens=list(zip(tokens, opening, strict=True)),
    )
    before = backend.post_processor
    parts = before if isinstance(before, Sequence) else [before]
    offsets = [part for part in parts if isinstance(part, ByteLevel)]  # adds no tokens
    backend.post_processor = Sequence([*offsets, framing])
    for option in ("add_bos_token", "add_eos_token"):
        tokenizer.init_kwargs.pop(option, None)  # a class would make its own framing from it
    tokenizer.save_pretrained(draft)
    asked = {"trust_remote_code": trusted}
    found = AutoTokenizer.from_pretrained(draft, **asked)
    if _frame(found) == (opening, []):
        return found
    path = draft / TOKENIZER
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": PLAIN_CLASS}))
    return AutoTokenizer.from_pretrained(draft, **asked)


def _copy_generation_config(draft: Path, model: str, *, revision: str) -> None:
    """An adapter's folder carries its base's generation config where the base has one."""
    try:
        GenerationConfig.from_pretrained(model, revision=revision).save_pretrained(draft)
    except Exception:  # the base has none, or one that transformers cannot read
        (draft / GENERATION).write_text("{}\n")


def _end_at(path: Path, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Add ids that end a text to those of a generation config, which loses negative ids; returns
    all."""
    written = path.read_text()
    settings = json.loads(written)
    settings |= {n: without_negative(settings[n]) for n in SPECIAL_IDS if n in settings}
    before = settings.get("eos_token_id")
    known = before if isinstance(before, list) else [before]
    together = list(dict.fromkeys([*(end for end in known if isinstance(end, int)), *ends]))
    if together and together != known:
        settings["eos_token_id"] = together if len(together) > 1 else together[0]
    if settings != json.loads(written):
        path.write_text(json.dumps(settings, indent=2) + "\n")
    return tuple(together)
