"""Every error a user can meet, each one sentence that names the value and the way out.

All take a single string, so that they survive pickling between Ray processes.
"""

from pathlib import Path


def reason_of(error: Exception) -> str:
    """What the operating system says, for the middle of a sentence."""
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    said = said or type(error).__name__
    return said[:1].lower() + said[1:]


class TutelageError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(TutelageError, ValueError):
    """The input, the config or the cluster does not allow what was asked; nothing was lost."""

    exit_code = 2


class ConfigError(UserError):
    """A config or an override that cannot be used."""


class DataError(UserError):
    """Text that cannot be read, or a domain without usable text."""


class HandshakeError(UserError):
    """A student that cannot learn from this teacher."""


class PlacementError(UserError):
    """The cluster lacks what a role needs."""


class RunInUseError(UserError):
    """Another process works in the same run directory."""


class StorageError(UserError):
    """The disk is full or not writable; the last good checkpoint survives."""


class EngineError(UserError):
    """An engine whose answers to a text that is known are none; no other answer is learnt from."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; names the step, the domains and the rows."""


class WeightingError(UserError):
    """A step of which the weighting leaves nothing to learn."""


class TeacherError(TutelageError, RuntimeError):
    """The teacher service cannot answer, or answers something that must not be learnt from."""


class ControllerError(TutelageError, RuntimeError):
    """The controller did not decide in time."""


class FrozenWeightsError(TutelageError, RuntimeError):
    """A weight that adapters leave alone has changed; nothing may be exported."""


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed from as asked."""


class DamagedError(UserError):
    """A file that is not what was written; nothing is learnt from it."""


class StoppedError(TutelageError):
    """Somebody stopped a command; says what the same command goes on from."""


class GrowthError(TutelageError):
    """Workers ended at a checkpoint, to go on from it as more."""


class JobError(TutelageError, RuntimeError):
    """A job on a cluster that did not succeed."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code if exit_code in (1, 2) else 1


class SelftestError(TutelageError, RuntimeError):
    """A check of `tutelage selftest` failed."""


def not_kept(what: str, folder: Path, error: Exception) -> StorageError:
    """That a part of a run cannot be written, which goes on from its last checkpoint later."""
    return StorageError(
        f"{what} cannot be kept in {folder}: {reason_of(error)}; free some space and run the same "
        "command again, it resumes from the last checkpoint"
    )
