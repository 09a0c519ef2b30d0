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
    nested = config.get("sentence_transformers") or {}
    path = from_files or nested.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if not path:
        return probabilities(labels)
    if str(path).rsplit(".", 1)[-1] in ("Sigmoid", "Softmax") and str(path).startswith("torch.nn."):
        return probabilities(labels)
    return named_activation(str(path), "activation_fn") or RAW
