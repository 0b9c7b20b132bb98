"""What text a run reads, and how it becomes rows."""

from typing import Literal

from pydantic import Field, model_validator

from shared.config.base import LocalPath, Name, Positive, Section


class HubDataset(Section):
    """A Hugging Face dataset by hub name or local path."""

    dataset: Name
    config: Name | None = None
    split: Name = "train"
    revision: Name | None = None


Source = LocalPath | HubDataset


class Domain(Section):
    """Text of one kind. A string source is a file, folder or glob of rows (.jsonl, .json, .csv,
    .parquet) or text."""

    train: Source | list[Source]
    validation: Source | list[Source] | None = None
    columns: dict[
        Literal[
            "text",
            "prompt",
            "response",
            "messages",
            "input",
            "system",
            "tools",
            "history",
            "teacher_prompt",
            "label",
            "entities",
            "chosen",
            "rejected",
            "images",
        ],
        str,
    ] = Field(
        default_factory=dict,
        description="our name -> the column's name in the source; teacher_prompt: what the teacher "
        "alone is shown before the row, which may be another field's too; label: of a task that "
        "classifies; entities: of one that tags; chosen and rejected: responses of a preference "
        "loss; images: of task image_text, their paths or bytes",
    )
    teacher: str | dict[str, Positive] | None = Field(
        default=None,
        description="the one of `teachers` it is learnt from; default: the only one; NAME: WEIGHT "
        "for several, whose distributions are averaged with `targets.exact`",
    )

    @model_validator(mode="after")
    def _each_column_is_one_field(self) -> "Domain":
        learnt = {ours: name for ours, name in self.columns.items() if ours != "teacher_prompt"}
        for name in (found := list(learnt.values())):
            if found.count(name) > 1:
                ours = " and ".join(field for field, value in learnt.items() if value == name)
                raise ValueError(f"columns gives {ours} the same column, {name}; name one for each")
        return self


class Data(Section):
    """How text becomes rows."""

    context: int = Field(default=512, ge=8, description="tokens in a row, at most")
    loss_on: Literal["responses", "everything"] = "responses"
    too_long: Literal["split", "split_with_prompt", "cut", "drop", "refuse"] = Field(
        default="split",
        description="what becomes of a document longer than the context; cut loses its end, drop "
        "leaves it out, split_with_prompt repeats what comes before the answer with every piece",
    )
    unfit: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="what becomes of a row with which its `teacher_prompt` cannot be shown; drop "
        "leaves it out and counts it",
    )
    special_tokens: Literal["auto", "text", "control"] = Field(
        default="auto",
        description="what special tokens written in a row are; auto: control tokens in a text "
        "that they frame, as a rendered conversation, plain text elsewhere",
    )
    chat_template: str | None = Field(
        default=None,
        description="the template of a tokenizer that has several; default: `default`, or "
        "`tool_use` for rows with tools",
    )
    validation_rows: int = Field(
        default=24, ge=1, description="rows per domain; training never sees them"
    )
