"""VllmEngine: a model that vLLM holds in an environment of its own; satisfies `Engine`.

It asks that process for numbers and encodes them here as any other engine's, so what it answers are
the same columns. vLLM scores at temperature 1 and gives the likeliest ids alone.

N positions with loss   K ids kept per position   L ids asked for   V head rows   T tokens of a text
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from shared.config.models.engines import VLLM_DRAWS_AT, VLLM_RANKS, VLLM_SHARE, draws_in_vllm
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, TeacherError
from shared.loading import read_config
from shared.model_parts import longest_context
from shared.targets.asks.head_location import ShippedHead
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.codec.decoding import LEAST_KEPT_MASS
from shared.targets.generation import NO_END, Continuations, Drawn, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.generation.generating import refuse_openings
from teacher_service.engine.identity import name_of, stored_fact, tokenizer_digest
from teacher_service.engine.loading import local_folder, weights_digest
from teacher_service.engine.refusing import refuse_rows, refuse_vocabulary
from teacher_service.engine.vllm.worker import (
    END,
    IDS,
    INPUT_IDS,
    LABEL,
    LOGPROBS,
    SEED,
    WRITTEN,
)
from teacher_service.scoring.answering import encode, refuse
from teacher_service.scoring.scoring import Selection

Ask = Callable[..., Any]  # a method of the worker and its arguments


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found at the positions with loss, the likeliest ids first."""

    label_logprob_N: np.ndarray  # float32
    ids_NL: np.ndarray  # int64
    logprobs_NL: np.ndarray  # float64


class VllmEngine:
    """Scores and continues texts with the model of a `VllmWorker`."""

    def __init__(
        self,
        ask: Ask,
        teacher: Teacher,
        *,
        context: int | None = None,
        section: str = "teachers.NAME",
        adapters: dict[str, Any] | None = None,
    ) -> None:
        """Load the teacher in the worker's process, for rows of at most `context` tokens; `section`
        is where the config has it. With `adapters`, rank and alpha as peft's config names them,
        the weights that it is given are LoRA adapters. Raises ConfigError where it cannot be
        loaded."""
        config = read_config(
            teacher.model,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
            attention="auto",
        )
        text, limit = config.get_text_config(), longest_context(config.get_text_config())
        self._limit = min(filter(None, (limit, context)), default=None)
        self._ask, self._adapters = ask, adapters
        settings = _settings(teacher, self._limit) | _room_for(adapters)
        try:
            loaded = ask("open", settings)
        except TeacherError as error:
            raise ConfigError(
                f"vllm in {teacher.python} cannot load {teacher.model}: {error}; leave "
                f"{section}.engine at transformers, or mend it"
            ) from error
        self._vocab = loaded.pop("vocab")
        folder = local_folder(teacher.model, revision=teacher.revision, marker="config.json")
        trusted = teacher.trust_remote_code
        self._fingerprint = {
            "model": name_of(teacher.model),
            "revision": getattr(config, "_commit_hash", None) or teacher.revision or "",
            "adapter": "",
            "dtype": teacher.dtype,
            "quantisation": "none",
            "tokenizer": tokenizer_digest(teacher.model, teacher.revision, trusted=trusted),
            "weights": weights_digest(folder),
            "adapter_weights": "",
            **stored_fact(config),
            **loaded,
        }
        self._description = TeacherDescription(
            fingerprint=self._fingerprint,
            vocab_rows=self._vocab,
            num_layers=text.num_hidden_layers,
            hidden_width=text.hidden_size,
            state_widths=(),
            max_context=self._limit,
            packed=True,
        )

    def describe(self) -> TeacherDescription:
        """See `Engine`."""
        return self._description

    def ship_head(self) -> ShippedHead:
        """See `Engine`; vLLM gives no hidden state."""
        raise ConfigError(
            "a teacher with engine vllm ships no head, since vllm gives no hidden states; leave "
            "targets.exact out, or set its engine to transformers"
        )

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`: every document is a text of its own."""
        refuse_vocabulary(question.ask.shared_vocab, vocab=self._vocab)
        refuse_rows(rows, vocab=self._vocab, limit=self._limit)
        ask = _refuse_beyond(question)
        refuse(question, rows)
        found = self._selected(rows, ask)
        return SoftTargets.build(
            question=question,
            teacher=self._fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=encode(found, question),
        )

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`. Draws come from a seed of each opening, so they depend on no other."""
        refuse_openings(openings, spec, vocab=self._vocab, limit=self._limit)
        if openings.are_forced:
            raise ConfigError(
                "a teacher with engine vllm is asked to go on from texts that are given in part, "
                "which it does not; leave source.teacher_mix out, or set its engine to transformers"
            )
        if not draws_in_vllm(spec.temperature):
            least, most = VLLM_DRAWS_AT
            raise ConfigError(
                f"{spec.in_words()} are asked of a teacher with engine vllm, which draws at "
                f"temperatures from {least:g} to {most:g}; change it, or set its engine to "
                "transformers"
            )
        seed = spec.seed.to_bytes(8, "little", signed=True)
        seeds = [xxhash.xxh3_64_intdigest(seed + one) >> 1 for one in openings.hashes()]
        ids = pa.array(openings.ids(), pa.list_(pa.int32()))
        asked = pa.table({INPUT_IDS: ids, SEED: pa.array(seeds, pa.int64())})
        found = self._ask("write", asked, _sampling(spec, self._vocab))
        written, ends = _arrays(found, WRITTEN), found.column(END).to_pylist()
        drawn = None
        if spec.logprobs:
            logprobs = _arrays(found, LOGPROBS)
            if not spec.temperature:  # the likeliest is certain
                logprobs = [np.zeros_like(each) for each in logprobs]
            drawn = Drawn(logprobs, ends)
        stopped = [end != NO_END for end in ends]
        pairs = zip(written, stopped, strict=True)
        return Continuations.build(
            openings,
            spec,
            teacher=self._fingerprint,
            output_ids=[ids[: len(ids) - is_stopped] for ids, is_stopped in pairs],
            stopped=stopped,
            drawn=drawn,
        )

    def load_weights(self, file: str) -> None:
        """Go on with the weights of a file of safetensors, named as the model's own files name
        them, or adapters, named as peft's modules are. Raises TeacherError where vLLM does not take
        them."""
        if self._adapters is None:
            self._ask("load_weights", file)
        else:
            self._ask("load_adapters", file, self._adapters)

    def _selected(self, rows: Rows, ask: LikeliestIds) -> Selection:
        """The kept ids among the shared ones; where others are among the likeliest, as many more
        are asked for as there are others at all."""
        for num_ids in (ask.num_ids, ask.num_ids + self._vocab - ask.shared_vocab):
            found = self._found(rows, min(num_ids, self._vocab))
            is_shared_NL = found.ids_NL < ask.shared_vocab
            if (is_shared_NL.sum(1) >= ask.num_ids).all():
                break
        # the first that are shared, in their order
        order_NL = np.argsort(~is_shared_NL, axis=1, kind="stable")
        kept_NK, rest_NL = order_NL[:, : ask.num_ids], order_NL[:, ask.num_ids :]
        ids_NK = np.take_along_axis(found.ids_NL, kept_NK, 1)
        logprobs_NK = np.take_along_axis(found.logprobs_NL, kept_NK, 1)
        if found.ids_NL.shape[1] == self._vocab:
            rest_N = np.exp(np.take_along_axis(found.logprobs_NL, rest_NL, 1)).sum(1)
        else:
            rest_N = np.maximum(1 - np.exp(logprobs_NK).sum(1), LEAST_KEPT_MASS)
        if not ask.names_ids:
            ascending_NK = np.argsort(ids_NK, axis=1)
            ids_NK = np.take_along_axis(ids_NK, ascending_NK, 1)
            logprobs_NK = np.take_along_axis(logprobs_NK, ascending_NK, 1)
        with np.errstate(divide="ignore"):  # -inf where nothing is left
            log_tail_N = np.minimum(np.log(rest_N), 0)
        return Selection(
            torch.from_numpy(ids_NK),
            torch.from_numpy(logprobs_NK).float(),
            torch.from_numpy(log_tail_N).float()[:, None],
            torch.from_numpy(found.label_logprob_N),
        )

    def _found(self, rows: Rows, num_ids: int) -> _Found:
        documents = rows.documents()
        is_learnt = [mask[:-1].astype(bool) for mask in documents.column("loss_mask")]
        texts = [
            (ids, learnt)
            for ids, learnt in zip(documents.column("input_ids"), is_learnt, strict=True)
            if learnt.any()
        ]
        ids = pa.array([ids for ids, _ in texts], pa.list_(pa.int32()))
        answer = self._ask("logprobs", pa.table({INPUT_IDS: ids}), num_ids) if texts else None
        labels, likeliest, logprobs = (
            _arrays(answer, name) if answer is not None else [] for name in (LABEL, IDS, LOGPROBS)
        )
        learnt = [is_learnt for _, is_learnt in texts]
        return _Found(
            _joined([each[own] for each, own in zip(labels, learnt, strict=True)], 0, np.float32),
            _joined(_of_positions(likeliest, learnt, num_ids), num_ids, np.int64),
            _joined(_of_positions(logprobs, learnt, num_ids), num_ids, np.float64),
        )


def _settings(teacher: Teacher, limit: int | None) -> dict[str, Any]:
    """vLLM's own. The text of a row is read whole and one token is written after it, so that it
    has room for one more."""
    on_gpu = teacher.gpus > 0
    found: dict[str, Any] = {
        "model": teacher.model,
        "revision": teacher.revision,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": teacher.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": limit and limit + 1,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",  # of the law that is drawn from
        "generation_config": "vllm",  # not the model's own defaults
        "enable_prefix_caching": False,  # an answer depends on no other
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_gpu:
        found["tensor_parallel_size"] = max(1, int(teacher.gpus))
        found["gpu_memory_utilization"] = VLLM_SHARE * min(1.0, teacher.gpus)
    else:
        found["enforce_eager"] = True
    return found


def _room_for(adapters: dict[str, Any] | None) -> dict[str, Any]:
    """What vLLM is told of adapters that it will be given, one set at a time."""
    if adapters is None:
        return {}
    rank = next(rank for rank in VLLM_RANKS if rank >= adapters["r"])
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def _sampling(spec: GenerationSpec, vocab: int) -> dict[str, Any]:
    """A question in vLLM's words."""
    found: dict[str, Any] = {
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "max_tokens": spec.max_new_tokens,
        "min_tokens": min(spec.min_new_tokens, spec.max_new_tokens),
        "ignore_eos": True,  # the model's own end; those asked for are
        "stop_token_ids": [i for i in spec.stop_ids if i < vocab],
    }
    if spec.vocab is not None and spec.vocab < vocab:
        found["allowed_token_ids"] = [*range(spec.vocab)]
    return found


def _refuse_beyond(question: Question) -> LikeliestIds:
    """The ask of a question that vLLM can answer. Raises ConfigError for others."""
    ask = question.ask
    plain = isinstance(ask, LikeliestIds) and ask.temperatures == (1.0,) and not ask.entropy
    if not plain or ask.student_ids or question.hidden.layers:  # type: ignore[union-attr]
        raise ConfigError(
            "a teacher with engine vllm gives its likeliest ids at temperature 1 and nothing else, "
            f"and is asked for {question.in_words()}; ask for less, or set its engine to "
            "transformers"
        )
    assert isinstance(ask, LikeliestIds)
    return ask


def _arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    return [scalar.values.to_numpy() for scalar in table.column(name)]


def _of_positions(
    found: list[np.ndarray], learnt: list[np.ndarray], num_ids: int
) -> list[np.ndarray]:
    """Those with loss of a list's [(T - 1) * L] numbers of each text."""
    pairs = zip(found, learnt, strict=True)
    return [numbers.reshape(-1, num_ids)[is_learnt] for numbers, is_learnt in pairs]


def _joined(parts: list[np.ndarray], width: int, kind: type) -> np.ndarray:
    """Of all texts end to end: [N], or [N, width]."""
    if not parts:
        return np.zeros((0, width) if width else 0, kind)
    return np.concatenate(parts).astype(kind)
