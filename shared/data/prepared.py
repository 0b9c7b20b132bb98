"""PreparedDomain: a domain whose text lies on disk as rows, ready to be drawn."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreparedDomain:
    """Where a domain's tokenised rows lie (Arrow files of `shared.data.rows.SCHEMA`)."""

    name: str
    train_path: str
    validation_path: str
    num_rows: int  # training rows
    num_loss_tokens: int  # in the training rows
    natural_weight: float  # share of the corpus's loss tokens
    order_path: str | None = None  # rows from easy to difficult; None: no phases
