"""Answers that hold ids drawn by the teacher's probabilities.

N positions with loss   K ids kept per position
Log-probabilities are nats at the temperature of the draw.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from shared.targets.asks.ask import MASSES, Arrays
from shared.targets.asks.kept_ids import LOG_PROBABILITIES, KeptIds, LikeliestIds
from shared.targets.codec.columns import Column, Columns
from shared.targets.codec.decoding import EXACT, LOGPROBS, RANGE, equal_log_weights, log_weights

if TYPE_CHECKING:
    from shared.config.targets import Targets

EXACT_SHARE = 0.25  # about, of the ids of `threshold` that are kept with their log-probabilities


@dataclass(frozen=True, slots=True)
class DrawnIds(KeptIds):
    """Ids drawn by the teacher's probabilities at one temperature, which carry weights: there is no
    tail to compare, and the entropy of what was drawn from comes with them."""

    temperature: float = field(default=1.0, kw_only=True)
    # Of what a seed gives for a row, the row's draw (`Rows.with_draws`) names one.
    seed: int = field(default=0, kw_only=True)

    is_estimate: ClassVar = True

    @classmethod
    def asked(
        cls, targets: "Targets", *, shared_vocab: int, temperatures: tuple[float, ...]
    ) -> Self:
        """See `KeptIds`; ids are drawn at the one temperature of the divergences."""
        return cls(
            targets.top_k,
            shared_vocab,
            encoding=targets.encoding,
            ids=targets.ids,
            temperature=temperatures[-1],
            seed=targets.seed,
        )

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Uniform numbers that draw the ids of a position."""

    @property
    def with_entropy(self) -> bool:
        """See `Ask`."""
        return True

    def exact(self) -> LikeliestIds:
        """See `Ask`; the likeliest ids."""
        return LikeliestIds(self.num_ids, self.shared_vocab, encoding="fp32", ids=self.ids)

    def num_draws(self, configured: int) -> int:
        """See `Ask`."""
        return configured

    @abstractmethod
    def _log_weights(self, columns: Columns) -> np.ndarray: ...

    def columns(self) -> dict[str, Column]:
        """See `Ask`."""
        return {**self._ids_columns(), "log_tail": Column(pa.list_(pa.float32(), 1), MASSES)}

    def decode(self, columns: Columns) -> Arrays:
        """`ids_NK`, int64, ascending, repeated ones as often as they count; `log_weights_NK`,
        float32, whose weights sum to 1; `log_tail_NS`, float32 [N, 1], exact log-mass of what is
        estimated."""
        return {
            "ids_NK": self._ids(columns),
            "log_weights_NK": self._log_weights(columns),
            "log_tail_NS": columns.matrix("log_tail"),
        }

    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        """The mass that is not estimated, at the temperature of the draw [N]."""
        return -np.expm1(arrays["log_tail_NS"][:, 0])

    def miss_of_weights(self, arrays: Arrays) -> float:
        """See `Ask`."""
        weights_NK = np.exp(arrays["log_weights_NK"].astype(np.float64))
        return float(np.abs(weights_NK.sum(axis=1) - 1).max(initial=0.0))

    def in_words(self) -> str:
        """See `Ask`."""
        return (
            f"{self.selector} {self.num_ids} of {self.shared_vocab:,} ids at temperature "
            f"{self.temperature:g} in {self.encoding}, entropy, seed {self.seed}"
        )

    def stored(self) -> dict[str, Any]:
        """See `Ask`."""
        drawn = {"temperatures": (self.temperature,), "seed": self.seed, "entropy": True}
        return self._stored() | drawn

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> Self:
        """See `Ask`."""
        (temperature,) = fields["temperatures"]
        return cls(**cls._from_stored(fields), temperature=temperature, seed=fields["seed"])


@dataclass(frozen=True, slots=True)
class ThresholdIds(DrawnIds):
    """Sampling in proportion to probability: the most likely ids exactly, of the others some that
    share their mass in equal parts."""

    selector: ClassVar = "threshold"

    @property
    def num_uniforms(self) -> int:
        """See `DrawnIds`."""
        return 1

    def columns(self) -> dict[str, Column]:
        """See `Ask`; bits mark the ids that are kept exactly."""
        bits = pa.list_(pa.uint8(), -(-self.num_ids // 8))
        typical = round(EXACT_SHARE * self.num_ids)
        return {
            **DrawnIds.columns(self),
            EXACT: Column(bits, LOG_PROBABILITIES),
            LOGPROBS: self._logprob_column(None, counted_by=EXACT, typical=typical),
            **self._range_column(RANGE),
        }

    def mass_is_sound(self, mass: float) -> bool:
        """See `Ask`; where the distribution is flat, nothing is kept exactly."""
        return mass == 0 or DrawnIds.mass_is_sound(self, mass)

    def mass_in_words(self, mass: float) -> str:
        """See `Ask`."""
        return f"{DrawnIds.mass_in_words(self, mass)} exactly and draws the rest"

    def _log_weights(self, columns: Columns) -> np.ndarray:
        range_N = columns.vector(RANGE) if self.encoding == "int8" else None
        exact_NW, written_H = columns.matrix(EXACT), columns.vector(LOGPROBS)
        tail_N = columns.matrix("log_tail")[:, 0]
        return log_weights(exact_NW, written_H, range_N, tail_N, self.num_ids)


@dataclass(frozen=True, slots=True)
class SampledIds(DrawnIds):
    """Independent draws with replacement, of equal weight."""

    selector: ClassVar = "sampled"

    @property
    def num_uniforms(self) -> int:
        """See `DrawnIds`."""
        return self.num_ids

    def _log_weights(self, columns: Columns) -> np.ndarray:
        return equal_log_weights(columns.num_positions, self.num_ids)
