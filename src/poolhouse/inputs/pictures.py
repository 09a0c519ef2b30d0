"""Pictures of prompts: how a model's prompts are written around them, and tokens with pictures in place.

Content ──PicturePrompts──► text with a placeholder per picture ──tokenizer──► ids ──placed──► Tokens with Pictures
sources ──media────────────► PIL pictures ──PictureProcessor─────────────────► Picture ─┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.prompts import Role
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class PictureProcessor(Protocol):
    """Makes what a tower reads of decoded pictures; safe from several threads."""

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        """The picture of one image. options: the request's `mm_processor_kwargs` over the files' settings.

        Raises:
            InvalidRequest: a picture that the model cannot read (its sides), or an unknown option.
        """
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """A prompt as text, with one placeholder per picture.

    text: what may be cut behind its last picture. tail: what stays, whatever is cut (a suffix, the end of a turn).
    tail_ids: ids behind the tail that stand for no text. add_special_tokens: whether the tokenizer adds its own. images:
    the pictures in the order of their placeholders, where that is not the caller's order (of a pair: the query's, then
    the document's); one of the model's own is ready.
    """

    text: str
    tail: str = ""
    tail_ids: tuple[int, ...] = ()
    add_special_tokens: bool = True
    images: tuple[Image | Picture, ...] | None = None


def plain_prompts(placeholder: str) -> PicturePrompts:
    """The prompts that vLLM 0.32 writes of content: pictures in front of all texts, with nothing between them."""

    def prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
        return Written(placeholder * len(content.images) + content.text)

    return prompts


class PicturePrompts(Protocol):
    """How one family writes its prompts, by its own code."""

    def __call__(self, content: Content, role: Role | None, instruction: str | None) -> Written:
        """The prompt of a text, pictures or both; pictures stand as `PictureReader.placeholder`.

        role: None where the caller says none; pictures are documents then. instruction: of models that read one.
        """
        ...


class PairPrompts(Protocol):
    """How one reranker writes the prompt of a pair, by its own code."""

    def __call__(self, query: Content, document: Content, instruction: str | None) -> Written:
        """The prompt of a pair; pictures stand as `PictureReader.placeholder`. instruction: what makes a document fit."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PictureReader:
    """How one model reads pictures.

    prompts: what writes prompts. pair: what writes those of pairs; None for models that read no pairs.
    placeholder: the text of one picture in prompts. token: the id in it that becomes the picture's ids; a prompt has as
    many as pictures. axes: whether positions have three axes. max_pictures: of one prompt; None for no limit of the
    model's. alone: a prompt is a text or one picture, never both (CLIP); the picture's ids are then the whole prompt.
    instructs: whether prompts are written with an instruction: that of a score, or the checkpoint's prompt that a request
    names.
    """

    processor: PictureProcessor
    prompts: PicturePrompts
    placeholder: str
    token: int
    axes: bool = False
    max_pictures: int | None = None
    alone: bool = False
    pair: PairPrompts | None = None
    instructs: bool = False
