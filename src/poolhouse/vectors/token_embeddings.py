"""TokenEmbeddings: the token vectors of many texts as one packed matrix, and files of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poolhouse.errors import ConfigError, InvalidRequest, PoolhouseError
from poolhouse.files import pyarrow_module, save_tensors, whole_file
from poolhouse.vectors.max_sim import RowOffsets, max_sim_packed, row_offsets
from poolhouse.vectors.precision import Calibration, Codes, Floats, Precision, dequantize, parse_precision, quantize


@dataclass(frozen=True, slots=True, eq=False)
class TokenEmbeddings:
    """The vectors of texts, end to end; a sequence of one matrix per text.

    values: [all rows, width] in `precision` ([all rows, width / 8] of bits); offsets: [texts + 1], where each text's
    rows begin, and the end. calibration: the ranges of int8 and uint8, where they are stored ones.
    """

    values: Codes
    offsets: RowOffsets
    precision: Precision = "float32"
    calibration: Calibration | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.offsets.ndim != 1 or not len(self.offsets):
            raise InvalidRequest(
                f"Token embeddings are a matrix and a list of offsets, got shapes {self.values.shape} and "
                f"{self.offsets.shape}."
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values) or (np.diff(self.offsets) < 0).any():
            raise InvalidRequest(f"Offsets must rise from 0 to the {len(self.values)} rows of the matrix.", "offsets")
        if self.names is not None and len(self.names) != len(self):
            raise InvalidRequest(f"There are {len(self)} texts and {len(self.names)} names of them.", "names")

    @classmethod
    def of(
        cls,
        matrices: Sequence[Floats],
        precision: Precision = "float32",
        calibration: Calibration | None = None,
        names: Sequence[str] | None = None,
    ) -> TokenEmbeddings:
        """The vectors of at least one text, [rows, width] each, in a precision.

        Raises:
            InvalidRequest: vectors that the precision cannot take.
        """
        values = quantize(np.concatenate(matrices), precision, calibration)
        offsets = row_offsets([len(matrix) for matrix in matrices])
        calibration = calibration if precision in ("int8", "uint8") else None
        return cls(values, offsets, precision, calibration, None if names is None else tuple(names))

    @classmethod
    def joined(cls, blocks: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
        """At least one block as one; all of one precision and calibration, and all with names or none."""
        values = np.concatenate([block.values for block in blocks])
        offsets = row_offsets(np.concatenate([np.diff(block.offsets) for block in blocks]))
        named = [block.names for block in blocks if block.names is not None]
        names = tuple(itertools.chain.from_iterable(named)) if len(named) == len(blocks) else None
        return cls(values, offsets, blocks[0].precision, blocks[0].calibration, names)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Codes:
        """A text's rows, a view of the matrix."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} texts, and no text {index}.")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Codes]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        return f"TokenEmbeddings({len(self)} texts, {rows} rows of {columns} {self.values.dtype}, {self.precision})"

    def floats(self) -> Floats:
        """All rows as float32 vectors, [all rows, width]."""
        return dequantize(self.values, self.precision, self.calibration)

    def max_sim(self, query: Floats) -> Floats:
        """The late-interaction score of a query with each text, [texts]; query: [rows, width] floats."""
        return max_sim_packed(query, self.values, self.offsets, self.precision, self.calibration)

    def save(self, path: str | Path) -> None:
        """Write a file of the kind that its name ends with: .npz, .safetensors or .arrow.

        Raises:
            ConfigError: another ending; pyarrow, which .arrow needs, is not installed.
        """

        with writer(path) as write:
            write(self)

    @staticmethod
    def load(path: str | Path) -> TokenEmbeddings:
        """The embeddings that `save` wrote.

        Raises:
            ConfigError: no such file, or another kind of file.
        """

        return read(path)


Write = Callable[[TokenEmbeddings], None]
Arrays = dict[str, np.ndarray[Any, Any]]


@contextlib.contextmanager
def writer(path: str | Path, form: str | None = None) -> Iterator[Write]:
    """Write a file block by block; it appears when all blocks are written, and not without a block (`whole_file`).

    form: ".npz", ".safetensors" or ".arrow"; None takes the ending of the path.
    An .arrow file takes no more memory than a block; the others hold all blocks until the end.

    Raises:
        ConfigError: an unknown ending; pyarrow, which .arrow needs, is not installed.
    """
    with whole_file(path) as part, _WRITERS[form or _form(Path(path))](part) as write:
        yield write


def read(path: str | Path) -> TokenEmbeddings:
    """The embeddings in a file.

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
            if whole.names is not None:
                arrays = {**arrays, "names": np.array(whole.names)}
            np.savez(file, precision=np.array(whole.precision), **arrays)


@contextlib.contextmanager
def _safetensors_writer(path: Path) -> Iterator[Write]:
    blocks: list[TokenEmbeddings] = []
    yield blocks.append
    if blocks:
        whole = TokenEmbeddings.joined(blocks)
        names = {} if whole.names is None else {"names": json.dumps(whole.names)}
        save_tensors(_arrays(whole), path, {"precision": whole.precision, **names})


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
    """A block as rows of one column, or of two with names."""
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.values.reshape(-1)), block.values.shape[1])
    texts = pyarrow.ListArray.from_arrays(pyarrow.array(block.offsets.astype(np.int32)), rows)
    metadata = {"precision": block.precision.encode()}
    metadata |= {name: numbers.tobytes() for name, numbers in _ranges(block.calibration).items()}
    columns = {"vectors": texts} | ({} if block.names is None else {"name": pyarrow.array(block.names)})
    schema = pyarrow.schema([(name, column.type) for name, column in columns.items()], metadata=metadata)
    return pyarrow.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _read_numpy(path: Path) -> TokenEmbeddings:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return _embeddings(arrays, str(arrays["precision"]), arrays["names"].tolist() if "names" in arrays else None)


def _read_safetensors(path: Path) -> TokenEmbeddings:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = file.metadata()
        return _embeddings(
            arrays, metadata["precision"], json.loads(metadata["names"]) if "names" in metadata else None
        )


def _read_arrow(path: Path) -> TokenEmbeddings:
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
        whole = [file.get_batch(index) for index in range(file.num_record_batches)]
        batches = [batch.column("vectors") for batch in whole]
        named = "name" in file.schema.names
        names = [name for batch in whole for name in batch.column("name").to_pylist()] if named else None
        metadata = {name.decode(): data for name, data in (file.schema.metadata or {}).items()}
        width = file.schema.field("vectors").type.value_type.list_size
        lengths = [batch.value_lengths().to_numpy() for batch in batches]
        arrays = {
            "values": np.concatenate([batch.flatten().flatten().to_numpy().reshape(-1, width) for batch in batches]),
            "offsets": row_offsets(np.concatenate(lengths)),
        }
    arrays |= {name: np.frombuffer(metadata[name], np.float32) for name in _RANGES if name in metadata}
    return _embeddings(arrays, metadata["precision"].decode(), names)


_RANGES = ("minimum", "maximum")


def _arrays(block: TokenEmbeddings) -> Arrays:
    return {"values": block.values, "offsets": block.offsets, **_ranges(block.calibration)}


def _ranges(calibration: Calibration | None) -> Arrays:
    return {} if calibration is None else {name: getattr(calibration, name) for name in _RANGES}


def _embeddings(arrays: Arrays, precision: str, names: Sequence[str] | None) -> TokenEmbeddings:
    calibration = Calibration(arrays["minimum"], arrays["maximum"]) if "minimum" in arrays else None
    return TokenEmbeddings(
        arrays["values"],
        arrays["offsets"],
        parse_precision(precision),
        calibration,
        None if names is None else tuple(names),
    )


def _pyarrow() -> Any:
    # By name: its annotations differ between versions.
    return pyarrow_module("pyarrow", "Arrow files", " .npz and .safetensors need nothing.")


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
