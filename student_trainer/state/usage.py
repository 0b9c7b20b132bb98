"""How an export is used: its tokenizer, where it stops, and how a text is given to it.

Training frames a text as bos, text, eos and joins a prompt and its response by a newline, unless
the tokenizer has a chat template (`shared.text.framing`). The exported files agree with that.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from shared.config.run import Config
from shared.text.chat import chosen_template
from shared.text.ends import ends_of

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user of an export has to know, in tokens."""

    ends: tuple[str, ...]  # any of them ends what it writes
    bos: str | None  # opens a text, if any token does
    eos: str | None  # closes it
    opens: bool  # whether `tokenizer(text)` puts it there
    chats: bool  # whether prompts pass through a chat template

    @property
    def framed(self) -> str:
        """What a plain text was in training."""
        return ", ".join(filter(None, (self.bos, "the text", self.eos)))


def save_usage(draft: Path, config: Config) -> Usage:
    """Write the tokenizer and the generation config into an export.

    Of several named chat templates the one that rows passed through is kept.
    `tokenizer(text)` opens with bos where all text did, which is where there is no chat template.
    The generation config ends at the tokenizer's eos, at what ends a turn of the template, and
    where it did before.
    """
    student = config.student
    asked = {"revision": student.revision or "main"}
    tokenizer = AutoTokenizer.from_pretrained(
        student.model, **asked, trust_remote_code=student.trust_remote_code
    )
    tokenizer.chat_template = chosen_template(
        tokenizer.chat_template, config.data.chat_template, model=student.model
    )
    tokenizer.save_pretrained(draft)
    if not tokenizer.chat_template and not _opens(tokenizer):
        tokenizer = _opened(draft, tokenizer, trusted=student.trust_remote_code)
    if not (draft / GENERATION).exists():
        _copy_generation_config(draft, student.model, **asked)
    ends = _end_at(draft / GENERATION, ends_of(tokenizer))
    return Usage(
        ends=tuple(map(str, tokenizer.convert_ids_to_tokens(list(ends)))),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        opens=_opens(tokenizer),
        chats=bool(tokenizer.chat_template),
    )


def _opens(tokenizer: Any) -> bool:
    """Whether a text's ids open with bos, where there is one."""
    bos = tokenizer.bos_token_id
    return bos is None or tokenizer("a")["input_ids"][:1] == [bos]


def _opened(draft: Path, tokenizer: Any, *, trusted: bool) -> Any:
    """The saved tokenizer with bos before every text; as it was where its class undoes that."""
    from tokenizers.processors import Sequence, TemplateProcessing

    bos, backend = tokenizer.bos_token, tokenizer.backend_tokenizer
    opening = TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", "$B:1"],
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    before = backend.post_processor
    backend.post_processor = opening if before is None else Sequence([before, opening])
    tokenizer.init_kwargs.pop("add_bos_token", None)  # a class would make its own from it
    tokenizer.save_pretrained(draft)
    return AutoTokenizer.from_pretrained(draft, trust_remote_code=trusted)


def _copy_generation_config(draft: Path, model: str, *, revision: str) -> None:
    """An adapter's folder carries its base's generation config where the base has one."""
    try:
        GenerationConfig.from_pretrained(model, revision=revision).save_pretrained(draft)
    except OSError:
        (draft / GENERATION).write_text("{}\n")


def _end_at(path: Path, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Add ids that end a text to those of a generation config; returns all."""
    settings = json.loads(path.read_text())
    before = settings.get("eos_token_id")
    known = before if isinstance(before, list) else [] if before is None else [before]
    together = list(dict.fromkeys([*known, *ends]))
    if together != known:
        settings["eos_token_id"] = together if len(together) > 1 else together[0]
        path.write_text(json.dumps(settings, indent=2) + "\n")
    return tuple(together)
