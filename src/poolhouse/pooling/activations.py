"""Activations that checkpoints name, and the rule by which logits become probabilities.

Source of the rule: vLLM's contract for classifiers and cross-encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.pooling.steps import Activation

_MODULES = (
    *(nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus),
    *(nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.ReLU6, nn.SELU, nn.CELU, nn.Softsign, nn.Tanhshrink),
)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


RAW = Activation("raw", lambda logits: logits)
SIGMOID = Activation("sigmoid", torch.sigmoid)
SOFTMAX = Activation("softmax", _softmax)


def named_activation(path: str, place: str) -> Activation | None:
    """The activation of a dotted path such as "torch.nn.modules.activation.Tanh"; None for the identity.

    place: where the path stands, for messages.

    Raises:
        CheckpointError: code that is not torch's own, or a module without its default arguments.
    """
    if not path.startswith("torch.nn."):
        raise CheckpointError(f"{place} {path!r}: activations are restricted to torch.nn.modules for security reasons.")
    for kind in _MODULES:
        if path.rsplit(".", 1)[-1] == kind.__name__:
            return None if kind is nn.Identity else Activation(kind.__name__.lower(), kind())
    raise CheckpointError(f"{place} {path!r} is not one of {[kind.__name__ for kind in _MODULES]}.")


def probabilities(labels: int) -> Activation:
    """What probabilities are by default: of one label alone, or of several that compete."""
    return SIGMOID if labels < 2 else SOFTMAX


def classifier_activation(config: Mapping[str, Any], labels: int, from_files: str | None) -> Activation:
    """The activation of a classifier with so many labels.

    config: config.json, which may hold `problem_type` or sentence-transformers' older words.
    from_files: `activation_fn` of config_sentence_transformers.json.

    Raises:
        CheckpointError: an activation outside torch.nn.
    """
    problem = config.get("problem_type")
    if problem == "regression":
        return RAW
    if problem == "single_label_classification":
        return probabilities(labels)
    if problem == "multi_label_classification":
        return SIGMOID
    stated = stated_activation(config, from_files)
    return probabilities(labels) if stated is None or stated in (SIGMOID, SOFTMAX) else stated


def stated_activation(config: Mapping[str, Any], from_files: str | None) -> Activation | None:
    """The activation that the files name, whatever vLLM makes of it; None where they name none.

    Raises:
        CheckpointError: an activation outside torch.nn.
    """
    nested = config.get("sentence_transformers") or {}
    path = str(from_files or nested.get("activation_fn") or config.get("sbert_ce_default_activation_function") or "")
    if not path:
        return None
    if path.startswith("torch.nn."):
        known = {"Sigmoid": SIGMOID, "Softmax": SOFTMAX}.get(path.rsplit(".", 1)[-1])
        if known is not None:
            return known
    return named_activation(path, "activation_fn") or RAW
