"""Routers of dense models: queries and documents go separate ways, as in sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, StaticEmbedding
from starlette.testclient import TestClient

from poolhouse import LLM, CheckpointError, InvalidRequest, PoolingParams
from poolhouse.server.app import create_app
from tests.checkpoints import save_checkpoint
from tests.inputs.test_tokenizer import wordpiece

TEXTS = ["the moon falls", "bread and ships", "a water", "the moon pulls the sea towards it", ""]
TOLERANCE = 1e-5
PROMPTS = {"query": "the water of ", "document": ""}


def dense(width: int = 16, seed: int = 1, first: int = 32) -> Dense:
    torch.manual_seed(seed)
    return Dense(first, width, activation_function=torch.nn.Identity())


def static() -> StaticEmbedding:
    tokenizer = wordpiece()
    torch.manual_seed(5)
    return StaticEmbedding(tokenizer, embedding_weights=torch.randn(tokenizer.get_vocab_size(), 32))


SIDES = ("query", "document")
# Name -> the modules, of a Transformer.
ROUTERS: dict[str, Callable[[Transformer], list[Any]]] = {
    "a Dense per side": lambda transformer: [
        transformer,
        Pooling(32),
        Router({"query": [dense(seed=1)], "document": [dense(seed=2)]}, default_route="document"),
        Normalize(),
    ],
    "the first route is the default": lambda transformer: [
        transformer,
        Pooling(32, "cls"),
        Router({"query": [dense(seed=1), LayerNorm(16)], "document": [Normalize(), dense(seed=2)]}),
    ],
    "one encoder, another pooling and heads": lambda transformer: [
        Router(
            {
                "query": [transformer, Pooling(32, "cls"), dense()],
                "document": [transformer, Pooling(32), dense(seed=3)],
            },
            default_route="query",
        ),
        Normalize(),
    ],
    "a Dense of tokens per side": lambda transformer: [
        transformer,
        Router.for_query_document(
            [Dense(32, 16, module_input_name="token_embeddings")], [Dense(32, 16, module_input_name="token_embeddings")]
        ),
        Pooling(16),
    ],
    "a table of queries": lambda transformer: [
        Router.for_query_document([static()], [transformer, Pooling(32)]),
        Normalize(),
    ],
    "a table of documents, with heads": lambda transformer: [
        Router.for_query_document([transformer, Pooling(32), dense()], [static(), dense(seed=4)]),
    ],
    "tables alone": lambda _: [
        Router.for_query_document([static(), dense()], [static(), dense(seed=4)]),
    ],
    "routes by mappings": lambda transformer: [
        transformer,
        Pooling(32),
        Router(
            {"short": [dense(seed=1)], "long": [dense(seed=2)]},
            route_mappings={("query", "text"): "short", ("document", None): "long", (None, None): "short"},
        ),
    ],
}


def save(folder: Path, modules: Callable[[Transformer], list[Any]], **options: Any) -> SentenceTransformer:
    save_checkpoint(folder / "plain", "bert, wordpiece")
    made = SentenceTransformer(modules=modules(Transformer(str(folder / "plain"))), device="cpu", **options)
    made.save_pretrained(str(folder / "saved"))
    return SentenceTransformer(str(folder / "saved"), device="cpu")


@pytest.mark.parametrize("name", ROUTERS)
def test_texts_go_the_ways_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path, ROUTERS[name], prompts=PROMPTS)
    queries, documents = theirs.encode_query(TEXTS), theirs.encode_document(TEXTS)
    assert np.abs(queries - documents).max() > 0.01
    with LLM(str(tmp_path / "saved")) as llm:
        for options, expected in (
            ({"input_type": "query"}, queries),
            ({"input_type": "search_document"}, documents),
            ({"prompt_name": "query"}, queries),
            ({}, theirs.encode(TEXTS)),
        ):
            found = llm.embed_array(TEXTS, **options)  # type: ignore[arg-type]
            assert np.abs(found - expected).max() < TOLERANCE, options
        raw = llm.embed_array(TEXTS, input_type="query", pooling_params=PoolingParams(use_activation=True))
        assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() < TOLERANCE
        # Both ways in one pack, and in a score.
        scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS)]
    assert scores == pytest.approx(theirs.similarity(queries[:1], documents)[0].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["a table of queries", "tables alone", "one encoder, another pooling and heads"])
def test_answers_are_memory_of_numpy(name: str, tmp_path: Path) -> None:
    """A tensor that a daemon thread drops while the interpreter ends would end the process by a signal."""
    save(tmp_path, ROUTERS[name])
    with LLM(str(tmp_path / "saved")) as llm:
        answers = [llm.embed_array(texts, input_type=side) for texts in (TEXTS[0], TEXTS) for side in SIDES]
        answers += [output.outputs.array for side in SIDES for output in llm.embed(TEXTS, input_type=side)]
        if name != "tables alone":
            answers += [output.outputs.array for output in llm.encode(TEXTS, pooling_task="token_embed")]
    for answer in answers:
        owner = answer
        while owner.base is not None:
            owner = owner.base
            assert isinstance(owner, np.ndarray)
        assert owner.flags.owndata


def test_a_route_of_another_name_is_chosen_by_it_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    def modules(transformer: Transformer) -> list[Any]:
        router = Router({"question": [dense(seed=1)], "doc": [dense(seed=2)]}, allow_empty_key=False)
        return [transformer, Pooling(32), router]

    theirs = save(tmp_path, modules)
    with LLM(str(tmp_path / "saved")) as llm:
        for task in ("question", "doc"):
            expected = theirs.encode(TEXTS, task=task)
            assert np.abs(llm.embed_array(TEXTS, input_type=task) - expected).max() < TOLERANCE
        for task in ("query", "document", None):
            with pytest.raises(ValueError, match=r"route"):
                theirs.encode(TEXTS, task=task)
            with pytest.raises(InvalidRequest, match=r"no route .* it has \['question', 'doc'\]"):
                llm.embed_array(TEXTS, input_type=task)
        with pytest.raises(InvalidRequest, match="'doc', 'document', 'query', 'question'"):
            llm.embed_array(TEXTS, input_type="docs")
        client = TestClient(create_app([llm.engine]))
        body = {"input": TEXTS, "input_type": "doc"}
        found = [item["embedding"] for item in client.post("/v1/embeddings", json=body).json()["data"]]
        assert np.abs(np.array(found) - theirs.encode(TEXTS, task="doc")).max() < TOLERANCE
        assert client.post("/v1/embeddings", json={"input": TEXTS}).status_code == 400


def test_a_former_asym_is_read(tmp_path: Path) -> None:
    save(tmp_path, ROUTERS["a Dense per side"])
    folder = tmp_path / "saved"
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Asym"
    (folder / "modules.json").write_text(json.dumps(modules))
    router = folder / modules[2]["path"]
    config = json.loads((router / "router_config.json").read_text())
    (router / "router_config.json").unlink()
    config["parameters"] = {"allow_empty_key": True}
    (router / "config.json").write_text(json.dumps(config))
    theirs = SentenceTransformer(str(folder), device="cpu")
    with LLM(str(folder)) as llm:
        for task, expected in (("query", theirs.encode_query(TEXTS)), (None, theirs.encode(TEXTS))):
            assert np.abs(llm.embed_array(TEXTS, input_type=task) - expected).max() < TOLERANCE


def two_encoders(transformer: Transformer) -> list[Any]:
    other = Transformer(transformer.config.name_or_path)
    return [Router.for_query_document([transformer, Pooling(32)], [other, Pooling(32)])]


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (two_encoders, "2 encoders and 0 tables"),
        (
            lambda transformer: [
                Router({"query": [static()], "document": [transformer, Pooling(32)], "other": [static()]})
            ],
            "1 encoders and 2 tables",
        ),
        (
            lambda transformer: [transformer, Pooling(32), Router.for_query_document([dense(16)], [dense(8)])],
            "vectors of 8 features, another of 16|vectors of 16 features, another of 8",
        ),
        (
            lambda transformer: [
                transformer,
                Pooling(32),
                Router({"query": [Router({"query": [dense()]})], "document": [dense(seed=2)]}),
            ],
            "a Router within a Router",
        ),
    ],
)
def test_routes_that_are_not_served_are_refused(
    modules: Callable[[Transformer], list[Any]], words: str, tmp_path: Path
) -> None:
    save(tmp_path, modules)
    with pytest.raises(CheckpointError, match=words):
        LLM(str(tmp_path / "saved"))
