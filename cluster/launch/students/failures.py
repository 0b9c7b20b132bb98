"""Why a group of workers ended, from the errors of Ray Train."""

import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ray.train import TrainingFailedError, WorkerGroupError

from shared import errors
from shared.errors import TutelageError

LOG = "error.log"  # of an attempt


def own_error(error: TrainingFailedError) -> TutelageError | None:
    """The error that a worker raised on purpose, if one did."""
    return next((e for e in _causes(error) if isinstance(e, TutelageError)), None)


def as_raised(told: dict[str, str]) -> TutelageError:
    """The error that rank 0 wrote down."""
    kind = getattr(errors, told["type"], TutelageError)
    return kind(told["message"])


def first_reason(error: TrainingFailedError) -> str:
    """What each rank died of, in a word."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return (
        ", ".join(f"rank {rank}: {type(e).__name__}" for rank, e in failures.items())
        or type(error).__name__
    )


def given_up(what: str, times: int, *, log: Path, onwards: str) -> TutelageError:
    """The sentence for workers that are not started again."""
    return TutelageError(
        f"the student workers failed {times} times, and {what}; the traceback is in {log}, the "
        f"same command continues {onwards}"
    )


def write_traceback(attempt: Path, error: BaseException) -> None:
    """Append everything known of an error to the log of an attempt."""
    with suppress(OSError), (attempt / LOG).open("a") as file:  # the disk may be full
        file.write("".join(traceback.format_exception(error)) + "\n")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything inside it, worker failures included."""
    yield error
    inner = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    inner += [getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__")]
    for one in inner:
        if isinstance(one, BaseException) and one is not error:
            yield from _causes(one)
