"""HFEngine: a causal language model of transformers that scores rows and continues text.

B lines   T tokens   N positions with loss   M those of a pass   D hidden width   V head rows
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.config.base import Dtype
from shared.config.models.attention import Attention
from shared.data.layout import Layout, lay_out
from shared.data.passes import TOGETHER, Passes, switches_of
from shared.data.rows import Rows
from shared.data.trust import LEAST_TOKENS, Trust, probe, reach_of
from shared.errors import ConfigError, TutelageError
from shared.loading import first_line, in_int8
from shared.model_parts import longest_context, num_weights
from shared.targets.asks.classes import ClassLogProbs
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import HiddenAsk, Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.branching import Branching
from teacher_service.engine.classes.texts import texts_of
from teacher_service.engine.classes.verbaliser import Reading, verbalised
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.generation.generating import ModelGenerator
from teacher_service.engine.identity import (
    loaded_fingerprint,
    name_of,
    stored_fact,
    tokenizer_digest,
)
from teacher_service.engine.loading import Loaded, load_model, merge_head
from teacher_service.engine.model_parts import (
    PROBE_TOKENS,
    Decoder,
    exact_head,
    find_decoder,
    find_head,
    reads_onwards,
)
from teacher_service.engine.refusing import refuse_rows, refuse_vocabulary
from teacher_service.engine.seeing import Sight, find_sight
from teacher_service.engine.tensor_parallel import (
    is_spread,
    layered_note,
    layout,
)
from teacher_service.engine.weights import load_weights
from teacher_service.scoring.answering import Scored, encode, find, refuse
from teacher_service.scoring.head_file import save_head
from teacher_service.scoring.projection import load_projections
from teacher_service.scoring.scoring import ScoringHead

UNTRUSTED_NOTE = "The teacher's answers would depend on what shares a batch; it scores {}."


class HFEngine:
    """Scores one unit per forward pass with any causal model that transformers loads."""

    def __init__(
        self,
        model: torch.nn.Module,
        decoder: Decoder,
        head: ScoringHead,
        fingerprint: dict[str, str],
        *,
        context: int | None = None,
    ) -> None:
        self.model, self.decoder, self.head = model, decoder, head
        self._text_config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self.sight: Sight | str = "it was loaded for text alone"
        self.cache: str | None = None  # where projections of hidden states are found
        self._projections: dict[str, dict[int, Tensor]] = {}
        self.max_context = longest_context(self._text_config)
        context = context or LEAST_TOKENS
        self._probed = context if self.max_context is None else min(context, self.max_context)
        self._dtype, self._name = fingerprint["dtype"], fingerprint["model"]
        self._in_int8 = in_int8(fingerprint)
        self.trust = self._probe(self._probed)
        said = self.trust.in_words()
        self.notes: tuple[str, ...] = (UNTRUSTED_NOTE.format(said),) if said else ()
        apart = self.trust.passes.in_words()
        self.fingerprint = fingerprint | {"packed": str(self.trust.packed)}
        if apart:
            self.fingerprint["passes"] = apart
        self._branching = Branching(decoder, dtype=self._dtype)
        self._generator = ModelGenerator(
            model,
            vocab=head.vocab.rows,
            device=decoder.device,
            dtype=fingerprint["dtype"],
            fingerprint=self.fingerprint,
        )

    @staticmethod
    def load(
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        adapter_revision: str | None = None,
        dtype: Dtype = "float32",
        attention: Attention = "auto",
        quantisation: Literal["none", "int8", "nf4"] = "none",
        device: str = "cpu",
        trust_remote_code: bool = False,
        context: int | None = None,
        tensor_parallel: int = 1,
    ) -> "HFEngine":
        """Load, prove decoder and head, and probe what units of rows of up to `context` tokens are
        trusted for. Raises ConfigError with the reason.

        With `tensor_parallel` this process has joined a group of so many. Each of them makes the
        same calls as the others in the same order, and is given the same answers.
        """
        loaded = load_model(
            model,
            revision=revision,
            adapter=adapter,
            adapter_revision=adapter_revision,
            dtype=dtype,
            attention=attention,
            quantisation=quantisation,
            device=device,
            trust_remote_code=trust_remote_code,
            tensor_parallel=tensor_parallel,
        )
        asked = {"name": model, "revision": revision, "trusted": trust_remote_code}
        named = _named(loaded, **asked, quantisation=quantisation) | {
            "adapter": name_of(adapter) if adapter else "",
            "dtype": dtype,
        }
        decoder, head = _proven_parts(loaded, model, device, named)
        if tensor_parallel > 1:
            named["tensor_parallel"] = layout()  # sums over shards have other last bits
        sight = find_sight(loaded.model, decoder, head, **asked)
        if isinstance(sight, Sight):
            named["images"] = sight.processor.digest
        fingerprint = named | loaded_fingerprint(loaded, device)
        engine = HFEngine(loaded.model, decoder, head, fingerprint, context=context)
        engine.sight = sight
        if tensor_parallel == 1 and device == "cuda" and (gpus := torch.cuda.device_count()) > 1:
            engine.notes += (layered_note(name_of(model), loaded.model.config, gpus),)
        return engine

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        return TeacherDescription(
            fingerprint=self.fingerprint,
            vocab_rows=self.head.vocab.rows,
            num_layers=self.decoder.num_layers,
            hidden_width=self.head.weight_VD.shape[1],
            state_widths=self.decoder.state_widths,
            max_context=self.max_context,
            packed=self.trust.packed,
            notes=self.notes,
            num_weights=sum(map(num_weights, self.model.parameters())),
        )

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """Answer one unit in one forward pass. Raises UserError for what can never be answered."""
        self._refuse(rows, question)
        if isinstance(question.ask, ClassLogProbs):
            return self._classified(rows, question, question.ask)
        refuse(question, rows)
        layout, hidden = self._read(rows, question.hidden.layers)
        last_ND, label_N = hidden[self.decoder.num_layers], torch.from_numpy(layout.label_N)
        found = find(question, Scored(rows, last_ND, label_N, self.head))
        return SoftTargets.build(
            question=question,
            teacher=self.fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=encode(
                found, question, hidden=self._projected(hidden, question.hidden), last_ND=last_ND
            ),
        )

    def _classified(self, rows: Rows, question: Question, ask: ClassLogProbs) -> SoftTargets:
        """Answer about the classes of documents, each read by itself."""
        longest = max(map(len, texts_of(rows)), default=0)
        self._refuse_unprobed(longest + max(map(len, ask.classes)))
        shared = self.trust.passes == TOGETHER
        branching = self._branching if shared else None
        reading = Reading(self.last_hidden, branching, self.head, self.max_context)
        return SoftTargets.build(
            question=question,
            teacher=self.fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=verbalised(rows, ask, reading),
        )

    def ship_head(self) -> ShippedHead:
        """Keep the head in the cache. Raises ConfigError for one that cannot be shipped."""
        return save_head(self.head.whole(), self.cache)

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch. Raises UserError for what can never be answered."""
        return self._generator.generate(openings, spec)

    def load_weights(self, file: str) -> None:
        """Go on with the weights of a file of safetensors. Raises ConfigError where they are not
        this model's."""
        load_weights(self.model, file)

    def last_hidden(self, rows: Rows) -> Tensor:
        """The head's input [N, D] at the positions with loss."""
        return self._read(rows, ())[1][self.decoder.num_layers]

    def lay_out(self, rows: Rows) -> Layout:
        """The batch of a unit, in as many forward passes as it is trusted in."""
        return lay_out(rows, packed=self.trust.packed, passes=self.trust.passes)

    def last_states(self, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each forward pass the positions [M] among those with loss, and the head's input there
        [M, D], with a gradient to whatever trains."""
        for part in layout.parts():
            ids_BT, positions_BT = map(torch.from_numpy, (part.input_ids_BT, part.position_ids_BT))
            states_BTD = self.decoder.outputs(ids_BT, positions_BT).last_hidden_state
            index_M = torch.from_numpy(part.loss_index_N).to(states_BTD.device)
            yield torch.from_numpy(part.entry_N), states_BTD.flatten(0, 1)[index_M]

    def _read(self, rows: Rows, layers: Sequence[int]) -> tuple[Layout, dict[int, Tensor]]:
        """The batch of a unit, and hidden states [N, D] by layer. Raises ConfigError for images
        that the model does not see."""
        if not any(rows.images()):
            layout = self.lay_out(rows)
            return layout, self._hidden(layout, layers)
        apart = self.trust.passes != TOGETHER
        sight = f"it reads {self.trust.passes.in_words()}" if apart else self.sight
        if isinstance(sight, str):
            raise ConfigError(
                f"the teacher {self._name} is asked about images, and {sight}; use another teacher"
            )
        return sight.hidden(rows, layers)

    def _hidden(self, layout: Layout, layers: Sequence[int]) -> dict[int, Tensor]:
        """Hidden states [N, D] by layer, of as many forward passes as the layout has."""
        parts = layout.parts()
        states = [
            self.decoder.hidden(
                torch.from_numpy(part.input_ids_BT),
                torch.from_numpy(part.position_ids_BT),
                torch.from_numpy(part.loss_index_N),
                layers,
            )
            for part in parts
        ]
        if len(parts) == 1:
            return states[0]
        order_N = torch.from_numpy(np.concatenate([part.entry_N for part in parts]).argsort())
        return {layer: torch.cat([s[layer] for s in states])[order_N] for layer in states[0]}

    def _projected(self, hidden: dict[int, Tensor], asked: HiddenAsk) -> dict[int, Tensor]:
        """The states asked for, narrowed where a projection is named."""
        states = {layer: hidden[layer] for layer in asked.layers}
        if not states or not asked.projection:
            return states
        if asked.projection not in self._projections:
            matrices = load_projections(self.cache, asked.projection)
            self._projections[asked.projection] = {
                layer: torch.from_numpy(matrix) for layer, matrix in matrices.items()
            }
        matrices = self._projections[asked.projection]
        return {
            layer: states_ND.float() @ matrices[layer].to(states_ND.device)
            for layer, states_ND in states.items()
        }

    def _probe(self, context: int) -> Trust:
        """What units of rows of up to `context` tokens are trusted for. Rows of an int8 teacher
        share passes all the same: what they change about each other is what its audit says."""
        last, switches = self.decoder.num_layers, switches_of(self._text_config)
        found = probe(
            lambda layout: self._hidden(layout, ())[last].float().cpu().numpy(),
            name=f"the teacher {self._name}",
            vocab=self.head.vocab.rows,
            context=context,
            dtype=self._dtype,
            takes_positions=self.decoder.takes_positions,
            limit=self.max_context,
            switches=switches,
            reach=reach_of(self._text_config),
        )
        if not self._in_int8:
            return found
        return Trust(found.packed, Passes(switches=switches).within(context))

    def _refuse_unprobed(self, longest: int) -> None:
        """Rows beyond the probed context are probed before the first of them is scored."""
        if longest <= self._probed:
            return
        if self._probe(longest) != self.trust:
            raise ConfigError(
                f"a row of {longest} tokens, with what the teacher is shown before it, is longer "
                f"than the context that {self._name} was started with, and it reads such rows "
                f"otherwise; start it with data.context={longest}"
            )
        self._probed = longest

    def _refuse(self, rows: Rows, question: Question) -> None:
        """Questions that no retry can answer."""
        vocab_rows = self.head.vocab.rows
        refuse_vocabulary(question.ask.shared_vocab, vocab=vocab_rows)
        for layer in question.hidden.layers:
            if not 0 <= layer <= self.decoder.num_layers:
                raise ConfigError(
                    f"layer {layer} is asked for and the teacher's layers are 0 to "
                    f"{self.decoder.num_layers}; change losses.layers"
                )
        by_document = question.ask.reads_documents
        refuse_rows(rows, vocab=vocab_rows, limit=None if by_document else self.max_context)
        if not by_document:
            self._refuse_unprobed(max(map(len, rows.column("input_ids")), default=0))


def _named(
    loaded: Loaded, *, name: str, revision: str | None, trusted: bool, quantisation: str
) -> dict[str, str]:
    """What names a loaded model, its tokenizer, and the bits of its weights."""
    stored = stored_fact(loaded.model.config) if quantisation == "none" else {}
    return {
        "model": name_of(name),
        "revision": loaded.commit or revision or "",
        "quantisation": quantisation,
        "tokenizer": tokenizer_digest(name, revision, trusted=trusted),
    } | stored


def _proven_parts(
    loaded: Loaded, name: str, device: str, named: Mapping[str, str]
) -> tuple[Decoder, ScoringHead]:
    """Decoder and head whose composition is the model, `named` as in its fingerprint; an adapter on
    the head is merged into it."""
    model = loaded.model
    if loaded.adapter_folder is not None and named["quantisation"] == "none":
        merge_head(model)
    head = find_head(model)
    if head is None:
        raise ConfigError(f"the head of {name} is not one matrix product; use another teacher")
    try:
        decoder = find_decoder(model, _input_device(model, device))
        exact = exact_head(model, decoder, head)
        # int8 products depend a little on all that is multiplied at once
        onwards = in_int8(named) or reads_onwards(decoder, head)
    except (TutelageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code
        raise ConfigError(
            f"the teacher {name} cannot read {PROBE_TOKENS} tokens: {first_line(error)}; use "
            f"another teacher{', or leave tensor_parallel at 1' if is_spread(model) else ''}"
        ) from error
    if exact is None:
        raise ConfigError(
            f"the logits of {name} are not its head times its last hidden state; use another "
            "teacher, or quantise less where an adapter changes the head"
        )
    if not onwards:
        raise ConfigError(
            f"the state of a token of {name} depends on those that follow it; use a teacher that "
            "reads from left to right"
        )
    return decoder, exact


def _input_device(model: torch.nn.Module, device: str) -> torch.device:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.weight.device if embedding is not None else torch.device(device)
