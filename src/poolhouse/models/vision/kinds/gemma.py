"""EmbeddingGemma 2: texts and pictures in one space; a picture has few or many rows, by its sides.

Its tower for sounds is left out. Tasks are told by the checkpoint's prompts, which stand before the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import BackEnd, image_settings
from poolhouse.inputs.pictures import PicturePrompts, PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer_files import read_tokenizer
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.vision.picture_model import Hosted, PictureModel
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_POSITIONS = "image_position_ids"


class GemmaPictures:
    """Pictures for Gemma 4's tower, without the padding that transformers adds.

    settings: of the checkpoint's processor. marks: ids before and after a picture's rows. token: of its rows.
    """

    def __init__(self, settings: Mapping[str, object], marks: tuple[int, int], token: int) -> None:
        self._back_end = BackEnd("Gemma4ImageProcessor", settings)
        self._marks, self._token = marks, token

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        values = self._back_end(image, options)
        positions = values[_POSITIONS][0]
        there = (positions >= 0).all(axis=-1)
        rows = int(values["num_soft_tokens_per_image"][0])
        ids = np.array([self._marks[0], *[self._token] * rows, self._marks[1]], np.int64)
        pixels = values["pixel_values"][0][there].astype(np.float32, copy=False)
        return Picture(pixels, ids, ids == self._token, more={_POSITIONS: positions[there]})


def _reader(config: Config, folder: Folder) -> PictureReader:
    token = config.get("image_token_id", 258880)
    marks = (config.get("boi_token_id", 255999), config.get("eoi_token_id", 258882))
    placeholder = read_tokenizer(folder).native.id_to_token(token)
    if placeholder is None:
        raise CheckpointError(f"{folder}: the tokenizer has no token {token}, which stands for a picture.")
    pictures = GemmaPictures(image_settings(folder), marks, token)
    return PictureReader(pictures, _prompts(placeholder), placeholder, token, instructs=True)


def _prompts(placeholder: str) -> PicturePrompts:
    def prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
        between = "" if content.text else " "
        return Written((instruction or "") + between.join(_part(part, placeholder) for part in content.parts))

    return prompts


def _part(part: object, placeholder: str) -> str:
    return part if isinstance(part, str) else placeholder


def _rows(model: Any, pictures: PackedPictures) -> Tensor:
    # One at a time: the tower takes pictures of one length together, and pads the others.
    return torch.cat([_of_one(model, one) for one in pictures.each()])


def _of_one(model: Any, picture: PackedPictures) -> Tensor:
    parts: list[Tensor] = model.get_image_features(picture.pixels[None], picture.more(_POSITIONS)[None]).pooler_output
    return parts[0]


def _matches(config: Config, _: Folder) -> bool:
    return architecture(config) == "EmbeddingGemma2Model" and isinstance(config.get("vision_config"), dict)


GEMMA = (
    PictureModel(
        "EmbeddingGemma 2",
        _matches,
        _reader,
        "dense",
        hosted=Hosted(_rows, lambda config: {**config, "audio_config": None}),
        pooling="MEAN",
        aside=(r"(.*\.)?(audio_tower|embed_audio)\..*",),
        notes=("Texts and pictures are read; sounds and videos are not.",),
    ),
)
