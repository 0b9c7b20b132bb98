"""The student of a task that classifies: a sequence or token classifier of transformers, whose
logits the losses read as they are.

B lines   T tokens   N rows, or words   C classes
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.config.models.student import LoRATraining
from shared.config.run import Config
from shared.data.trust import Trust
from shared.errors import ConfigError
from shared.loading import first_line
from shared.model_parts import longest_text, not_finite, tolerance
from student_trainer.losses.kernel.primitive import Head
from student_trainer.models import bag  # noqa: F401  # transformers then loads it
from student_trainer.models.adapters import adapt, refuse_lost_adapters, with_adapters
from student_trainer.models.classes import keep_padding
from student_trainer.models.probing import evaluating
from student_trainer.models.saving import refuse_unsaveable
from student_trainer.models.student import Student, load_model, probe_tokens
from student_trainer.tasks.task import ModelKind


@dataclass(frozen=True, slots=True)
class Classifier(Student):
    """A loaded classifier; `decoder` is all of it, and `head` the identity on its logits."""

    pad_id: int = 0

    @property
    def read_by_losses(self) -> Iterable[nn.Parameter]:
        """None."""
        return ()

    def outputs(
        self, batch: Mapping[str, Tensor], options: Mapping[str, bool]
    ) -> tuple[Any, Tensor]:
        """The model's output, and the logits of each row, or at each position with loss
        where it tells classes of tokens [N, C], float32."""
        output = self.decoder(**padded(batch, pad_id=self.pad_id), **options)
        logits = output.logits.float()
        at_N = batch["row_N"] if logits.ndim == 2 else batch["loss_index_N"]
        return output, logits.flatten(0, -2)[at_N]

    def output_head(self) -> Head:
        """Logits are their own: a product with the identity changes no bit of them."""
        return Head(self.head.weight, None, 1.0, None)

    def probe(self, device: torch.device, *, tokens: int) -> dict[str, Tensor]:
        """A batch of one row of a few fixed tokens."""
        rows: int = self.decoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return {
            "input_ids_BT": probe_tokens(rows, tokens, device)[None],
            "length_B": torch.tensor([tokens], device=device),
            "row_N": torch.zeros(1, dtype=torch.int64, device=device),
            "loss_index_N": torch.arange(tokens, device=device),
        }


def padded(batch: Mapping[str, Tensor], *, pad_id: int) -> dict[str, Tensor]:
    """What a sequence classifier is called with. A line without a row keeps a token, since a model
    that attends to nothing gives no numbers."""
    ids_BT, length_B1 = batch["input_ids_BT"], batch["length_B"][:, None].clamp(min=1)
    is_text_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B1
    ids_BT = ids_BT.masked_fill(~is_text_BT, pad_id)
    return {"input_ids": ids_BT, "attention_mask": is_text_BT.long()}


def load_classifier(
    config: Config, kind: ModelKind, *, device: torch.device, export: Path | None = None
) -> Classifier:
    """Load and adapt the student of a config; with `export` what that folder holds, a whole model
    or adapters on the config's. A head that the model lacks is made from the run's seed.

    Raises ConfigError for a model that cannot be loaded or trained as asked.
    """
    asked = config.student
    if export is not None and not isinstance(asked.train, LoRATraining):
        asked = asked.model_copy(update={"model": str(export), "revision": None})
    torch.manual_seed(config.seed)
    model = load_model(asked, kind)
    pad_id = keep_padding(model, config.student)
    refuse_short_context(model, config)
    model.to(device)  # type: ignore[arg-type]
    if isinstance(asked.train, LoRATraining):
        model.requires_grad_(False)
    if export is not None:
        adapted = with_adapters(model, asked, export)
    else:
        adapted = adapt(model, asked, kind, decoder=model, head=nn.Identity(), seed=config.seed)
    if asked.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    num_classes = len(kind.labels)
    return Classifier(
        adapted,
        model,
        _identity(num_classes, device),
        1.0,
        None,
        is_adapted=adapted is not model,
        state_width=num_classes,
        pad_id=pad_id,
    )


def classifier_trust(config: Config, kind: ModelKind) -> Trust:
    """Load the student's model once and try it: it reads a text and its export would be what was
    trained. Rows never share a line. Raises ConfigError."""
    plain = config.student.model_copy(update={"train": {"kind": "full"}})
    torch.manual_seed(config.seed)
    model = load_model(plain, kind)
    pad_id = keep_padding(model, config.student)
    if (weight := not_finite(model)) is not None:
        raise ConfigError(
            f"student.model: {plain.model} has values in {weight} that are not finite in "
            f"{plain.dtype}; get its files again"
        )
    refuse_short_context(model, config)
    _refuse_unreadable(model, config, pad_id=pad_id, num_classes=len(kind.labels))
    if not isinstance(config.student.train, LoRATraining):
        refuse_unsaveable(model, config.student, kind)
    adapted = adapt(
        model, config.student, kind, decoder=model, head=nn.Identity(), seed=config.seed
    )
    if adapted is not model:
        refuse_lost_adapters(adapted, name=config.student.model)
    return Trust(packed=False)


def refuse_short_context(model: PreTrainedModel, config: Config) -> None:
    """Raise ConfigError where texts may be longer than what a model reads."""
    limit = longest_text(model)
    if limit is not None and config.data.context - 1 > limit:  # the class of a row is not read
        raise ConfigError(
            f"data.context is {config.data.context}, of which a text has all but one, but "
            f"{config.student.model} reads at most {limit} tokens; set data.context={limit + 1}"
        )


def _identity(size: int, device: torch.device) -> nn.Linear:
    linear = nn.Linear(size, size, bias=False, device=device)
    nn.init.eye_(linear.weight)
    return linear.requires_grad_(False)


def _of_fourth(logits: Tensor) -> Tensor:
    """Logits of whole texts, or of the fourth token of each [B, C], float32."""
    return (logits if logits.ndim == 2 else logits[:, 3]).float()


def _refuse_unreadable(
    model: PreTrainedModel, config: Config, *, pad_id: int, num_classes: int
) -> None:
    """Two texts of different lengths must give logits of the classes, each as if alone."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,assignment]
    ids_BT = probe_tokens(rows, 8, torch.device("cpu")).repeat(2, 1)
    batch = {"input_ids_BT": ids_BT, "length_B": torch.tensor([8, 4])}
    alone = {"input_ids_BT": ids_BT[1:, :4], "length_B": torch.tensor([4])}
    name = config.student.model
    try:
        with torch.no_grad(), evaluating(model):
            both_BC = _of_fourth(model(**padded(batch, pad_id=pad_id)).logits)
            alone_1C = _of_fourth(model(**padded(alone, pad_id=pad_id)).logits)
    except Exception as error:  # of the model's own code
        raise ConfigError(
            f"student.model: {name} cannot read two texts: {first_line(error)}; choose another "
            "student"
        ) from error
    if both_BC.shape != (2, num_classes) or not bool(both_BC.isfinite().all()):
        raise ConfigError(
            f"student.model: {name} does not give a finite logit of each of {num_classes} classes; "
            "choose another student"
        )
    off, most = (both_BC[1] - alone_1C[0]).abs().max(), both_BC.abs().max()
    if off > tolerance(config.student.dtype, reordered=True) * most:
        raise ConfigError(
            f"student.model: the classes of a text depend on what {name} reads beside it; choose "
            "another student"
        )
