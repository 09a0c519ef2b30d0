"""Pruners: rerankers that also say of every token whether it stays; which checkpoints are some, and their two heads.

Sources: Chirkova et al. 2025, "Provence" (arXiv 2501.16214), and its training code in naver/bergen;
hotchpotch/open_provence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import JsonObject
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.heads.heads import Head, HeadModule, LoadedHead, check_head, read_head
from poolhouse.pooling.steps import Dense, Step
from poolhouse.tasks import PruningHead

# The encoders that OpenProvence is served over; the token head reads the first before its last norm: it was trained on
# `hidden_states[-1]` of transformers 4, which transformers 5 gives behind that norm.
_BEFORE_LAST_NORM = "modernbert"
_ENCODERS = (_BEFORE_LAST_NORM, "deberta-v2", "roberta", "xlm-roberta")


@dataclass(frozen=True, slots=True)
class Pruner:
    """What the files say of a pruner.

    config: the part about its encoder, of a native family. keep: the layer with two labels for each token.
    raw: scores are logits by default. wrapped: what may stand before the names of the reranker's tensors.
    before_norm: whether `keep` reads hidden states before the encoder's last norm.
    one_separator: whether a single separator joins query and document, where the tokenizer may put two.
    max_tokens: a limit that the files set.
    """

    name: str
    config: JsonObject
    keep: HeadModule
    head: PruningHead
    raw: bool = False
    wrapped: str = ""
    before_norm: bool = False
    one_separator: bool = False
    max_tokens: int | None = None

    def known(self, score: Head) -> tuple[str, ...]:
        """Regular expressions of the tensors that the heads read."""
        wrapped = f"({re.escape(self.wrapped)})?" if self.wrapped else ""
        names = [wrapped + re.escape(module.name) for module in score.modules] + [re.escape(self.keep.name)]
        return tuple(rf"{name}\.(weight|bias)" for name in (*names, *(["final_norm"] if self.before_norm else [])))


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPruner:
    """The heads of a pruner with their weights. norm: of what `score` reads and `keep` does not."""

    score: LoadedHead
    keep: LoadedHead
    norm: tuple[Step, ...] = ()

    @property
    def used(self) -> frozenset[str]:
        """The tensors that they took."""
        return self.score.used | self.keep.used


def read_pruner(config: Config) -> Pruner | None:
    """What config.json says of a pruner; None where it is none.

    Raises:
        CheckpointError: one that cannot be served, and why.
    """
    name, model_type = architecture(config), str(config.get("model_type", ""))
    names = {name.lower(), model_type.lower()}
    if any(one.startswith(("open_provence", "openprovence")) for one in names):
        return _open_provence(config)
    if any(one.startswith("xprovence") for one in names):
        return _provence("XProvence", config, "xlm-roberta")
    if any(one.startswith("provence") for one in names):
        return _provence("Provence", config, "deberta-v2")
    # As its training code names them.
    return _provence("Provence", config, model_type) if name.endswith("ForCompressionAndRanking") else None


def read_heads(
    pruner: Pruner, score: Head, tensors: Mapping[str, Tensor], prefix: str, norm_eps: float, hidden_size: int
) -> LoadedPruner:
    """The two heads, each from its own tensors. prefix: of the encoder's names. norm_eps: of its norms.

    Raises:
        CheckpointError: tensors that are missing or do not fit.
    """
    wrapped = pruner.wrapped if any(name.startswith(pruner.wrapped) for name in tensors) else ""
    ranks = _first_logit(read_head(score, tensors, wrapped, pruner.name))
    keeps = read_head(Head((pruner.keep,), pooling=None), tensors, "", pruner.name)
    norm: tuple[Step, ...] = ()
    if pruner.before_norm:
        last = HeadModule(f"{prefix}final_norm", kind="norm", eps=norm_eps)
        norm = read_head(Head((last, *score.modules)), tensors, wrapped, pruner.name).steps[:1]
    for head in (ranks, keeps):
        check_head(head, hidden_size, pruner.name)
    if keeps.labels != 2:
        raise CheckpointError(f"{pruner.keep.name} has {keeps.labels} labels; pruning needs two, to drop and to keep.")
    return LoadedPruner(ranks, keeps, norm)


def _first_logit(loaded: LoadedHead) -> LoadedHead:
    """The head without the logits behind the first, which alone is the score."""
    *before, last = loaded.steps
    assert isinstance(last, Dense)
    first = replace(last, weight=last.weight[:1], bias=None if last.bias is None else last.bias[:1])
    return replace(loaded, steps=(*before, first), labels=1)


def _provence(name: str, config: Config, model_type: str) -> Pruner:
    return Pruner(
        name,
        {**config, "model_type": model_type},
        HeadModule("token_classifier"),
        PruningHead("votes", plain_query=True),
        raw=True,
        one_separator=True,
    )


def _open_provence(config: Config) -> Pruner:
    """The encoder's config stands within the whole.

    Raises:
        CheckpointError: it does not, or the heads are of another kind.
    """
    encoder = config.get("base_model_config")
    model_type = encoder.get("model_type") if isinstance(encoder, Mapping) else None
    if not isinstance(encoder, Mapping) or model_type not in _ENCODERS:
        raise CheckpointError(
            f"config.json: base_model_config has the model_type {model_type!r}; OpenProvence is served over "
            f"{list(_ENCODERS)}."
        )
    heads = config.get("pruning_config") or {}
    stated: dict[str, tuple[object, object]] = {
        "mode": (config.get("mode"), "reranking_pruning"),
        "num_pruning_labels": (config.get("num_pruning_labels"), 2),
        "pruning_config.num_labels": (heads.get("num_labels"), 2),
        "pruning_config.use_weighted_pooling": (heads.get("use_weighted_pooling"), False),
    }
    for key, (value, served) in stated.items():
        if value not in (None, served):
            raise CheckpointError(f"config.json: {key} is {value!r}; pruners with {served!r} are served.")
    # The first is how its own code spells it.
    threshold = config.get("default_threadshold", config.get("default_threshold"))
    if not isinstance(threshold, int | float | None):
        raise CheckpointError(f"config.json: default_threadshold is {threshold!r}, which is no number.")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Pruner(
        "OpenProvence",
        {**encoder, "architectures": [architecture(config)], **({} if dtype is None else {"dtype": dtype})},
        HeadModule("pruning_head.classifier"),
        PruningHead("mean") if threshold is None else PruningHead("mean", float(threshold)),
        wrapped="ranking_model.",
        before_norm=model_type == _BEFORE_LAST_NORM,
        max_tokens=config.get("max_length", 512),
    )
