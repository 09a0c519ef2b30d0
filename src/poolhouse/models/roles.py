"""Roles: whether a checkpoint embeds, classifies texts or tokens, or gives weights to its vocabulary, by which head.

Source of the rules by name: vLLM's runner and conversion tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families import Family
from poolhouse.params import PoolerConfig

# A masked language model embeds, and classifies tokens by its vocabulary where the checkpoint has the head for it.
Role = Literal["embed", "classify", "token_classify", "masked_lm", "splade"]
Convert = Literal["auto", "none", "embed", "classify"]
# Endings of architecture names, the first that fits decides; every other name is an embedder.
_ENDINGS: tuple[tuple[str, Role], ...] = (
    ("ForTokenClassification", "token_classify"),
    ("ForSequenceClassification", "classify"),
    *((f"For{medium}Classification", "classify") for medium in ("Audio", "Image", "Video")),
    ("ClassificationModel", "classify"),
    ("ForMaskedLM", "masked_lm"),
    ("SpladeSparseEmbeddingModel", "splade"),
)
_GENERATORS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")


def _two_layers(_: Config) -> Head:
    """Qwen's reward of every token; logits by default."""
    return Head((HeadModule("score.0", "relu"), HeadModule("score.2")), pooling=None, use_activation=False)


def _of_steps(_: Config) -> Head:
    """Qwen's process reward: the probabilities of a bad and a good step, where the tag <extra_0> ends one."""
    return Head((HeadModule("score.0", "relu"), HeadModule("score.2")), pooling=None, step_tag_id=151651)


def _value(_: Config) -> Head:
    """InternLM2's reward of every token; one label is a probability by default, as in vLLM."""
    return Head((HeadModule("v_head"),), pooling=None)


# Classes that score pairs of pictures and texts, of no kind that is known; without their heads they would pass for embedders.
_NOT_READ = "VLForSequenceClassification"
# Architectures whose head is not their family's: rewards of every token.
ARCHITECTURE_HEADS: Mapping[str, Callable[[Config], Head]] = {
    "Qwen2ForRewardModel": _two_layers,
    "Qwen2ForProcessRewardModel": _of_steps,
    "InternLM2ForRewardModel": _value,
}
# Embedders, served by transformers, that pool otherwise than others of their kind where no file says.
DEFAULT_POOLINGS: Mapping[str, str] = {"EmbeddingGemma2Model": "MEAN"}
# Classifiers, served by transformers, whose answers are logits by default.
RAW_LOGITS = frozenset({"JambaForSequenceClassification"})


def role_of(config: Config, convert: Convert, described: bool, pooler: PoolerConfig) -> Role:
    """What a checkpoint is run as.

    convert: by the user, which wins. described: whether sentence-transformers' files state a pooling, which
    makes an embedder of any architecture. pooler: STEP pooling makes a process reward model of a generator.

    Raises:
        ConfigError: a generator, and convert='none'. CheckpointError: a head that is not known here.
    """
    name = architecture(config)
    if convert != "embed" and _NOT_READ in name:
        raise CheckpointError(
            f"{name} is not served: its score reads texts and pictures together, and its head is not known here. "
            "Use convert='embed' to run its text side as an embedder."
        )
    if judges_steps(config, pooler):
        return "token_classify"
    if convert == "embed" or (convert == "auto" and described):
        return "embed"
    if convert == "none" and name.endswith(_GENERATORS) and not described:
        raise ConfigError(
            f"{name} does not support `--runner pooling` as it is; pass `--convert <embed|classify>` to adapt it."
        )
    if name in ARCHITECTURE_HEADS:
        return "token_classify"
    role = next((role for ending, role in _ENDINGS if name.endswith(ending)), None)
    if role in (None, "masked_lm"):
        return "classify" if convert == "classify" else role or "embed"
    return role


def judges_steps(config: Config, pooler: PoolerConfig) -> bool:
    """Whether a generator is to judge steps by the tokens that it would write next (Math-Shepherd)."""
    return pooler.tok_pooling_type == "STEP" and architecture(config).endswith(_GENERATORS)


def head_of(family: Family, config: Config, role: Role) -> Head | None:
    """The head that a checkpoint of this role has; None where it has none."""
    if role == "embed":
        return None
    own = ARCHITECTURE_HEADS.get(architecture(config))
    if own is not None:
        return own(config)
    if role in ("masked_lm", "splade"):
        return family.vocabulary_head(config) if family.vocabulary_head is not None else None
    if role == "token_classify":
        return family.token_head(config)
    head, stated = family.sequence_head(config), family.stated_pooling(config)
    return head if stated is None else replace(head, pooling=stated, fixed=True)
