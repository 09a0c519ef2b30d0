"""Source: rows of files, one after another, from any place on; a row that cannot be read is one of them, with the reason."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.files import pyarrow_module
from poolhouse.jobs.job import STANDARD_INPUT, form_of

# Rows that a Parquet file gives at a time.
_PARQUET_ROWS = 2048
# A line without an end is not read into memory beyond this.
_LONGEST_LINE = 256 * 1024 * 1024


class Place(NamedTuple):
    """Where reading goes on. file: its number. row: rows of it that were read. offset: its bytes, for files of lines."""

    file: int = 0
    row: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file. number: its line or row, from 1. after: where reading goes on behind it.

    values: of the columns that are read. problem: why it has none.
    """

    file: str
    number: int
    after: Place
    values: Mapping[str, Any]
    problem: str | None = None


class Source:
    """The rows of files.

    columns: those to read. files: see `input_files`.

    Raises:
        ConfigError: a table without one of the columns, or a Parquet file without pyarrow; when the file is opened.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str], input_form: str | None) -> None:
        self.files, self.columns, self.input_form = files, columns, input_form
        self._sizes = [0 if name == STANDARD_INPUT else Path(name).stat().st_size for name in files]

    def rows(self, start: Place) -> Iterator[Row]:
        """All rows from a place on.

        Raises:
            ConfigError: a file that cannot be opened or read as what it is said to be.
        """
        for index in range(start.file, len(self.files)):
            name = self.files[index]
            form = form_of(name, self.input_form)
            here = start if index == start.file else Place(index)
            if form == "parquet":
                yield from self._parquet(name, here)
                continue
            stream = sys.stdin.buffer if name == STANDARD_INPUT else Path(name).open("rb")  # noqa: SIM115
            try:
                if form in ("lines", "jsonl"):
                    yield from self._lines(stream, name, here, form == "jsonl")
                else:
                    yield from self._table(stream, name, here, "," if form == "csv" else "\t")
            finally:
                if name != STANDARD_INPUT:
                    stream.close()

    def share(self, place: Place) -> float | None:
        """About how much of all is read there, from 0 to 1; None where nobody can know."""
        total = sum(self._sizes)
        if not total:
            return None
        done = sum(self._sizes[: place.file])
        if place.file < len(self.files):
            done += min(place.offset, self._sizes[place.file])
        return done / total

    def check(self) -> None:
        """Open each Parquet file and read its columns' names.

        Raises:
            ConfigError: as `rows`.
        """
        for name in self.files:
            if form_of(name, self.input_form) == "parquet":
                self._opened(name).close()

    def schema(self) -> Mapping[str, Any]:
        """Arrow types of the columns of the first file, where it is Parquet and knows them."""
        if not self.files or form_of(self.files[0], self.input_form) != "parquet":
            return {}
        file = self._opened(self.files[0])
        with file:
            return {name: file.schema_arrow.field(name).type for name in self.columns}

    def _lines(self, stream: IO[bytes], name: str, start: Place, is_json: bool) -> Iterator[Row]:
        offset, number = start.offset, start.row
        if name != STANDARD_INPUT:
            stream.seek(offset)
        else:
            # A stream is given anew, and what was read of it is passed over.
            for _ in range(number):
                stream.readline()
        while line := stream.readline(_LONGEST_LINE):
            number, offset = number + 1, offset + len(line)
            after = Place(start.file, number, offset)
            if number == 1:
                if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise ConfigError(f"{name} is not UTF-8; it looks like UTF-16. Convert it first, such as by iconv.")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if is_json and not line.strip():
                continue
            yield self._line(line, name, after, is_json)

    def _line(self, line: bytes, name: str, after: Place, is_json: bool) -> Row:
        if len(line) >= _LONGEST_LINE:
            return Row(name, after.row, after, {}, f"the line is longer than {_LONGEST_LINE} bytes")
        if not is_json:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                return Row(name, after.row, after, {}, f"the line is not UTF-8: {error}")
            text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
            return Row(name, after.row, after, dict.fromkeys(self.columns, text))
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            return Row(name, after.row, after, {}, f"the line is not JSON: {error}")
        if isinstance(value, str):
            value = dict.fromkeys(self.columns, value)
        if not isinstance(value, dict):
            return Row(name, after.row, after, {}, "the line is no JSON object")
        missing = [column for column in self.columns if column not in value]
        if missing:
            fields = ", ".join(map(str, list(value)[:20])) or "none"
            return Row(name, after.row, after, {}, f"there is no field '{missing[0]}'; fields: {fields}")
        return Row(name, after.row, after, {column: value[column] for column in self.columns})

    def _table(self, stream: IO[bytes], name: str, start: Place, separator: str) -> Iterator[Row]:
        """Rows below a first one that names the columns; those before `start` are read again and passed over."""
        csv.field_size_limit(sys.maxsize)
        position = 0

        def decoded() -> Iterator[str]:
            nonlocal position
            for number, line in enumerate(stream, start=1):
                position += len(line)
                # A byte that is no UTF-8 is marked, and its row set aside: the others can still be read.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")

        reader = csv.reader(decoded(), delimiter=separator, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ConfigError(f"The first line of {name} cannot be read as names of columns: {error}.") from None
        indexes = []
        for column in self.columns:
            if header.count(column) != 1:
                raise ConfigError(_no_column(name, column, header))
            indexes.append(header.index(column))
        number, line = 0, reader.line_num
        while True:
            problem: str | None = None
            cells: list[str] | None = []
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problem = f"it cannot be read as a row: {error}"
            if cells is None:
                return
            number += 1
            begun, line = line + 1, reader.line_num
            if number <= start.row:
                continue
            after = Place(start.file, number, position)
            if problem is None and not cells and len(header) == 1:
                cells = [""]
            if problem is None and len(cells) != len(header):
                problem = f"the row has {len(cells)} cells, and the first line {len(header)}"
            values = {} if problem else {column: cells[at] for column, at in zip(self.columns, indexes, strict=True)}
            if problem is None and any(not _is_clean(value) for value in values.values()):
                values, problem = {}, "the row is not UTF-8"
            yield Row(name, begun, after, values, problem)

    def _opened(self, name: str) -> Any:
        parquet = pyarrow_module("pyarrow.parquet", "Parquet files")
        if name == STANDARD_INPUT:
            raise ConfigError("Parquet is read from a file, not from standard input.")
        try:
            file = parquet.ParquetFile(name)
        except Exception as error:  # noqa: BLE001 - of pyarrow's own kinds
            raise ConfigError(f"{name} cannot be read as Parquet: {error}") from None
        names = file.schema_arrow.names
        for column in self.columns:
            if names.count(column) != 1:
                file.close()
                raise ConfigError(_no_column(name, column, names))
        return file

    def _parquet(self, name: str, start: Place) -> Iterator[Row]:
        """Row groups before `start` are passed over, not read."""
        size = self._sizes[start.file]
        with self._opened(name) as file:
            counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            total, first, number = sum(counts), 0, 0
            while first < len(counts) and number + counts[first] <= start.row:
                number += counts[first]
                first += 1
            groups = list(range(first, len(counts)))
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=list(self.columns)):
                # By name: a reader may give columns in the file's order.
                cells = [batch.column(column).to_pylist() for column in self.columns]
                for values in zip(*cells, strict=True):
                    number += 1
                    if number > start.row:
                        after = Place(start.file, number, size * number // max(total, 1))
                        yield Row(name, number, after, dict(zip(self.columns, values, strict=True)))


def _is_clean(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def _no_column(name: str, column: str, names: Sequence[str]) -> str:
    found = "two columns" if column in names else "no column"
    shown = ", ".join(text[:40] for text in names[:20]) or "none"
    return f"{name} has {found} '{column}'; it has: {shown}.{did_you_mean(column, names)}"
