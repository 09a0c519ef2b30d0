"""Families: the kinds of checkpoints that are served natively, one file each, listed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.own_classes import own_class_of
from poolhouse.models.native.families.albert import ALBERT
from poolhouse.models.native.families.bert import BERT, ROBERTA
from poolhouse.models.native.families.deberta import DEBERTA
from poolhouse.models.native.families.distilbert import DISTILBERT
from poolhouse.models.native.families.electra import ELECTRA
from poolhouse.models.native.families.eurobert import EUROBERT
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.families.gemma import GEMMA, GEMMA2
from poolhouse.models.native.families.gemma3 import GEMMA3
from poolhouse.models.native.families.gte import GTE
from poolhouse.models.native.families.internlm import INTERNLM2
from poolhouse.models.native.families.jina import JINA
from poolhouse.models.native.families.jina_v2 import JINA_V2
from poolhouse.models.native.families.jina_v5 import JINA_V5
from poolhouse.models.native.families.llama import LLAMA, LLAMA_BIDIRECTIONAL
from poolhouse.models.native.families.mistral import MISTRAL
from poolhouse.models.native.families.modernbert import MODERNBERT
from poolhouse.models.native.families.mpnet import MPNET
from poolhouse.models.native.families.nomic import NOMIC
from poolhouse.models.native.families.nv_embed import NV_EMBED
from poolhouse.models.native.families.qwen import PPLX, QWEN2, QWEN3, QWEN3_VOYAGE
from poolhouse.models.native.spec import TransformerSpec

FAMILIES: tuple[Family, ...] = (
    *(BERT, ROBERTA, DISTILBERT, MPNET, ALBERT, ELECTRA, DEBERTA),
    *(MODERNBERT, NOMIC, GTE, JINA_V2, JINA, JINA_V5, EUROBERT),
    *(LLAMA, LLAMA_BIDIRECTIONAL, MISTRAL, QWEN2, QWEN3, QWEN3_VOYAGE, PPLX, GEMMA, GEMMA2, GEMMA3, INTERNLM2),
    NV_EMBED,
)


def family_of(config: Config) -> Family | None:
    """The family that serves a config.json, or None."""
    model_type = _model_type(config)
    return next((family for family in FAMILIES if model_type in family.model_types), None)


class Described(Protocol):
    """A family, or one of towers."""

    @property
    def spec(self) -> Callable[[Config], TransformerSpec]: ...


def spec_of(family: Described, config: Config, folder: Folder) -> TransformerSpec:
    """What a config means to its family. folder: where it lies, for messages.

    Raises:
        NotNative: it means something that the family does not compute. CheckpointError: it cannot be understood.
    """
    try:
        return family.spec(config)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"The config of {folder} cannot be understood: {error!r}") from error


def _model_type(config: Config) -> str | None:
    """The `model_type`, made exact where several architectures share it."""
    name, positions = config.get("model_type"), config.get("position_embedding_type")
    if name == "xlm-roberta" and positions == "rotary":
        return "xlm-roberta-rotary"
    if name == "bert" and positions == "alibi":
        return "bert-alibi"
    if name == "nomic_bert" and "NomicVisionModel" in (config.get("architectures") or ()):
        return "nomic_vision"
    return "qwen3-voyage" if name == "qwen3" and _projects(config) else name


def _projects(config: Config) -> bool:
    """Whether `num_labels` is the width of Voyage's projection.

    Files that transformers writes name their labels and never count them; nobody counts as many as there are features.
    """
    width = config.get("num_labels")
    return isinstance(width, int) and (own_class_of(config) is not None or width >= config.get("hidden_size", 4096))


__all__ = ["FAMILIES", "Family", "family_of", "spec_of"]
