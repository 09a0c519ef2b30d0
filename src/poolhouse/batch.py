"""Batch: one callable for the workers of Ray, Spark, Daft and Dask; a batch of rows in, the same with new columns out.

    Embedder(options) ─► pickled to a worker ─► first batch: opens the engine of this process ─► columns, batch by batch

The answers are those of jobs on files: the same tasks, the same columns.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from poolhouse.errors import ConfigError, InvalidRequest, PoolhouseError, did_you_mean
from poolhouse.jobs.job import COLUMNS, STANDARD_INPUT, Job, parse_tasks
from poolhouse.settings import Settings
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import parse_precision

if TYPE_CHECKING:
    from poolhouse.engine.interface import OfflineEngine
    from poolhouse.jobs.asking import Answered, Asked, Asker, Column, Failed

BatchT = TypeVar("BatchT")
Missing = npt.NDArray[np.bool_]

# What becomes of a batch with a row that cannot be answered.
Errors = Literal["raise", "null"]
# What vectors are in Arrow.
Lists = Literal["fixed", "variable"]
# Columns that are there where `output` names them.
_ON_REQUEST = ("truncated", "error")


class Embedder:
    """A model as a function of batches: it gives back each batch with new columns, in the kind that it came in.

    A batch is an Arrow table or record batch, a pandas DataFrame, or a mapping of numpy arrays or lists. Of tasks with
    one column it may also be the texts alone: an Arrow array, a pandas Series, a numpy array; the vectors come alone
    then. Vectors are lists in Arrow, a matrix in numpy, and an array per row in pandas.

    Made anywhere, it is only its options, and pickled as such. The model is opened at the first batch, once in each
    process for all with equal options, and stays open until the process ends.

    task: see `poolhouse.jobs.job.Job`; several from one pass. column, query_column, image_column: where the text, the
        query of `score`, or the picture stands.
    output: what the new columns are called: a name where there is one, else a mapping from those of jobs (embedding,
        token_embeddings, sparse_indices, sparse_values, label, probabilities, entities, score). "truncated" and "error"
        in the mapping add whether a text was cut, and why a row is null.
    muvera: makes the vector of `embed` of those of a text's tokens; `input_type` says whether texts are queries.
    labels: what `entities` looks for, or `classify` classifies by, of models that take labels; threshold, multi_label: as
        those of `LLM.extract` and `LLM.classify`.
    errors: "raise" ends a batch with a row that cannot be answered, by an InvalidRequest that names it; "null" leaves
        such rows empty. numpy has no null: vectors of floats are NaN, all else None in an array of objects.
    lists: what vectors are in Arrow, lists of one length ("fixed"), or of any ("variable"), as Spark wants them.
    options: of the engine, as those of `LLM`.

    Raises:
        ConfigError: options that cannot be; those that only the model knows at the first batch.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        task: str | Sequence[str] = "embed",
        *,
        column: str = "text",
        query_column: str = "query",
        image_column: str | None = None,
        output: str | Mapping[str, str] | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        instruction: str | None = None,
        dimensions: int | None = None,
        precision: str = "float32",
        muvera: Muvera | None = None,
        labels: Sequence[str] = (),
        threshold: float = 0.5,
        multi_label: bool = False,
        errors: Errors = "raise",
        lists: Lists = "fixed",
        **options: Any,
    ) -> None:
        if model is not None and Path(model).exists():
            # A worker may stand in another folder.
            model = Path(model).resolve()
        self.settings = Settings.parse(model=model, **options)
        for name, value, known in (("errors", errors, get_args(Errors)), ("lists", lists, get_args(Lists))):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        with _words_of_python():
            self._job = Job(
                (STANDARD_INPUT,),
                Path(),
                tasks=parse_tasks([task] if isinstance(task, str) else task),
                column=column,
                query_column=query_column,
                image_column=image_column,
                prompt_name=prompt_name,
                input_type=input_type,
                instruction=instruction,
                dimensions=dimensions,
                precision=parse_precision(precision),
                muvera=muvera,
                labels=tuple(labels),
                threshold=threshold,
                multi_label=multi_label,
            )
        self._errors, self._lists = errors, lists
        self._names = _names(output, self._job)
        # Made here and carried along: a function among the settings has another address in each process.
        self._key = repr(self.settings)
        self._opened: Asker | None = None

    def __call__(self, batch: BatchT) -> BatchT:
        """The batch with its new columns.

        Raises:
            InvalidRequest: a column that it lacks or has already; a row that cannot be answered. TypeError: no batch.
        """
        (result,) = self.map([batch])
        return result

    def map(self, batches: Iterable[BatchT]) -> Iterator[BatchT]:
        """Each of the batches with its new columns, in order; the next rows are computed while a result is used.

        Raises:
            as a call with one batch.
        """
        from poolhouse.jobs.asking import rows_at_once
        from poolhouse.llm.calls import read_ahead

        asker = self._asker()
        size = rows_at_once(self._job)
        parts: list[tuple[Answered, list[Failed]]] = []
        for part, futures in read_ahead(
            asker.engine, self._parts(batches, asker, size), lambda part: part.asked.requests
        ):
            with _words_of_python():
                answered, failed = asker.answered(part.asked, futures)
            if failed and self._errors == "raise":
                raise InvalidRequest(
                    f"Row {failed[0].row.number} of the batch, counted from 0: {failed[0].reason}. errors='null' leaves such rows empty.",
                    self._job.column,
                )
            parts.append((answered, failed))
            if part.ends:
                yield part.batch.extended(*_joined(parts, self._names))
                parts = []

    def close(self) -> None:
        """Free the engine of this process, also for others with equal options; the next batch opens it again."""
        if self._opened is not None:
            self._opened.engine.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        return f"Embedder({self.settings.model or 'the embedded default'!r}, {', '.join(self._job.tasks)})"

    def _asker(self) -> Asker:
        from poolhouse.jobs.asking import Asker, check_precision
        from poolhouse.llm.llm import shared_engine

        engine: OfflineEngine = shared_engine(self._key, self.settings)
        if self._opened is None or self._opened.engine is not engine:
            with _words_of_python():
                check_precision(self._job)
                self._opened = Asker(engine, self._job)
        return self._opened

    def _parts(self, batches: Iterable[BatchT], asker: Asker, size: int) -> Iterator[_Part]:
        from poolhouse.jobs.asking import Asked
        from poolhouse.jobs.source import Place, Row

        for given in batches:
            batch = _opened(given, self._lists == "fixed")
            self._check(batch)
            columns = self._job.columns
            cells = [batch.cells(name) for name in columns]
            for first in range(0, batch.rows or 1, size):
                rows = [
                    Row("", number, Place(0, number), dict(zip(columns, values, strict=True)))
                    for number, values in enumerate(
                        zip(*(own[first : first + size] for own in cells), strict=True), first
                    )
                ]
                asked = asker.ask(rows) if rows else Asked([], [], [], [], Place())
                yield _Part(batch, asked, first + size >= batch.rows)

    def _check(self, batch: _Batch) -> None:
        """Raise InvalidRequest for a batch without the columns that are read, or with those that are made."""
        if batch.columns is None:
            if len(self._job.columns) > 1 or len(self._names) > 1:
                needed = [*self._job.columns, *self._names.values()]
                raise InvalidRequest(f"Texts alone have no place for the columns {', '.join(needed)}: give a table.")
            return
        shown = ", ".join(batch.columns[:20]) or "none"
        for name in self._job.columns:
            if name not in batch.columns:
                near = did_you_mean(name, batch.columns)
                raise InvalidRequest(f"The batch has no column '{name}'; it has: {shown}.{near}", name)
        for name in self._names.values():
            if name in batch.columns:
                raise InvalidRequest(f"The batch has a column '{name}' already; output= names another.", "output")


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Rows of a batch on their way. ends: there are no more of it."""

    batch: _Batch
    asked: Asked
    ends: bool


def _names(output: str | Mapping[str, str] | None, job: Job) -> dict[str, str]:
    """What each column of an answer is called; of those on request, where they are named.

    Raises:
        ConfigError: a name for a column that there is not, or for two.
    """
    made = [name for task in job.tasks for name in COLUMNS[task]]
    if isinstance(output, str):
        if len(made) > 1:
            raise ConfigError(
                f"output={output!r} is one name, and there are several columns: {{'{made[0]}': {output!r}, ...}} "
                f"names some of {', '.join(made)}."
            )
        return {made[0]: output}
    given = dict(output or {})
    for name in given:
        if name not in (*made, *_ON_REQUEST):
            known = (*made, *_ON_REQUEST)
            raise ConfigError(
                f"output: there is no column '{name}', but {', '.join(known)}.{did_you_mean(name, known)}"
            )
    names = {**{name: name for name in made}, **given}
    if len(set(names.values())) != len(names):
        raise ConfigError(f"output gives two columns one name: {', '.join(names.values())}.")
    return names


def _joined(
    parts: Sequence[tuple[Answered, Sequence[Failed]]], names: Mapping[str, str]
) -> tuple[dict[str, Column], Missing | None]:
    """The columns of all parts of a batch by their new names, and which rows have no answer; None where all have one."""
    from poolhouse.jobs.asking import Column

    failed = [one for _, own in parts for one in own]
    kept = [row.number for answered, _ in parts for row in answered.rows]
    missing: Missing | None = None
    if failed:
        missing = np.ones(len(kept) + len(failed), bool)
        missing[kept] = False
    columns: dict[str, Column] = {}
    for several in zip(*(answered.columns for answered, _ in parts), strict=True):
        columns[names[several[0].name]] = _column(several, kept, missing)
    if "truncated" in names:
        cut = np.concatenate([np.asarray(answered.truncated, bool) for answered, _ in parts])
        columns[names["truncated"]] = _column([Column("truncated", cut)], kept, missing)
    if "error" in names:
        reasons: list[str | None] = [None] * (len(kept) + len(failed))
        for one in failed:
            reasons[one.row.number] = one.reason
        columns[names["error"]] = Column("error", reasons)
    return columns, missing


def _column(parts: Sequence[Column], kept: Sequence[int], missing: Missing | None) -> Column:
    """Parts of a column as one, with a place for each row: zeros, or None in lists, where there is no answer."""
    from poolhouse.jobs.asking import Column

    name, like = parts[0].name, parts[0].like
    if isinstance(parts[0].values, np.ndarray):
        matrix = parts[0].values if len(parts) == 1 else np.concatenate([part.values for part in parts])
        if missing is not None:
            whole = np.zeros((len(missing), *matrix.shape[1:]), matrix.dtype)
            whole[kept] = matrix
            matrix = whole
        return Column(name, matrix, like)
    values = [value for part in parts for value in part.values]
    if missing is not None:
        listed: list[Any] = [None] * len(missing)
        for number, value in zip(kept, values, strict=True):
            listed[number] = value
        values = listed
    return Column(name, values, like)


class _Batch(Protocol):
    """A batch of any kind. columns: their names; None of texts alone."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> Sequence[str] | None: ...

    def cells(self, column: str) -> list[Any]:
        """The values of a column as Python has them."""
        ...

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        """The batch with these columns; of texts alone, the one column."""
        ...


def _opened(batch: object, fixed: bool) -> _Batch:
    """The batch by its kind. fixed: see `arrow_array`.

    Raises:
        TypeError: it is none.
    """
    # Whoever gives one has imported its library.
    pa, pandas = sys.modules.get("pyarrow"), sys.modules.get("pandas")
    if pa is not None and isinstance(batch, pa.Table | pa.RecordBatch):
        return _ArrowTable(batch, fixed)
    if pa is not None and isinstance(batch, pa.Array):
        return _ArrowTexts(batch, fixed)
    if pa is not None and isinstance(batch, pa.ChunkedArray):
        return _ArrowTexts(batch, fixed, pa.chunked_array)
    if pandas is not None and isinstance(batch, pandas.DataFrame):
        return _Frame(batch)
    if pandas is not None and isinstance(batch, pandas.Series):
        return _Series(batch)
    if isinstance(batch, np.ndarray) and batch.ndim == 1:
        return _Texts(batch)
    if isinstance(batch, Mapping):
        return _Arrays(batch)
    raise TypeError(
        "A batch is an Arrow table, record batch or array, a pandas DataFrame or Series, a numpy array of texts, or a "
        f"mapping of arrays, not {type(batch).__module__}.{type(batch).__qualname__}."
    )


class _ArrowTable:
    def __init__(self, table: Any, fixed: bool) -> None:
        self._table, self._fixed = table, fixed
        self.rows: int = table.num_rows
        self.columns: Sequence[str] | None = table.schema.names

    def cells(self, column: str) -> list[Any]:
        return self._table.column(column).to_pylist()  # type: ignore[no-any-return]

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        from poolhouse.jobs.arrow import arrow_array

        table = self._table
        for name, column in columns.items():
            table = table.append_column(name, arrow_array(column, missing, fixed=self._fixed))
        return table


class _ArrowTexts:
    columns: Sequence[str] | None = None

    def __init__(self, texts: Any, fixed: bool, chunked: Callable[[list[Any]], Any] | None = None) -> None:
        """chunked: puts the answer into chunks, as the texts are."""
        self._texts, self._fixed, self._chunked = texts, fixed, chunked
        self.rows = len(texts)

    def cells(self, _: str) -> list[Any]:
        return self._texts.to_pylist()  # type: ignore[no-any-return]

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        from poolhouse.jobs.arrow import arrow_array

        (column,) = columns.values()
        array = arrow_array(column, missing, fixed=self._fixed)
        return array if self._chunked is None else self._chunked([array])


class _Frame:
    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self.rows = len(frame)
        self.columns: Sequence[str] | None = [str(name) for name in frame.columns]

    def cells(self, column: str) -> list[Any]:
        return self._frame[column].tolist()  # type: ignore[no-any-return]

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        return self._frame.assign(**{name: _of_rows(column, missing) for name, column in columns.items()})


class _Series:
    columns: Sequence[str] | None = None

    def __init__(self, series: Any) -> None:
        self._series = series
        self.rows = len(series)

    def cells(self, _: str) -> list[Any]:
        return self._series.tolist()  # type: ignore[no-any-return]

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        ((name, column),) = columns.items()
        return type(self._series)(_of_rows(column, missing), index=self._series.index, name=name)


class _Texts:
    columns: Sequence[str] | None = None

    def __init__(self, texts: npt.NDArray[Any]) -> None:
        self._texts = texts
        self.rows = len(texts)

    def cells(self, _: str) -> list[Any]:
        return self._texts.tolist()  # type: ignore[no-any-return]

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        (column,) = columns.values()
        return _as_numpy(column, missing)


class _Arrays:
    """A mapping of arrays or lists of one length, as Ray and datasets give them."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InvalidRequest(f"The columns of a batch have one length, not {lengths}.")
        self.rows = next(iter(lengths.values()), 0)
        self.columns: Sequence[str] | None = list(arrays)

    def cells(self, column: str) -> list[Any]:
        values = self._arrays[column]
        return values.tolist() if isinstance(values, np.ndarray) else list(values)

    def extended(self, columns: Mapping[str, Column], missing: Missing | None) -> Any:
        return {**self._arrays, **{name: _as_numpy(column, missing) for name, column in columns.items()}}


def _as_numpy(column: Column, missing: Missing | None) -> npt.NDArray[Any]:
    """A matrix of vectors, an array of numbers, or one of objects; NaN or None where there is no answer."""
    values = column.values
    if isinstance(values, np.ndarray) and missing is None:
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values[missing] = np.nan
        return values
    return _objects(values, missing)


def _of_rows(column: Column, missing: Missing | None) -> npt.NDArray[Any]:
    """An object per row; of numbers, the numbers."""
    values = column.values
    return (
        _as_numpy(column, missing) if isinstance(values, np.ndarray) and values.ndim == 1 else _objects(values, missing)
    )


def _objects(values: Iterable[Any], missing: Missing | None) -> npt.NDArray[Any]:
    """An array of objects, whatever they are; vectors are views. Lists have None already where there is no answer."""
    listed = list(values)
    array = np.empty(len(listed), object)
    for number, value in enumerate(listed):
        array[number] = value
    if missing is not None and isinstance(values, np.ndarray):
        array[missing] = None
    return array


@contextmanager
def _words_of_python() -> Iterator[None]:
    """Name options in errors as they are in Python, not as on the command line."""
    try:
        yield
    except PoolhouseError as error:
        error.args = (re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), str(error)),)
        raise
