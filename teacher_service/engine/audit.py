"""What quantisation costs: a quantised teacher against its own unquantised weights.

The unquantised model is loaded once per teacher, scores a fixed probe and is freed; its last
hidden states, which with the head are its full distributions, are stored in the cache.

N probe positions   C positions of a chunk   D hidden width   V head rows
"""

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor, nn

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import StorageError
from shared.loading import in_int8, stored_as
from shared.model_parts import num_weights
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.loading import local_folder, weights_digest
from teacher_service.scoring.scoring import ScoringHead, chunk_size

PROBE_TOKENS = 64  # of a row
PROBE_UNIT = 4  # rows whose answers are compared alone and together
ROUNDING = 1e-5  # nats; more than another shape of a batch changes
PROBE_TEXT = """
The heart pumps blood through two circuits. The right side sends it to the lungs, where it takes up
oxygen; the left side sends it to the rest of the body. A valve between each pair of chambers keeps
it from flowing back. When a valve leaks, the heart must work harder to move the same amount.

Question: A farmer sells 14 boxes of apples at 3 dollars each and 9 boxes of pears at 5 dollars
each. How much does she earn? Answer: 14 * 3 = 42 and 9 * 5 = 45, so she earns 42 + 45 = 87 dollars.

def greatest_common_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return abs(a)

Once there was a little boat that was afraid of the wind. One morning the wind blew so gently that
the boat forgot its fear, and when it looked back the harbour was far away.

SELECT name, population FROM cities WHERE country = 'Norway' ORDER BY population DESC LIMIT 10;

This licence is granted without warranty of any kind. You may copy, change and distribute the work,
provided that this notice appears in all copies.
"""


@dataclass(frozen=True, slots=True)
class Audit:
    """A quantised teacher beside the unquantised one on the probe."""

    mean_kl: float  # KL(unquantised || quantised), nats per token, full vocabulary
    top1_agreement: float  # share of positions
    num_tokens: int
    # KL(a row alone || beside the others) by position [N], where quantisation depends on the unit:
    # int8 leaves out columns in which any of its rows has an outlier.
    mates_kl_N: Tensor

    def sentences(self, quantisation: str) -> tuple[str, ...]:
        """For the user; the last one has the price of quantisation."""
        return (*mates_notes(self.mates_kl_N, quantisation), self.sentence(quantisation))

    def sentence(self, quantisation: str) -> str:
        """For the user."""
        return (
            f"The {quantisation} teacher differs from its unquantised weights by a KL of "
            f"{self.mean_kl:.4f} nats per token and agrees on the most likely token at "
            f"{self.top1_agreement:.1%} of {self.num_tokens} probe positions."
        )


def load_engine(
    teacher: Teacher, *, cache: str | None = None, context: int | None = None
) -> HFEngine:
    """The engine a config asks for; a quantised one carries its audit as a note.

    `cache` is the folder that keeps the unquantised probe answers and the projections of hidden
    states, `context` the length of the longest rows. Raises ConfigError.
    """
    if teacher.quantisation == "none":
        engine = _load(teacher, cache, context)
        if (stored := stored_as(engine.model.config)) is not None:
            if in_int8(engine.fingerprint):
                unit = probe_rows(teacher).part(slice(0, PROBE_UNIT))
                engine.notes += mates_notes(_mates_kl(engine, unit), "int8")
            engine.notes += (
                f"The teacher's weights are stored {stored}; it computes in {teacher.dtype}, and "
                "nothing compares it with its unquantised weights.",
            )
        return engine
    rows = probe_rows(teacher)
    reference_ND = _reference(teacher, rows, cache)
    engine = _load(teacher, cache, context)
    engine.notes += (quantised_note(engine.model, teacher.quantisation),)
    if reference_ND is None:
        engine.notes += (
            f"The {teacher.quantisation} teacher is not audited: its unquantised "
            "weights do not fit on the device.",
        )
    else:
        engine.notes += audit(engine, reference_ND, rows).sentences(teacher.quantisation)
    return engine


def audit(engine: HFEngine, reference_ND: Tensor, rows: Rows) -> Audit:
    """Compare a quantised engine's distributions with those of stored last hidden states.

    The head is never quantised, so both share it.
    """
    kl_N, same_N = divergence(reference_ND, engine.last_hidden(rows), engine.head)
    mates_kl_N = _mates_kl(engine, rows.part(slice(0, PROBE_UNIT)))
    return Audit(float(kl_N.mean()), float(same_N.float().mean()), len(kl_N), mates_kl_N)


def mates_notes(mates_kl_N: Tensor, quantisation: str) -> tuple[str, ...]:
    """What rows of a unit change about each other's answers, where that is more than rounding."""
    mean, most = float(mates_kl_N.mean()), float(mates_kl_N.max())
    if mean < ROUNDING:
        return ()
    return (
        f"The {quantisation} teacher's answer about a row depends on the rows beside it: alone "
        f"and in a unit of {PROBE_UNIT} probe rows it differs by a KL of {mean:.4f} nats per "
        f"token, {most:.2f} at most; nf4, or no quantisation, answers alike.",
    )


def _mates_kl(engine: HFEngine, rows: Rows) -> Tensor:
    """What the rows of a unit change about each other's answers [N], nats."""
    alone_ND = torch.cat([engine.last_hidden(rows.part(slice(r, r + 1))) for r in range(len(rows))])
    return divergence(alone_ND, engine.last_hidden(rows), engine.head)[0]


def quantised_note(model: nn.Module, quantisation: str) -> str:
    """How much of a teacher is quantised, and that fused experts are not."""
    weights = dict(model.named_parameters())
    stored = {n: num_weights(p) for n, p in weights.items() if _is_quantised(p)}
    total = sum(map(num_weights, weights.values()))
    said = (
        f"{len(stored)} matrices of the teacher are in {quantisation}, {sum(stored.values()):,} of "
        f"{total:,} weights"
    )
    experts = [p for n, p in weights.items() if "expert" in n and p.ndim == 3]
    if experts:
        said += (
            f"; {len(experts)} fused expert tensors ({sum(p.numel() for p in experts):,} weights) "
            f"stay unquantised, since {quantisation} takes linear layers alone"
        )
    return said + "."


def _is_quantised(parameter: nn.Parameter) -> bool:
    return type(parameter).__module__.startswith("bitsandbytes")


@torch.inference_mode()
def divergence(reference_ND: Tensor, other_ND: Tensor, head: ScoringHead) -> tuple[Tensor, Tensor]:
    """KL(reference || other) and whether the most likely id is the same, both [N], in chunks."""
    vocab_rows, device = len(head.weight_VD), head.weight_VD.device
    kl, same = [], []
    for start in range(0, len(reference_ND), step := chunk_size(vocab_rows, device.type)):
        part = slice(start, start + step)
        p_CV, q_CV = (head.logits(h[part]).log_softmax(1) for h in (reference_ND, other_ND))
        kl.append((p_CV.exp() * (p_CV - q_CV)).sum(1))
        same.append(p_CV.argmax(1) == q_CV.argmax(1))
    return torch.cat(kl), torch.cat(same)


def probe_rows(teacher: Teacher) -> Rows:
    """The fixed probe in the teacher's own tokens; pseudo-random ids where it has no tokenizer."""
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            teacher.model,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
        )
        ids = np.asarray(tokenizer(PROBE_TEXT)["input_ids"])
    except (OSError, ValueError, KeyError):
        ids = np.arange(8 * PROBE_TOKENS) * 6151 % 256
    starts = range(0, len(ids) - 1, PROBE_TOKENS)
    parts = [ids[start : start + PROBE_TOKENS] for start in starts]
    return Rows.build(
        domains=["probe"] * len(parts),
        indices=range(len(parts)),
        input_ids=parts,
        doc_starts=[np.zeros(1)] * len(parts),
        loss_masks=[np.append(np.ones(len(part) - 1), 0) for part in parts],
    )


def _load(teacher: Teacher, cache: str | None, context: int | None = None) -> HFEngine:
    engine = HFEngine.load(
        teacher.model,
        **teacher.loading,
        device="cuda" if teacher.gpus > 0 else "cpu",
        context=context,
        tensor_parallel=teacher.tensor_parallel,
    )
    engine.cache = cache
    return engine


def _reference(teacher: Teacher, rows: Rows, cache: str | None) -> Tensor | None:
    """Last hidden states of the unquantised teacher; None where it does not fit."""
    path = None
    if cache is not None:
        folder = Path(cache).expanduser() / "teacher_probes"
        path = folder / f"{_probe_key(teacher, rows)}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path, allow_pickle=False))
    try:
        engine = _load(teacher.model_copy(update={"quantisation": "none"}), cache)
        hidden_ND = engine.last_hidden(rows).float().cpu()
        del engine
    except torch.OutOfMemoryError:
        hidden_ND = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if path is not None and hidden_ND is not None:
        _write(path, hidden_ND.numpy())
    return hidden_ND


def _probe_key(teacher: Teacher, rows: Rows) -> str:
    folder = local_folder(teacher.model, revision=teacher.revision, marker="config.json")
    parts = [weights_digest(folder), teacher.dtype, str(teacher.gpus > 0)]
    if teacher.attention != "auto":
        parts.append(teacher.attention)
    if teacher.adapter:
        revision = teacher.adapter_revision
        adapter = local_folder(teacher.adapter, revision=revision, marker="adapter_config.json")
        parts.append(weights_digest(adapter))
    return xxhash.xxh3_128_hexdigest(b"".join([*rows.hashes(), *(p.encode() for p in parts)]))


def _write(path: Path, hidden_ND: np.ndarray) -> None:
    """Written aside and renamed, so that replicas loading at once never read half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, hidden_ND)
        aside.replace(path)
    except OSError as error:
        raise StorageError(
            f"the probe of the unquantised teacher cannot be written to {path.parent}: "
            f"{error.strerror}; free space or change paths.cache"
        ) from error
