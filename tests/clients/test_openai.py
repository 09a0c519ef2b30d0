"""OpenAI's own client, sync and async."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import openai
import pytest

from tests.clients.asked import EMBEDDER, KEY, TEXTS, Calls
from tests.clients.conftest import Embedded


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def embed(url: str, key: str = KEY, **options: Any) -> Any:
    with client(url, key) as connected:
        return connected.embeddings.create(**{"model": EMBEDDER, "input": TEXTS} | options)


def models(url: str) -> list[Any]:
    with client(url) as connected:
        return list(connected.models.list())


def azure(url: str, key: str = KEY) -> openai.AzureOpenAI:
    return openai.AzureOpenAI(azure_endpoint=url, api_key=key, api_version="2024-02-01", max_retries=0)


def retrieved(url: str, model: str = EMBEDDER) -> Any:
    with client(url) as connected:
        return connected.models.retrieve(model)


def embed_by_azure(url: str, **options: Any) -> Any:
    with azure(url, **options) as connected:
        return connected.embeddings.create(model=EMBEDDER, input=TEXTS)


CALLS: Calls = {
    "embeddings.create": embed,
    "embeddings.create, one text": lambda url: embed(url, input=TEXTS[0]),
    "embeddings.create, token ids": lambda url: embed(url, input=[101, 7592, 102]),
    "embeddings.create, float": lambda url: embed(url, encoding_format="float", dimensions=128, user="somebody"),
    "models.list": models,
    "models.retrieve": retrieved,
    "AzureOpenAI.embeddings.create": embed_by_azure,
}


def test_openai_gets_the_offline_vectors_and_counts(embedder: str, embedded: Embedded) -> None:
    for form in ("float", openai.NOT_GIVEN):
        reply = embed(embedder, encoding_format=form)
        assert np.abs(np.array([item.embedding for item in reply.data]) - embedded.vectors).max() < 1e-5
        assert [item.index for item in reply.data] == [0, 1, 2]
        assert (reply.model, reply.object) == (EMBEDDER, "list")
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == embedded.tokens
    # Asked for by name, the client hands the text over as it came.
    packed = embed(embedder, encoding_format="base64").data
    decoded = np.stack([np.frombuffer(base64.b64decode(item.embedding), "<f4") for item in packed])
    assert np.abs(decoded - embedded.vectors).max() < 1e-5


def test_openai_gets_shorter_vectors(embedder: str, embedded: Embedded) -> None:
    reply = embed(embedder, dimensions=64)
    assert np.abs(np.array([item.embedding for item in reply.data]) - embedded.short).max() < 1e-5


def test_openai_sends_many_texts_at_once(embedder: str, embedded: Embedded) -> None:
    reply = embed(embedder, input=TEXTS * 300)
    got = np.array([item.embedding for item in reply.data])
    assert np.abs(got - np.tile(embedded.vectors, (300, 1))).max() < 1e-5


def test_async_openai_calls_share_the_server(embedder: str, embedded: Embedded) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{embedder}/v1", api_key=KEY) as connected:
            return await asyncio.gather(
                *(connected.embeddings.create(model=EMBEDDER, input=text) for text in TEXTS * 10)
            )

    got = np.array([reply.data[0].embedding for reply in asyncio.run(ask())])
    assert np.abs(got - np.tile(embedded.vectors, (10, 1))).max() < 1e-5


def test_openai_lists_the_models(embedder: str) -> None:
    assert [model.id for model in models(embedder)] == [EMBEDDER]


def test_openai_asks_for_one_model(embedder: str) -> None:
    assert retrieved(embedder).id == EMBEDDER
    with pytest.raises(openai.NotFoundError, match=EMBEDDER):
        retrieved(embedder, "somebody/another")


def test_azure_finds_its_deployment_and_key(embedder: str, embedded: Embedded) -> None:
    reply = embed_by_azure(embedder)
    assert np.abs(np.array([item.embedding for item in reply.data]) - embedded.vectors).max() < 1e-5
    with pytest.raises(openai.AuthenticationError):
        embed_by_azure(embedder, key="wrong")
    with azure(embedder) as connected:
        assert [model.id for model in connected.models.list()] == [EMBEDDER]
        with pytest.raises(openai.NotFoundError, match="another"):
            connected.embeddings.create(model="another", input="a")


@pytest.mark.parametrize(
    ("options", "error", "status"),
    [
        ({"model": "another"}, openai.NotFoundError, 404),
        ({"key": "wrong"}, openai.AuthenticationError, 401),
        ({"dimensions": 65}, openai.BadRequestError, 400),
        ({"input": []}, openai.BadRequestError, 400),
        ({"input": "word " * 3000}, openai.BadRequestError, 400),
        ({"encoding_format": "hex"}, openai.BadRequestError, 400),
    ],
)
def test_openai_raises_its_own_errors(
    embedder: str, options: dict[str, Any], error: type[openai.APIStatusError], status: int
) -> None:
    with pytest.raises(error) as raised:
        embed(embedder, **options)
    assert raised.value.status_code == status


def test_openai_hears_that_a_reranker_makes_no_vectors(reranker: str) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support Embeddings API"):
        embed(reranker, model=None)
