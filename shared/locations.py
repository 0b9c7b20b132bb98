"""Where a target store lies: a folder of this machine or of any file system that Arrow knows.

A plain path is local. A URI names another file system (`s3://bucket/folder`, `gs://`, `hdfs://`,
`file:///folder`), pyarrow's own or one of fsspec. Credentials come from the environment, as the
file systems themselves read them: those in a URI would end up in run folders, and are refused.
"""

import importlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs as file_systems

from shared.errors import ConfigError, StorageError
from shared.loading import first_line

SECRETS = ("secret", "token", "password", "key", "sas", "credential")
UNFINISHED = ".part"


@dataclass(frozen=True, slots=True)
class Location:
    """A folder, which need not exist yet. Errors of the file system become StorageErrors."""

    files: file_systems.FileSystem
    path: str
    shown: str  # as the user wrote it

    @staticmethod
    def of(where: str | Path) -> "Location":
        """A path or URI. Raises ConfigError for one that names no file system."""
        shown = str(where)
        if "://" not in shown:
            path = str(Path(shown).expanduser().absolute())
            return Location(file_systems.LocalFileSystem(use_mmap=True), path, path)
        refuse_credentials(shown)
        files, path = _file_system(shown)
        if isinstance(files, file_systems.LocalFileSystem):
            files = file_systems.LocalFileSystem(use_mmap=True)
        return Location(files, path.rstrip("/"), shown.rstrip("/"))

    def __truediv__(self, name: str) -> "Location":
        return Location(self.files, f"{self.path}/{name}", f"{self.shown}/{name}")

    @property
    def local(self) -> Path | None:
        """The folder on this machine, None elsewhere."""
        here = isinstance(self.files, file_systems.LocalFileSystem)
        return Path(self.path) if here else None

    def list(self) -> list[file_systems.FileInfo]:
        """What the folder holds, by name; nothing where there is no such folder."""
        selector = file_systems.FileSelector(self.path, allow_not_found=True)
        with self._refusals("read"):
            return sorted(self.files.get_file_info(selector), key=lambda info: info.base_name)

    def open(self) -> pa.NativeFile:
        """This file, for random access; mapped where it is local. Raises FileNotFoundError."""
        with self._refusals("read"):
            return self.files.open_input_file(self.path)

    def read(self) -> bytes:
        """This file, whole. Raises FileNotFoundError."""
        with self._refusals("read"), self.files.open_input_stream(self.path) as stream:
            return stream.read()

    def write(self, data: bytes | pa.Buffer) -> None:
        """Write this file; it appears whole or not at all, in the place of what was there."""
        folder, _, name = self.path.rpartition("/")
        aside = f"{folder}/.{name}.{uuid.uuid4().hex}{UNFINISHED}"
        with self._refusals("written"):
            self.files.create_dir(folder, recursive=True)
            try:
                with self.files.open_output_stream(aside) as stream:
                    stream.write(data)
                self.files.move(aside, self.path)
            except OSError:
                with suppress(OSError):
                    self.files.delete_file(aside)
                raise

    def rename(self, name: str) -> None:
        """Give this file another name in its folder; nothing where another process did."""
        with self._refusals("written"), suppress(FileNotFoundError):
            self.files.move(self.path, f"{self.path.rpartition('/')[0]}/{name}")

    def delete(self) -> None:
        """Remove this file or folder; nothing where there is none."""
        with self._refusals("written"), suppress(FileNotFoundError):
            if self.files.get_file_info(self.path).type == file_systems.FileType.Directory:
                self.files.delete_dir(self.path)
            else:
                self.files.delete_file(self.path)

    @contextmanager
    def _refusals(self, done: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise StorageError(
                f"targets.store cannot be {done} at {self.shown}: {reason}; free space or give "
                "access, or name another folder"
            ) from error


def refuse_credentials(uri: str) -> None:
    """Refuse a URI with a secret in it. Raises ConfigError, which does not repeat it."""
    parts = urlsplit(uri)
    names = [name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if parts.password is not None or any(s in name for name in names for s in SECRETS):
        raise ConfigError(
            f"targets.store is a {parts.scheme}:// address with credentials in it, which would be "
            "written into run folders; take them out and give them in the environment, as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3"
        )


def _file_system(uri: str) -> tuple[Any, str]:
    try:
        return file_systems.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        pass  # not one of pyarrow's own
    except OSError as error:
        raise _unreached(uri, error) from None
    try:
        fsspec: Any = importlib.import_module("fsspec")  # it need not be installed
        found, path = fsspec.core.url_to_fs(uri)
    except OSError as error:
        raise _unreached(uri, error) from None
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"targets.store is {uri}, which names no file system here ({error}); name a folder, "
            "or an address such as s3://BUCKET/FOLDER"
        ) from None
    return file_systems.PyFileSystem(file_systems.FSSpecHandler(found)), path


def _unreached(uri: str, error: OSError) -> StorageError:
    reason = error.strerror or first_line(error)
    return StorageError(
        f"targets.store {uri} cannot be reached: {reason}; correct the address, see to the "
        "network, or name a folder"
    )
