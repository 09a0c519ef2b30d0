"""Token vectors as files: .npz, .safetensors, or .arrow, of which rows are texts and which is written as it comes.

.npz and .safetensors hold `values`, `offsets`, the precision, and `minimum` and `maximum` of stored ranges. .arrow (the
IPC file format) has a column `vectors` of list<fixed_size_list<number>>, and the rest in its schema's metadata.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.max_sim import offsets_of
from poolhouse.precision import Calibration, parse_precision
from poolhouse.token_embeddings import TokenEmbeddings
from poolhouse.whole_files import save_tensors, whole_file

Write = Callable[[TokenEmbeddings], None]
Arrays = dict[str, np.ndarray[Any, Any]]


@contextlib.contextmanager
def writer(path: str | Path, form: str | None = None) -> Iterator[Write]:
    """Write a file block by block; it appears when all of them are written, and without any not at all (`whole_file`).

    form: ".npz", ".safetensors" or ".arrow"; None goes by the path's ending.
    An .arrow file takes no more memory than a block; the others hold all blocks until the end.

    Raises:
        ConfigError: an ending that means no kind of file; pyarrow, which .arrow needs, is not installed.
    """
    with whole_file(path) as part, _WRITERS[form or _form(Path(path))](part) as write:
        yield write


def read(path: str | Path) -> TokenEmbeddings:
    """What was written into a file.

    Raises:
        ConfigError: no such file, or another kind of file.
    """
    form = _form(Path(path))
    from safetensors import SafetensorError

    try:
        return _READERS[form](Path(path))
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError, PoolhouseError) as error:
        raise ConfigError(f"{path} cannot be read as token vectors: {error}") from None


def _form(path: Path) -> str:
    if path.suffix not in _WRITERS:
        raise ConfigError(f"{path}: token vectors are files that end with {', '.join(_WRITERS)}.")
    return path.suffix


@contextlib.contextmanager
def _numpy_writer(path: Path) -> Iterator[Write]:
    blocks: list[TokenEmbeddings] = []
    yield blocks.append
    if blocks:
        whole = TokenEmbeddings.joined(blocks)
        arrays: Mapping[str, Any] = _arrays(whole)
        with path.open("wb") as file:
            np.savez(file, precision=np.array(whole.precision), **arrays)


@contextlib.contextmanager
def _safetensors_writer(path: Path) -> Iterator[Write]:
    blocks: list[TokenEmbeddings] = []
    yield blocks.append
    if blocks:
        whole = TokenEmbeddings.joined(blocks)
        save_tensors(_arrays(whole), path, {"precision": whole.precision})


@contextlib.contextmanager
def _arrow_writer(path: Path) -> Iterator[Write]:
    pyarrow = _pyarrow()
    with contextlib.ExitStack() as stack:
        file: Any = None

        def write(block: TokenEmbeddings) -> None:
            nonlocal file
            batch = _record_batch(pyarrow, block)
            if file is None:
                file = stack.enter_context(pyarrow.ipc.new_file(str(path), batch.schema))
            file.write_batch(batch)

        yield write


def _record_batch(pyarrow: Any, block: TokenEmbeddings) -> Any:
    """A block as rows of one column."""
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.values.reshape(-1)), block.values.shape[1])
    texts = pyarrow.ListArray.from_arrays(pyarrow.array(block.offsets.astype(np.int32)), rows)
    metadata = {"precision": block.precision.encode()}
    metadata |= {name: numbers.tobytes() for name, numbers in _ranges(block.calibration).items()}
    return pyarrow.RecordBatch.from_arrays([texts], schema=pyarrow.schema([("vectors", texts.type)], metadata=metadata))


def _read_numpy(path: Path) -> TokenEmbeddings:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return _embeddings(arrays, str(arrays["precision"]))


def _read_safetensors(path: Path) -> TokenEmbeddings:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return _embeddings(arrays, file.metadata()["precision"])


def _read_arrow(path: Path) -> TokenEmbeddings:
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
        batches = [file.get_batch(index).column("vectors") for index in range(file.num_record_batches)]
        metadata = {name.decode(): data for name, data in (file.schema.metadata or {}).items()}
        width = file.schema.field("vectors").type.value_type.list_size
        lengths = [batch.value_lengths().to_numpy() for batch in batches]
        arrays = {
            "values": np.concatenate([batch.flatten().flatten().to_numpy().reshape(-1, width) for batch in batches]),
            "offsets": offsets_of(np.concatenate(lengths)),
        }
    arrays |= {name: np.frombuffer(metadata[name], np.float32) for name in _RANGES if name in metadata}
    return _embeddings(arrays, metadata["precision"].decode())


_RANGES = ("minimum", "maximum")


def _arrays(block: TokenEmbeddings) -> Arrays:
    return {"values": block.values, "offsets": block.offsets, **_ranges(block.calibration)}


def _ranges(calibration: Calibration | None) -> Arrays:
    return {} if calibration is None else {name: getattr(calibration, name) for name in _RANGES}


def _embeddings(arrays: Arrays, precision: str) -> TokenEmbeddings:
    calibration = Calibration(arrays["minimum"], arrays["maximum"]) if "minimum" in arrays else None
    return TokenEmbeddings(arrays["values"], arrays["offsets"], parse_precision(precision), calibration)


def _pyarrow() -> Any:
    try:
        # By name: its annotations differ between versions.
        return import_module("pyarrow")
    except ImportError:
        raise ConfigError(
            "Arrow files need pyarrow, which is not installed: pip install 'poolhouse[arrow]'. "
            ".npz and .safetensors need nothing."
        ) from None


_WRITERS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Write]]] = {
    ".npz": _numpy_writer,
    ".safetensors": _safetensors_writer,
    ".arrow": _arrow_writer,
}
_READERS: Mapping[str, Callable[[Path], TokenEmbeddings]] = {
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
    ".arrow": _read_arrow,
}
