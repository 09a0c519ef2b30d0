"""BGE-M3 against its authors' BGEM3FlagModel, from text to each answer and score."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from FlagEmbedding import BGEM3FlagModel

from poolhouse import LLM
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TOLERANCE = 1e-4
WORDS = [*TEXTS, "w1 w1 unknown w2 w1", "w3 w9"]
WEIGHTS = [0.4, 0.2, 0.4]


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    tokens = tokenizer(tmp_path, "roberta")
    tokens.eos_token = "[SEP]"
    tokens.save_pretrained(tmp_path)
    save(tmp_path, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | {"bos_token_id": 0, "eos_token_id": 2})
    # Weights of about 0.3, half of them above 0.
    torch.save({"weight": 0.1 * torch.randn(1, 32), "bias": torch.tensor([0.3])}, tmp_path / "sparse_linear.pt")
    torch.save({"weight": torch.randn(32, 32), "bias": torch.randn(32)}, tmp_path / "colbert_linear.pt")
    return BGEM3FlagModel(str(tmp_path), use_fp16=False, devices="cpu")


def test_dense_sparse_and_multi_vectors_are_those_of_flag_embedding(theirs: Any, tmp_path: Path) -> None:
    expected = theirs.encode(WORDS, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    assert sum(map(len, expected["lexical_weights"])) > len(WORDS)
    with LLM(str(tmp_path)) as llm:
        assert np.allclose(llm.embed_array(WORDS), expected["dense_vecs"], atol=TOLERANCE)
        for output, weights in zip(llm.embed_sparse(WORDS), expected["lexical_weights"], strict=True):
            theirs_by_id = {int(token): float(weight) for token, weight in weights.items()}
            assert output.outputs.indices == sorted(theirs_by_id)
            assert output.outputs.as_dict() == pytest.approx(theirs_by_id, abs=TOLERANCE)
        vectors = llm.encode(WORDS, pooling_task="token_embed")
        for output, rows in zip(vectors, expected["colbert_vecs"], strict=True):
            assert output.outputs.array.shape == rows.shape
            assert np.allclose(output.outputs.array, rows, atol=TOLERANCE)


def test_scores_of_every_mode_are_those_of_flag_embedding(theirs: Any, tmp_path: Path) -> None:
    pairs = list(product(WORDS, WORDS))
    queries, documents = (list(side) for side in zip(*pairs, strict=True))
    expected = theirs.compute_score(pairs, weights_for_different_modes=WEIGHTS)
    assert max(expected["sparse"]) > 0
    with LLM(str(tmp_path)) as llm:
        for mode, scores in expected.items():
            weights = WEIGHTS if "+" in mode else None
            got = [output.outputs.score for output in llm.score(queries, documents, mode=mode, weights=weights)]
            assert got == pytest.approx(scores, abs=TOLERANCE)
