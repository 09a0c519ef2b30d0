"""TokenEmbeddings: the token vectors of many texts as one packed matrix, and as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poolhouse.errors import InvalidRequest
from poolhouse.max_sim import Offsets, max_sim_packed, offsets_of
from poolhouse.precision import Calibration, Codes, Floats, Precision, dequantize, quantize


@dataclass(frozen=True, slots=True, eq=False)
class TokenEmbeddings:
    """The vectors of texts, end to end; a sequence of one matrix per text.

    values: [all rows, width] in `precision` ([all rows, width / 8] of bits); offsets: [texts + 1], where each text's
    rows begin, and the end. calibration: the ranges of int8 and uint8, where they are stored ones.
    """

    values: Codes
    offsets: Offsets
    precision: Precision = "float32"
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.offsets.ndim != 1 or not len(self.offsets):
            raise InvalidRequest(
                f"Token embeddings are a matrix and a list of offsets, got shapes {self.values.shape} and "
                f"{self.offsets.shape}."
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values) or (np.diff(self.offsets) < 0).any():
            raise InvalidRequest(f"Offsets must rise from 0 to the {len(self.values)} rows of the matrix.", "offsets")

    @classmethod
    def of(
        cls, matrices: Sequence[Floats], precision: Precision = "float32", calibration: Calibration | None = None
    ) -> TokenEmbeddings:
        """The vectors of at least one text, [rows, width] each, in a precision.

        Raises:
            InvalidRequest: vectors that the precision cannot take.
        """
        values = quantize(np.concatenate(matrices), precision, calibration)
        offsets = offsets_of([len(matrix) for matrix in matrices])
        return cls(values, offsets, precision, calibration if precision in ("int8", "uint8") else None)

    @classmethod
    def joined(cls, blocks: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
        """At least one block, and what follows it, as one; all of one precision and calibration."""
        values = np.concatenate([block.values for block in blocks])
        offsets = offsets_of(np.concatenate([np.diff(block.offsets) for block in blocks]))
        return cls(values, offsets, blocks[0].precision, blocks[0].calibration)

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
        from poolhouse import token_files

        with token_files.writer(path) as write:
            write(self)

    @staticmethod
    def load(path: str | Path) -> TokenEmbeddings:
        """What `save` wrote.

        Raises:
            ConfigError: no such file, or another kind of file.
        """
        from poolhouse import token_files

        return token_files.read(path)
