"""Images: bytes, arrays and PIL pictures of strangers become RGB pictures, or an error that names the item.

Only formats with careful decoders are opened, the first frame is taken, and nothing is decoded before its header was checked.
Transparency is flattened on white, as vLLM does it; transformers drops it, so that what lies beneath shows. All else is as
PIL converts it to RGB, as in both: 16 bit grey is cut off at 255, not scaled.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from poolhouse.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """max_pixels: of a picture, by its header. max_ratio: its longer side over the shorter."""

    max_pixels: int = 50_000_000
    max_ratio: float = 200.0

    def check(self, width: int, height: int, path: str) -> None:
        """Raise InvalidRequest for a picture that is too large or too thin."""
        if min(width, height) < 1:
            raise InvalidRequest(f"{path}: the picture is empty ({width} x {height}).", path)
        if width * height > self.max_pixels:
            raise InvalidRequest(
                f"{path}: the picture has {width} x {height} pixels; at most {self.max_pixels} are read (max_image_pixels).",
                path,
            )
        if max(width, height) > self.max_ratio * min(width, height):
            raise InvalidRequest(
                f"{path}: the picture of {width} x {height} has a side ratio of over {self.max_ratio:g} (max_image_ratio).",
                path,
            )


def decoded(source: object, path: str, limits: ImageLimits) -> PILImage:
    """The RGB picture of bytes of a file, of an array [height, width] or [height, width, 1, 3 or 4] uint8, or of PIL's.

    path: how errors name it.

    Raises:
        InvalidRequest: it is none of these, over a limit, or damaged.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InvalidRequest("Reading pictures needs Pillow: pip install 'poolhouse[images]'.", path) from None
    if isinstance(source, bytes | bytearray | memoryview):
        return _of_bytes(source, path, limits)
    if isinstance(source, np.ndarray):
        return _of_array(source, path, limits)
    if isinstance(source, Image.Image):
        return _rgb(source, path, limits)
    raise InvalidRequest(
        f"{path}: a picture is a URL, a data URI, a path, bytes, a numpy array or a PIL picture, not {type(source).__name__}.",
        path,
    )


def bytes_of_base64(text: str, path: str, max_bytes: int) -> bytes:
    """The bytes that strict base64 stands for.

    Raises:
        InvalidRequest: a sign that does not belong there, wrong padding, or too many bytes.
    """
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # binascii.Error is one, and so is a sign beyond ASCII
        raise InvalidRequest(f"{path}: the picture is not valid base64: {error}.", path) from None
    if len(data) > max_bytes:
        raise too_many_bytes(path, max_bytes)
    return data


def too_many_bytes(path: str, max_bytes: int) -> InvalidRequest:
    """The error for a picture whose file is too large."""
    return InvalidRequest(f"{path}: the picture has more than {max_bytes} bytes (max_image_bytes).", path)


def _of_bytes(data: bytes | bytearray | memoryview, path: str, limits: ImageLimits) -> PILImage:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidRequest(
            f"{path}: these {len(data)} bytes are no picture of a format that is read: {', '.join(FORMATS)}.", path
        ) from None
    except Exception as error:
        raise _damaged(path, error) from error
    return _rgb(picture, path, limits)


def _of_array(array: np.ndarray, path: str, limits: ImageLimits) -> PILImage:
    from PIL import Image

    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise InvalidRequest(
            f"{path}: an array is a picture as uint8 [height, width] or [height, width, channels] with 1, 3 or 4 of them, "
            f"not {array.dtype} {list(shape)}.",
            path,
        )
    limits.check(shape[1], shape[0], path)
    return _rgb(Image.fromarray(array[..., 0] if shape[2:] == (1,) else array), path, limits)


def _rgb(picture: PILImage, path: str, limits: ImageLimits) -> PILImage:
    from PIL import Image, ImageOps

    limits.check(picture.width, picture.height, path)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"{path}: the picture cannot be decoded: {error}.", path)
