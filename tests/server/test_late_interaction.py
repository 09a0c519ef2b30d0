"""A ColBERT model over /pooling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient

from poolhouse import LLM
from poolhouse.server.app import create_app
from tests.models.colbert_layouts import DOCUMENTS, ROWS, write

BERT = "colbert-ir/colbertv2.0, answerdotai/answerai-colbert-small-v1"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("models") / "colbert"
    write(ROWS[BERT], folder)
    with LLM(str(folder), served_model_name="colbert") as llm:
        yield llm


def test_texts_are_documents_and_tokens_are_counted_as_read(llm: LLM) -> None:
    http = TestClient(create_app([llm.engine]))
    expected = llm.encode(DOCUMENTS, pooling_task="token_embed", input_type="document", use_tqdm=False)
    reply = http.post("/pooling", json={"model": "colbert", "input": DOCUMENTS, "task": "token_embed"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    for item, output in zip(body["data"], expected, strict=True):
        assert np.allclose(item["data"], output.outputs.array, atol=1e-6)
    # Skipped punctuation was read all the same.
    read = sum(len(output.prompt_token_ids) for output in expected)
    assert body["usage"]["prompt_tokens"] == read > sum(len(output.outputs.array) for output in expected)
