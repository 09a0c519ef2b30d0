"""Arrow: columns of answers as arrays of Arrow; vectors are fixed-size lists over the memory of their matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from poolhouse.files import pyarrow_module
from poolhouse.jobs.asking import Column

Missing = npt.NDArray[np.bool_]


def arrow_array(column: Column, missing: Missing | None = None, *, fixed: bool = True) -> Any:
    """A value for each row, of one type whatever the rows are.

    missing: [rows], where there is none; a list has None there, and a matrix anything. None: nowhere.
    fixed: whether vectors are fixed-size lists; else lists, for readers that know no others.
    """
    pa, values = pyarrow_module("pyarrow", "Arrow columns"), column.values
    if isinstance(values, np.ndarray):
        return _vectors(pa, values, missing, fixed) if values.ndim == 2 else pa.array(values, mask=missing)
    if column.like is None:
        return pa.array(values, _entities(pa) if column.name == "entities" else pa.string())
    lengths = [0 if one is None else len(one) for one in values]
    flat = np.concatenate([column.like, *(one for one in values if one is not None)]).astype(column.like.dtype)
    inner = _vectors(pa, flat, None, fixed) if flat.ndim == 2 else pa.array(flat)
    return _lists(pa, inner, lengths, missing)


def _vectors(pa: Any, matrix: npt.NDArray[Any], missing: Missing | None, fixed: bool) -> Any:
    """[rows, width] as lists, without a copy; bit patterns of small floats stay integers."""
    flat, (rows, width) = pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape
    if not fixed:
        return _lists(pa, flat, np.full(rows, width), missing)
    return pa.FixedSizeListArray.from_arrays(flat, max(width, 1), mask=None if missing is None else pa.array(missing))


def _lists(pa: Any, values: Any, lengths: npt.ArrayLike, missing: Missing | None) -> Any:
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=None if missing is None else pa.array(missing))


def _entities(pa: Any) -> Any:
    fields = {"label": pa.string(), "score": pa.float32(), "start": pa.int32(), "end": pa.int32(), "text": pa.string()}
    return pa.list_(pa.struct(list(fields.items())))
