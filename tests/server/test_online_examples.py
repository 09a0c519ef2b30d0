"""The curls that users of vLLM's pooling models know, against `poolhouse serve` on tiny checkpoints of their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from poolhouse import LLM, PoolingParams
from tests.models.embedding_rows import ROWS
from tests.models.hub_layout import Hub, write, write_modules, write_tokenizer
from tests.models.parity import change_config
from tests.models.test_task_adapters import save_v3
from tests.server.running import served

E5, JINA, M3 = "intfloat/e5-small", "jinaai/jina-embeddings-v3", "BAAI/bge-m3"
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which models lie by their names on the hub."""
    home = tmp_path_factory.mktemp("hub")
    write(ROWS["intfloat/e5-small-v2, e5-base"], home / E5, home / "twin-e5")
    write(ROWS["BAAI/bge-m3 (dense)"], home / M3, home / "twin-m3")
    save_v3(home, hidden_size=64, vocab_size=300)
    (home / "jinaai").mkdir()
    folder = (home / "v3").rename(home / JINA)
    change_config(folder, matryoshka_dimensions=[32, 64])
    write_tokenizer(folder, "unigram", (True, True))
    write_modules(folder, 64, Hub("", "", {}, pooling="mean"))
    return home


@pytest.fixture(scope="module")
def http(home: Path) -> Iterator[httpx.Client]:
    with served(home, E5, JINA, M3, "--trust-remote-code", "--runner", "pooling") as client:
        yield client


def test_pooling_answers_a_vector_per_prompt(http: httpx.Client, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = http.post("/pooling", json={"model": E5, "input": PROMPTS, "task": "embed"})
    assert reply.status_code == 200, reply.text
    monkeypatch.chdir(home)
    with LLM(model=E5, runner="pooling") as llm:
        expected = llm.embed_array(PROMPTS)
    for output, vector in zip(reply.json()["data"], expected, strict=True):
        assert set(output) == {"index", "object", "data"}
        assert output["object"] == "pooling"
        assert np.allclose(output["data"], vector, atol=1e-5)


def test_matryoshka_embeddings_have_the_length_that_was_asked(
    http: httpx.Client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"input": "Follow the white rabbit.", "model": JINA, "encoding_format": "float", "dimensions": 32}
    reply = http.post("/v1/embeddings", json=body, headers={"accept": "application/json"})
    assert reply.status_code == 200, reply.text
    shown: dict[str, Any] = reply.json()
    assert list(shown) == ["id", "object", "created", "model", "data", "usage"]
    assert shown["id"].startswith("embd-")
    assert (shown["object"], shown["model"]) == ("list", JINA)
    ((index, kind, vector),) = [(item["index"], item["object"], item["embedding"]) for item in shown["data"]]
    assert (index, kind, len(vector)) == (0, "embedding", 32)
    tokens = shown["usage"]["prompt_tokens"]
    assert shown["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    monkeypatch.chdir(home)
    with LLM(model=JINA, runner="pooling") as llm:
        (offline,) = llm.embed(body["input"], pooling_params=PoolingParams(dimensions=32))
        assert tokens == len(offline.prompt_token_ids)
        assert np.allclose(vector, offline.outputs.array, atol=1e-5)


def test_a_model_that_was_not_trained_for_it_refuses_other_dimensions_in_these_words(http: httpx.Client) -> None:
    reply = http.post("/v1/embeddings", json={"model": M3, "input": "x", "dimensions": 16})
    assert reply.status_code == 400
    problem = (
        '"message":"Model \\"BAAI/bge-m3\\" does not support matryoshka representation, changing output '
        'dimensions will lead to poor results.","type":"BadRequestError","param":null,"code":400'
    )
    assert reply.text == f'{{"object":"error",{problem},"error":{{{problem}}}}}'
