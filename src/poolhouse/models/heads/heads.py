"""Heads: what a classifier computes between hidden states and logits, read from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.layers.feed_forward import ACTIVATIONS
from poolhouse.models.files.checkpoint import Config
from poolhouse.params import PoolerConfig
from poolhouse.pooling.steps import Activation, Dense, Norm, Step


@dataclass(frozen=True, slots=True)
class HeadModule:
    """One module of a head.

    name: the checkpoint's, without the prefix of its backbone. activation: its name in config.json, applied after it.
    eps: of a norm. also: other names for it. bias: the full name of a bias that stands apart.
    tied: its weight is the table of tokens where the checkpoint has none for it.
    """

    name: str
    activation: str = "linear"
    kind: Literal["dense", "norm"] = "dense"
    eps: float = 1e-5
    also: tuple[str, ...] = ()
    bias: str = ""
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """The modules of a head, the last of which gives the logits, and what they are applied to.

    pooling: a name of REDUCTIONS, or None for the row of every token (token classification, rewards).
    fixed: whether the pooling is the checkpoint's own, which the user's does not replace.
    late: logits are computed for every token and pooled then.
    use_activation: whether answers are probabilities by default.
    step_tag_id: the token whose rows alone are answered (process rewards), or None for all.
    tokens: whether single tokens can be classified, which a head that is part of the backbone may not allow.
    mean: what is taken from a logit, unless the user's `logit_mean` says otherwise.
    """

    modules: tuple[HeadModule, ...]
    pooling: str | None = "CLS"
    fixed: bool = False
    late: bool = False
    use_activation: bool = True
    step_tag_id: int | None = None
    tokens: bool = True
    mean: float | None = None


# What a language model goes on with.
VOCABULARY = Head((HeadModule("lm_head"),))


@dataclass(frozen=True, slots=True, eq=False)
class LoadedHead:
    """A head with its weights.

    labels: width of the logits. used: names of the tensors it took.
    columns: the token that each logit stands for, where the head consists of rows of a vocabulary.
    """

    head: Head
    steps: tuple[Step, ...]
    labels: int
    used: frozenset[str] = frozenset()
    columns: tuple[int, ...] | None = None


def read_head(
    head: Head, tensors: Mapping[str, Tensor], prefix: str, architecture: str, table: Tensor | None = None
) -> LoadedHead:
    """The head's steps, in float32.

    prefix: of the backbone's names; a head's module may stand with or without it.
    table: the backbone's table of tokens, [vocabulary, features], for a module that is tied to it.

    Raises:
        CheckpointError: a tensor that is missing, naming it.
    """
    steps: list[Step] = []
    used: set[str] = set()
    for module in head.modules:
        weight, bias, names = _read(module, tensors, prefix, architecture, table)
        used |= names
        if module.kind == "norm":
            steps.append(Norm(weight, bias, module.eps))
        else:
            steps.append(Dense(weight, bias, activation_of(module.activation)))
    return LoadedHead(head, tuple(steps), _labels(steps), frozenset(used))


def vocabulary_matrix(tensors: Mapping[str, Tensor], config: Config, token_table: str) -> str:
    """The name of the matrix from hidden states to the vocabulary; the token table where the two are tied.

    Raises:
        CheckpointError: there is none.
    """
    name = next((name for name in ("lm_head.weight", "output.weight") if name in tensors), None)
    if name is not None:
        return name
    tied = config.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma"))
    if not tied or token_table not in tensors:
        raise CheckpointError("The checkpoint lacks lm_head.weight, which its score is made of; it is never made up.")
    return token_table


def step_head(tensors: Mapping[str, Tensor], config: Config, token_table: str, pooler: PoolerConfig) -> LoadedHead:
    """The head of a generator that judges steps: the rows of its vocabulary that the user names.

    Raises:
        ConfigError: tokens that are not named, or not in the vocabulary.
    """
    name, tokens = vocabulary_matrix(tensors, config, token_table), pooler.returned_token_ids
    if not tokens or pooler.step_tag_id is None:
        raise ConfigError("pooler_config: STEP pooling of a language model needs step_tag_id and returned_token_ids.")
    matrix = tensors[name]
    if not all(0 <= token < len(matrix) for token in tokens):
        raise ConfigError(f"pooler_config: returned_token_ids {list(tokens)} are not all in 0..{len(matrix) - 1}.")
    head = Head((), pooling=None, step_tag_id=pooler.step_tag_id)
    return LoadedHead(head, (Dense(matrix[list(tokens)].float()),), len(tokens), frozenset({name}), tokens)


def activation_of(name: str) -> Activation | None:
    """The activation that a config calls so; None for none."""
    return None if name in ("linear", "identity") else Activation(name, ACTIVATIONS[name])


def check_head(loaded: LoadedHead, hidden_size: int, architecture: str) -> None:
    """Raise CheckpointError for modules that do not fit together or the backbone."""
    width = hidden_size
    for step in loaded.steps:
        weight = step.weight if isinstance(step, Dense | Norm) else torch.empty(width, width)
        if weight.shape[-1] != width:
            raise CheckpointError(
                f"{architecture}: a {step.description.split()[0]} of the head takes {weight.shape[-1]} features, "
                f"but {width} come in."
            )
        width = weight.shape[0]


def _read(
    module: HeadModule, tensors: Mapping[str, Tensor], prefix: str, architecture: str, table: Tensor | None
) -> tuple[Tensor, Tensor | None, set[str]]:
    """Weight and bias in float32, and the names that they stood under."""
    tied = table if module.tied else None
    names = (module.name, *module.also)
    weights = present([f"{name}.weight" for name in names], tensors, prefix)
    # Where a bias stands twice, the two are one.
    biases = present([*(f"{name}.bias" for name in names), module.bias], tensors, prefix)
    if not weights and tied is None:
        raise CheckpointError(
            f"The checkpoint lacks {module.name}.weight, which {architecture} needs; a head is never made up. "
            "Use convert='embed' to run the backbone without it."
        )
    weight = tensors[weights[0]] if weights else tied
    assert weight is not None
    return weight.float(), tensors[biases[0]].float() if biases else None, {*weights[:1], *biases}


def present(names: Sequence[str], tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Those of these names that the checkpoint has, with or without a prefix."""
    return [found for name in names for found in (name, prefix + name, f"model.{name}") if found in tensors]


def _labels(steps: Sequence[Step]) -> int:
    last = steps[-1]
    assert isinstance(last, Dense)
    return last.weight.shape[0]
