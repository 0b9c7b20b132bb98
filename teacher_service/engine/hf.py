"""HFEngine: a causal language model of transformers that scores rows and continues text.

B lines   T tokens   N positions with loss   D hidden width   V head rows
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from shared.config.run import Dtype
from shared.data.layout import Layout, lay_out
from shared.data.rows import Rows
from shared.data.tokenizers import identify
from shared.errors import ConfigError, HandshakeError, TutelageError
from shared.targets.draws import uniforms
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.head_location import ShippedHead
from shared.targets.soft_targets import SoftTargets
from shared.targets.spec import TargetSpec
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.generating import generate, refuse_openings
from teacher_service.engine.loading import Loaded, load_model, merge_head, weights_digest
from teacher_service.engine.model_parts import (
    Decoder,
    find_decoder,
    find_head,
    head_is_exact,
    len_vocab,
)
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.encoding import encode
from teacher_service.scoring.head_file import save_head
from teacher_service.scoring.projection import load_projections
from teacher_service.scoring.scoring import Head, Selection, select

PACKING_TOLERANCE = {"float32": 1e-4}  # relative, of the last hidden state; other types below
COARSE_PACKING_TOLERANCE = 5e-2
UNPACKED_NOTE = "The teacher lets packed documents attend to each other; it scores them one by one."


class HFEngine:
    """Scores one unit per forward pass with any causal model that transformers loads."""

    def __init__(
        self,
        model: torch.nn.Module,
        decoder: Decoder,
        head: Head,
        fingerprint: dict[str, str],
        *,
        max_context: int | None,
    ) -> None:
        self.model, self.decoder, self.head = model, decoder, head
        self.cache: str | None = None  # where projections of hidden states are found
        self._projections: dict[str, dict[int, Tensor]] = {}
        self.notes: tuple[str, ...] = ()
        self.packed = decoder.takes_positions and self._keeps_documents_apart(fingerprint["dtype"])
        if not self.packed:
            self.notes = (UNPACKED_NOTE,)
        self.max_context = max_context
        self.fingerprint = fingerprint | {"packed": str(self.packed)}

    @staticmethod
    def load(
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        adapter_revision: str | None = None,
        dtype: Dtype = "float32",
        quantisation: Literal["none", "int8", "nf4"] = "none",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> "HFEngine":
        """Load, prove decoder and head, and probe packing. Raises ConfigError with the reason."""
        loaded = load_model(
            model,
            revision=revision,
            adapter=adapter,
            adapter_revision=adapter_revision,
            dtype=dtype,
            quantisation=quantisation,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        decoder, head = _proven_parts(loaded, model, device, quantisation)
        named = {
            "model": _name(model),
            "revision": loaded.commit or revision or "",
            "adapter": _name(adapter) if adapter else "",
            "dtype": dtype,
            "quantisation": quantisation,
            "tokenizer": _tokenizer_digest(model, revision, trusted=trust_remote_code),
        }
        fingerprint = named | _weights(loaded) | _machine(loaded, device)
        config = loaded.model.config.get_text_config()  # type: ignore[union-attr]
        context = getattr(config, "max_position_embeddings", None)
        return HFEngine(loaded.model, decoder, head, fingerprint, max_context=context)

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        vocab_rows, hidden_width = self.head.weight_VD.shape
        return TeacherDescription(
            fingerprint=self.fingerprint,
            vocab_rows=vocab_rows,
            num_layers=self.decoder.num_layers,
            hidden_width=hidden_width,
            max_context=self.max_context,
            packed=self.packed,
            notes=self.notes,
        )

    def score(self, rows: Rows, spec: TargetSpec) -> SoftTargets:
        """Answer one unit in one forward pass. Raises UserError for what can never be answered."""
        self._refuse(rows, spec)
        layout = lay_out(rows, packed=self.packed)
        hidden = self._hidden(layout, spec.hidden_layers)
        last_ND, label_N = hidden[self.decoder.num_layers], torch.from_numpy(layout.label_N)
        found = self._selected(last_ND, label_N, rows, spec)
        return SoftTargets.build(
            spec=spec,
            teacher=self.fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=encode(found, spec, hidden=self._projected(hidden, spec), last_ND=last_ND),
        )

    def ship_head(self) -> ShippedHead:
        """Keep the head in the cache. Raises ConfigError for one that cannot be shipped."""
        return save_head(self.head, self.cache)

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch. Raises UserError for what can never be answered."""
        vocab_rows = len(self.head.weight_VD)
        refuse_openings(openings, spec, vocab=vocab_rows, limit=self.max_context)
        device, teacher = self.decoder.device, self.fingerprint
        return generate(self.model, openings, spec, device=device, teacher=teacher)

    def last_hidden(self, rows: Rows) -> Tensor:
        """The head's input [N, D] at the positions with loss."""
        return self._hidden(lay_out(rows, packed=self.packed), ())[self.decoder.num_layers]

    def _hidden(self, layout: Layout, layers: Sequence[int]) -> dict[int, Tensor]:
        return self.decoder.hidden(
            torch.from_numpy(layout.input_ids_BT),
            torch.from_numpy(layout.position_ids_BT),
            torch.from_numpy(layout.loss_index_N),
            layers,
        )

    def _selected(
        self, hidden_ND: Tensor, label_N: Tensor, rows: Rows, spec: TargetSpec
    ) -> Selection:
        if spec.selector == "top_k":
            named_NM = rows.student_ids() if spec.student_ids else None
            return select(
                hidden_ND,
                self.head,
                label_N,
                top_k=spec.top_k,
                shared_vocab=spec.shared_vocab,
                temperatures=spec.temperatures,
                entropy=spec.entropy,
                named_NM=None if named_NM is None else torch.from_numpy(named_NM.astype(np.int64)),
            )
        count = spec.top_k if spec.selector == "sampled" else 1
        return draw(
            hidden_ND,
            self.head,
            label_N,
            uniform_NU=torch.from_numpy(uniforms(rows, seed=spec.seed, count=count)),
            selector=spec.selector,
            top_k=spec.top_k,
            shared_vocab=spec.shared_vocab,
            temperature=spec.temperatures[0],
        )

    def _projected(self, hidden: dict[int, Tensor], spec: TargetSpec) -> dict[int, Tensor]:
        """The states asked for, narrowed where the spec names a projection."""
        asked = {layer: hidden[layer] for layer in spec.hidden_layers}
        if not asked or not spec.projection:
            return asked
        if spec.projection not in self._projections:
            matrices = load_projections(self.cache, spec.projection)
            self._projections[spec.projection] = {
                layer: torch.from_numpy(matrix) for layer, matrix in matrices.items()
            }
        matrices = self._projections[spec.projection]
        return {
            layer: states_ND.float() @ matrices[layer].to(states_ND.device)
            for layer, states_ND in asked.items()
        }

    def _keeps_documents_apart(self, dtype: str) -> bool:
        """Whether two packed documents give the hidden states that each gives alone."""
        ids = np.arange(44) * 6151 % len(self.head.weight_VD)
        rows = Rows.build(
            domains=["probe"],
            indices=[0],
            input_ids=[ids],
            doc_starts=[np.array([0, 21])],
            loss_masks=[np.array([1] * 20 + [0] + [1] * 22 + [0])],
        )
        together_ND, apart_ND = (
            self._hidden(lay_out(rows, packed=packed), ())[self.decoder.num_layers].float()
            for packed in (True, False)
        )
        error = (together_ND - apart_ND).norm() / apart_ND.norm()
        return bool(error <= PACKING_TOLERANCE.get(dtype, COARSE_PACKING_TOLERANCE))

    def _refuse(self, rows: Rows, spec: TargetSpec) -> None:
        """Questions that no retry can answer."""
        vocab_rows = len(self.head.weight_VD)
        if spec.shared_vocab > vocab_rows:
            raise HandshakeError(
                f"{spec.shared_vocab} ids are asked for and the teacher's head has {vocab_rows}; "
                "use a student that shares its tokenizer"
            )
        if spec.top_k > spec.shared_vocab:
            raise ConfigError(
                f"targets.top_k is {spec.top_k}, above the {spec.shared_vocab} ids that teacher "
                "and student share; lower it"
            )
        for layer in spec.hidden_layers:
            if not 0 <= layer <= self.decoder.num_layers:
                raise ConfigError(
                    f"layer {layer} is asked for and the teacher's layers are 0 to "
                    f"{self.decoder.num_layers}; change losses.layers"
                )
        self._refuse_rows(rows, vocab_rows)
        if spec.student_ids:
            _refuse_student_ids(rows, spec)

    def _refuse_rows(self, rows: Rows, vocab_rows: int) -> None:
        for name, ids in zip(rows.names(), rows.column("input_ids"), strict=True):
            if self.max_context is not None and len(ids) > self.max_context:
                raise HandshakeError(
                    f"row {name} has {len(ids)} tokens and the teacher's context is "
                    f"{self.max_context}; lower data.context"
                )
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_rows:
                raise HandshakeError(
                    f"row {name} holds token id {ids.max()} and the teacher knows {vocab_rows}; "
                    "use a student that shares its tokenizer"
                )


def _refuse_student_ids(rows: Rows, spec: TargetSpec) -> None:
    """Ids that are missing, not as many as asked for, unknown, or named twice."""
    ids_NM = rows.student_ids()
    num, wanted = int(rows.num_loss_tokens().sum()), spec.student_ids
    if spec.selector != "top_k" or spec.head or wanted >= spec.top_k:
        raise ConfigError(
            f"{wanted} ids of the student are asked for with {spec.in_words()}; they need the "
            "selector top_k and room among its ids"
        )
    found = "none" if ids_NM is None else f"{ids_NM.shape[1]} at {len(ids_NM)}"
    if ids_NM is None or ids_NM.shape != (num, wanted):
        raise HandshakeError(
            f"rows {rows.named()} should come with {wanted} ids of the student at {num} positions "
            f"and come with {found}; run teacher and trainer in the same version"
        )
    if ids_NM.size and not 0 <= ids_NM.min() <= ids_NM.max() < spec.shared_vocab:
        raise HandshakeError(
            f"the student asks about ids {ids_NM.min()} to {ids_NM.max()} in rows {rows.named()}, "
            f"and it shares {spec.shared_vocab} with the teacher; use a student that shares its "
            "tokenizer"
        )
    if not np.diff(np.sort(ids_NM, axis=1), axis=1).all():
        raise HandshakeError(
            f"the student asks about one id twice at a position of rows {rows.named()}; run "
            "teacher and trainer in the same version"
        )


def _proven_parts(
    loaded: Loaded, name: str, device: str, quantisation: str
) -> tuple[Decoder, Head]:
    """Decoder and head whose composition is the model; an adapter on the head is merged into it."""
    model = loaded.model
    if loaded.adapter_folder is not None and quantisation == "none":
        merge_head(model)
    head = find_head(model)
    decoder = find_decoder(model, _input_device(model, device))
    if head is None or len_vocab(model) > len(head.weight_VD):
        raise ConfigError(f"the head of {name} is not one matrix product; use another teacher")
    if not head_is_exact(model, decoder, head):
        raise ConfigError(
            f"the logits of {name} are not its head times its last hidden state; use another "
            "teacher, or quantise less where an adapter changes the head"
        )
    return decoder, head


def _input_device(model: torch.nn.Module, device: str) -> torch.device:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.weight.device if embedding is not None else torch.device(device)


def _name(model: str) -> str:
    """Folders by their last part, so that a moved folder stays the same teacher."""
    folder = Path(model).expanduser()
    return folder.name if folder.is_dir() else model


def _weights(loaded: Loaded) -> dict[str, str]:
    adapter = loaded.adapter_folder
    return {
        "weights": weights_digest(loaded.folder),
        "adapter_weights": weights_digest(adapter) if adapter else "",
    }


def _machine(loaded: Loaded, device: str) -> dict[str, str]:
    """What decides the last bits of an answer besides weights and rows."""
    if device == "cuda":
        kind = torch.cuda.get_device_name()
    else:
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    if loaded.adapter_folder is not None:
        versions += f" peft {version('peft')}"
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        versions += f" bitsandbytes {version('bitsandbytes')}"
    return {
        "engine": versions,
        "device": kind,
        "attention": str(getattr(loaded.model.config, "_attn_implementation", "")),
        "threads": str(torch.get_num_threads()),
    }


def _tokenizer_digest(model: str, revision: str | None, *, trusted: bool) -> str:
    """Identity of the tokenizer in the teacher's folder, empty where it has none."""
    asked = {"revision": revision, "trust_remote_code": trusted}
    try:
        return identify(transformers.AutoTokenizer.from_pretrained(model, **asked)).digest
    except (OSError, ValueError, KeyError, TutelageError):
        return ""
