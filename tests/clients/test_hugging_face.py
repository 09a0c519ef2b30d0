"""Hugging Face's InferenceClient, made for Text Embeddings Inference among others."""

from __future__ import annotations

import asyncio
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.asked import KEY, TEXTS, Calls
from tests.clients.conftest import LABELS, Embedded


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the client would not even talk to a server on this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def extract(url: str, texts: Any = TEXTS, key: str = KEY, **options: Any) -> np.ndarray:
    return InferenceClient(model=url, token=key).feature_extraction(texts, **options)


def similarity(url: str) -> list[float]:
    return InferenceClient(model=f"{url}/similarity", token=KEY).sentence_similarity(TEXTS[0], other_sentences=TEXTS)


def classify(url: str, **options: Any) -> Any:
    return InferenceClient(model=f"{url}/predict", token=KEY).text_classification(TEXTS[0], **options)


CALLS: Calls = {
    "feature_extraction": lambda url: extract(f"{url}/embed"),
    "feature_extraction, one text": lambda url: extract(
        f"{url}/embed", TEXTS[0], normalize=False, truncate=True, truncation_direction="left", dimensions=64
    ),
    "feature_extraction, at the root": extract,
    "sentence_similarity": similarity,
    "text_classification": classify,
}


@pytest.mark.parametrize("at", ["/embed", "/tei/embed", "", "/tei"])
def test_the_inference_client_extracts_features(embedder: str, embedded: Embedded, at: str) -> None:
    assert np.abs(extract(embedder + at) - embedded.vectors).max() < 1e-5
    one = extract(embedder + at, TEXTS[0])
    assert one.shape == (1, 384)
    assert np.abs(one - embedded.vectors[:1]).max() < 1e-5


def test_the_inference_client_chooses_how_vectors_are_made(embedder: str, embedded: Embedded) -> None:
    assert np.abs(extract(f"{embedder}/embed", dimensions=64) - embedded.short).max() < 1e-5
    raw = extract(f"{embedder}/embed", normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    assert np.abs(raw / lengths - embedded.vectors).max() < 1e-5
    cut = extract(f"{embedder}/embed", "word " * 600, truncate=True)
    assert cut.shape == (1, 384)


def test_the_inference_client_compares_sentences(embedder: str, embedded: Embedded) -> None:
    assert np.allclose(similarity(embedder), embedded.vectors @ embedded.vectors[0], atol=1e-5)
    assert np.allclose(similarity(f"{embedder}/tei"), embedded.vectors @ embedded.vectors[0], atol=1e-5)


def test_the_inference_client_classifies(classifier: str, classified: np.ndarray) -> None:
    # Of a list of labels the client hands over the first alone, whoever serves it.
    best = classify(classifier)
    assert best.label == LABELS[int(classified[0].argmax())]
    assert abs(best.score - classified[0].max()) < 1e-5


def test_the_inference_client_calls_without_waiting(embedder: str, embedded: Embedded) -> None:
    async def ask() -> np.ndarray:
        async with AsyncInferenceClient(model=f"{embedder}/embed", token=KEY) as client:
            return await client.feature_extraction(TEXTS)

    assert np.abs(asyncio.run(ask()) - embedded.vectors).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"key": "wrong"}, 401),
        ({"texts": "word " * 600, "truncate": False}, 422),
        ({"dimensions": 65}, 422),
        ({"prompt_name": "no such"}, 422),
        ({"texts": ""}, 400),
    ],
)
def test_the_inference_client_raises_its_own_errors(embedder: str, options: dict[str, Any], status: int) -> None:
    with pytest.raises(HfHubHTTPError) as raised:
        extract(f"{embedder}/embed", **options)
    assert raised.value.response.status_code == status
