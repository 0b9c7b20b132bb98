"""Folders of tokenised rows: written whole or not at all, checked before they are used again.

A folder holds `train.arrow`, `validation.arrow` and `facts.json`, which counts what was done to
the text and records the hash of both files.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from shared.config.domains import Data
from shared.data.account import Account, Tally
from shared.data.packing import Fit
from shared.data.row_store import RaggedRows, write_rows
from shared.errors import DataError, StorageError
from shared.text.digests import digest_file

MAKERS = ("tokenizers", "transformers", "jinja2")
FRAMING_REVISION = "6"  # one more where some texts are framed otherwise; their corpora keep names
TRAIN, VALIDATION, FACTS = "train.arrow", "validation.arrow", "facts.json"


@dataclass(frozen=True, slots=True)
class Built:
    """A domain's rows before they are written."""

    training: RaggedRows
    validation: RaggedRows
    account: Account  # of the documents of `train`
    validation_account: Account  # of those of `validation`, or of what is held out
    also_in_validation: int
    validation_rows_found: int


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What the rows of training or of validation hold, and what became of their documents."""

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    account: Account


@dataclass(frozen=True, slots=True)
class Facts:
    """What was done to a domain's text, and what the files must look like."""

    train_hash: str
    validation_hash: str
    training: SplitFacts
    validation: SplitFacts
    also_in_validation: int  # pieces kept out of training
    validation_rows_found: int  # of which `data.validation_rows` are kept
    made_by: dict[str, str]  # versions of what decides the ids beside the tokenizer's own files

    def sentence(self, data: Data) -> str:
        """The counts of one domain for the log; what did not happen is left out."""
        text, fit = self.training, self.training.account.fit
        fill = text.num_tokens / (text.num_rows * data.context)
        counts = (
            (fit.too_long, f"longer than {data.context:,} tokens ({data.too_long})"),
            (fit.without_loss, "dropped"),
            (self.also_in_validation, "also in the validation text (dropped)"),
        )
        return ", ".join(
            (
                f"{fit.documents:,} documents in {text.num_rows:,} rows ({fill:.1%} full)",
                f"{text.num_loss_tokens:,} loss tokens",
                f"{self.validation.num_rows} validation rows",
                *(f"{count:,} {what}" for count, what in counts if count),
            )
        )


def publish(folder: Path, *, domain: str, built: Built) -> Facts:
    """Write beside the folder's place and rename, so that a reader never sees half of it.

    The caller holds the folder's lock. Raises StorageError where the disk is full.
    """
    staging = folder.with_name(f".{folder.name}")
    with storage_errors(folder.parent):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_rows(staging / TRAIN, domain=domain, rows=built.training)
        write_rows(staging / VALIDATION, domain=domain, rows=built.validation)
        facts = Facts(
            train_hash=digest_file(staging / TRAIN),
            validation_hash=digest_file(staging / VALIDATION),
            training=_split_facts(built.training, built.account),
            validation=_split_facts(built.validation, built.validation_account),
            also_in_validation=built.also_in_validation,
            validation_rows_found=built.validation_rows_found,
            made_by=makers(),
        )
        (staging / FACTS).write_text(json.dumps(asdict(facts)))
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    return facts


def makers() -> dict[str, str]:
    """Versions of what turns text into ids."""
    return {name: version(name) for name in MAKERS} | {"framing": FRAMING_REVISION}


def facts_of(rows: str | Path) -> Facts:
    """The facts beside a file of rows that `publish` wrote."""
    return _read_facts(Path(rows).parent)


def intact(folder: Path) -> Facts | None:
    """The facts of a complete, undamaged folder that the installed versions made."""
    try:
        facts = _read_facts(folder)
        if facts.made_by != makers():
            return None
        found = (digest_file(folder / TRAIN), digest_file(folder / VALIDATION))
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None
    return facts if found == (facts.train_hash, facts.validation_hash) else None


def _split_facts(rows: RaggedRows, account: Account) -> SplitFacts:
    return SplitFacts(len(rows), sum(map(len, rows.input_ids)), rows.num_loss_tokens, account)


def _read_facts(folder: Path) -> Facts:
    found = json.loads((folder / FACTS).read_text())
    for split in ("training", "validation"):
        account = found[split].pop("account")
        parts = Account(Fit(**account["fit"]), Tally(**account["tally"]))
        found[split] = SplitFacts(**found[split], account=parts)
    return Facts(**found)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk of {folder} is full; free space or set paths.cache"
        else:
            reason = f"{folder} cannot be written ({error.strerror or error}); set paths.cache"
        raise StorageError(reason) from None
