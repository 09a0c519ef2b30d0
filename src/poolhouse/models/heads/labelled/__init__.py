"""Labelled models: checkpoints that read labels with each text, and wrap an encoder of a family that we know."""

from __future__ import annotations

from collections.abc import Callable

from poolhouse.files import Folder
from poolhouse.models.heads.labelled.files import LabelledFiles
from poolhouse.models.heads.labelled.gliclass import read_gliclass
from poolhouse.models.heads.labelled.gliner import read_gliner
from poolhouse.models.heads.labelled.gliner2 import read_gliner2

# One per kind: what the files in a folder say, or None where they are of another kind. CheckpointError: not served.
READERS: tuple[Callable[[Folder], LabelledFiles | None], ...] = (read_gliner, read_gliner2, read_gliclass)


def read_labelled(folder: Folder) -> LabelledFiles | None:
    """What the files say of reading labels; None for all other models.

    Raises:
        CheckpointError: a kind, or an option of it, that is not served.
    """
    return next((found for read in READERS if (found := read(folder)) is not None), None)
