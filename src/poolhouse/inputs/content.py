"""Content: a message, query or document as its parts, texts and pictures in the caller's order."""

from __future__ import annotations

from dataclasses import dataclass


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


def from_base64(text: str, path: str) -> Image:
    """A picture of APIs that take bare base64 beside URLs and data URIs."""
    bare = not text[:5].lower().startswith(("http:", "https", "data:", "file:"))
    return Image(f"data:;base64,{text}" if bare else text, path)
