"""Where a teacher's head lies, once it has been shipped: a safetensors file in the cache.

It is named by the digest of its bytes, which stands in the question, so that states are never
multiplied with another head. Needs neither torch nor Ray; who writes and reads it has torch.

Tensors: `weight` [V, D] and, where there is one, `bias` [V] in the teacher's own type;
`logit_scale` [1] and, where logits are capped, `soft_cap` [1] in float64.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import ConfigError
from shared.text.digests import digest_file

StatesEncoding = Literal["bf16", "fp16", "fp32"]  # the teacher's own type


@dataclass(frozen=True, slots=True)
class ShippedHead:
    """A head in a cache, and the type of the states that it multiplies."""

    digest: str
    states: StatesEncoding
    states_width: int
    num_bytes: int


def head_path(cache: str | Path, digest: str) -> Path:
    """Where the head of a digest lies in a cache."""
    return Path(cache).expanduser() / "heads" / f"{digest}.safetensors"


def find_head(cache: str | Path, digest: str) -> Path:
    """The file of a head, whole. Raises ConfigError where the cache lacks or garbles it."""
    path = head_path(cache, digest)
    if not path.exists():
        raise ConfigError(
            f"targets.exact needs the teacher's head {digest}, which is not in paths.cache "
            f"{cache}; use the paths.cache of the teacher service, or of the run that filled "
            "targets.store"
        )
    if digest_file(path) != digest:
        raise ConfigError(f"{path} is damaged; remove it and run the same command again")
    return path
