"""Shards: the output of a job, file by file, and the journal that says which of them are whole.

    out/
        journal.jsonl        what the job is, then a line for each file that is whole, and where reading goes on behind it
        part-00000.parquet   written as .part-00000.parquet and renamed before its line
        errors.jsonl         the rows that were set aside: file, line and reason
        manifest.json        what the job was and what came of it, written at its end

A job that is killed between a rename and its line writes that file again, with the same name: no row is twice there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import orjson

from poolhouse.errors import ConfigError
from poolhouse.files import GrowingMatrix, pyarrow_module, whole_file
from poolhouse.jobs.arrow import arrow_array
from poolhouse.jobs.asking import Answered
from poolhouse.jobs.job import Job
from poolhouse.jobs.source import Place, Row
from poolhouse.journal import JournalFile, differences

JOURNAL, ERRORS, MANIFEST = "journal.jsonl", "errors.jsonl", "manifest.json"


@dataclass(slots=True)
class Shard:
    """A file that is whole. after: where reading goes on. errors: rows set aside since the last one."""

    file: str | None
    after: Place
    rows: int = 0
    bytes: int = 0
    sha256: str = ""
    truncated: int = 0
    tokens: int = 0
    errors: list[dict[str, object]] = field(default_factory=list)


class Journal:
    """The shards of a job's folder, in order; one process at a time holds it.

    kinds: see `kinds_of`; None until they are known.

    Raises:
        ConfigError: another process holds it, or it belongs to another job; the message says what differs.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], inputs: Sequence[Mapping[str, object]]) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out} is no folder that can be made: {error.strerror}.") from None
        self.path = out / JOURNAL
        is_new = not self.path.exists()
        if is_new and any(out.iterdir()):
            raise ConfigError(f"--out {out} holds other files; name a new folder, or that of the job to go on with.")
        self._lines = JournalFile(self.path, out)
        self.shards: list[Shard] = []
        self.kinds: dict[str, str] | None = None
        try:
            self.continued = bool(self._lines.entries)
            if self.continued:
                self._read(fingerprint, inputs)
            else:
                self._lines.append({"job": fingerprint, "inputs": list(inputs)})
            self._tidy()
        except BaseException:
            self._lines.close()
            raise

    @property
    def place(self) -> Place:
        """Where reading goes on."""
        return self.shards[-1].after if self.shards else Place()

    @property
    def errors(self) -> int:
        return sum(len(shard.errors) for shard in self.shards)

    def next_name(self, form: str) -> str:
        """The file of the next shard."""
        number = sum(shard.file is not None for shard in self.shards)
        return f"part-{number:05d}.{form}"

    def add(self, shard: Shard) -> None:
        """A shard is whole, and its rows are not computed again."""
        self._lines.append({**asdict(shard), "after": list(shard.after)})
        self.shards.append(shard)
        if shard.errors:
            with (self.out / ERRORS).open("ab") as stream:
                _write_lines(stream, shard.errors)

    def fix_kinds(self, kinds: dict[str, str]) -> None:
        """Remember what the columns that come along hold, for all files of the job."""
        self._lines.append({"kinds": kinds})
        self.kinds = kinds

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write what came of the job."""
        with whole_file(self.out / MANIFEST) as part:
            part.write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")

    def close(self) -> None:
        self._lines.close()

    def _read(self, fingerprint: Mapping[str, Any], inputs: Sequence[Mapping[str, object]]) -> None:
        head, *entries = self._lines.entries
        if "job" not in head:
            raise ConfigError(f"{self.path} is no journal of a job.")
        self._compare(head, fingerprint, inputs)
        for entry in entries:
            if "kinds" in entry:
                self.kinds = entry["kinds"]
            else:
                self.shards.append(Shard(**{**entry, "after": Place(*entry["after"])}))

    def _compare(
        self, head: Mapping[str, Any], fingerprint: Mapping[str, Any], inputs: Sequence[Mapping[str, object]]
    ) -> None:
        if said := differences(head["job"], fingerprint):
            raise ConfigError(f"--out {self.out} holds a job with other options: {said}. Name another folder.")
        for old, new in zip(head["inputs"], inputs, strict=False):
            if old != dict(new):
                raise ConfigError(
                    f"{old['file']} has changed since the job in {self.out} was begun. Name another folder."
                )
        if len(head["inputs"]) != len(inputs):
            raise ConfigError(f"The job in {self.out} was begun with {len(head['inputs'])} files, not {len(inputs)}.")

    def _tidy(self) -> None:
        """Remove what a killed process left half written, and write the errors anew."""
        for pattern in (".part-*", ".poolhouse-*.part"):
            for part in self.out.glob(pattern):
                part.unlink(missing_ok=True)
        found = [error for shard in self.shards for error in shard.errors]
        if found or (self.out / ERRORS).exists():
            with (self.out / ERRORS).open("wb") as stream:
                _write_lines(stream, found)


class Writer(Protocol):
    """A file that grows block by block."""

    def write(self, answered: Answered) -> None: ...

    def close(self) -> None: ...


class ShardFile:
    """The file that is being written. size: bytes so far, as far as they are known."""

    def __init__(self, journal: Journal, job: Job, types: Mapping[str, Any]) -> None:
        """types: Arrow types of columns that come along, where the input says them."""
        self.name = journal.next_name(job.form)
        self.part = journal.out / f".{self.name}"
        self.target = journal.out / self.name
        self._writer: Writer = _WRITERS[job.form](self.part, job, types, journal.kinds or {})
        self.rows = 0

    def write(self, answered: Answered) -> None:
        if answered.rows:
            self.rows += len(answered.rows)
            self._writer.write(answered)

    @property
    def size(self) -> int:
        return self.part.stat().st_size if self.rows else 0

    def close(self) -> tuple[int, str]:
        """End the file and give it its name; its bytes and their SHA-256."""
        self._writer.close()
        digest = hashlib.sha256()
        with self.part.open("rb") as stream:
            os.fsync(stream.fileno())
            while block := stream.read(1 << 20):
                digest.update(block)
        size = self.part.stat().st_size
        self.part.replace(self.target)
        return size, digest.hexdigest()

    def drop(self) -> None:
        """Leave no file."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self.part.unlink(missing_ok=True)


class _Parquet:
    """A row group per block. Vectors are fixed-size lists, as readers of vectors want them."""

    def __init__(self, path: Path, job: Job, types: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
        self.path, self.job = path, job
        self.arrow = pyarrow_module("pyarrow", "Parquet files")
        self.parquet = pyarrow_module("pyarrow.parquet", "Parquet files")
        named = {name: getattr(self.arrow, kind)() for name, kind in kinds.items()}
        self.types: Mapping[str, Any] = {**named, **types, "file": self.arrow.string(), "row": self.arrow.int64()}
        self.writer: Any = None

    def write(self, answered: Answered) -> None:
        pa = self.arrow
        arrays: dict[str, Any] = {}
        for name, cells in _named(answered, self.job):
            of_type = self.types[name]
            arrays[name] = pa.array(map(_as_cell, cells) if pa.types.is_string(of_type) else cells, of_type)
        for column in answered.columns:
            arrays[column.name] = arrow_array(column)
        arrays["truncated"] = pa.array(answered.truncated, pa.bool_())
        table = pa.table(arrays)
        if self.writer is None:
            self.writer = self.parquet.ParquetWriter(self.path, table.schema, compression="zstd", use_dictionary=False)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _JsonLines:
    def __init__(self, path: Path, job: Job, *_: object) -> None:
        self.job = job
        self.stream = path.open("wb")

    def write(self, answered: Answered) -> None:
        named = list(_named(answered, self.job))
        columns = [(column.name, column.values) for column in answered.columns]
        for number, cut in enumerate(answered.truncated):
            line = {name: cells[number] for name, cells in named}
            for name, values in columns:
                one = values[number]
                line[name] = np.ascontiguousarray(one) if isinstance(one, np.ndarray) else one
            line["truncated"] = cut
            option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            self.stream.write(orjson.dumps(line, default=_as_text, option=option))

    def close(self) -> None:
        self.stream.close()


class _Matrix:
    def __init__(self, path: Path, *_: object) -> None:
        self.stream = path.open("wb")
        self.matrix = GrowingMatrix(self.stream)

    def write(self, answered: Answered) -> None:
        values = answered.columns[0].values
        assert isinstance(values, np.ndarray)
        self.matrix.write(values)

    def close(self) -> None:
        if not self.stream.closed:
            self.matrix.finish()
        self.stream.close()


_WRITERS: Mapping[str, Any] = {"parquet": _Parquet, "jsonl": _JsonLines, "npy": _Matrix}


def _named(answered: Answered, job: Job) -> Iterator[tuple[str, list[Any]]]:
    """The columns that say which row it is, and those that come along."""
    if job.id is not None:
        yield job.id, [row.values[job.id] for row in answered.rows]
    elif job.form != "npy":
        yield "file", [row.file for row in answered.rows]
        yield "row", [row.number for row in answered.rows]
    for name in job.keep:
        yield name, [row.values[name] for row in answered.rows]


def kinds_of(job: Job, rows: Sequence[Row], known: Mapping[str, Any]) -> dict[str, str]:
    """What each column that comes along holds, by the first rows: int64, float64, bool_ or string, as Arrow calls them.

    known: columns whose types the input says.
    """
    kinds: dict[str, str] = {}
    for name in (*([job.id] if job.id else ()), *job.keep):
        if name not in known:
            types = {type(row.values[name]) for row in rows if row.values.get(name) is not None}
            kinds[name] = next((kind for kind, allowed in _KINDS.items() if types and types <= allowed), "string")
    return kinds


def misfit(row: Row, kinds: Mapping[str, str]) -> str | None:
    """Why a row's cells do not fit the columns of the rows before it; None where they do. A text column takes all."""
    for name, kind in kinds.items():
        value = row.values[name]
        fits = value is None or kind == "string" or type(value) in _KINDS[kind]
        if not fits or (kind == "int64" and value is not None and not -(2**63) <= value < 2**63):
            return f"'{name}' is {value!r:.40}, where rows before it have {kind.rstrip('_')}"
    return None


_KINDS: Mapping[str, set[type]] = {"int64": {int}, "float64": {int, float}, "bool_": {bool}}


def _as_cell(value: object) -> str | None:
    """A cell of a text column: other values than texts as JSON."""
    return value if isinstance(value, str | None) else orjson.dumps(value, default=_as_text).decode()


def _as_text(value: object) -> str:
    """What JSON has no form for: bytes as their length is of no use, so as text where they are one."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _write_lines(stream: IO[bytes], lines: Sequence[Mapping[str, object]]) -> None:
    for line in lines:
        stream.write(orjson.dumps(line, default=_as_text, option=orjson.OPT_APPEND_NEWLINE))
