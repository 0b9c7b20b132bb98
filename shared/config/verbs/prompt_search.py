"""How `tutelage prompts optimise` searches; training reads none of it."""

from typing import Literal

from pydantic import Field

from shared.config.base import LocalPath, Section


class PromptSearch(Section):
    """For each domain: a beam search over prompts, and how they are tried."""

    metric: Literal["auto", "accuracy", "likelihood"] = Field(
        default="auto",
        description="accuracy for prompts with responses, else likelihood of the text",
    )
    instructions: dict[str, str] = Field(
        default_factory=dict, description="domain -> the instruction its search starts from"
    )
    rounds: int = Field(default=5, ge=1, description="at most")
    beam: int = Field(default=4, ge=1, description="prompts that are varied in a round")
    paraphrases: int = Field(default=3, ge=0, description="rewrites of a prompt in a round")
    keywords: int = Field(default=3, ge=0, description="words that are varied in a round")
    examples: int = Field(default=4, ge=0, description="worked examples in a prompt, at most")
    dev_documents: int = Field(default=32, ge=4, description="a prompt is scored on these")
    confirm_documents: int = Field(
        default=64, ge=4, description="the winner is compared with no prompt on these"
    )
    pool_documents: int = Field(default=128, ge=0, description="examples are chosen from these")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="of an answer; by default as the longest right one"
    )
    to: LocalPath = Field(default="prompts.json", description="file the prompts are written to")
