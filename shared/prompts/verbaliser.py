"""How a causal language model is asked about the class of a text: what it reads, and what it would
write for each class.

As in its own training text, the question and the answer are a user's and an assistant's turn where
its tokenizer has a chat template, and else lines of one text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.config.tasks.task import TEXT, Classification, Tagging
from shared.errors import ConfigError
from shared.prompts.class_reading import Read
from shared.targets.asks.classes import ClassLogProbs, Tokens
from shared.text.framing import ends_of


@dataclass(frozen=True, slots=True)
class Verbaliser:
    """The classes of a task in the words of one teacher; satisfies `ClassReading`."""

    task: Classification | Tagging
    load_tokenizer: Callable[[], Any]  # the teacher's, a fast one of transformers
    teacher: str  # for messages
    tokenizer_digest: str
    limit: int | None  # tokens that it reads at most; None: no limit

    @property
    def identity(self) -> tuple[str, int | None]:
        """What decides, beside the task, what it reads."""
        return self.tokenizer_digest, self.limit

    def ask(self) -> ClassLogProbs:
        """What it is asked about every row. Raises ConfigError for classes that it cannot tell
        apart, or cannot write."""
        tokens = [self._tokens(self.task.said(label)) for label in self.task.classes]
        self._refuse_alike(tokens)
        tokens = [(*own, *self._end()) for own in tokens]
        if self.task.calibration == "none":
            return ClassLogProbs(tuple(tokens))
        (free,) = self._read([self.task.content_free], room_of=tokens)
        return ClassLogProbs(tuple(tokens), tuple(free.ids))

    def read(self, texts: Sequence[str], ask: ClassLogProbs) -> list[Read]:
        """What it reads of each text, before the class; a text loses its end where it would not fit
        with the longest class. Raises ConfigError where none would."""
        return self._read(texts, room_of=ask.classes)

    def _read(self, texts: Sequence[str], *, room_of: Sequence[Tokens]) -> list[Read]:
        found = [Read(ids) for ids in self.framed(texts)]
        if self.limit is None:
            return found
        most = self.limit - max(map(len, room_of))
        for number, read in enumerate(found):
            ids, text = read.ids, texts[number]
            while len(ids) > most and text:
                over = len(ids) - most
                text = text[: max(0, int(len(text) * (1 - over / len(ids))) - 1)]
                (ids,) = self.framed([text])
            if len(ids) > most:
                raise ConfigError(
                    f"task.template alone has {len(ids)} tokens for {self.teacher}, which reads "
                    f"{self.limit}, a class among them; shorten it"
                )
            if ids is not read.ids:
                found[number] = Read(ids, is_cut=True)
        return found

    def framed(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of whole texts, whatever their length."""
        tokenizer = self.load_tokenizer()
        asked = [self.task.template.replace(TEXT, text) for text in texts]
        if tokenizer.chat_template:
            turns = [[{"role": "user", "content": one}] for one in asked]
            asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return self._ids(asked)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [[*bos, *ids] for ids in self._ids([f"{one}\n" for one in asked])]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "verbose": False}
        return self.load_tokenizer()(list(texts), **options)["input_ids"]

    def _end(self) -> Tokens:
        """What ends an answer in text that it was trained on, if anything does: without it a class
        that begins as another would never be likelier."""
        return ends_of(self.load_tokenizer())[-1:]

    def _tokens(self, said: str) -> Tokens:
        (found,) = self._ids([said]) if said else ([],)
        if not found:
            raise ConfigError(
                f"task.verbaliser writes a class as {said!r}, which has no token for "
                f"{self.teacher}; write it in words"
            )
        return tuple(found)

    def _refuse_alike(self, tokens: Sequence[Tokens]) -> None:
        first: dict[Tokens, str] = {}
        for label, own in zip(self.task.classes, tokens, strict=True):
            other = first.setdefault(own, label)
            if other != label:
                raise ConfigError(
                    f"task.verbaliser writes the classes {other} and {label} with the same tokens "
                    f"of {self.teacher}, as {self.task.said(label)!r}, so that it cannot tell them "
                    "apart; write one of them otherwise"
                )
