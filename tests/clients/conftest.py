"""Three servers on sockets, each with a key, and the same models offline."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the libraries are imported: litellm would fetch a list of prices, the others would report.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["LANGSMITH_TRACING"] = "false"

import numpy as np
import pytest

from poolhouse import LLM, PoolingParams
from tests.clients.asked import CLASSIFIER, DOCUMENTS, EMBEDDER, KEY, QUERY, RERANKER, TEXTS
from tests.models import hub_layout
from tests.server.test_server import Server

SIZES = (64, 128)
LABELS = {0: "calm", 1: "glad", 2: "sad"}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def _event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """A loop for clients that ask for the current one from plain functions, as litellm does, and never close it."""
    if request.node.get_closest_marker("asyncio") is not None:
        yield
        return
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@dataclass(frozen=True)
class Embedded:
    """What the embedder says offline. vectors: of TEXTS; short: the same of 64 numbers; tokens: their count."""

    vectors: np.ndarray
    short: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Ranked:
    """What the reranker says offline of QUERY and DOCUMENTS. order: the best first; scores: in that order."""

    order: list[int]
    scores: list[float]
    logits: list[float]
    tokens: int


@pytest.fixture(autouse=True)
def _only_our_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that asks anybody but our servers fails its test; connections that it leaves open are closed."""
    connect = socket.socket.connect
    connected: list[socket.socket] = []

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"A client went to {address}.")
        connected.append(self)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield
    for left in connected:
        left.close()


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("reranker"), num_labels=1)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    return _checkpoint(tmp_path_factory.mktemp("classifier"), **labels)


@pytest.fixture(scope="session")
def embedder() -> Iterator[str]:
    """The URL of a server with the embedded MiniLM."""
    yield from _serve("--matryoshka-dimensions", ",".join(map(str, SIZES)), "--served-model-name", EMBEDDER)


@pytest.fixture(scope="session")
def reranker(reranker_folder: Path) -> Iterator[str]:
    """The URL of a server with a cross-encoder."""
    yield from _serve(str(reranker_folder), "--served-model-name", RERANKER)


@pytest.fixture(scope="session")
def classifier(classifier_folder: Path) -> Iterator[str]:
    """The URL of a server with a classifier of three labels."""
    yield from _serve(str(classifier_folder), "--served-model-name", CLASSIFIER)


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    with LLM(matryoshka_dimensions=SIZES) as llm:
        outputs = llm.embed(TEXTS)
        tokens = sum(len(output.prompt_token_ids) for output in outputs)
        short = llm.embed_array(TEXTS, pooling_params=PoolingParams(dimensions=SIZES[0]))
        return Embedded(llm.embed_array(TEXTS), short, tokens)


@pytest.fixture(scope="session")
def ranked(reranker_folder: Path) -> Ranked:
    with LLM(str(reranker_folder)) as llm:
        outputs = llm.score(QUERY, DOCUMENTS)
        scores = np.array([output.outputs.score for output in outputs])
        order = np.argsort(-scores)
        tokens = sum(len(output.prompt_token_ids) for output in outputs)
        (logits,) = [
            [
                output.outputs.score
                for output in llm.score(QUERY, DOCUMENTS, pooling_params=PoolingParams(use_activation=False))
            ]
        ]
    return Ranked(order.tolist(), scores[order].tolist(), np.array(logits)[order].tolist(), tokens)


@pytest.fixture(scope="session")
def classified(classifier_folder: Path) -> np.ndarray:
    """The probabilities of the labels of TEXTS."""
    with LLM(str(classifier_folder)) as llm:
        return np.array([output.outputs.probs for output in llm.classify(TEXTS)])


def _serve(*options: str) -> Iterator[str]:
    server = Server(*options, "--api-key", KEY)
    yield server.url
    status, log = server.stop()
    assert status == 0
    assert "Traceback" not in log


def _checkpoint(folder: Path, **labels: Any) -> Path:
    hub = hub_layout.Hub(
        "BertForSequenceClassification",
        "Bert",
        {**_BERT, **labels},
        head="ForSequenceClassification",
        tokenizer="wordpiece",
        pooling=None,
    )
    hub_layout.write(hub, folder / "hub", folder / "twin")
    return folder / "hub"
