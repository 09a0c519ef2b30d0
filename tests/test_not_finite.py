"""A checkpoint in which one token is not a number: the items that hold it fail, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poolhouse import LLM, NonFiniteResult
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.tasks import Task
from tests.checkpoints import save_checkpoint

BROKEN = 9
GOOD, BAD = [2, 5, 6, 7, 8, 3], [2, 5, BROKEN, 7, 8, 3]

ROWS: dict[str, tuple[str, Task]] = {
    "embed": ("Model", "embed"),
    "token_embed": ("Model", "token_embed"),
    "classify": ("ForSequenceClassification", "classify"),
    "token_classify": ("ForSequenceClassification", "token_classify"),
    "token_classify by its own head": ("ForTokenClassification", "token_classify"),
}


def break_token(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][BROKEN] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", ROWS)
def test_the_item_fails_alone(row: str, value: float, tmp_path: Path) -> None:
    model, task = ROWS[row]
    save_checkpoint(tmp_path, "bert, wordpiece", model)
    with LLM(str(tmp_path)) as llm:
        clean = llm.encode([GOOD], pooling_task=task)[0].outputs.array
    break_token(tmp_path, value)
    with LLM(str(tmp_path)) as llm:
        # Of one length, so that they share attention calls.
        prompts = [GOOD, BAD, GOOD, BAD, GOOD[:3]]
        futures = llm.engine.submit([Request(Prompt(None, np.array(ids)), task) for ids in prompts])
        for ids, future in zip(prompts, futures, strict=True):
            if BROKEN in ids:
                with pytest.raises(NonFiniteResult, match="NaN or infinity"):
                    future.result(60)
            else:
                assert np.isfinite(future.result(60).array).all()
        assert np.abs(futures[0].result().array - clean).max() < 1e-6
        with pytest.raises(NonFiniteResult):
            llm.encode(prompts, pooling_task=task)


@pytest.mark.parametrize("call", ["score", "embed_chunks", "embed in pieces", "token_classify"])
def test_composed_answers_fail_too(call: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", "ForTokenClassification" if call == "token_classify" else "Model")
    break_token(tmp_path, float("nan"))
    with LLM(str(tmp_path), overflow="chunk") as llm:
        (bad,) = llm.engine.token_strings([BROKEN])
        calls: dict[str, Any] = {
            "score": lambda text: llm.score("moon", text),
            "embed_chunks": lambda text: llm.embed_chunks(text, chunk_size=2),
            "embed in pieces": lambda text: llm.embed(text * 100),
            "token_classify": lambda text: llm.token_classify(text),
        }
        calls[call]("the moon ")
        with pytest.raises(NonFiniteResult):
            calls[call](f"the {bad} ")
