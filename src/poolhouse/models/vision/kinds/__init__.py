"""Kinds: the models that read pictures, one file for each group of kin, listed here."""

from __future__ import annotations

from poolhouse.files import Folder
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds.colqwen3 import COLQWEN3
from poolhouse.models.vision.kinds.colqwen3_5 import COLQWEN3_5
from poolhouse.models.vision.kinds.gemma import GEMMA
from poolhouse.models.vision.kinds.llava import LLAVA
from poolhouse.models.vision.kinds.paligemma import PALIGEMMA
from poolhouse.models.vision.kinds.tiled import TILED
from poolhouse.models.vision.picture_model import PictureModel

# The first that matches serves a checkpoint, so those that are found by tensors or by name stand before plainer ones.
KINDS: tuple[PictureModel, ...] = (*COLQWEN3, *PALIGEMMA, *TILED, *GEMMA, *COLQWEN3_5, *LLAVA)


def picture_model_of(config: Config, folder: Folder) -> PictureModel | None:
    """The kind of a checkpoint that reads pictures; None for all others. folder: of its tensors.

    Raises:
        CheckpointError: tensors that are needed to tell and cannot be read.
    """
    return next((kind for kind in KINDS if kind.matches(config, folder)), None)
