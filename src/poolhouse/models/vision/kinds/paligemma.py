"""PaliGemma's kin: ColPali, as transformers and as colpali-engine save it, and BiPali, its mean.

Every token of a prompt sees every other. Prompts are those of their own classes; "Query: " before queries of
colpali-engine's models is what MTEB measures them with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from poolhouse.files import Folder
from poolhouse.inputs.media.processor import image_settings
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds._hosted import TEXTS_AS_QUERIES, FixedPictures, described, vlm_part
from poolhouse.models.vision.kinds._qwen import processor_settings
from poolhouse.models.vision.picture_model import Hosted, PictureModel, named
from poolhouse.packing.pack import PackedPictures

_PADDING = "<pad>" * 10


def _pictures(config: Config, folder: Folder) -> tuple[FixedPictures, int]:
    """A processor, and the id of picture tokens. config: of PaliGemma."""
    vision = config.get("vision_config") or {}
    side, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
    token = config.get("image_token_index") or config.get("image_token_id") or 256000
    tokens = np.full((side // patch) ** 2, token, np.int64)
    return FixedPictures(image_settings(folder), "SiglipImageProcessor", side, tokens, token), token


def _by_transformers(config: Config, folder: Folder) -> PictureReader:
    settings = processor_settings(folder)
    query = settings.get("query_prefix", "Question: ")
    shown = settings.get("visual_prompt_prefix", "Describe the image.")
    prompts = described(f"<bos>{query}", f"{_PADDING}\n", f"{{}}<bos>{shown}", "\n", specials=False)
    pictures, token = _pictures(vlm_part(config), folder)
    return PictureReader(pictures, prompts, "<image>", token)


def _by_engine(config: Config, folder: Folder) -> PictureReader:
    # PaliGemma's processor puts a <bos> behind pictures, and the class a second one.
    prompts = described("<bos>Query: ", _PADDING, "{}<bos><bos>Describe the image.", "\n", specials=False)
    pictures, token = _pictures(config, folder)
    return PictureReader(pictures, prompts, "<image>", token)


def _rows(model: Any, pictures: PackedPictures) -> Tensor:
    rows: Tensor = model.get_image_features(pixel_values=pictures.pixels).pooler_output
    return rows.flatten(0, 1)


_COLPALI = PictureModel(
    "ColPali of transformers",
    named("ColPaliForRetrieval"),
    _by_transformers,
    "late",
    hosted=Hosted(_rows, vlm_part),
    projections=("embedding_proj_layer", "custom_text_proj"),
    width=lambda config: config.get("embedding_dim"),
    notes=(TEXTS_AS_QUERIES,),
)
_ENGINE = replace(
    _COLPALI,
    name="ColPali of colpali-engine",
    matches=named("ColPali"),
    reader=_by_engine,
    hosted=Hosted(_rows),
    projections=("custom_text_proj",),
    width=lambda config: None,
    notes=("Queries begin with 'Query: ', as in MTEB; colpali-engine's class has no prefix.", TEXTS_AS_QUERIES),
)
_BIPALI = replace(
    _ENGINE, name="BiPali of colpali-engine", matches=named("BiPali"), answers="dense", projections=(), pooling="MEAN"
)
PALIGEMMA = (_COLPALI, _ENGINE, _BIPALI)
