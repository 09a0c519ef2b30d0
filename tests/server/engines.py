"""Engines without a model, of every kind that routes ask for."""

from __future__ import annotations

from poolhouse.tasks import SparseHead
from poolhouse.testing import FakeEngine

LABELS = {0: "calm", 1: "angry", 2: "glad"}


def every_kind() -> list[FakeEngine]:
    """An embedder with token weights beside its vectors, a classifier, labels of tokens, a reranker, SPLADE, a reader of
    pictures, a judge of entailment, and one that reads labels with each text.
    """
    embedder = FakeEngine(
        "embedder",
        tasks=("embed", "token_embed", "token_classify"),
        prompts={"query": "query: "},
        sparse=SparseHead("token_classify", "token", 2**32),
    )
    return [
        embedder,
        FakeEngine("classifier", tasks=("classify",), label_names=LABELS),
        FakeEngine("tagger", tasks=("token_classify",), label_names=LABELS, width=3),
        FakeEngine("reranker", tasks=("classify",), label_names={0: "fits"}),
        FakeEngine("splade", sparse=SparseHead("embed", "vocabulary", 8)),
        FakeEngine("pages", pictures=True),
        FakeEngine("judge", tasks=("classify",), label_names={0: "contradiction", 1: "neutral", 2: "entailment"}),
        FakeEngine("finder", tasks=("extract",)),
    ]
