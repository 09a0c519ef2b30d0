"""The examples whose clients are in the environment of `make test-stores`, run as users run them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from poolhouse import LLM
from poolhouse.data import passages, queries, queries_with_answers
from poolhouse.plans.sparse import dot
from tests.checkpoints import save_checkpoint
from tests.test_examples import by_question, run


def test_qdrant_orders_what_it_finds_by_max_sim(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m3", "xlm-roberta, unigram", tokens=180)
    torch.save({"weight": torch.randn(1, 32), "bias": torch.ones(1)}, tmp_path / "m3" / "sparse_linear.pt")
    torch.save({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, tmp_path / "m3" / "colbert_linear.pt")
    said = run("hybrid_qdrant.py", "--model", tmp_path / "m3")
    assert said.startswith(f"{len(passages())} texts in the collection.\n")
    with LLM(tmp_path / "m3", overflow="truncate") as llm:
        tokens = llm.embed_tokens(passages(), input_type="document")
        dense = llm.embed_array(passages())
        sparse = [output.outputs for output in llm.embed_sparse(passages())]
        for found, question in zip(by_question(said), queries(), strict=True):
            scores = tokens.max_sim(llm.embed_tokens(question, input_type="query")[0])
            for score, number in found:
                assert abs(score - scores[number]) < 1e-3
            (first, _), (second, _) = found
            assert first >= second
            # What is first by one kind of vectors is always among those that MaxSim orders.
            (asked,) = llm.embed_sparse(question)
            by_sparse = [dot(asked.outputs, one) for one in sparse]
            for leader in (np.argmax(dense @ llm.embed_array(question)[0]), np.argmax(by_sparse)):
                assert first >= scores[leader] - 1e-3


def test_mteb_measures_what_is_counted_by_hand() -> None:
    said = run("mteb_task.py")
    with LLM() as llm:
        scores = llm.embed_array(queries()) @ llm.embed_array(passages()).T
    answers = [answer for _, answer in queries_with_answers()]
    ranks = [int((row > row[answer]).sum()) for row, answer in zip(scores, answers, strict=True)]
    gain = float(np.mean([1 / np.log2(rank + 2) if rank < 10 else 0 for rank in ranks]))
    found = re.search(r"nDCG@10 (\d\.\d+), recall@1 (\d\.\d+)", said)
    assert found, said
    assert abs(float(found[1]) - gain) < 1e-3
    assert abs(float(found[2]) - np.mean([rank == 0 for rank in ranks])) < 1e-3
