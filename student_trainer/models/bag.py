"""A classifier of about 0.03 million weights: the mean of embeddings of a text's tokens and two
layers, as small as the students of Latif et al. (arXiv 2312.15842).

The ids of its tokenizer, however many, share the rows of the embedding by a hash, so that its size
does not grow with a vocabulary. It is a model of transformers wherever this module is imported;
elsewhere `student_trainer/state/reload.py` has the few lines that load it with torch alone.

B lines   T tokens   D width   H width of the layer between   C classes
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

FACTOR = 2_654_435_761  # of Knuth's multiplicative hash


class BagConfig(PreTrainedConfig):
    """Sizes of a `BagForSequenceClassification`."""

    model_type = "tutelage_bag"

    vocab_size: int = 0  # ids of its tokenizer
    buckets: int = 1024  # rows of the embedding
    hidden_size: int = 16  # D
    intermediate_size: int = 64  # H
    num_hidden_layers: int = 1


class BagForSequenceClassification(PreTrainedModel):
    """logits = W2 relu(W1 mean(E[hash(id)]) + b1) + b2."""

    config_class = BagConfig
    base_model_prefix = "bag"

    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        width, inner = config.hidden_size, config.intermediate_size
        self.embedding = nn.Embedding(config.buckets, width)
        self.hidden = nn.Linear(width, inner)
        assert config.num_labels is not None, "a model of transformers has a number of classes"
        self.classifier = nn.Linear(inner, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The rows that ids share."""
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        """Logits of the classes [B, C]; tokens whose mask [B, T] is 0 are no part of a text."""
        states_BTD = self.embedding(bucket(input_ids, self.embedding.num_embeddings))
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask_BT1 = mask_BT[..., None].to(states_BTD.dtype)
        mean_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        logits_BC = self.classifier(self.hidden(mean_BD).relu())
        return SequenceClassifierOutput(logits=logits_BC)


def bucket(ids_BT: Tensor, buckets: int) -> Tensor:
    """The row of the embedding that each id has."""
    return ids_BT * FACTOR % 2**32 * buckets // 2**32


AutoConfig.register(BagConfig.model_type, BagConfig)
AutoModelForSequenceClassification.register(BagConfig, BagForSequenceClassification)
