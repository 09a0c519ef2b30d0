"""Heads of transformers' own models: taken off where they are one linear layer, else run as part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poolhouse.models.fallback.backbones import Forward, hidden_states
from poolhouse.models.fallback.probe import ALONE_TOLERANCE, relative_error
from poolhouse.models.heads.heads import Head, LoadedHead
from poolhouse.models.roles import Role
from poolhouse.packing.segments import Segments
from poolhouse.pooling.reductions import REDUCTIONS
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.steps import Dense

# transformers' doors to models with a head.
AUTO_CLASSES: dict[Role, str] = {
    "classify": "AutoModelForSequenceClassification",
    "token_classify": "AutoModelForTokenClassification",
    "splade": "AutoModelForMaskedLM",
}
# Tokens of the text that tells how a head pools.
_LENGTH = 9


def take_head(
    forward: Forward, role: Role, ids: Sequence[int], device: torch.device
) -> tuple[Forward, LoadedHead] | None:
    """The model without its head, and the head, if that is one linear layer over hidden states; else None.

    What the head does with hidden states is not read but tried: forward answers with the whole model's logits.
    """
    whole = forward.model
    base = whole.base_model
    linear = _lone_linear(whole, base)
    if linear is None:
        return None
    text = torch.tensor([[ids[place * 7 % len(ids)] for place in range(_LENGTH)]], device=device)
    without = Forward(base, forward.dtype, hidden_states)
    try:
        hidden = without(text)[0].float()
    except Exception:  # noqa: BLE001 - a base that cannot be asked for hidden states stays in its model
        return None
    weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
    expected = forward(text)[0].float()
    pooling = _pooling(hidden, weight, bias, expected, role, ALONE_TOLERANCE[forward.dtype])
    if pooling is None:
        return None
    head = Head((), pooling=pooling or None)
    return without, LoadedHead(head, (Dense(weight, bias),), len(weight))


def kept_head(forward: Forward, role: Role, labels: int) -> LoadedHead:
    """The head of a model that answers with logits already: nothing is left to compute."""
    config = forward.model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        # transformers takes several texts at a time only where padding is defined; none of ours is padded.
        config.pad_token_id = -1
    whole = role == "classify"
    return LoadedHead(Head((), pooling="CLS" if whole else None, fixed=whole, tokens=not whole), (), labels)


def logits(answer: Any, ids: Tensor) -> Tensor:
    """[rows, length, labels]; what is said of a whole text is said at each of its tokens."""
    found: Tensor = answer.logits
    return found[:, None].expand(-1, ids.shape[1], -1) if found.ndim == 2 else found


def _lone_linear(whole: nn.Module, base: nn.Module) -> nn.Linear | None:
    """The only module with weights outside the base, if it is linear."""
    inside = set(base.modules())
    others = [
        module
        for module in whole.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    return others[0] if len(others) == 1 and isinstance(others[0], nn.Linear) else None


def _pooling(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor, role: Role, tolerance: float
) -> str | None:
    """The pooling that leads to the expected logits, "" for none of it; None if no pooling does."""
    if role != "classify":
        tried = {"": hidden}
    else:
        rows = Rows(hidden, Segments([len(hidden)], hidden.device), torch.empty(len(hidden), device=hidden.device))
        tried = {name: REDUCTIONS[name](rows) for name in ("LAST", "CLS", "MEAN")}
    errors = {
        name: relative_error(nn.functional.linear(rows, weight, bias).expand_as(expected), expected)
        for name, rows in tried.items()
    }
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= tolerance else None
