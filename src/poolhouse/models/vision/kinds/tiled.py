"""Pictures in tiles: ColIdefics3 (ColSmol) and ColModernVBERT, which read a picture in parts and once as a whole.

Each tile has a mark with its row and column, and as many rows as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.media.processor import BackEnd, image_settings
from poolhouse.inputs.pictures import PicturePrompts, PictureReader
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds._hosted import TEXTS_AS_QUERIES, described, squares, tokens_of, vlm_part
from poolhouse.models.vision.kinds._qwen import processor_settings
from poolhouse.models.vision.picture_model import Hosted, PictureModel, named
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Ids, Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_AUGMENTED = "<end_of_utterance>" * 10
_EDGE = "<fake_token_around_image>"


class TiledPictures:
    """Pictures for Idefics3's towers: tiles of one size, and the whole picture in that size behind them.

    settings: of the checkpoint's processor. side: of a tile, in pixels. rows: that a tile becomes. token: the id of
    picture tokens. tokens: of a text.
    """

    def __init__(
        self, settings: Mapping[str, object], side: int, rows: int, token: int, tokens: Callable[[str], Ids]
    ) -> None:
        self._back_end = BackEnd("Idefics3ImageProcessor", settings, return_row_col_info=True)
        self._side, self._rows, self._token, self._tokens = side, rows, token, tokens
        self._ids = lru_cache(maxsize=64)(self._marked)

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        values = self._back_end(image, options)
        tiles = squares(values["pixel_values"][0], self._side)
        if not tiles.any(axis=(1, 2, 3)).all():
            # The model takes such a tile for padding and drops it.
            raise InvalidRequest(
                "A tile of the picture is zero everywhere once normalised, which the model cannot read."
            )
        shape = int(values["rows"][0][0]), int(values["cols"][0][0])
        ids = self._ids(*shape)
        return Picture(tiles, ids, ids == self._token, cells=self._cells(*shape))

    def _marked(self, rows: int, columns: int) -> Ids:
        """The ids of a picture in so many tiles; 0 by 0 for one that is small enough to stand whole."""
        shown = "<image>" * self._rows
        lines = (
            "".join(f"{_EDGE}<row_{row}_col_{column}>{shown}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return self._tokens("".join(lines) + ("\n" if rows else "") + f"{_EDGE}<global-img>{shown}{_EDGE}")

    def _cells(self, rows: int, columns: int) -> Ids:
        """The rows of the tiles as they lie side by side; those of the whole picture where it has no tiles."""
        side, down, across = math.isqrt(self._rows), max(rows, 1), max(columns, 1)
        tiles = np.arange(down * across * side**2).reshape(down, across, side, side)
        return tiles.swapaxes(1, 2).reshape(down * side, across * side)


def _whole(config: Config) -> Config:
    return config


def _reader(
    config: Config,
    folder: Folder,
    *,
    prompts: Callable[[Config], PicturePrompts],
    part: Callable[[Config], Config] = _whole,
    patch: int,
    shuffle: int,
    token: int,
) -> PictureReader:
    """prompts: by the settings of the processor. part: of config.json that is the model without its head, whose defaults
    are patch, shuffle (how many patches a side make one row) and token.
    """
    model = part(config)
    vision = model.get("vision_config") or {}
    shuffle = model.get("scale_factor") or model.get("pixel_shuffle_factor") or shuffle
    side = vision.get("image_size", 224)
    rows = (side // vision.get("patch_size", patch)) ** 2 // shuffle**2
    token = model.get("image_token_id", token)
    pictures = TiledPictures(image_settings(folder), side, rows, token, tokens_of(folder))
    return PictureReader(pictures, prompts(processor_settings(folder)), "<image>", token)


def _idefics3_prompts(settings: Config) -> PicturePrompts:
    shown = "<|im_start|>User:{}Describe the image."
    return described(settings.get("query_prefix", "Query: "), _AUGMENTED, shown, "<end_of_utterance>\nAssistant:")


def _modernvbert_prompts(settings: Config) -> PicturePrompts:
    shown, end = "<|begin_of_text|>User:{}Describe the image.", "<end_of_utterance>\nAssistant:"
    stated = str(settings.get("visual_prompt_prefix") or "")
    if "<image>" in stated:
        before, token, behind = stated.rpartition("<end_of_utterance>")
        shown, end = (before or behind).replace("<image>", "{}"), f"{token}{behind}" if before else ""
    return described(settings.get("query_prefix") or "", _AUGMENTED, shown, end)


def _rows(model: Any, pictures: PackedPictures) -> Tensor:
    # Tiles of all pictures are given as those of one prompt.
    parts: list[Tensor] = model.get_image_features(pixel_values=pictures.pixels[None]).pooler_output
    return torch.cat(list(parts))


_ONE_TILE = {"do_image_splitting": False}
_IDEFICS3 = partial(_reader, prompts=_idefics3_prompts, patch=32, shuffle=2, token=128257)
_MODERNVBERT = partial(_reader, prompts=_modernvbert_prompts, patch=16, shuffle=4, token=50407)
_COLIDEFICS3 = PictureModel(
    "ColIdefics3",
    named("ColIdefics3"),
    _IDEFICS3,
    "late",
    hosted=Hosted(_rows, probe=_ONE_TILE),
    projections=("linear",),
    notes=("Queries begin with 'Query: ', as in MTEB; colpali-engine's class has no prefix.", TEXTS_AS_QUERIES),
)
_BIIDEFICS3 = replace(
    _COLIDEFICS3, name="BiIdefics3", matches=named("BiIdefics3"), answers="dense", projections=(), pooling="LAST"
)
_COLMODERNVBERT = PictureModel(
    "ColModernVBERT of transformers",
    named("ColModernVBertForRetrieval"),
    partial(_MODERNVBERT, part=vlm_part),
    "late",
    hosted=Hosted(_rows, vlm_part, probe=_ONE_TILE),
    projections=("embedding_proj_layer", "custom_text_proj"),
    width=lambda config: config.get("embedding_dim"),
    # An attention that pools pictures, which nobody asks.
    aside=(r"(.*\.)?vision_model\.head\..*",),
    notes=(TEXTS_AS_QUERIES,),
)
_ENGINE = replace(
    _COLMODERNVBERT,
    name="ColModernVBERT of colpali-engine",
    matches=named("ColModernVBert"),
    reader=_MODERNVBERT,
    hosted=Hosted(_rows, probe=_ONE_TILE),
    projections=("custom_text_proj",),
    width=lambda config: None,
)
_BIMODERNVBERT = replace(
    _ENGINE, name="BiModernVBERT", matches=named("BiModernVBert"), answers="dense", projections=(), pooling="MEAN"
)
TILED = (_COLIDEFICS3, _BIIDEFICS3, _COLMODERNVBERT, _ENGINE, _BIMODERNVBERT)
