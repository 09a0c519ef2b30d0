"""Content: a message, query or document as its parts, texts and pictures in the caller's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from poolhouse.errors import InvalidRequest, did_you_mean


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture as a caller gives it.

    source: a URL, a data URI or a path (text), bytes, an array [height, width, channels] or a PIL picture. A `Path` is of
    code in this process, and opened without questions.
    path: where it stands in the request, for errors ("messages[0].content[1]").
    """

    source: object
    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Texts and pictures in order."""

    parts: tuple[str | Image, ...]

    @property
    def text(self) -> str:
        """Its texts, one after another."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))


# A query, a document or a prompt: most are texts, and stay texts.
TextOrContent = str | Content


class PILPicture(Protocol):
    """A picture of Pillow, which is imported where pictures are read and nowhere else."""

    @property
    def mode(self) -> str: ...

    @property
    def size(self) -> tuple[int, int]: ...


# A picture by itself; arrays are [height, width, channels].
PictureInput = PILPicture | npt.NDArray[np.uint8]


def parse_content(value: object, path: str) -> Content:
    """The parts of a message, query or document.

    value: a text, a picture (of PIL, or an array), or a list of parts. A part is a text, a picture, or a dict in one of
    the spellings of OpenAI ("text", "image_url", "input_image"), transformers ("image"), vLLM ("image_pil") and Voyage
    ("image_base64"). `type` may be missing; `uuid`, `detail` and further keys change nothing.
    path: where it stands in the request, for errors.

    Raises:
        InvalidRequest: naming the first part that is not read, and what is.
    """
    if isinstance(value, str) or is_picture(value):
        value = [value]
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"{path} must be a text or a list of text and picture parts.", path)
    return Content(tuple(_part(part, f"{path}[{index}]") for index, part in enumerate(value)))


def parse_image(source: object, path: str) -> Image:
    """A picture of its source, which is not looked at yet.

    Raises:
        InvalidRequest: several pictures, or nothing that could be one.
    """
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim > _CHANNELS_LAST):
        raise InvalidRequest(f"{path} holds several pictures or frames; give each a part of its own.", path)
    if isinstance(source, str | bytes | bytearray | memoryview | Path | np.ndarray) or is_picture(source):
        return Image(source, path)
    shown = "null" if source is None else type(source).__name__
    raise InvalidRequest(
        f"{path} is {shown}; a picture is a URL, a data URI, a path, bytes, a PIL picture or an array "
        "[height, width, channels].",
        path,
    )


def from_base64(text: str, path: str) -> Image:
    """A picture of APIs that take bare base64 beside URLs and data URIs."""
    bare = not text[:5].lower().startswith(("http:", "https", "data:", "file:"))
    return Image(f"data:;base64,{text}" if bare else text, path)


def is_picture(value: object) -> bool:
    """Whether a value is a picture and nothing else: of PIL, or an array [height, width, channels]."""
    if isinstance(value, np.ndarray):
        return value.ndim == _CHANNELS_LAST and value.shape[-1] in (1, 3, 4)
    return any(kind.__module__ == "PIL.Image" for kind in type(value).__mro__)


# Dimensions of an array of one picture.
_CHANNELS_LAST = 3
# Types of text parts in OpenAI's chat API and in its responses API; all hold `text`.
_TEXTS = ("text", "input_text", "output_text")
# Types of picture parts, and the keys that may hold the picture.
_PICTURES: Mapping[str, tuple[str, ...]] = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("image", "url", "path", "base64"),
    "image_pil": ("image_pil",),
    "image_base64": ("image_base64",),
}
_KNOWN = (*_TEXTS, *_PICTURES)
# What other models read, and what to give instead.
_VIDEO = "video is not read; give single frames as pictures"
_SOUND = "sound is not read; give texts and pictures"
_FILE = "files are not read; give their pages as pictures and their text as text"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("video", "video_url", "input_video"), _VIDEO),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), _SOUND),
    **dict.fromkeys(("file", "input_file", "document"), _FILE),
    "image_embeds": "vectors of pictures are not read; give the picture itself",
}


def _part(part: object, path: str) -> str | Image:
    if isinstance(part, str):
        return str(part)
    if is_picture(part):
        return parse_image(part, path)
    if not isinstance(part, Mapping):
        shown = "null" if part is None else type(part).__name__
        raise InvalidRequest(f"{path} is {shown}; it must be a text, a picture or a dict with 'type'.", path)
    kind = str(part.get("type") or next((key for key in (*_KNOWN, *_REFUSED) if part.get(key) is not None), "text"))
    if kind in _REFUSED:
        raise InvalidRequest(f"{path} is {kind!r}: {_REFUSED[kind]}.", path)
    if kind in _TEXTS:
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{path} is {kind!r} and needs 'text', a text.", path)
        return str(part["text"])
    if kind not in _PICTURES:
        raise InvalidRequest(
            f"{path} is of an unknown type, {kind!r}.{did_you_mean(kind, _KNOWN)} Types: {list(_KNOWN)}.", path
        )
    return _image(part, kind, path)


def _image(part: Mapping[str, object], kind: str, path: str) -> Image:
    """The picture of a part of this type."""
    keys = _PICTURES[kind]
    key = next((key for key in keys if part.get(key) is not None), None)
    source = None if key is None else part[key]
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        reuse = " A 'uuid' without its picture stands for nothing: pictures are not kept." if part.get("uuid") else ""
        raise InvalidRequest(f"{path} is {kind!r} and needs {' or '.join(map(repr, keys))}.{reuse}", path)
    if key in ("image_base64", "base64") and isinstance(source, str):
        return from_base64(source, path)
    return parse_image(source, path)
