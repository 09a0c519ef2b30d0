"""JSON files of a model folder, read with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poolhouse.errors import CheckpointError


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file and none is needed.

    Raises:
        CheckpointError: no JSON, or no object.
    """
    if not needed and not path.is_file():
        return {}
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def read_any_json(path: Path) -> Any:
    """Whatever JSON a file holds.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
