"""Pruning over HTTP: what is left of documents in each dialect of reranking, as offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from poolhouse import LLM, PruningParams
from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine
from tests.models.pruners import Pruner
from tests.server.documented import checked

QUERY = "w1 w2"
DOCUMENTS = ["W4 W5 W6. W7 W8! W9.", "W14.", "W15 W16? " + "W1 W2 W3 W4. " * 40, ""]
PATHS = ("/rerank", "/v1/rerank", "/v2/rerank", "/jina/v1/rerank", "/cohere/v1/rerank", "/cohere/v2/rerank")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("pruner")
    Pruner(folder, "openprovence, modernbert")
    with LLM(str(folder)) as llm:
        yield llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[TestClient]:
    with TestClient(
        create_app([llm.engine, FakeEngine("plain", tasks=("classify",), label_names={0: "fits"})])
    ) as client:
        checked(client)
        yield client


def offline(llm: LLM, prune: Any) -> list[dict[str, Any]]:
    outputs = [output.outputs for output in llm.score(QUERY, DOCUMENTS, prune=prune)]
    return [
        {
            "pruned_text": one.pruned,
            "compression": pytest.approx(one.compression),
            "sentences": [
                {
                    "start": sentence.start,
                    "end": sentence.end,
                    "probability": pytest.approx(sentence.probability, abs=1e-6),
                    "kept": sentence.kept,
                }
                for sentence in one.sentences or ()
            ],
        }
        for one in outputs
    ]


@pytest.mark.parametrize("prune", [0.45, True, {"threshold": 0.45, "keep_first": True, "rule": "votes"}])
@pytest.mark.parametrize("path", PATHS)
def test_documents_are_pruned_as_offline(http: TestClient, llm: LLM, path: str, prune: Any) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "prune": prune}
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    expected, names = offline(llm, prune), ("pruned_text", "compression", "sentences")
    results = reply.json()["results"]
    assert [{name: one[name] for name in names} for one in results] == [expected[one["index"]] for one in results]
    usual = http.post(path, json={**body, "documents": DOCUMENTS[:2], "prune": None}).json()["results"]
    assert not any(name in one for one in usual for name in names)


def test_scores_of_pairs_are_pruned_too(http: TestClient, llm: LLM) -> None:
    reply = http.post("/score", json={"queries": QUERY, "documents": DOCUMENTS, "prune": 0.45}).json()
    assert [one["pruned_text"] for one in reply["data"]] == [one["pruned_text"] for one in offline(llm, 0.45)]


def test_sentences_may_be_given(http: TestClient, llm: LLM) -> None:
    given = [["W4 W5", "W6. W7"]]
    body = {"query": QUERY, "documents": DOCUMENTS[:1], "prune": {"threshold": 0, "sentences": given}}
    (result,) = http.post("/rerank", json=body).json()["results"]
    ours = llm.score(QUERY, DOCUMENTS[:1], prune=PruningParams(0, sentences=given))[0].outputs
    assert result["pruned_text"] == ours.pruned == "W4 W5 W6. W7 "


def test_coheres_usual_limit_does_not_cut_what_is_pruned(http: TestClient, llm: LLM) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "prune": 0.45, "max_tokens_per_doc": 4096}
    for path in ("/v2/rerank", "/cohere/v2/rerank"):
        for prune in (0.45, 0):
            results = http.post(path, json={**body, "prune": prune}).json()["results"]
            assert {one["index"]: one["pruned_text"] for one in results}[2] == offline(llm, prune)[2]["pruned_text"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": 2}, "from 0 to 1"),
        ({"prune": "much"}, "prune must be"),
        ({"prune": {"treshold": 0.1}}, "Did you mean 'threshold'"),
        ({"prune": {"sentences": [["W99"]] * 4}}, "sentences[0][0] is 'W99'"),
        ({"prune": {"sentences": [[[3, 99]]] * 4}}, "sentences[0][0] is [3, 99]"),
        ({"prune": {"sentences": 5}}, "sentences"),
        ({"prune": 0.1, "model": "plain"}, "plain has no head for pruning"),
        ({"prune": 0.1, "max_tokens_per_doc": 5}, "max_tokens_per_doc beside prune"),
        ({"prune": 0.1, "truncate_prompt_tokens": 9}, "truncate_prompt_tokens beside prune"),
        ({"prune": 0.1, "query": "w1 " * 70}, "The query has 70 tokens"),
        ({"prune": 0.1, "instruction": "be brief"}, "instruction"),
        ({"prune": 0.1, "mode": "dense"}, "mode"),
    ],
)
def test_what_is_wrong_is_named(http: TestClient, changes: dict[str, Any], words: str) -> None:
    reply = http.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS, **changes})
    assert reply.status_code == 400, reply.text
    assert words in reply.text.replace("\\\\", "\\").replace('\\"', '"')
