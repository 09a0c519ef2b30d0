"""Attention: the function that transformers' models call when they run on a pack.

It holds no state: the segments reach it as an extra keyword of `model(...)`, so several engines share it in peace.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from poolhouse.layers.attention import attend
from poolhouse.packing.pack import Segments

# Names in transformers' attention interface: for running, and for the probe at load, which also watches the masks.
RUN = "poolhouse"
PROBE = "poolhouse_probe"

# Tensors that attention functions are handed but that say nothing about the scores.
_HARMLESS = frozenset({"position_ids", "cache_position", "token_type_ids", "input_ids"})


class PackingError(Exception):
    """Why a model must run unpacked; seen by the probe only."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over one pack, under the calling convention of transformers.

    query: [1, heads, total, head_dim]; key, value: [1, kv_heads, total, head_dim].
    sliding_window: tokens seen on each side, the token itself counted too.
    Returns [1, total, heads, head_dim].

    Raises:
        PackingError: the model asks for what a pack cannot give; the probe then runs it unpacked.
    """
    if segments is None:
        raise PackingError("the model does not hand extra keywords on to its attention")
    if attention_mask is not None:
        raise PackingError("the model makes an attention mask of its own")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == segments.total:
        raise PackingError("attention does not run over the tokens of the pack")
    for name, argument in others.items():
        # Sinks and position biases change the scores; a bias is as large as the pack squared.
        if isinstance(argument, Tensor) and name not in _HARMLESS:
            raise PackingError(f"attention takes '{name}', which packs do not support")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    mixed = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=None if sliding_window is None else sliding_window - 1,
        softcap=softcap,
    )
    return mixed[None], None


def watched_mask(*, local_size: int | None = None, kv_length: int = 0, **_: Any) -> None:
    """No mask, while the probe runs; refuses locality that the probe's short sequences would not show.

    Sliding windows are made small for the probe, so a large size is something else (chunks of attention).
    """
    if local_size is not None and 2 * local_size > kv_length:
        raise PackingError(f"attention is limited to {local_size} tokens in a way that is no sliding window")
