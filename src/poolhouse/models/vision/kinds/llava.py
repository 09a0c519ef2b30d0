"""E5-V: LLaVA-NeXT that is asked for one word about a text or a picture; its last state is the vector.

A picture is read in tiles, of a number and shape that fit its sides, and once as a whole; rows that only show padding are
left out, and every line of cells ends in a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import BackEnd, image_settings
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer_files import read_tokenizer
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds._hosted import squares
from poolhouse.models.vision.picture_model import Hosted, PictureModel, named
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_SIZES = "image_sizes"
_HEADER = "<|start_header_id|>"
_BEFORE = f"{_HEADER}user<|end_header_id|>\n\n"
_BEHIND = f"<|eot_id|>{_HEADER}assistant<|end_header_id|>\n\n \n"
_SHAPES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LlavaPictures:
    """Pictures for LLaVA-NeXT.

    settings: of the checkpoint's processor. shapes: heights and widths that tiles may make together. side: of a tile;
    cells: that it has on each side. token: of picture rows. first: rows of a tile before its cells.
    """

    def __init__(
        self,
        settings: Mapping[str, object],
        shapes: list[list[int]],
        side: int,
        cells: int,
        token: int,
        first: int,
    ) -> None:
        # Padding would be tiles that nobody reads.
        self._back_end = BackEnd("LlavaNextImageProcessor", settings, image_grid_pinpoints=shapes, do_pad=False)
        self._shapes, self._side, self._cells, self._token, self._first = shapes, side, cells, token, first

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        if "image_grid_pinpoints" in options:
            raise InvalidRequest("The shapes of tiles are the model's own.", "mm_processor_kwargs")
        pixels = squares(self._back_end(image, options)["pixel_values"][0], self._side)
        ids = np.full(self._rows(image.height, image.width), self._token, np.int64)
        sizes = np.array([[image.height, image.width]], np.int64)
        return Picture(pixels, ids, np.ones(len(ids), np.bool_), more={_SIZES: sizes})

    def _rows(self, height: int, width: int) -> int:
        """Rows of a picture: its cells without those of padding, a row behind each line, and the whole in one tile."""
        down, across = (length // self._side * self._cells for length in self._shape(height, width))
        if width / height > across / down:
            down -= 2 * ((down - int(round(height * (across / width), 7))) // 2)
        else:
            across -= 2 * ((across - int(round(width * (down / height), 7))) // 2)
        return int(down * across + down + self._cells**2 + self._first)

    def _shape(self, height: int, width: int) -> list[int]:
        """The one that shows most of a picture, and wastes least; the first of equally good ones."""

        def fits(shape: list[int]) -> tuple[int, int]:
            scale = min(shape[0] / height, shape[1] / width)
            shown = min(int(height * scale) * int(width * scale), height * width)
            return shown, shown - shape[0] * shape[1]

        return max(self._shapes, key=fits)


def _prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
    if not content.images:
        return Written(f"{_BEFORE}{content.text}", f"\nSummary above sentence in one word: {_BEHIND}")
    if content.text.strip():
        raise InvalidRequest("E5-V reads a text or a picture, not both in one prompt.")
    return Written(f"{_BEFORE}<image>\nSummary above image in one word: ", _BEHIND)


def _reader(config: Config, folder: Folder) -> PictureReader:
    if read_tokenizer(folder).native.token_to_id(_HEADER) is None:
        raise CheckpointError(
            f"{folder}: LLaVA-NeXT is served with the prompts of E5-V, which are Llama 3's, and this tokenizer has no "
            f"{_HEADER}."
        )
    vision = config.get("vision_config") or {}
    side = vision.get("image_size", 336)
    token = config.get("image_token_index") or config.get("image_token_id") or 32000
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    pictures = LlavaPictures(
        image_settings(folder),
        config.get("image_grid_pinpoints") or _SHAPES,
        side,
        side // vision.get("patch_size", 14),
        token,
        int(whole),
    )
    return PictureReader(pictures, _prompts, "<image>", token, max_pictures=1)


def _rows(model: Any, pictures: PackedPictures) -> Tensor:
    return torch.cat(list(model.get_image_features(pictures.pixels, pictures.more(_SIZES)).pooler_output))


LLAVA = (
    PictureModel(
        "E5-V (LLaVA-NeXT)",
        named("LlavaNextForConditionalGeneration"),
        _reader,
        "dense",
        hosted=Hosted(_rows),
        pooling="LAST",
        notes=("Prompts are those of E5-V, which ask for one word about a text or a picture.",),
    ),
)
