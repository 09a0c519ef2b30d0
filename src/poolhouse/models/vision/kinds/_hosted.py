"""What kinds share that transformers runs: prompts that describe a picture, pictures of one size, tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import BackEnd
from poolhouse.inputs.pictures import PicturePrompts, Written
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer_files import read_tokenizer
from poolhouse.models.files.checkpoint import Config
from poolhouse.packing.tokens import Ids, Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

TEXTS_AS_QUERIES = (
    "Documents that are texts alone are read as queries are, and texts beside pictures behind 'Describe the image.': "
    "its own code knows no other prompts."
)


def described(
    query: str, suffix: str, before: str, behind: str, specials: bool = True, picture: str = "<image>"
) -> PicturePrompts:
    """Prompts that let pictures be described; of a text alone, what queries have.

    query, suffix: around a text alone. before, behind: around the caller's text where there are pictures; the pictures
    stand in `before`, as "{}". specials: whether the tokenizer adds special tokens of its own. picture: what stands
    for one.
    """

    def prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
        text, count = content.text, len(content.images)
        if not count:
            return Written(query + text, suffix, add_special_tokens=specials)
        shown = before.replace("{}", picture * count)
        return Written(shown + (f" {text}" if text else ""), behind, add_special_tokens=specials)

    return prompts


def vlm_part(config: Config) -> Config:
    """The part of a *ForRetrieval of transformers that is the model without its projection.

    Raises:
        CheckpointError: there is none.
    """
    part = config.get("vlm_config")
    if not isinstance(part, dict):
        raise CheckpointError(
            "config.json has no vlm_config, the part that describes the model without its projection."
        )
    return part


class FixedPictures:
    """Pictures that are all resized to one square.

    settings: of the checkpoint's processor. kind: of that processor. tokens: ids that a picture becomes. filled: the one
    of them that its rows replace.
    """

    def __init__(self, settings: Mapping[str, object], kind: str, side: int, tokens: Ids, filled: int) -> None:
        defaults = {} if "size" in settings else {"size": {"height": side, "width": side}}
        self._back_end = BackEnd(kind, settings, **defaults)
        self._side, self._tokens, self._filled = side, tokens, tokens == filled
        rows = int(np.count_nonzero(self._filled))
        sides = math.isqrt(rows)
        self._extent = (sides, sides) if sides**2 == rows else None

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        pixels = squares(self._back_end(image, options)["pixel_values"], self._side)
        return Picture(pixels, self._tokens, self._filled, extent=self._extent)


def squares(pixels: npt.NDArray[Any], side: int) -> npt.NDArray[np.float32]:
    """Pictures, or tiles of one: [pictures, channels, side, side].

    Raises:
        InvalidRequest: other sides than the tower reads.
    """
    if pixels.shape[-2:] != (side, side):
        raise InvalidRequest(
            f"This model reads pictures of {side} x {side} pixels; its picture processor made one of "
            f"{pixels.shape[-1]} x {pixels.shape[-2]}.",
            "mm_processor_kwargs",
        )
    return np.ascontiguousarray(pixels, np.float32)


def tokens_of(folder: Folder) -> Callable[[str], Ids]:
    """What makes tokens of a text by the tokenizer of a folder, without special tokens around it."""
    native = read_tokenizer(folder).native
    return lambda text: np.array(native.encode(text, add_special_tokens=False).ids, np.int64)
