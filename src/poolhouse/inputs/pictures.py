"""Pictures of prompts: how a model's prompts are written around them, and tokens with pictures in place.

Content ──PicturePrompts──► text with a placeholder per picture ──tokenizer──► ids ──placed──► Tokens with Pictures
sources ──media────────────► PIL pictures ──PictureProcessor─────────────────► Picture ─┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from poolhouse.errors import InputTooLong, InvalidRequest
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.limits import CHARACTERS_PER_TOKEN, SURPLUS, Limit, too_many_tokens
from poolhouse.inputs.prompts import Prompt, Role
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Flags, Ids, Offsets, Picture, Pictures, Tokens

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
    tail_ids: ids behind all that, which stand for no text. add_special_tokens: whether the tokenizer adds its own.
    images: the pictures in the order of their placeholders, where that is not the caller's order (of a pair: the query's,
    then the document's); one of the model's own is ready.
    """

    text: str
    tail: str = ""
    add_special_tokens: bool = True
    images: tuple[Image | Picture, ...] | None = None
    tail_ids: tuple[int, ...] = ()

    @property
    def whole(self) -> str:
        """All of its text."""
        return self.text + self.tail


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
    model's. alone: a prompt is a text or one picture, never both (CLIP); the picture's ids are then the whole prompt, and
    `token` is none.
    instructs: whether prompts are written with an instruction: that of a score, or the checkpoint's prompt that a request
    names. alike: task adapters for which queries and documents are written like texts of no role.
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
    alike: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class WrittenPrompt:
    """A prompt of a model that reads pictures, and the pictures of its placeholders, in order.

    ids: token ids of the caller, which stand for the text. text: that of the caller, where its offsets are asked for.
    """

    written: Written
    pictures: tuple[Picture, ...] = ()
    ids: Ids | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PicturePair:
    """A pair that is not written yet, since its texts may be cut before. pictures: the query's, then the document's."""

    query: Content
    document: Content
    instruction: str | None = None
    pictures: tuple[Picture, ...] = ()


def in_order(written: Written, images: Sequence[Image], pictures: tuple[Picture, ...]) -> WrittenPrompt:
    """A prompt and its pictures in the order of their placeholders. pictures: of these images."""
    if written.images is None:
        return WrittenPrompt(written, pictures)
    loaded = dict(zip(map(id, images), pictures, strict=True))
    shown = (image if isinstance(image, Picture) else loaded[id(image)] for image in written.images)
    return WrittenPrompt(written, tuple(shown))


class PictureTokens:
    """The tokenizer of prompts with pictures: texts to ids, placeholders to pictures, all within limits.

    Only text behind the last picture is cut, and the tail stays.
    """

    def __init__(self, reader: PictureReader, tokenizer: Tokenizer) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._tails: dict[str, Ids] = {}
        # Tokens of a placeholder behind that of the picture; they stay with it.
        ends = np.flatnonzero(self._tail(reader.placeholder)[::-1] == reader.token)
        self._behind = int(ends[0]) if len(ends) else 0

    def encode(
        self, prompts: Sequence[WrittenPrompt | PicturePair], limits: Sequence[Limit]
    ) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt, or an error for it alone."""
        results: dict[int, Tokens | InvalidRequest] = {}
        written: dict[int, tuple[WrittenPrompt, Limit, int]] = {}
        texts: list[tuple[Prompt, Limit]] = []
        for index, (given, limit) in enumerate(zip(prompts, limits, strict=True)):
            try:
                prompt, own, lost = self._written(given, limit) if isinstance(given, PicturePair) else (given, limit, 0)
                if self._reader.alone and prompt.pictures:
                    results[index] = _alone(prompt)
                    continue
                texts.append(_text(prompt, own))
                written[index] = prompt, own, lost
            except InvalidRequest as error:
                results[index] = error
        encoded = self._tokenizer.encode([text for text, _ in texts], [limit for _, limit in texts])
        for (index, (prompt, limit, lost)), (text, _), tokens in zip(written.items(), texts, encoded, strict=True):
            try:
                if isinstance(tokens, InvalidRequest):
                    raise tokens
                found = self._within_limit(prompt, limit, tokens, text)
                if lost:
                    found = replace(found, original_tokens=found.original_tokens + lost, original_is_estimate=True)
                results[index] = found
            except InvalidRequest as error:
                results[index] = error
        return [results[index] for index in range(len(prompts))]

    def _written(self, pair: PicturePair, limit: Limit) -> tuple[WrittenPrompt, Limit, int]:
        """The prompt of a pair, what limits it, and how many tokens of its texts were cut before.

        Each text is cut to its own limit; of a pair that is too long as a whole, the document.
        """
        assert self._reader.pair is not None
        images, keep, side = (*pair.query.images, *pair.document.images), limit.cut, limit.side
        query, lost = self._cut(pair.query, limit.max_query_tokens, side)
        most = min((own for own in (limit.max_document_tokens, keep) if own is not None), default=None)
        document, more = self._cut(pair.document, most, side)
        prompt = in_order(self._reader.pair(query, document, pair.instruction), images, pair.pictures)
        shown = sum(len(picture.ids) for picture in prompt.pictures)
        if keep is not None and len(prompt.written.whole.encode()) + shown > keep:
            whole = self._within_limit(prompt, Limit(2**62), *self._whole(prompt, limit))
            length = sum(self._length(part) for part in document.parts if isinstance(part, str))
            if length and len(whole) > keep:
                document, again = self._cut(document, max(length - (len(whole) - keep), 0), side)
                more += again
                prompt = in_order(self._reader.pair(query, document, pair.instruction), images, pair.pictures)
        return prompt, replace(limit, max_query_tokens=None, max_document_tokens=None), lost + more

    def _whole(self, prompt: WrittenPrompt, limit: Limit) -> tuple[Tokens, Prompt]:
        """All tokens of a text, and the text."""
        text, unlimited = _text(prompt, replace(limit, keep=None, overflow="chunk", max_prompt_tokens=None))
        (tokens,) = self._tokenizer.encode([text], [unlimited])
        if isinstance(tokens, InvalidRequest):
            raise tokens
        return tokens, text

    def _cut(self, content: Content, tokens: int | None, side: str) -> tuple[Content, int]:
        """A content whose texts have at most so many tokens, and how many those have that were cut. Pictures stay."""
        texts = [part for part in content.parts if isinstance(part, str)]
        if tokens is None or sum(len(text.encode()) for text in texts) <= tokens:
            return content, 0
        parts: list[str | Image] = []
        lost = 0
        for part in content.parts if side == "right" else content.parts[::-1]:
            if isinstance(part, Image):
                parts.append(part)
                continue
            kept, dropped = self._tokenizer.rendered.cut_text(part, max(tokens, 1), side)
            if tokens < 1:
                kept, dropped = "", dropped + self._length(kept)
            parts.append(kept)
            tokens -= self._length(kept)
            lost += dropped
        return Content(tuple(parts if side == "right" else parts[::-1])), lost

    def _length(self, text: str) -> int:
        """Tokens of a text."""
        (ids,) = self._tokenizer.rendered.content([text])
        if isinstance(ids, InvalidRequest):
            raise ids
        return len(ids)

    def _within_limit(self, prompt: WrittenPrompt, limit: Limit, tokens: Tokens, text: Prompt) -> Tokens:
        """The tokens with pictures in place, cut where they may be. text: what was tokenised.

        Raises:
            InvalidRequest: not as many placeholders as pictures. InputTooLong: what may not be cut is too long.
        """
        written, pictures = prompt.written, prompt.pictures
        head, end = (0, 0) if prompt.ids is not None or not _special(written, limit) else self._tokenizer.special_ends
        tail, length = self._tail(written.tail), len(tokens) - end
        if prompt.ids is None and text.text == written.whole:
            length -= len(tail)
            tail = tokens.ids[length:]
        else:
            tail = np.concatenate((tail, tokens.ids[length:]))
        tail = np.concatenate((tail, np.array(written.tail_ids, np.int64)))
        ids = tokens.ids[:length]
        places = np.flatnonzero(ids == self._reader.token)
        if len(places) < len(pictures) and tokens.truncated:
            raise _too_long(limit, tokens.original_tokens)
        if len(places) != len(pictures):
            (token,) = self._tokenizer.decoder.strings([self._reader.token])
            raise InvalidRequest(
                f"The prompt has {len(places)} placeholders ({token!r}) and {len(pictures)} pictures; it needs one for each "
                "picture, and no text may hold another.",
                "prompt",
            )
        ids, filled = placed(ids, places, pictures)
        # Ids up to the last picture, or of special tokens, stay; and so do those behind the text.
        floor = len(ids) - max(length - int(places[-1]) - 1 - self._behind, 0) if pictures else head
        original = tokens.original_tokens - len(tokens) + len(ids) + len(tail)
        room = self._kept(limit, original, pictures, floor + len(tail), head + len(tail)) - len(tail)
        kept = np.arange(len(ids))
        if len(ids) > room:
            rest = len(ids) - (room - floor)
            kept = np.r_[0:room] if limit.side == "right" else np.r_[0:floor, rest : len(ids)]
            ids, filled = ids[kept], filled[kept]
        filled = np.concatenate((filled, np.zeros(len(tail), np.bool_)))
        shown = Pictures(pictures, filled, axes_of(filled, pictures) if self._reader.axes else None)
        return Tokens(
            np.concatenate((ids, tail)),
            original_tokens=original,
            original_is_estimate=tokens.original_is_estimate,
            offsets=None if tokens.offsets is None else _in_text(tokens.offsets.take(kept), prompt, len(tail)),
            pictures=shown if pictures else None,
        )

    def _kept(self, limit: Limit, total: int, pictures: Sequence[Picture], fixed: int, around: int) -> int:
        """How many tokens of the prompt are kept.

        fixed: tokens that are never cut. around: those among them that are neither text nor before the last picture.

        Raises:
            InputTooLong: a prompt that is too long and may not be cut, or not so far.
        """
        keep = limit.cut
        if limit.max_query_tokens is not None:
            # The limit of one text, which counts no pictures.
            own = max(limit.max_query_tokens + around + sum(len(picture.ids) for picture in pictures), fixed)
            keep = own if keep is None else min(keep, own)
        if keep is None:
            longest = limit.max_pass_tokens if pictures else limit.max_uncut_tokens
            if longest is not None and total > longest:
                raise _too_long(limit, total) if pictures else too_many_tokens(longest, total)
            return total
        if total > keep and keep < max(fixed, 1):
            if pictures:
                raise _too_long(limit, fixed, keep)
            raise InvalidRequest(
                f"truncate_prompt_tokens={keep} leaves no room beside the {fixed} tokens around each text.",
                "truncate_prompt_tokens",
                keep,
            )
        return keep

    def _tail(self, tail: str) -> Ids:
        """The ids of a text that many prompts end in."""
        if tail not in self._tails:
            (tokens,) = self._tokenizer.encode([Prompt(tail)], [Limit(2**30, add_special_tokens=False)])
            if isinstance(tokens, InvalidRequest):
                raise tokens
            self._tails[tail] = tokens.ids
        return self._tails[tail]


def _alone(prompt: WrittenPrompt) -> Tokens:
    """A prompt that is one picture."""
    if len(prompt.pictures) > 1 or prompt.ids is not None or prompt.written.text:
        raise InvalidRequest(
            "This model accepts text-only or image-only inputs, not both! Give a picture an empty prompt, and a text a prompt "
            "of its own.",
            "prompt",
        )
    (picture,) = prompt.pictures
    shown = Pictures(prompt.pictures, picture.filled)
    return Tokens(picture.ids, original_tokens=len(picture.ids), pictures=shown)


def _in_text(found: Offsets, prompt: WrittenPrompt, behind: int) -> Offsets:
    """Offsets in the caller's text of those in the prompt, of a text alone. behind: tokens of the tail."""
    start, length = prompt.written.text.rfind(prompt.text), len(prompt.text)
    bounds = np.clip(found.bounds - start, 0, length)
    outside = (bounds[:, 0] == bounds[:, 1]) | found.special
    bounds[outside] = 0
    words = np.where(outside, -1, found.words - found.words[~outside].min(initial=found.words.max(initial=0)))
    return Offsets(
        np.concatenate((bounds, np.zeros((behind, 2), np.int64))),
        np.concatenate((words, np.full(behind, -1))),
        np.concatenate((outside, np.ones(behind, np.bool_))),
    )


def _special(written: Written, limit: Limit) -> bool:
    return written.add_special_tokens and limit.add_special_tokens


def _text(prompt: WrittenPrompt, limit: Limit) -> tuple[Prompt, Limit]:
    """What is tokenised: all of the prompt; of one far over its limit, the part of its text that could be kept, and more."""
    special = _special(prompt.written, limit)
    whole = Limit(2**62, add_special_tokens=special, lower_case=limit.lower_case, offsets=limit.offsets)
    if prompt.ids is not None:
        return Prompt(None, prompt.ids), whole
    keep, text = limit.cut, prompt.written.text
    wanted = limit.max_uncut_tokens if keep is None else keep
    # What is cut at its beginning may have pictures there, which stay.
    if (
        wanted is None
        or len(text) <= 2 * CHARACTERS_PER_TOKEN * (wanted + SURPLUS)
        or (prompt.pictures and limit.side == "left")
    ):
        return Prompt(prompt.written.whole), whole
    return Prompt(text), replace(whole, keep=wanted + SURPLUS, side=limit.side)


def _too_long(limit: Limit, tokens: int, keep: int | None = None) -> InputTooLong:
    """The error for a prompt whose pictures, and what stands around them, are too long."""
    return InputTooLong(
        f"The prompt has {tokens} tokens that are not cut, pictures and what is written around them, but at most "
        f"{limit.max_pass_tokens if keep is None else keep} are read. A prompt with pictures is never split, and cut behind its "
        "last picture only; show smaller ones (mm_processor_kwargs: max_pixels), fewer, or a shorter text.",
        "input_tokens",
        tokens,
    )


def placed(ids: Ids, places: Ids, pictures: Sequence[Picture]) -> tuple[Ids, Flags]:
    """Ids with pictures in the places of their placeholders, and which of them the towers' rows replace.

    places: [pictures], the indices of placeholders among the ids.
    """
    parts: list[Ids] = []
    filled: list[Flags] = []
    end = 0
    for place, picture in zip(places.tolist(), pictures, strict=True):
        parts += (ids[end:place], picture.ids)
        filled += (np.zeros(place - end, np.bool_), picture.filled)
        end = place + 1
    return np.concatenate((*parts, ids[end:])), np.concatenate((*filled, np.zeros(len(ids) - end, np.bool_)))


def axes_of(filled: Flags, pictures: Sequence[Picture]) -> Ids:
    """[3, tokens]: the positions of each token in time, down and across (M-RoPE).

    A text token takes the next position on all three. A picture of so many merged rows and columns stands at one moment,
    its rows and columns are counted from there, and the next token comes behind the longer side. Source: Qwen2-VL.
    """
    extents = [picture.extent for picture in pictures]
    steps = np.ones(len(filled), np.int64)
    steps[filled] = 0
    within = np.zeros((3, int(filled.sum())), np.int64)
    shown, begin = np.flatnonzero(filled), 0
    for extent in extents:
        assert extent is not None
        rows, columns = extent
        end = begin + rows * columns
        within[1, begin:end] = np.repeat(np.arange(rows), columns)
        within[2, begin:end] = np.tile(np.arange(columns), rows)
        steps[shown[end - 1]] = max(rows, columns)
        begin = end
    axes = np.tile(np.cumsum(steps) - steps, (3, 1))
    axes[:, filled] += within
    return axes
