"""Embedding models of the hub, from text to vector, against sentence-transformers or an independent definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from poolhouse import LLM
from poolhouse.outputs import Array
from tests.models.embedding_rows import ROWS
from tests.models.hub_layout import TEXTS, Hub, write
from tests.models.parity import Parity, Record

# Both sides add the same float32 numbers in another order, over at most four layers.
TOLERANCE = 1e-4


def repository(tmp_path: Path, row: str) -> Path:
    """A folder named after the first example of a row."""
    return tmp_path / row.split(",")[0].split("(")[0].strip().rsplit("/", 1)[-1]


@pytest.mark.parametrize("row", ROWS)
def test_vectors_are_those_of_sentence_transformers(row: str, tmp_path: Path, record_parity: Record) -> None:
    hub, folder, twin = ROWS[row], repository(tmp_path, row), tmp_path / "twin"
    write(hub, folder, twin)
    reference = SentenceTransformer(str(twin), device="cpu")
    with LLM(str(folder), dtype="float32", device="cpu", overflow="truncate") as llm:
        for name in ("", *hub.prompts):
            # One text at a time: the reference shall not depend on padding.
            expected = reference.encode(TEXTS, batch_size=1, prompt=hub.prompts.get(name, ""))
            got = llm.embed_array(TEXTS, prompt_name=name, use_tqdm=False)
            alone = np.concatenate([llm.embed_array(text, prompt_name=name, use_tqdm=False) for text in TEXTS])
            error, packing_error = difference(got, expected), difference(got, alone)
            assert error < TOLERANCE
            assert packing_error < TOLERANCE
            assert cosines(got, expected).min() > 0.9999
        record_parity(
            Parity(
                row, llm.model.facts.served_by, "sentence-transformers", error, packing_error,
                architecture=hub.architecture, tasks=llm.model.tasks,
            )
        )  # fmt: skip
    # Texts are told apart: no pooling takes a token that all texts share.
    assert hub.pooling == "cls" or cosines(got[:1], got[1:]).max() < 0.9999


def difference(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def cosines(got: Array, expected: Array) -> Array:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return np.asarray((got * expected).sum(1) / norms)
