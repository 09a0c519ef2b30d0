"""Clients with pictures: OpenAI's, Cohere's and Voyage's, asked of a server whose engine counts and does not look."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cohere
import numpy as np
import openai
import pytest
import voyageai
from PIL import Image

from tests.clients.asked import KEY
from tests.server.running import running

MODEL = "pages"
# A picture is four tokens there, and a word one.
PICTURE_TOKENS = 4
PAGE = Image.new("RGB", (40, 30), "teal")


@pytest.fixture(scope="module")
def pages() -> Iterator[str]:
    """The URL of a server whose engine reads pictures."""
    with running(load=f"engines = [FakeEngine({MODEL!r}, pictures=True)]", api_key=KEY) as server:
        yield server.url


def uri() -> str:
    file = io.BytesIO()
    PAGE.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri()}}


def test_openai_sends_messages_and_contents_in_the_body(pages: str) -> None:
    text = {"type": "text", "text": "two words"}
    with openai.OpenAI(base_url=f"{pages}/v1", api_key=KEY, max_retries=0) as client:
        contents = {"input": [{"content": [picture(), text]}, {"content": [picture()]}, "two words"]}
        reply = client.embeddings.create(model=MODEL, input=[], encoding_format="float", extra_body=contents)
        assert len({tuple(item.embedding) for item in reply.data}) == 3
        # A prompt without words has a token nevertheless.
        assert reply.usage.prompt_tokens == 2 * PICTURE_TOKENS + 2 + 1 + 2
        messages = {"model": MODEL, "messages": [{"role": "user", "content": [picture(), text]}]}
        posted = client.post("/embeddings", body=messages, cast_to=openai.types.CreateEmbeddingResponse)
        assert len(posted.data) == 1
        with pytest.raises(openai.BadRequestError, match="video"):
            client.embeddings.create(
                model=MODEL, input=[], extra_body={"input": [{"content": [{"type": "video_url", "video_url": "x"}]}]}
            )


@pytest.mark.parametrize("at", ["", "/cohere"])
def test_cohere_embeds_pictures_and_inputs(pages: str, at: str) -> None:
    with cohere.ClientV2(api_key=KEY, base_url=pages + at) as client:
        reply = client.embed(model=MODEL, images=[uri()], input_type="image", embedding_types=["float", "int8"])
        assert np.array(reply.embeddings.float_).shape == (1, 8)
        assert (reply.meta.billed_units.image_tokens, reply.meta.billed_units.input_tokens) == (PICTURE_TOKENS, 1)
        inputs: list[Any] = [{"content": [{"type": "text", "text": "two words"}, picture()]}]
        mixed = client.embed(model=MODEL, inputs=inputs, input_type="search_document", embedding_types=["float"])
        assert mixed.meta.billed_units.input_tokens == 2
        assert mixed.embeddings.float_ != reply.embeddings.float_
        with pytest.raises(cohere.BadRequestError, match="one of texts, images and inputs"):
            client.embed(model=MODEL, images=[uri()], texts=["a"], input_type="image")
    with cohere.Client(api_key=KEY, base_url=pages + at) as first:
        former = first.embed(model=MODEL, images=[uri()], input_type="image", embedding_types=["float"])
        assert former.embeddings.float_ == reply.embeddings.float_


@pytest.mark.parametrize("at", ["/v1", "/voyage/v1"])
def test_voyage_embeds_texts_and_pictures_together(pages: str, at: str) -> None:
    def ask(inputs: Any, **options: Any) -> Any:
        # In a thread of its own, because connections live as long as theirs.
        with ThreadPoolExecutor(1) as thread:
            client = voyageai.Client(api_key=KEY, base_url=pages + at)
            return thread.submit(client.multimodal_embed, inputs, MODEL, **options).result()

    reply = ask([["two words", PAGE], [PAGE], ["two words"]], input_type="document")
    assert np.array(reply.embeddings).shape == (3, 8)
    assert reply.total_tokens == 2 * PICTURE_TOKENS + 2 + 1 + 2
    assert (reply.text_tokens, reply.image_pixels) == (5, 2 * PICTURE_TOKENS * 560)
    parts = [{"content": [{"type": "text", "text": "two words"}, {"type": "image_url", "image_url": uri()}]}]
    assert np.array(ask(parts, output_dimension=8).embeddings).shape == (1, 8)
    connected = voyageai.AsyncClient(api_key=KEY, base_url=pages + at)
    again = asyncio.run(connected.multimodal_embed([["two words", PAGE]], MODEL))
    assert np.allclose(again.embeddings, reply.embeddings[:1])
    with pytest.raises(voyageai.error.InvalidRequestError, match="video"):
        ask([{"content": [{"type": "video_url", "video_url": "https://example.org/a.mp4"}]}])


def test_voyage_reads_a_refusal_of_its_key(pages: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        client = voyageai.Client(api_key="wrong", base_url=f"{pages}/v1")
        with pytest.raises(voyageai.error.AuthenticationError):
            thread.submit(client.multimodal_embed, [[PAGE]], MODEL).result()
