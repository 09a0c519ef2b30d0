"""Vision only: models without a text half, which are refused by name."""

from __future__ import annotations

from functools import partial

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.vision.picture_model import PictureModel


def _ends(config: Config, _: Folder, *, endings: tuple[str, ...]) -> bool:
    return architecture(config).endswith(endings)


def _no_reader(config: Config, _: Folder) -> PictureReader:
    raise CheckpointError(f"{architecture(config)} has no prompts.")


def _refused(name: str, why: str, *endings: str) -> PictureModel:
    return PictureModel(name, partial(_ends, endings=endings), _no_reader, "dense", refused=why)


VISION_ONLY = (
    _refused("a classifier of pictures", "classifiers here read texts", "ForImageClassification"),
    _refused(
        "the picture half of a dual encoder",
        "it has no text half and no tokenizer; load the whole model, which embeds pictures by themselves too",
        *("CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel", "Siglip2VisionModel"),
    ),
    _refused(
        "a picture encoder beside a text model of its own (nomic-embed-vision)",
        "its tower is code of another repository, which neither Poolhouse nor transformers has",
        "NomicVisionModel",
    ),
)
