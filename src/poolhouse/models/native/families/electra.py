"""ELECTRA: BERT whose embeddings may be narrower than its layers."""

from __future__ import annotations

from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families.bert import EMBEDDINGS, HEADS, LAYERS, bert, to_vocabulary
from poolhouse.models.native.families.family import Family, token_classifier_head
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout


def _electra(config: Config) -> TransformerSpec:
    return bert({"hidden_size": 256, "num_attention_heads": 4, **config})


def _vocabulary_head(config: Config) -> Head:
    prefix = "generator_predictions"
    return to_vocabulary(config, f"{prefix}.dense", "gelu", (f"{prefix}.LayerNorm",), "generator_lm_head")


ELECTRA = Family(
    ("electra",),
    _electra,
    # Projected only where embedding_size differs from hidden_size.
    (Layout(EMBEDDINGS | {"project": "embeddings_project"} | LAYERS, optional=frozenset({"project"})),),
    aside=(
        *HEADS,
        r"(discriminator_predictions|generator_predictions)\.(dense|dense_prediction|LayerNorm)\.(weight|bias)",
        r"generator_lm_head\.(weight|bias)",
    ),
    max_tokens=lambda config: config.get("max_position_embeddings", 512),
    sequence_head=lambda _: Head((HeadModule("classifier.dense", "gelu"), HeadModule("classifier.out_proj"))),
    token_head=token_classifier_head,
    vocabulary_head=_vocabulary_head,
)
