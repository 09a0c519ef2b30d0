"""LangChain: a vector store over a server's vectors, whose finds a server reranks.

pip install langchain-openai langchain-cohere
python examples/langchain_search.py
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from served import served

from poolhouse.data import passages, queries


def main() -> None:
    """Each question: what the store finds, in the order of the reranker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="an embedder; the embedded one without it")
    parser.add_argument("--reranker", help="such as BAAI/bge-reranker-v2-m3; cosines of --model without it")
    given = parser.parse_args()
    with ExitStack() as running:
        embedder = running.enter_context(served(given.model))
        reranker = running.enter_context(served(given.reranker)) if given.reranker else embedder
        embeddings = OpenAIEmbeddings(
            model="the-model", base_url=f"{embedder}/v1", api_key="none", check_embedding_ctx_length=False
        )
        store = InMemoryVectorStore(embeddings)
        store.add_documents([Document(text, metadata={"place": place}) for place, text in enumerate(passages())])
        rerank = CohereRerank(model="the-model", base_url=f"{reranker}/cohere", cohere_api_key="none", top_n=2)
        for question in queries():
            found = store.similarity_search(question, k=5)
            print(f"\n{question}")
            for document in rerank.compress_documents(found, question):
                score, place = document.metadata["relevance_score"], document.metadata["place"]
                print(f"  {score:.3f} [{place}] {document.page_content[:70]}")


if __name__ == "__main__":
    main()
