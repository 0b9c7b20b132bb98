"""ClassifierEngine: a sequence or token classifier of transformers that says how likely each of its
classes is, of a text or of its words.

P texts   N positions with loss: of a text one, or one for each word   B lines   T tokens of a text
C classes
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from shared.config.models.engines import refuse_beyond_classifier
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, TeacherError
from shared.loading import classes_of, first_line
from shared.model_parts import longest_text, num_weights, pad_with, tolerance
from shared.targets.asks.classes import HeadLogProbs
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.classes.texts import class_columns, names_of, places_of, texts_of
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.identity import (
    loaded_fingerprint,
    name_of,
    stored_fact,
    tokenizer_digest,
)
from teacher_service.engine.loading import load_model
from teacher_service.engine.refusing import refuse_ids

TOKENS_AT_ONCE = 2**14  # that a forward pass reads, with padding
PROBE_TOKENS = (8, 4)  # of two texts


class ClassifierEngine:
    """Scores texts, or their words, with any classifier that transformers loads; an `Engine`."""

    def __init__(self, model: Any, fingerprint: dict[str, str], *, pad_id: int) -> None:
        self.model, self.fingerprint, self._pad_id = model, fingerprint, pad_id
        self.classes = classes_of(model.config) or ()
        self.max_context = longest_text(model)
        self._rows = model.get_input_embeddings().weight.shape[0]
        self._refuse_unreadable()

    @staticmethod
    def load(teacher: Teacher) -> "ClassifierEngine":
        """Load weights and tokenizer. Raises ConfigError."""
        refuse_beyond_classifier(f"the teacher {teacher.model}", teacher)
        device, trusted = "cuda" if teacher.gpus > 0 else "cpu", teacher.trust_remote_code
        loaded = load_model(teacher.model, **teacher.loading, device=device)
        if getattr(loaded.model.config, "problem_type", None) == "multi_label_classification":
            raise ConfigError(
                f"the teacher {teacher.model} says of each class by itself whether a text has it "
                "(problem_type multi_label_classification), and classes here exclude one another; "
                "name another teacher"
            )
        tokenizer = AutoTokenizer.from_pretrained(
            teacher.model, revision=teacher.revision or "main", trust_remote_code=trusted
        )
        named = {
            "model": name_of(teacher.model),
            "revision": loaded.commit or teacher.revision or "",
            "adapter": "",
            "dtype": teacher.dtype,
            "quantisation": "none",
            "tokenizer": tokenizer_digest(teacher.model, teacher.revision, trusted=trusted),
            **stored_fact(loaded.model.config),
        }
        fingerprint = named | loaded_fingerprint(loaded, device)
        pad_id = pad_with(loaded.model, tokenizer)
        return ClassifierEngine(loaded.model, fingerprint, pad_id=pad_id)

    def describe(self) -> TeacherDescription:
        """See `Engine`."""
        text = self.model.config.get_text_config()
        return TeacherDescription(
            fingerprint=self.fingerprint,
            vocab_rows=self._rows,
            num_layers=getattr(text, "num_hidden_layers", 0),
            hidden_width=getattr(text, "hidden_size", 0),
            state_widths=(),
            max_context=self.max_context,
            packed=False,
            num_weights=sum(map(num_weights, self.model.parameters())),
            classes=self.classes,
        )

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`: every document is a text and the numbers of its classes."""
        texts, ask = texts_of(rows), question.ask
        if not isinstance(ask, HeadLogProbs) or set(ask.classes) != set(self.classes):
            raise ConfigError(
                f"the teacher tells the classes {', '.join(self.classes):.200} apart, and is asked "
                f"about {ask.in_words()}; ask about classes of these names"
            )
        refuse_ids(names_of(rows), texts, vocab=self._rows, limit=self.max_context)
        order_C = [self.classes.index(name) for name in ask.classes]
        logits_NC = self._logits(texts, places_of(rows))[:, order_C]
        logprobs_NC = logits_NC.double().log_softmax(1)
        if not bool(logprobs_NC.isfinite().all()):
            raise TeacherError("the teacher computed logits that are not finite")
        return SoftTargets.build(
            question=question,
            teacher=self.fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=class_columns(rows, logprobs_NC.float().numpy()),
        )

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`; a classifier writes nothing."""
        raise ConfigError(
            f"the teacher {self.fingerprint['model']} is a classifier, which writes no text; name "
            "a causal language model"
        )

    def ship_head(self) -> ShippedHead:
        """See `Engine`; its head gives no tokens."""
        raise ConfigError(
            f"the teacher {self.fingerprint['model']} is a classifier, whose head gives no tokens; "
            "leave targets.exact out"
        )

    @torch.inference_mode()
    def _logits(self, texts: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> Tensor:
        """At the places of each text, or of it as a whole [N, C], float32 on the host; texts are
        read together with those after."""
        found = [torch.empty(0, len(self.classes))]
        for part in _parts(texts):
            ids_BT, mask_BT = padded([texts[number] for number in part], pad_id=self._pad_id)
            device = self.model.device
            output = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device))
            logits = output.logits.float().cpu()
            if logits.ndim == 3:  # of every token
                at = [torch.from_numpy(places[number]) for number in part]
                logits = torch.cat([own_TC[own] for own_TC, own in zip(logits, at, strict=True)])
            found.append(logits)
        return torch.cat(found)

    def _refuse_unreadable(self) -> None:
        """Two texts of different lengths must give a finite logit of each class, each as if alone.
        Raises ConfigError."""
        name = self.fingerprint["model"]
        texts = [(3 + np.arange(size) * 7) % self._rows for size in PROBE_TOKENS]
        try:
            last = [np.array([size - 1]) for size in PROBE_TOKENS]
            both_PC = self._logits(texts, last)
            pairs = zip(texts, last, strict=True)
            alone_PC = torch.cat([self._logits([text], [at]) for text, at in pairs])
        except Exception as error:  # of the model's own code
            raise ConfigError(
                f"the teacher {name} cannot read two texts: {first_line(error)}; use "
                "another teacher"
            ) from error
        if both_PC.shape != (2, len(self.classes)) or not bool(both_PC.isfinite().all()):
            raise ConfigError(
                f"the teacher {name} does not give a finite logit of each of {len(self.classes)} "
                "classes; get its files again, or use another teacher"
            )
        level = tolerance(self.fingerprint["dtype"], reordered=True)
        if (both_PC - alone_PC).abs().max() > level * both_PC.abs().max():
            raise ConfigError(
                f"the classes of a text depend on what the teacher {name} reads beside it; use "
                "another teacher"
            )


def padded(texts: Sequence[np.ndarray], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and what of them is text [B, T], int64."""
    width = max(map(len, texts))
    ids_BT = torch.full((len(texts), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for line, ids in enumerate(texts):
        ids_BT[line, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask_BT[line, : len(ids)] = 1
    return ids_BT, mask_BT


def _parts(texts: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Numbers of texts that are read together."""
    part: list[int] = []
    for number in range(len(texts)):
        width = max(len(texts[one]) for one in [*part, number])
        if part and width * (len(part) + 1) > TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(number)
    if part:
        yield part
