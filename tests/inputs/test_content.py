"""Parts of messages, queries and documents in every spelling, and the pictures of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import Content, Image, parse_content
from poolhouse.inputs.prompts import Conversation, Prompt, images_of, parse_prompts, parse_texts

PIXELS = np.zeros((4, 6, 3), np.uint8)
PICTURE = PIL.fromarray(PIXELS)
URL = "https://example.org/a.png"


def shown(content: Content) -> list[object]:
    """The texts, and the sources of the pictures."""
    return [part.source if isinstance(part, Image) else part for part in content.parts]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, URL),
        ({"type": "image_url", "image_url": URL, "uuid": "x"}, URL),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, URL),
        ({"image_url": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        ({"image_url": {"url": URL}, "type": None}, URL),
        ({"type": "image", "image": URL}, URL),
        ({"type": "image", "url": URL}, URL),
        ({"image": Path("/page.png")}, Path("/page.png")),
        ({"image": b"\x89PNG"}, b"\x89PNG"),
        ({"image": PICTURE}, PICTURE),
        ({"type": "image_pil", "image_pil": PICTURE}, PICTURE),
        ({"type": "image_base64", "image_base64": "AAAA"}, "data:;base64,AAAA"),
        ({"image_base64": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
        (PICTURE, PICTURE),
    ],
)
def test_a_picture_part_is_read_in_every_spelling(part: Any, source: object) -> None:
    content = parse_content(["before", part, {"type": "input_text", "text": "after"}], "x")
    assert shown(content) == ["before", source, "after"]
    (image,) = content.images
    assert image.path == "x[1]"
    assert content.text == "beforeafter"


def test_a_picture_may_be_an_array() -> None:
    for content in (parse_content(PIXELS, "x"), parse_content([PIXELS], "x"), parse_content([{"image": PIXELS}], "x")):
        assert content.images[0].source is PIXELS


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video_url", "video_url": URL}, r"x\[0\] is 'video_url': video is not read; give single frames"),
        ({"video": URL}, "is 'video': video"),
        ({"type": "input_audio", "input_audio": {}}, "is 'input_audio': sound is not read"),
        ({"type": "image_embeds", "image_embeds": "AA"}, "is 'image_embeds': vectors of pictures are not read"),
        ({"type": "file", "file": {}}, "is 'file': files are not read; give their pages"),
        (
            {"type": "image_ulr", "image_ulr": URL},
            r"unknown type, 'image_ulr'. Did you mean 'image_url'\? Types: \['text'",
        ),
        ({"type": ["text"]}, "unknown type"),
        ({"type": "image_url"}, "needs 'image_url'"),
        ({"type": "image_url", "uuid": "x"}, "A 'uuid' without its picture"),
        ({"type": "image", "image": [PICTURE, PICTURE]}, r"x\[0\] holds several pictures or frames; give each a part"),
        ({"type": "image", "image": np.zeros((2, 4, 4, 3), np.uint8)}, "several pictures or frames"),
        ({"type": "image", "image": 3}, "is int; a picture is a URL"),
        ({"type": "text", "text": 3}, "needs 'text'"),
        ({}, "needs 'text'"),
        (None, r"x\[0\] is null; it must be a text, a picture"),
    ],
)
def test_what_is_no_part_is_refused_by_name(part: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_content([part], "x")


@pytest.mark.parametrize("value", [3, {"type": "text", "text": "x"}, None])
def test_a_content_is_a_text_or_a_list(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="x must be a text or a list of text and picture parts"):
        parse_content(value, "x")


def test_prompts_carry_pictures() -> None:
    literal, several, content, plain, picture, array, text = parse_prompts(
        [
            {"prompt": "<image>x", "multi_modal_data": {"image": PICTURE}, "mm_processor_kwargs": {"max_pixels": 9}},
            {"prompt_token_ids": [1, 2], "multi_modal_data": {"image": [URL, PICTURE]}, "multi_modal_uuids": {"image": ["a"]}},
            {"content": [{"image_url": URL}, "a"], "mm_processor_kwargs": {"max_pixels": 9}},
            {"content": [{"type": "text", "text": "a"}, "b"]},
            PICTURE,
            PIXELS,
            "text",
        ]
    )  # fmt: skip
    assert (literal.text, literal.processor_options) == ("<image>x", {"max_pixels": 9})
    assert [(image.source, image.path) for image in literal.images] == [(PICTURE, "prompts[0].multi_modal_data.image")]
    assert several.ids is not None
    assert [image.path for image in several.images] == [
        f"prompts[1].multi_modal_data.image[{index}]" for index in (0, 1)
    ]
    assert content.content is not None
    assert (shown(content.content), content.processor_options) == ([URL, "a"], {"max_pixels": 9})
    assert (plain.text, plain.content) == ("ab", None)
    assert [image.source for prompt in (picture, array) for image in images_of(prompt)] == [PICTURE, PIXELS]
    assert images_of(text) == ()


@pytest.mark.parametrize(
    "given", [PICTURE, PIXELS, [PICTURE], np.stack([PIXELS])], ids=["picture", "array", "list", "batch"]
)
def test_a_picture_is_a_prompt_by_itself(given: Any) -> None:
    (prompt,) = parse_prompts(given)
    (image,) = images_of(prompt)
    assert image.path.startswith("prompts")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "x", "multi_modal_data": {"video": "y"}}, "has 'video'; pictures are read, under 'image'"),
        ({"prompt": "x", "multi_modal_data": {"image": {"image_embeds": 1}}}, "vectors of pictures"),
        ({"prompt": "x", "multi_modal_data": [PICTURE]}, "multi_modal_data is list; it must be a dict with 'image'"),
        ({"prompt": "x", "mm_processor_kwargs": {"a": 1}}, "'mm_processor_kwargs' and no picture"),
        ({"content": [PICTURE], "prompt": "x"}, "'prompt' and 'content'; give one"),
        ({"content": [PICTURE], "multi_modal_data": {"image": PICTURE}}, "parts of one"),
        ({"text": "a", "text_pair": "b", "multi_modal_data": {"image": PICTURE}}, "score reads pairs with pictures"),
        ({"prompt": "x", "prompt_embeds": [1.0]}, "'prompt_embeds' is not supported"),
    ],
)  # fmt: skip
def test_wrong_prompts_with_pictures_are_named(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_prompts(prompt)


def test_the_texts_of_a_score_may_hold_pictures() -> None:
    texts = parse_texts(
        ["a", {"content": ["b", {"image_url": URL}]}, PICTURE, {"content": ["c", "d"]}, {"text": "e"}], "data_2"
    )
    assert [text if isinstance(text, str) else shown(text) for text in texts] == ["a", ["b", URL], [PICTURE], "cd", "e"]
    with pytest.raises(InvalidRequest, match="parts of 'content'"):
        parse_texts([{"prompt": "x", "multi_modal_data": {"image": PICTURE}}], "data_2")


def test_the_pictures_of_messages_are_known_before_they_are_rendered() -> None:
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"image_url": URL}, "what?", PICTURE]},
    ]
    images = images_of(Prompt(None, conversation=Conversation(messages)))
    assert [(image.source, image.path) for image in images] == [
        (URL, "messages[1].content[0]"),
        (PICTURE, "messages[1].content[2]"),
    ]
    assert images_of(Prompt(None, conversation=Conversation([*messages, {"role": "user", "content": [3]}]))) == ()
    assert images_of(Prompt(None, conversation=Conversation("none"))) == ()
