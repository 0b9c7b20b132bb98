"""What the teacher ships per position, how, and where it is kept; how students ask for it."""

from typing import Literal

from pydantic import Field, model_validator

from shared.config.base import Name, Positive, Section, Seed


class HiddenPayload(Section):
    """How hidden states travel, where a loss asks for some."""

    width: int = Field(
        default=512, ge=1, description="the teacher projects wider states down to this"
    )
    projection: Literal["pca", "random"] = "pca"
    raw: bool = Field(default=False, description="ship them whole, whatever their width")
    encoding: Literal["bf16", "int8", "fp32"] = "bf16"
    calibration_rows: int = Field(default=32, ge=1, description="rows per domain a PCA is fit on")


class Targets(Section):
    """What the teacher ships per position (design: SoftTargets)."""

    selector: Literal["auto", "top_k", "renormalised", "threshold", "sampled"] = Field(
        default="auto",
        description="top_k, renormalised, threshold or sampled; auto takes what fits the losses",
    )
    top_k: int = Field(
        default=64, ge=1, description="ids the teacher ships per position, whatever the selector"
    )
    student_ids: int = Field(
        default=0,
        ge=0,
        description="likeliest ids of the student that the teacher ships too; no step is then "
        "asked ahead",
    )
    draws: int = Field(
        default=4,
        ge=1,
        description="draws of a row that take turns, one an epoch, if ids are drawn",
    )
    seed: Seed = Field(
        default=0, description="of the draws; runs of any seed share those of a store"
    )
    encoding: Literal["fp16", "int8", "fp32"] = "fp16"
    ids: Literal["elias_fano", "plain"] = Field(
        default="elias_fano",
        description="elias_fano, the fewest bytes, or plain integers for any Arrow tool",
    )
    exact: Literal["last_hidden"] | None = Field(
        default=None,
        description="last_hidden: the last hidden state in place of ids, and the head once",
    )
    hidden: HiddenPayload = HiddenPayload()
    store: Name | None = Field(
        default=None,
        description="folder, or address as s3://BUCKET/FOLDER, that answers are written to and "
        "read from",
    )
    store_ids: Literal["elias_fano", "plain"] | None = Field(
        default=None, description="the same in `store`, if not as they came"
    )
    teacher_free: bool = Field(
        default=False, description="train from `store` with no teacher alive"
    )

    @property
    def renormalised(self) -> bool:
        """Whether losses leave out the mass of ids that are not kept."""
        return self.selector == "renormalised"

    @model_validator(mode="after")
    def _nothing_is_asked_twice(self) -> "Targets":
        """Compared with the defaults, which a recorded config names too."""
        if self.exact is None:
            return self
        fields = type(self).model_fields
        ids = ("selector", "top_k", "student_ids", "draws", "seed", "encoding", "ids", "store_ids")
        for option in ids:
            if getattr(self, option) != fields[option].default:
                raise ValueError(
                    f"targets.exact is {self.exact}, which ships no ids, so targets.{option} has "
                    "no meaning; remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _what_is_stored_is_there_for_any_student(self) -> "Targets":
        if self.teacher_free and self.store is None:
            raise ValueError("targets.teacher_free needs targets.store, the folder to train from")
        if self.student_ids and self.store is not None:
            raise ValueError(
                f"targets.student_ids is {self.student_ids}, whose answers depend on the student "
                f"of the moment, but targets.store is {self.store}, which keeps answers for any; "
                "remove one of the two"
            )
        return self


class Service(Section):
    """How students talk to teachers."""

    in_flight: int = Field(default=3, ge=1, le=16, description="scoring units under way per worker")
    unit_deadline_s: Positive = 600.0
    max_unit_failures: int = Field(
        default=3, ge=1, description="failures of one unit before the run stops"
    )
