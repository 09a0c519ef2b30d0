"""LlamaIndex: an index over a server's vectors, whose finds a server reranks.

pip install llama-index-embeddings-text-embeddings-inference llama-index-postprocessor-tei-rerank
python examples/llamaindex_search.py
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from served import served

from poolhouse.data import passages, queries


def main() -> None:
    """Each question: what the index finds, in the order of the reranker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="an embedder; the embedded one without it")
    parser.add_argument("--reranker", help="such as BAAI/bge-reranker-v2-m3; cosines of --model without it")
    given = parser.parse_args()
    with ExitStack() as running:
        embedder = running.enter_context(served(given.model))
        reranker = running.enter_context(served(given.reranker)) if given.reranker else embedder
        # Without these, LlamaIndex writes instructions of its own before the texts of some models.
        nothing = {"text_instruction": "", "query_instruction": ""}
        embeddings = TextEmbeddingsInference(model_name="the-model", base_url=embedder, **nothing)
        nodes = [TextNode(text=text, id_=str(place)) for place, text in enumerate(passages())]
        retriever = VectorStoreIndex(nodes, embed_model=embeddings).as_retriever(similarity_top_k=5)
        rerank = TextEmbeddingInference(base_url=reranker, top_n=2)
        for question in queries():
            print(f"\n{question}")
            for node in rerank.postprocess_nodes(retriever.retrieve(question), query_str=question):
                print(f"  {node.score:.3f} [{node.node_id}] {node.text[:70]}")


if __name__ == "__main__":
    main()
