"""MTEB: a retrieval task of your own texts, measured by `mteb` with a model that Poolhouse runs.

pip install mteb
python examples/mteb_task.py --model intfloat/e5-small-v2
"""

from __future__ import annotations

import argparse
from typing import Any

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder

from poolhouse import LLM
from poolhouse.data import passages, queries_with_answers


class Passages(AbsTaskRetrieval):
    """Questions, and the passage of Poolhouse's package that answers each; nothing is fetched."""

    metadata = TaskMetadata(
        name="Passages",
        description="Find the passage that answers a question.",
        type="Retrieval",
        dataset={"path": "local", "revision": "1"},
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **_: Any) -> None:
        """The corpus, the queries, and which document answers which, as MTEB has them."""
        pairs = list(enumerate(queries_with_answers()))
        split = {
            "corpus": Dataset.from_list(
                [{"id": f"d{number}", "title": "", "text": text} for number, text in enumerate(passages())]
            ),
            "queries": Dataset.from_list([{"id": f"q{number}", "text": text} for number, (text, _) in pairs]),
            "relevant_docs": {f"q{number}": {f"d{answer}": 1} for number, (_, answer) in pairs},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Poolhouse(AbsEncoder):
    """A model for all embedding tasks of MTEB; the checkpoint's prompts for queries and documents are used."""

    def __init__(self, llm: LLM) -> None:
        self.model = llm

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """[texts, dimensions]. inputs: batches of texts. prompt_type: "query", "document" or None."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = None if prompt_type is None else "query" if prompt_type.value == "query" else "document"
        return self.model.embed_array(texts, input_type=side)


def main() -> None:
    """Run the task, and print its main score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="an embedder; the embedded one without it")
    given = parser.parse_args()
    with LLM(given.model, overflow="truncate") as llm:
        (result,) = mteb.evaluate(Poolhouse(llm), Passages(), cache=None, show_progress_bar=False).task_results
        scores = result.scores["test"][0]
        print(f"{llm.engine.facts.name}: nDCG@10 {scores['ndcg_at_10']:.4f}, recall@1 {scores['recall_at_1']:.4f}")


if __name__ == "__main__":
    main()
