"""Family: how to read one kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from poolhouse.models.checkpoint import Config
from poolhouse.models.spec import TransformerSpec
from poolhouse.models.weights import Layout


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: what its config means and how its tensors are called.

    model_types: the `model_type` words of config.json that it serves.
    spec: behaviour from a config.json. Defaults are those of transformers' config class, for files that omit a key.
    layouts: how its checkpoints name tensors; the one whose token table is present wins.
    pooling: the default where neither the user nor sentence-transformers files say (CLS, MEAN or LAST).
    aside: regular expressions of tensors that belong to heads or are not used by the backbone.
    max_tokens: longest prompt by the config, or None where the config does not say.
    float16: whether its activations stay within float16's range.
    default_adapter: the task adapter of its checkpoints for requests that name none.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Config], TransformerSpec]
    layouts: tuple[Layout, ...]
    pooling: Literal["CLS", "MEAN", "LAST"] = "CLS"
    aside: tuple[str, ...] = ()
    max_tokens: Callable[[Config], int | None] = lambda config: config.get("max_position_embeddings")
    float16: bool = True
    default_adapter: str | None = None
