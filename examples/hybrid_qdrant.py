"""Hybrid search in Qdrant: dense, sparse and multi-vectors of each text from one pass of BGE-M3.

pip install qdrant-client
python examples/hybrid_qdrant.py --model BAAI/bge-m3
"""

from __future__ import annotations

import argparse

from qdrant_client import QdrantClient, models

from poolhouse import LLM
from poolhouse.data import passages, queries

TASKS = ["embed", "sparse", "token_embed"]


def main() -> None:
    """Write the passages into a collection in memory, and ask it each question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="BAAI/bge-m3", help="a model that gives all three")
    given = parser.parse_args()
    texts = passages()
    with LLM(given.model, overflow="truncate") as llm:
        client = QdrantClient(":memory:")
        answers = [output.outputs for output in llm.encode(texts, tasks=TASKS, input_type="document")]
        create(client, len(answers[0]["embed"].array), answers[0]["token_embed"].array.shape[1])
        client.upsert(
            "texts",
            [
                models.PointStruct(id=number, payload={"text": text}, vector=vectors(answer))
                for number, (text, answer) in enumerate(zip(texts, answers, strict=True))
            ],
        )
        print(f"{client.count('texts').count} texts in the collection.")
        for question in queries():
            (output,) = llm.encode(question, tasks=TASKS, input_type="query")
            print(f"\n{question}")
            for point in search(client, vectors(output.outputs)):
                print(f"  {point.score:.3f} [{point.id}] {point.payload['text'][:70]}")


def create(client: QdrantClient, dimensions: int, width: int) -> None:
    """A collection with a place for each kind of vector. width: of a token's."""
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    cosine, no_index = models.Distance.COSINE, models.HnswConfigDiff(m=0)
    client.create_collection(
        "texts",
        vectors_config={
            "dense": models.VectorParams(size=dimensions, distance=cosine),
            "tokens": models.VectorParams(size=width, distance=cosine, multivector_config=many, hnsw_config=no_index),
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )


def vectors(answer: dict) -> dict:
    """The answers to a text as Qdrant names them."""
    sparse = answer["sparse"]
    return {
        "dense": answer["embed"].array,
        "sparse": models.SparseVector(indices=sparse.indices, values=sparse.values),
        "tokens": answer["token_embed"].array.tolist(),
    }


def search(client: QdrantClient, asked: dict) -> list[models.ScoredPoint]:
    """Twenty texts by dense and by sparse vectors, joined by their ranks, of which MaxSim orders the best."""
    found = [models.Prefetch(query=asked[name], using=name, limit=20) for name in ("dense", "sparse")]
    joined = models.Prefetch(prefetch=found, query=models.FusionQuery(fusion=models.Fusion.RRF), limit=20)
    return client.query_points("texts", prefetch=joined, query=asked["tokens"], using="tokens", limit=2).points


if __name__ == "__main__":
    main()
