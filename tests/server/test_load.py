"""Many connections at once: the right answers, order and limits, and a memory that does not grow."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, PoolingParams
from poolhouse.models.files.hub import embedded_model
from tests.models.tiny import LAYERS, WORDS, save, tokenizer
from tests.server.sockets import Client, get, load, wait_until
from tests.server.test_server import Server

# Sums of a pack come in another order than those of one text, in float32.
TOLERANCE = 1e-5
MINILM = str(embedded_model())
CUT = PoolingParams(truncate_prompt_tokens=-1)
SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny cross-encoder that tokenises words `w0` to `w89`."""
    folder = tmp_path_factory.mktemp("ranker")
    tokenizer(folder)
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    return str(folder)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("embedder")
    tokenizer(folder)
    save(folder, "BertModel", "BertConfig", LAYERS)
    return str(folder)


@dataclass(frozen=True)
class Offline:
    """The models of the server, in this process."""

    minilm: LLM
    ranker: LLM
    embedder: LLM


@pytest.fixture(scope="module")
def offline(ranker: str, embedder: str) -> Iterator[Offline]:
    with LLM() as one, LLM(ranker) as two, LLM(embedder) as three:
        yield Offline(one, two, three)


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 13 + place * 7) % 90] for place in range(count))


def lines(seed: int, count: int) -> list[str]:
    return [words(seed + number, 1 + (seed + number * 5) % 30) for number in range(count)]


def floats(reply: Any) -> list[Any]:
    return [np.array(item.get("embedding", item.get("data"))) for item in reply["data"]]


def decoded(reply: Any) -> list[Any]:
    items = [(item.get("embedding", item.get("data")), item.get("shape", [-1])) for item in reply["data"]]
    return [np.frombuffer(base64.b64decode(data), "<f4").reshape(shape) for data, shape in items]


def scores(reply: Any) -> list[Any]:
    return [np.array(item["score"]) for item in reply["data"]]


def relevances(reply: Any) -> list[Any]:
    return [np.array(item["relevance_score"]) for item in sorted(reply["results"], key=lambda item: item["index"])]


# Route, body, how its reply is read, and what the same is offline; all of a number that varies their texts.
Kind = Callable[[int, Offline, str, str], tuple[str, dict[str, Any], Callable[[Any], list[Any]], list[Any]]]


def short(number: int, offline: Offline, *_: str) -> Any:
    text = f"The {number}th text is short."
    return "/v1/embeddings", {"input": text, "model": MINILM}, floats, list(offline.minilm.embed_array([text]))


def fifty(number: int, offline: Offline, _: str, embedder: str) -> Any:
    texts = lines(number, 50)
    body = {"input": texts, "model": embedder, "encoding_format": "base64"}
    return "/v1/embeddings", body, decoded, list(offline.embedder.embed_array(texts))


def long(number: int, offline: Offline, *_: str) -> Any:
    text = f"A long one, the {number}th. " * 100
    body = {"input": text, "model": MINILM, "truncate_prompt_tokens": -1}
    return "/v1/embeddings", body, floats, list(offline.minilm.embed_array([text], pooling_params=CUT))


def token_ids(number: int, offline: Offline, *_: str) -> Any:
    ids = [101, 2000 + number, 3000 + number, 102]
    expected = [output.outputs.array for output in offline.minilm.encode([ids], pooling_task="embed")]
    return "/pooling", {"input": [ids], "task": "embed", "model": MINILM}, floats, expected


def matrices(number: int, offline: Offline, _: str, embedder: str) -> Any:
    texts = lines(number, 9)
    expected = [output.outputs.array for output in offline.embedder.encode(texts, pooling_task="token_embed")]
    body = {"input": texts, "task": "token_embed", "model": embedder, "encoding_format": "base64"}
    return "/pooling", body, decoded, expected


def one_to_many(number: int, offline: Offline, ranker: str, _: str) -> Any:
    query, documents = words(number, 4), lines(number, 7)
    expected = [np.array(output.outputs.score) for output in offline.ranker.score(query, documents)]
    return "/score", {"text_1": query, "text_2": documents, "model": ranker}, scores, expected


def ranked(number: int, offline: Offline, ranker: str, _: str) -> Any:
    query, documents = words(number, 3), lines(number + 1, 20)
    expected = [np.array(output.outputs.score) for output in offline.ranker.score(query, documents)]
    return "/rerank", {"query": query, "documents": documents, "model": ranker}, relevances, expected


def classes(number: int, offline: Offline, ranker: str, _: str) -> Any:
    texts = lines(number, 3)
    expected = [output.outputs.array for output in offline.ranker.encode(texts, pooling_task="classify")]
    return "/pooling", {"input": texts, "task": "classify", "model": ranker}, floats, expected


KINDS: tuple[Kind, ...] = (short, fifty, long, token_ids, matrices, one_to_many, ranked, classes)


def test_sixty_four_connections_of_mixed_sizes_get_the_offline_answers(
    offline: Offline, ranker: str, embedder: str
) -> None:
    asked = [KINDS[number % len(KINDS)](number, offline, ranker, embedder) for number in range(128)]
    server = Server(MINILM, ranker, embedder)
    clients = [Client(server.url) for _ in range(64)]
    for first in (0, 64):
        batch = asked[first : first + 64]
        for client, (path, body, _, _) in zip(clients, batch, strict=True):
            client.send(path, body)
        for client, (path, _, read, expected) in zip(clients, batch, strict=True):
            reply = client.reply()
            assert reply.status == 200, (path, reply.body[:300])
            got = read(reply.json)
            assert [each.shape for each in got] == [each.shape for each in expected]
            for ours, theirs in zip(got, expected, strict=True):
                assert np.abs(ours - theirs).max() < TOLERANCE * max(1, np.abs(theirs).max()), path
    assert load(server.url) == 0
    status, log = server.stop()
    assert (status, "Traceback" in log) == (0, False), log


def test_an_overload_is_said_and_passes(embedder: str) -> None:
    server = Server(embedder, "--max-queued-prompts", "8")
    clients = [Client(server.url) for _ in range(48)]
    refused = 0
    for number in range(5):
        for client in clients:
            client.send("/v1/embeddings", {"input": lines(number, 4)})
        replies = [client.reply() for client in clients]
        assert {reply.status for reply in replies} <= {200, 429}
        assert any(reply.status == 200 for reply in replies)
        for reply in replies:
            if reply.status == 429:
                refused += 1
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                assert reply.json["type"] == "Too Many Requests"
    assert refused > 0
    assert load(server.url) == 0
    for client in clients:
        assert client.ask("/v1/embeddings", {"input": lines(9, 8)}).status == 200
    assert load(server.url) == 0
    assert 'status="429"' in get(server.url, "/metrics").body.decode()
    assert server.stop()[0] == 0


def test_late_small_requests_and_urgent_ones_go_before_what_is_left_of_a_huge_one() -> None:
    server = Server()
    huge = Client(server.url).send("/v1/embeddings", {"input": [f"text {number} " * 40 for number in range(3000)]})
    wait_until(lambda: load(server.url) >= 3000, "the huge request")
    small = [Client(server.url).send("/v1/embeddings", {"input": f"small {number}"}) for number in range(20)]
    assert [client.reply().status for client in small] == [200] * 20
    assert not huge.answered
    later = Client(server.url).send("/v1/embeddings", {"input": ["can wait"] * 200, "priority": 5})
    wait_until(lambda: load(server.url) >= 200, "the one that can wait")
    assert Client(server.url).ask("/v1/embeddings", {"input": ["urgent"] * 20, "priority": -1}).status == 200
    assert not later.answered
    assert not huge.answered
    huge.hang_up()
    assert later.reply().status == 200
    wait_until(lambda: load(server.url) == 0, "what the huge one left")
    status, log = server.stop()
    assert (status, "Traceback" in log) == (0, False), log


def test_memory_stays_flat_under_everything_at_once(embedder: str) -> None:
    # `benchmarks/soak.py` alone asks 10,000; docs/operations.md says what came of it.
    options = ["--model", embedder, "--requests", "3000", "--warmup", "1000", "--samples", "8"]
    done = subprocess.run(
        [sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
