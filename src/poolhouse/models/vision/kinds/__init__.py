"""Kinds: the models that read pictures, one file for each group of kin, listed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds.clip import CLIP
from poolhouse.models.vision.kinds.colqwen2 import COLQWEN2
from poolhouse.models.vision.kinds.colqwen3 import COLQWEN3
from poolhouse.models.vision.kinds.colqwen3_5 import COLQWEN3_5
from poolhouse.models.vision.kinds.embedders import EMBEDDERS
from poolhouse.models.vision.kinds.gemma import GEMMA
from poolhouse.models.vision.kinds.jina_v4 import JINA_V4
from poolhouse.models.vision.kinds.llava import LLAVA
from poolhouse.models.vision.kinds.nemotron import NEMOTRON
from poolhouse.models.vision.kinds.paligemma import PALIGEMMA
from poolhouse.models.vision.kinds.refused import REFUSED
from poolhouse.models.vision.kinds.rerankers import RERANKERS
from poolhouse.models.vision.kinds.siglip import SIGLIP
from poolhouse.models.vision.kinds.tiled import TILED
from poolhouse.models.vision.kinds.vision_only import VISION_ONLY
from poolhouse.models.vision.picture_model import PictureModel

# The first that matches serves a checkpoint, so those that are found by tensors or by name stand before plainer ones.
KINDS: tuple[PictureModel, ...] = (
    *RERANKERS,
    *COLQWEN3,
    *COLQWEN2,
    *JINA_V4,
    *EMBEDDERS,
    *PALIGEMMA,
    *TILED,
    *GEMMA,
    *COLQWEN3_5,
    *LLAVA,
    *NEMOTRON,
    *REFUSED,
    CLIP,
    *SIGLIP,
    *VISION_ONLY,
)


def picture_model_of(
    config: Config, folder: Folder, names: Callable[[], Iterable[str]] = tuple, rerankers: bool = True
) -> PictureModel | None:
    """The kind of a checkpoint that reads pictures; None for all others.

    folder: of its tensors. names: what it and the bases of its card are called. rerankers: whether it may be one.

    Raises:
        CheckpointError: tensors that are needed to tell and cannot be read, or a model that is not served.
    """
    fitting = (kind for kind in KINDS if (rerankers or kind.answers != "score") and kind.matches(config, folder))
    found = next((kind for kind in fitting if not kind.named or _is_named(kind, config, names())), None)
    if found is not None and found.refused:
        raise CheckpointError(f"{folder} is {found.name}, which is not served: {found.refused}.")
    return found


def _is_named(kind: PictureModel, config: Config, names: Iterable[str]) -> bool:
    """Whether a checkpoint has a name of this kind; vLLM's overrides of rerankers say as much."""
    overridden = config.get("classifier_from_token") is not None or config.get("is_original_qwen3_reranker")
    if kind.tokens is not None and overridden:
        return True
    return any(part in name.lower() for name in names for part in kind.named)
