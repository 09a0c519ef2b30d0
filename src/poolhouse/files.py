"""Files: a model folder whose JSON is read once, its chat templates, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from poolhouse.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np


# An object of a JSON file; the reader of a key knows or checks the type of its value.
JsonObject: TypeAlias = dict[str, Any]


class Folder:
    """A folder of a model's files. Each of its JSON files is read once, when it is first needed, and kept.

    `folder / "1_Pooling"` is a folder within it, which shares what was read.
    """

    __slots__ = ("_read", "path")

    def __init__(self, path: Path, read: dict[Path, object] | None = None) -> None:
        self.path = path
        self._read = {} if read is None else read

    @classmethod
    def of(cls, folder: Path | Folder) -> Folder:
        """The folder at a path; a Folder as it is."""
        return folder if isinstance(folder, cls) else cls(Path(folder))

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.path / name, self._read)

    def __str__(self) -> str:
        return str(self.path)

    __repr__ = __fspath__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    def text(self, name: str) -> str:
        """The text of a file.

        Raises:
            OSError, UnicodeDecodeError: there is no such file, or it is no text.
        """
        return (self.path / name).read_text(encoding="utf-8")

    def json(self, name: str, needed: bool = True, keep: bool = True) -> JsonObject:
        """The JSON object in a file; an empty one where there is no file and none is needed.

        keep: remember it; no for large files of which little is used, such as a vocabulary.

        Raises:
            CheckpointError: no JSON, or no object.
        """
        if not needed and self.path / name not in self._read and not self.has(name):
            return {}
        value = self.any_json(name, keep)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name} holds no JSON object.")
        return value

    def any_json(self, name: str, keep: bool = True) -> object:
        """The JSON value in a file. keep: see `json`.

        Raises:
            CheckpointError: no file, or no JSON.
        """
        path = self.path / name
        if path in self._read:
            return self._read[path]
        try:
            value: object = json.loads(self.text(name))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if keep:
            self._read[path] = value
        return value


# The name of the template that is used where a request names none.
DEFAULT = "default"


def chat_templates(folder: Folder) -> dict[str, str]:
    """Chat templates by name, from the first of the files where transformers keeps them.

    These are chat_template.jinja with additional_chat_templates/, tokenizer_config.json, and the older
    chat_template.json.

    Raises:
        CheckpointError: a file that is no text.
    """
    files = {path.stem: path for path in sorted((folder.path / "additional_chat_templates").glob("*.jinja"))}
    if folder.has("chat_template.jinja"):
        files[DEFAULT] = folder.path / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in files.items()}
    return _stored(folder, "tokenizer_config.json") or _stored(folder, "chat_template.json")


def special_tokens(folder: Folder) -> dict[str, str]:
    """The special tokens that have a name, such as bos_token and eos_token."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in folder.json(file, needed=False).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _stored(folder: Folder, file: str) -> dict[str, str]:
    """The templates of a JSON file: one text, or a list of named ones."""
    stored = folder.json(file, needed=False).get("chat_template")
    if isinstance(stored, str):
        return {DEFAULT: stored}
    items = stored if isinstance(stored, list) else ()
    named = {item.get("name"): item.get("template") for item in items if isinstance(item, dict)}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to; it replaces `path` when the block ends without an error.

    Until then, and after a failure or an interruption, `path` is as it was. If nothing was written, no file appears. Links
    stay links, and a file that is replaced keeps its permissions. Pipes and devices, which no file can replace, are
    written at the end.

    Raises:
        ConfigError: a folder, or a path where no file can be created. OSError: naming `path`, such as for a full disk.
    """
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file()
    if target.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it to write.")
    part = _part(target, path, special)
    try:
        yield part
        if part.stat().st_size:
            _put(part, target, special)
    except OSError as error:
        # The error of a failed write names no file; that of a failed read does.
        if error.filename is None or str(part) in (error.filename, error.filename2):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def save_tensors(
    arrays: Mapping[str, np.ndarray[Any, Any]], part: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; a full disk raises OSError, as for other files."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(arrays), part, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


def pyarrow_module(name: str, what: str, instead: str = "") -> Any:
    """A module of pyarrow, which is no requirement. what: the files that need it. instead: what can be done without.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(
            f"{what} need pyarrow, which is not installed: pip install 'poolhouse[arrow]'.{instead}"
        ) from None


class GrowingMatrix:
    """A .npy file of rows that come block by block; its header, which says how many there are, is written at the end.

    stream: can be sought in; it stays open. A file without a row stays empty.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._rows = self._width = 0
        self._descr: object = None

    def write(self, block: np.ndarray[Any, Any]) -> None:
        """Rows, [rows, width] of one width and type."""
        import numpy as np

        if not self._rows:
            self._width, self._descr = block.shape[1], np.lib.format.dtype_to_descr(block.dtype)
            self._header()
        self._rows += len(block)
        self._stream.write(np.ascontiguousarray(block).data)

    def finish(self) -> None:
        """Say in the header how many rows there are."""
        if self._rows:
            self._stream.seek(0)
            self._header()

    def _header(self) -> None:
        import numpy as np

        # numpy leaves room in it for any number of rows.
        header = {"shape": (self._rows, self._width), "fortran_order": False, "descr": self._descr}
        np.lib.format.write_array_header_1_0(self._stream, header)


# Files of weights, the first that is there is read.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(variant: str | None = None) -> list[str]:
    """The names under which a folder may hold its weights, or their index; the first that is there is read.

    variant: which of several weights; its name stands before the last ending, as transformers writes it.
    """
    if variant is None:
        return list(_WEIGHTS)
    return [f"{stem}.{variant}.{ending}" for stem, _, ending in (name.rpartition(".") for name in _WEIGHTS)]


def same_file(one: str | int | Path, other: str | int | Path) -> bool:
    """Whether two paths, or open descriptors, are the same ordinary file."""
    try:
        first, second = os.stat(one), os.stat(other)  # noqa: PTH116 - of descriptors too
    except OSError:
        return False
    return stat.S_ISREG(first.st_mode) and os.path.samestat(first, second)


def _part(target: Path, path: str | Path, special: bool) -> Path:
    """A new and empty file, with the permissions that the target has or would get."""
    # A short name, since the target's may be as long as the file system allows; a random one, since two may write at once.
    folder = Path(tempfile.gettempdir()) if special else target.parent
    if target.exists() and not os.access(target, os.W_OK):
        raise ConfigError(f"{path} may not be written.")
    part = folder / f".poolhouse-{secrets.token_hex(6)}.part"
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: no file can be made in {folder}: {error.strerror}.") from None
    if target.is_file():
        before = target.stat()
        with contextlib.suppress(OSError):
            os.chown(part, before.st_uid, before.st_gid)
        part.chmod(before.st_mode & 0o777)
    return part


def _put(part: Path, target: Path, special: bool) -> None:
    if special:
        with part.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        return
    with part.open("rb") as written:
        os.fsync(written.fileno())
    try:
        part.replace(target)
    except OSError as error:
        # A file that is a mount of its own, as in containers, cannot be replaced by renaming.
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(part, target)
