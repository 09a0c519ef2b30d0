"""MPNet: BERT with a bucketed bias on relative positions besides the table of positions."""

from __future__ import annotations

from poolhouse.models.native.families.bert import (
    EMBEDDINGS,
    HEADS,
    LAYERS,
    from_pad_id,
    roberta,
    roberta_head,
    roberta_vocabulary_head,
)
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.weights import Layout, Source

_NAMES: dict[str, Source] = {
    **{slot: theirs for slot, theirs in EMBEDDINGS.items() if slot != "types"},
    **LAYERS,
    "relative": "encoder.relative_attention_bias",
    "layers.*.attn.qkv": tuple(f"encoder.layer.*.attention.attn.{name}" for name in "qkv"),
    "layers.*.attn.out": "encoder.layer.*.attention.attn.o",
    "layers.*.attn_post": "encoder.layer.*.attention.LayerNorm",
}

MPNET = Family(
    ("mpnet",),
    roberta,
    (Layout(_NAMES),),
    aside=HEADS,
    max_tokens=from_pad_id,
    sequence_head=roberta_head,
    token_head=token_classifier_head,
    vocabulary_head=roberta_vocabulary_head,
)
