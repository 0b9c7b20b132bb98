"""What names a model in an engine's fingerprint, whatever computes it."""

from pathlib import Path

import transformers

from shared.text.tokenizers import identify


def name_of(model: str) -> str:
    """Folders by their last part, so that a moved folder stays the same teacher."""
    folder = Path(model).expanduser()
    return folder.name if folder.is_dir() else model


def tokenizer_digest(model: str, revision: str | None, *, trusted: bool) -> str:
    """Identity of the tokenizer in the teacher's folder, empty where it has none."""
    asked = {"revision": revision, "trust_remote_code": trusted}
    try:
        return identify(transformers.AutoTokenizer.from_pretrained(model, **asked)).digest
    except Exception:  # of every tokenizer's own code; a run has read it before
        return ""
